"""The script that trains the bundled model: what it counts, and one tiny run from end to end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "--device": "cpu",
    "--minutes": "0.05",
    "--max-documents": "20",
    "--layers": "2",
    "--hidden": "64",
    "--experts": "8",
    "--top-k": "2",
    "--expert-width": "16",
    "--heads": "2",
    "--kv-heads": "1",
    "--vocab": "512",
    "--sequence-length": "64",
}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load_example("bundled_model_report")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return load_example("train_bundled_model")


def test_characters_of_docstrings_and_comments_are_told_from_code(report: ModuleType) -> None:
    lines = {
        '"""Module: é."""\n': "D" * 16 + "c",
        "x = '# no comment'  # é yes\n": "c" * 20 + "#" * 7 + "c",
        "\n": "c",
        "def f():\n": "c" * 9,
        '    "Says."; y = """not one"""\n': "c" * 4 + "D" * 7 + "c" * 20,
        "    'nor this'  #\n": "c" * 16 + "#" + "c",
    }
    kinds = report.character_kinds("".join(lines))
    letters = {report.Kind.CODE: "c", report.Kind.DOCSTRING: "D", report.Kind.COMMENT: "#"}
    assert "".join(letters[kind] for kind in kinds) == "".join(lines.values())


def test_a_docstring_over_lines_and_form_feeds_keeps_its_place(report: ModuleType) -> None:
    text = "class A:\n    '''é\n\f two\n    '''\n    x = 1\n"
    kinds = report.character_kinds(text)
    first, last = text.index("'''"), text.rindex("'''") + 3
    assert set(np.flatnonzero(kinds == report.Kind.DOCSTRING)) == set(range(first, last))


def test_a_token_is_of_the_kind_of_its_last_character(report: ModuleType) -> None:
    kinds = report.token_kinds("x  # y\n", [(0, 1), (1, 2), (2, 4), (4, 6), (6, 7)])
    assert kinds.tolist() == [0, 0, 2, 2, 0]


@pytest.mark.parametrize("text", ["print 'two'\n", "x = (\n", "  x\n y\n", "\0"])
def test_text_that_does_not_parse_is_of_unknown_kind(report: ModuleType, text: str) -> None:
    assert report.token_kinds(text, [(0, 1)]).tolist() == [report.Kind.UNKNOWN]


@pytest.mark.parametrize("num_tokens", [2, 9, 10, 12, 31])
def test_every_token_but_the_first_is_a_target_once(report: ModuleType, num_tokens: int) -> None:
    batches = list(report.windows(torch.arange(num_tokens), sequence_length=3, batch_size=2))
    assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == list(
        range(1, num_tokens)
    )
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in batches)


def test_divergence_is_one_bit_between_disjoint_loads_and_zero_between_equal_ones(
    report: ModuleType,
) -> None:
    left, right = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert report.divergence_bits(left, right) == 1.0
    assert report.divergence_bits(left, left) == 0.0
    assert report.divergence_bits(left, None) is None


def test_load_of_idle_experts_counts_them_as_dead(report: ModuleType) -> None:
    expert_ids = np.array([[[0, 1], [0, 1], [0, 2], [0, 1]]])  # [layers, tokens, top_k]
    (row,) = report.load_rows(expert_ids, num_experts=4)
    assert row == {"layer": 0, "least_load": 0.0, "greatest_load": 2.0, "num_dead_experts": 1}


def test_balance_loss_is_top_k_at_balance_and_sees_each_layer_by_itself(
    script: ModuleType,
) -> None:
    even = torch.eye(4) * 50  # every token to an expert of its own
    assert script.balance_loss([even], top_k=1).item() == pytest.approx(1.0)
    collapsed = [torch.eye(4)[[expert_id] * 4] * 50 for expert_id in range(4)]
    assert script.balance_loss(collapsed, top_k=1).item() == pytest.approx(4.0)


def test_an_epoch_of_windows_holds_no_token_twice(script: ModuleType) -> None:
    batches = script.shuffled_windows(torch.arange(50), sequence_length=8, batch_size=2, seed=0)
    starts = torch.cat([next(batches)[:, 0] for _ in range(3)])
    assert len(set((starts // 8).tolist())) == len(starts)
    assert len(set((starts % 8).tolist())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "9", "--experts", "8"], "--top-k must be at most --experts 8"),
        (["--minutes", "0"], "--minutes must be greater than 0, got 0.0"),
        (["--vocab", "256"], "--vocab must be over 256"),
        (["--sequence-length", "4096"], "--max-positions must be at least --sequence-length"),
        (["--device", "abacus"], "--device must be cpu or cuda, got abacus"),
    ],
)
def test_bad_arguments_end_in_one_line(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments(["--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_existing_folder_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.parse_arguments(["--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith("exists; add --overwrite to replace it\n")


@pytest.mark.slow
def test_a_tiny_run_writes_a_model_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(EXAMPLES / "train_bundled_model.py"), "--out", str(out)]
    flags = [word for flag in TINY.items() for word in flag]
    # one thread: the sizes are tiny, and idle threads of a busy machine only wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert not (tmp_path / "model.partial").exists()

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.config.model_type == "qwen3_moe"
    assert model(input_ids=torch.tensor([[0, 1, 2]])).router_logits is None
    assert model.generation_config.do_sample is False

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "".join(map(chr, range(1, 256))) + "\r\n\n\t  日本 😀 a , b . don 't \0  x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0

    record = json.loads((out / "training.json").read_text())
    assert record.keys() >= {"command", "model", "data", "training", "loss", "routing"}
    assert record["loss"].keys() >= {
        "held_out_bits_per_byte",
        "train_bits_per_byte",
        "unigram_bits_per_byte",
        "byte_entropy_bits_per_byte",
    }
    assert len(record["routing"]["load"]) == len(record["routing"]["divergence"]) == 2
    assert record["model"]["weights_bytes"] == (out / "model.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert f"{record['loss']['held_out_bits_per_byte']:.4f}" in card
    assert record["command"] in card


def test_package_code_comes_in_one_order_up_to_the_limit(script: ModuleType) -> None:
    some, more = script.package_documents(0.1), script.package_documents(0.2)
    assert more[: len(some)] == some
    assert sum(map(script.num_bytes, some[:-1])) < 1e5 <= sum(map(script.num_bytes, some))
    assert script.package_documents(0) == []
