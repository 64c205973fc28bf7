"""What people keep text in is read as what it is, or refused by name; never as other text."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import tarfile
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from foreroute.data.columns import RowReading
from foreroute.data.corpus import contents, documents
from foreroute.data.document import TokenRow

TEXTS = [f"Text {i}. It is about {i} things." for i in range(40)]
ROWS = [{"text": text, "id": f"x{i}"} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


class Chatty:
    """A tokenizer with a template: every character is a token."""

    chat_template = "yes"

    def apply_chat_template(self, turns, **_):
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)
        return {"input_ids": [ord(character) for character in text]}


def both_splits(dataset, read=documents, *arguments):
    found = []
    for split in ("train", "held-out"):
        try:
            found += read(str(dataset), split, *arguments)
        except ValueError as error:
            if "has no text in its" not in str(error):
                raise
    return found


def texts_of(dataset) -> list[str]:
    return [document.text for document in both_splits(dataset)]


def rows_of(dataset, **reading) -> list[TokenRow]:
    return both_splits(dataset, contents, RowReading(tokenizer=Chatty(), **reading))


def as_csv(separator: str) -> bytes:
    lines = [separator.join(ROWS[0])] + [separator.join(row.values()) for row in ROWS]
    return "\n".join(lines).encode()


def zipped(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.json.xz", lzma.compress(LINES)),
        ("a.csv.gz", gzip.compress(as_csv(","), mtime=0)),
        ("array.json", json.dumps(ROWS).encode()),
        ("lines.json", LINES),
        ("A.JSONL", LINES),
        ("inner.json", json.dumps({"version": "1", "data": ROWS}).encode()),
        ("a.ndjson", LINES),
        ("a.csv", as_csv(",")),
        ("a.tsv", as_csv("\t")),
        ("marked.jsonl", b"\xef\xbb\xbf" + LINES),
        ("marked.csv", b"\xef\xbb\xbf" + as_csv(",")),
        ("wide.jsonl", LINES.decode().encode("utf-16")),
        ("wide.csv", as_csv(",").decode().encode("utf-16")),
        ("[1] *.jsonl", LINES),
    ],
)
def test_a_table_gives_its_rows_whatever_it_is_kept_in(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert sorted(texts_of(tmp_path / name)) == sorted(TEXTS)
    assert sorted(texts_of(tmp_path)) == sorted(TEXTS)


def test_a_quoted_csv_keeps_its_commas_and_lines(tmp_path):
    texts = [f'one, two\nand "{i}"' for i in range(30)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *enumerate(texts)])
    assert sorted(texts_of(tmp_path / "a.csv")) == sorted(texts)


def test_folders_of_save_to_disk_and_their_files_are_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "many")
    file = next((tmp_path / "one").glob("*.arrow"))
    (tmp_path / "outer").mkdir()
    (tmp_path / "one").rename(tmp_path / "outer" / "one")
    for dataset in ("outer/one", "many", f"outer/one/{file.name}", "outer"):
        assert sorted(texts_of(tmp_path / dataset)) == sorted(TEXTS), dataset


def test_a_zip_archive_is_read_like_a_folder(tmp_path):
    members = {
        "in/a.jsonl": LINES,
        "b.txt": b"bee",
        ".hidden": b"no",
        "c.txt.gz": gzip.compress(b"sea", mtime=0),
    }
    path = zipped(tmp_path / "a.zip", members)
    assert sorted(texts_of(path)) == sorted([*TEXTS, "bee", "sea"])
    assert sorted(texts_of(tmp_path)) == sorted([*TEXTS, "bee", "sea"])


def test_a_tar_of_webdataset_gives_its_texts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, text in enumerate(TEXTS):
            member = tarfile.TarInfo(f"{number:03}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    assert sorted(texts_of(tmp_path / "a.tar")) == sorted(TEXTS)


@pytest.mark.parametrize(
    "content", ["z\u00fcg\r\nzwei", "\ufeffz\u00fcg", "plain", "\u65e5\u672c \U0001f98a"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_text_is_decoded_by_its_mark(tmp_path, content, encoding):
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    expected = [content.removeprefix("\ufeff")] if encoding == "utf-8" else [content]
    assert texts_of(tmp_path / "a.txt") == texts_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "Gr\u00f6\u00dfe und Ma\u00df".encode("latin-1")),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
        ("a.pdf", b"%PDF-1.4\nmerely text"),
        ("a.zip", b"PK\x03\x04 cut off"),
        ("a", b"\x1f\x8b\x08 a compressed file without its ending"),
        ("a.txt.gz", b"not compressed at all"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd1234"),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:200]),
        ("a.parquet", b"PAR1 or not"),
        ("a.arrow", b"ARROW1 or not"),
        ("cut.jsonl", LINES[:-5]),
        ("deep.jsonl", b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("odd.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:12] + b"damaged" + b"x" * 40),
        ("numbers.jsonl", b'{"text": 1}\n{"text": 2}'),
        ("nested.jsonl", b'{"text": ["a", "b"], "name": "c"}'),
        ("only-ids.jsonl", b'{"id": "x1", "n": 3}'),
        ("some-id.jsonl", b'{"prompt_id": "x1", "n": 3}'),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}], "source": "s"}'),
        ("ids.jsonl", b'{"input_ids": [1, 2, 3], "split": "train"}'),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as refused:
        texts_of(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_nothing_and_nobodys_home_are_no_dataset():
    with pytest.raises(ValueError, match="The dataset has no name"):
        texts_of("")
    with pytest.raises(FileNotFoundError, match="There is no dataset at ~no-such-user"):
        texts_of("~no-such-user/a")


def test_where_a_prompt_ends_is_not_said_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("ay")
    for dataset in (tmp_path, tmp_path / "a.txt", "python-stdlib"):
        with pytest.raises(ValueError, match="--prompt-tokens is for token ids"):
            rows_of(dataset, prompt_tokens="3")


def test_a_device_is_no_dataset():
    with pytest.raises(ValueError, match="/dev/zero is neither a file nor a folder"):
        texts_of("/dev/zero")


def test_files_without_text_are_left_out_of_a_folder_and_named(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("ay")
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    (tmp_path / "settings.json").write_text("// no JSON\n{")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04")
    with caplog.at_level(logging.INFO, logger="foreroute"):
        assert texts_of(tmp_path) == ["ay"]
    assert len(caplog.records) == 1, "it is said once"
    assert "Left out 4 of 5 files" in caplog.text
    for name in ("cut.zip", "package.json", "settings.json", "picture.png"):
        assert name in caplog.text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no text: cut\.zip"):
        texts_of(tmp_path)


def test_empty_tables_give_nothing_and_stop_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for name in ("empty.jsonl", "blank.jsonl", "empty.json"):
        (tmp_path / name).write_text("\n\n" if name == "blank.jsonl" else "")
        assert texts_of(tmp_path / name) == []
    assert sorted(texts_of(tmp_path)) == sorted(TEXTS)


def test_links_are_followed_each_folder_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("ay")
    near = tmp_path / "near"
    near.mkdir()
    (near / "sub").symlink_to(tmp_path / "far")
    (near / "broken").symlink_to("/nowhere")
    (tmp_path / "far" / "back").symlink_to(near)
    assert texts_of(near) == ["ay"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("first", "row"),
    [
        ({"text": None, "id": "a0"}, lambda text: {"text": text, "id": "a1"}),
        ({"text": "", "id": "a0"}, lambda text: {"text": text, "id": "a1"}),
        ({"id": "a0"}, lambda text: {"text": text, "id": "a1"}),
        ({"body": None, "n": 1}, lambda text: {"body": text, "n": 2}),
        ({"content": "title", "text": None}, lambda text: {"content": "title", "text": text}),
    ],
)
def test_the_column_does_not_depend_on_the_first_row(tmp_path, ending, first, row):
    rows = [first, *map(row, TEXTS)]
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        names = rows[-1].keys()
        columns = {name: [row.get(name) for row in rows] for name in names}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert sorted(texts_of(path)) == sorted(TEXTS)


CHATS = {
    "openai": {"messages": [{"role": "user", "content": "hi"}], "prompt_id": "x"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}], "source": "x"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    "mixed": {"dialogue": [{"role": "user", "content": "hi", "tool_calls": None}], "n": 1},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_chats_go_through_the_tokenizers_template(tmp_path, row):
    empty = dict.fromkeys(row) | {next(iter(row)): []}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [row, empty, row, row])))
    rows = rows_of(tmp_path / "a.jsonl")
    assert ["".join(map(chr, r.token_ids)) for r in rows] == ["<user>hi"] * 3


def test_token_ids_are_taken_as_such_with_where_their_prompt_ends(tmp_path):
    rows = [{"input_ids": [7, 8, 9], "end": i, "split": "train"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = rows_of(tmp_path / "a.jsonl")
    assert [(row.token_ids, row.num_prompt_tokens) for row in plain] == [((7, 8, 9), None)] * 4
    ends = rows_of(tmp_path / "a.jsonl", prompt_tokens="end")
    assert sorted(row.num_prompt_tokens for row in ends) == [0, 1, 2, 3]
    assert {row.num_prompt_tokens for row in rows_of(tmp_path, prompt_tokens="2")} == {2}
    with pytest.raises(ValueError, match=r"Row 0 of a\.jsonl .* not a number from 0 to 3"):
        rows_of(tmp_path / "a.jsonl", prompt_tokens="split")


def test_a_column_can_be_named(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "n": i} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = {document.text for document in rows_of(tmp_path / "a.jsonl", column="answer")}
    assert answers == {f"a{i}" for i in range(20)}
    with pytest.raises(ValueError, match="no column reply; its columns are question, answer, n"):
        rows_of(tmp_path / "a.jsonl", column="reply")
    with pytest.raises(ValueError, match="its column n holds neither text"):
        rows_of(tmp_path / "a.jsonl", column="n")
    with pytest.raises(ValueError, match="of token ids only; column answer holds text"):
        rows_of(tmp_path / "a.jsonl", column="answer", prompt_tokens="n")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("first.jsonl", b'null\n{"text": "a"}', "a line of it is null"),
        ("later.jsonl", b'{"text": "a"}\n null \n{"text": "b"}', "a line of it is null"),
        ("array.json", b'[{"text": "a"}, null]', "an entry of it is null"),
        ("nan.json", b'[NaN, {"text": "a"}, {"text": {"a": 1}}]', "an entry of it is null"),
        ("nan.jsonl", b'NaN\n{"text": "a"}\n{"text": {"a": 1}}', "a line of it is null"),
        ("lists.jsonl", b'{"text": "a", "x": ' + b"[ " * 9999 + b"}", "nested too deeply"),
        ("both.jsonl", b'{"text": "a", "x": ' + b'{"x": [' * 9999, "nested too deeply"),
    ],
)
def test_json_that_would_end_the_process_is_refused_compressed_or_not(
    tmp_path, name, content, problem
):
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, content)
    for place in (name, f"{name}.gz", "a.zip"):
        with pytest.raises(ValueError, match=problem):
            texts_of(tmp_path / place)


def test_brackets_and_nulls_in_texts_are_no_structure(tmp_path):
    texts = ["[null" * 400, "\n null \n", 'a "quoted" [' * 300, "\\" * 5 + "{" * 500]
    rows = [{"text": text, "x": [None] if text == texts[-1] else [1]} for text in texts * 20]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        found = both_splits(tmp_path / name, contents, RowReading(column="text"))
        assert sorted(document.text for document in found) == sorted(
            text for text in texts * 20 if text.strip()
        )
