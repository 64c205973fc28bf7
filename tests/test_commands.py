"""The commands as a user types them: end to end on a tiny model, and one line for every mistake."""

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
MODULES = {
    "collect-traces": "foreroute.data.cli",
    "train-estimator": "foreroute.train.cli",
    "export-estimator": "foreroute.export.cli",
    "foreroute": "foreroute.runtime.cli",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process; gives exit code, standard output and standard error."""

    def typed(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            importlib.import_module(MODULES[words[0]]).main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        written = capsys.readouterr()
        return code, written.out, written.err

    return typed


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_from_text_to_a_bench_by_commands(
    run: Callable[..., Any], tiny_moe: Any, text_dataset: Path, here: Path
) -> None:
    lines = (
        f"collect-traces --model {tiny_moe.folder} --dataset {text_dataset} --tokens 2048 "
        f"--sequence-length 64 --out {here}/traces",
        f"train-estimator --traces {here}/traces --layers all --epochs 2 --device cpu "
        f"--out {here}/run",
        f"export-estimator --run {here}/run --out {here}/bundle",
        f"foreroute generate --model {tiny_moe.folder} --bundle {here}/bundle --device cpu "
        "--prompt 'def parse' --max-new-tokens 4",
        f"foreroute bench --model {tiny_moe.folder} --bundle {here}/bundle --device cpu "
        f"--dataset {text_dataset} --num-prompts 1 --prompt-tokens 16 --new-tokens 8 --repeats 1 "
        f"--expert-slots 50% --json {here}/bench.json",
    )
    for line, last in zip(lines, ("traces", "run", "bundle", None, "bench.json"), strict=True):
        code, out, err = run(line)
        assert code == 0, err
        if last:
            assert out.strip().splitlines()[-1] == f"{here}/{last}"
    bench = json.loads((here / "bench.json").read_text())
    assert bench["exact_tokens_equal"] is True
    assert {"stock", "all-resident", "on-demand", "prefetch", "predicted"} <= set(bench["modes"])


def test_a_trained_bundle_is_refused_by_another_model(
    run: Callable[..., Any], make_tiny_moe: Callable[..., Any], here: Path
) -> None:
    other = make_tiny_moe(num_experts=16)
    code, _, err = run(
        f"foreroute generate --model {other.folder} --bundle {here}/bundle --prompt x --device cpu"
    )
    assert_one_line(code, err, "8 experts", "16 experts")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("foreroute generate --model /no/such --prompt x", ["/no/such"]),
        ("foreroute generate --model {llama} --prompt x", ["not a Mixture-of-Experts"]),
        ("foreroute generate --model {tiny} --expert-slots 9 --prompt x", ["more than the 8"]),
        ("foreroute generate --model {tiny} --expert-slots 1 --prompt x", ["fewer than the 2"]),
        ("foreroute generate --model {tiny} --prompt x --bundle {here}/no", ["{here}/no"]),
        ("foreroute generate --model {tiny} --prompt ''", ["prompt is empty"]),
        (
            "foreroute generate --model {tiny} --prompt x --on-miss pray",
            ["known parts: fetch"],
        ),
        ("foreroute generate --model {tiny} --prompt x --dtype float12", ["float12"]),
        ("collect-traces --model {llama} --out {here}/new", ["not a Mixture-of-Experts"]),
        ("collect-traces --model {tiny} --dataset {here}/empty --out {here}/new", ["empty"]),
        ("train-estimator --traces {here}/none --out {here}/new", ["{here}/none"]),
        ("train-estimator --traces {here}/traces --layers 0 --out {here}/new", ["0"]),
        ("train-estimator --traces {here}/traces --form magic --out {here}/new", ["low-rank"]),
        ("export-estimator --run {here}/none --out {here}/new", ["{here}/none"]),
        ("export-estimator --run {here}/run --out {here}/bundle", ["--overwrite"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    run: Callable[..., Any],
    tiny_moe: Any,
    llama_folder: Path,
    here: Path,
    line: str,
    parts: list[str],
) -> None:
    (here / "empty").mkdir(exist_ok=True)
    places = {"tiny": tiny_moe.folder, "llama": llama_folder, "here": here}
    code, _, err = run(line.format(**places))
    assert_one_line(code, err, *(part.format(**places) for part in parts))
    assert not (here / "new").exists()


def test_a_damaged_shard_is_named(run: Callable[..., Any], here: Path) -> None:
    shard = next((here / "traces").glob("layer_*/shard_00000.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    code, _, err = run(f"train-estimator --traces {here}/traces --out {here}/damaged")
    shard.write_bytes(whole)
    assert_one_line(code, err, str(shard.name), "damaged")


def assert_one_line(code: int, err: str, *parts: str) -> None:
    said = [line for line in err.splitlines() if "error:" in line]
    assert code == 2, err
    assert len(said) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in said[0]


def shown_commands() -> list[str]:
    """What the README and the walk through the pipeline tell people to type."""
    pages = ROOT / "README.md", ROOT / "docs" / "pipeline.md"
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    lines = [line[2:].strip() for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.split()[0] in MODULES]


def test_every_command_is_shown() -> None:
    assert {line.split()[0] for line in shown_commands()} == set(MODULES)


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_shown_is_understood(run: Callable[..., Any], line: str) -> None:
    code, out, err = run(f"{line} --print_config")
    assert code == 0, err
    assert out
