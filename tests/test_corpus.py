"""Documents of every kind of dataset, their split, and their packing into sequences."""

import json

import pytest

from foreroute.data.corpus import documents, split_of, stdlib_documents, windows
from foreroute.data.document import Document, TokenRow


def both_splits(dataset) -> dict[str, str]:
    found = {}
    for split in ("train", "held-out"):
        try:
            for name, text in documents(str(dataset), split):
                assert name not in found, "a document is in both splits"
                found[name] = text
        except ValueError as error:
            if "has no text in its" not in str(error):
                raise
    return found


def test_the_split_of_a_name_never_changes():
    # sha256("file_7") begins with 01 (under a twentieth of ff), sha256("file_0") with 23.
    assert (split_of("file_0"), split_of("file_7")) == ("train", "held-out")
    share = sum(split_of(f"file_{i}") == "held-out" for i in range(4000)) / 4000
    assert 0.04 < share < 0.06  # 5 %, three standard deviations are 1 %


def test_stdlib_is_split_by_file_and_leaves_out_tests():
    train = {name for name, _ in stdlib_documents("train")}
    held_out = {name for name, _ in stdlib_documents("held-out")}
    assert len(train) > 10 * len(held_out) > 0
    assert not train & held_out
    assert not any("test" in name.split("/")[:-1] for name in train)


def test_a_folder_of_text_gives_its_files_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.md").write_text("ay")
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text("")
    assert both_splits(tmp_path) == {"b.txt": "bee", "sub/a.md": "ay"}


def test_one_text_file_is_cut_into_pieces_that_join_again(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100_000))
    (tmp_path / "long.txt").write_text(text)
    pieces = both_splits(tmp_path / "long.txt")
    assert "".join(pieces[f"long.txt:{i}"] for i in range(len(pieces))) == text
    assert any(split_of(name) == "held-out" for name in pieces)


@pytest.mark.parametrize("column", ["text", "content", "only_string"])
def test_jsonl_gives_one_document_a_row(tmp_path, column):
    rows = [{column: f"row {i}", "number": i} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = both_splits(tmp_path / "d.jsonl")
    assert found == {f"d.jsonl:{i}": f"row {i}" for i in range(30)}


def test_parquet_gives_one_document_a_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"id": [1, 2], "text": ["one", "two"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert both_splits(tmp_path) == {"d.parquet:0": "one", "d.parquet:1": "two"}


def test_a_table_without_a_text_column_is_refused_naming_its_columns(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b", "id": 3}\n')
    with pytest.raises(ValueError, match="its columns are question, answer, id"):
        list(documents(str(tmp_path / "d.jsonl"), "train"))


def test_a_garbled_table_is_refused_by_name(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read"):
        list(documents(str(tmp_path / "d.parquet"), "train"))


def test_missing_paths_and_empty_datasets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no dataset at"):
        list(documents(str(tmp_path / "nowhere"), "train"))
    with pytest.raises(FileNotFoundError, match="There is no dataset at"):
        list(documents("nowhere.jsonl", "train"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no text in its train split \(0 documents"):
        list(documents(str(tmp_path / "empty.txt"), "train"))
    with pytest.raises(ValueError, match="known: train, held-out"):
        list(documents("python-stdlib", "test"))


def test_a_hub_dataset_that_cannot_be_reached_is_refused_in_one_line(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/some-set' on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="cannot be read from the Hub: Couldn't reach") as error:
        list(documents("someone/some-set", "train"))
    assert "\n" not in str(error.value)


def test_hub_rows_are_split_by_number(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, configuration, streaming):
        asked.append((path, configuration, streaming))
        return {"test": [], "train": [{"text": f"row {i}"} for i in range(100)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(both_splits("someone/some-set:config")) == 100
    assert asked[0] == ("someone/some-set", "config", True)


def test_windows_give_every_document_once_before_any_twice_and_lose_nothing():
    texts = [Document("a", "0123456789"), Document("b", "xyz"), Document("c", "abcdef")]
    pieces = list(windows(lambda: texts, sequence_length=1))  # four characters
    assert [name for name, _ in pieces] == ["a", "b", "c", "a", "c", "a"]
    for name, text in texts:
        assert sorted("".join(t for n, t in pieces if n == name)) == sorted(text)
    assert max(len(text) for _, text in pieces) == 4


def test_windows_cut_token_ids_but_not_rows_that_say_where_the_prompt_ends():
    rows = [TokenRow("a", (1, 2, 3, 4, 5)), TokenRow("b", (6, 7, 8, 9), num_prompt_tokens=1)]
    pieces = list(windows(lambda: rows, sequence_length=2))
    assert sorted(p.token_ids for p in pieces if p.name == "a") == [(1, 2), (3, 4), (5,)]
    assert [p for p in pieces if p.name == "b"] == [rows[1]]
