"""What rules cost is measured by decode steps through the engine, and chosen from afterwards."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speculation
import torch

from foreroute.data.corpus import split_of
from foreroute.estimators.console import run_command
from foreroute.runtime import Engine
from foreroute.runtime.cli import generate
from foreroute.runtime.evaluation.cli import evaluate
from foreroute.runtime.evaluation.comparison import Comparison, with_interval
from foreroute.runtime.evaluation.forced import read_by_steps
from foreroute.runtime.evaluation.frontier import Frontier, PriceRow, parse_quality_budget
from foreroute.runtime.evaluation.price import _same_tokens

RULES = "substitute:1.5,skip"


def run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of `foreroute generate` or `evaluate`."""
    name, *words = shlex.split(command)
    code = 0
    try:
        run_command(f"foreroute {name}", {"evaluate": evaluate, "generate": generate}[name], words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files that are held out."""
    folder = tmp_path_factory.mktemp("texts")
    names = [name for name in (f"text_{i}.py" for i in range(200)) if split_of(name) == "held-out"]
    for name in names[:2]:
        (folder / name).write_text(f"def parse_{name[:-3]}(line):\n    return int(line)\n" * 4)
    return folder


@pytest.fixture(scope="module")
def measured(tiny_moe: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's frontier: two rules and the exact one, 3 of 8 experts resident."""
    out = tmp_path_factory.mktemp("frontier") / "frontier.json"
    evaluate(
        rules=RULES,
        slots="3",
        out=out,
        model=str(tiny_moe.folder),
        dataset=str(texts),
        num_prompts=2,
        prompt_tokens=6,
        new_tokens=10,
        free_tokens=4,
        device="cpu",
    )
    return out


def test_decode_steps_give_the_logits_of_one_pass(tiny_moe: Any) -> None:
    tokens = torch.randint(3, 250, (1, 14), generator=torch.Generator().manual_seed(0))
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3", device="cpu") as engine:
        found = read_by_steps(engine, tokens[:, :5], tokens[:, 5:])
        assert engine.stats().decode.forwards == len(found.step_ms) == 8
        expected = engine(tokens).logits[0, 5:-1]
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)


def test_the_exact_rule_differs_from_itself_by_nothing_and_others_say_by_how_much(
    measured: Path,
) -> None:
    frontier = Frontier.read(measured)
    exact, substitute, skip = frontier.rows
    assert [row.rule for row in frontier.rows] == ["fetch", *RULES.split(",")]
    assert exact.kl == exact.kl_noise == 0
    assert exact.same_tokens == 4
    assert 0 <= skip.same_tokens <= 4
    assert exact.perplexity_ratio == exact.top1_agreement == exact.agreement == 1
    for row in (substitute, skip):
        assert row.kl_interval[0] <= row.kl <= row.kl_interval[1]
        assert row.kl > 0
        assert row.agreement < 1
        assert row.perplexity_interval[0] < row.perplexity_ratio < row.perplexity_interval[1]
    assert substitute.bytes_per_token < exact.bytes_per_token
    positions = exact.by_position
    assert (positions[0]["first"], positions[-1]["last"]) == (2, 10)


def test_what_is_measured_already_is_not_measured_again(
    measured: Path, tiny_moe: Any, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Frontier.read(measured)
    flags = (
        f"--model {tiny_moe.folder} --dataset {texts} --num-prompts 2 --prompt-tokens 6 "
        f"--free-tokens 4 --device cpu --slots 3 --out {measured}"
    )
    code, output, _ = run(f"evaluate --rules {RULES} --new-tokens 10 {flags}", capsys)
    assert code == 0
    assert "substitute:1.5" in output
    assert Frontier.read(measured).rows == before.rows
    code, _, error = run(f"evaluate --rules {RULES} --new-tokens 9 {flags}", capsys)
    assert code == 2
    assert "give another --out" in error


def test_tokens_count_up_to_the_first_that_differs() -> None:
    written = torch.tensor([3, 1, 4, 1])
    assert _same_tokens(written, written) == 4
    assert _same_tokens(written, torch.tensor([3, 1, 5, 1])) == 2


def test_figures_by_hand() -> None:
    """Two tokens; the exact model gives 3/4 and 1/4, the engine one half each."""
    comparison = Comparison()
    exact = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    comparison.add(exact, torch.zeros(2, 2), torch.tensor([0, 1]))
    ratio, _ = comparison.perplexity_ratio()
    assert ratio == pytest.approx((0.75 * 0.25) ** 0.5 / 0.5)
    kl, _ = comparison.mean_kl()
    assert kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert comparison.top1_agreement() == (1.0, (1.0, 1.0))
    assert [part["first"] for part in comparison.by_position(2)] == [2, 3]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    dice = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, (low, high) = with_interval(dice.normal(size=30))
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def row(rule: str, worst: float, bytes_per_token: float, tpot_ms: float) -> PriceRow:
    return PriceRow(
        model="m",
        rule=rule,
        slots="25%",
        kl=0.0,
        kl_interval=(0.0, 0.0),
        kl_noise=0.0,
        perplexity_ratio=1.0,
        perplexity_interval=(1.0, 1 + worst),
        top1_agreement=1.0,
        top1_interval=(1.0, 1.0),
        agreement=1.0,
        hit_rate=1.0,
        bytes_per_token=bytes_per_token,
        tpot_ms=tpot_ms,
        by_position=[],
    )


@pytest.mark.parametrize(
    ("device", "budget", "rule"),
    [
        ("cpu", 0.0, "fetch"),
        ("cpu", 0.01, "substitute:0.5"),
        ("NVIDIA H100", 0.01, "substitute:0.25"),
        ("cpu", 0.05, "skip:1"),
    ],
)
def test_the_rule_that_takes_least_within_the_budget_is_chosen(
    measured: Path, device: str, budget: float, rule: str
) -> None:
    rows = [
        row("fetch", 0.0, 100, 2.0),
        row("substitute:0.25", 0.004, 80, 1.0),
        row("substitute:0.5", 0.009, 60, 1.5),
        row("skip:1", 0.02, 20, 0.5),
    ]
    frontier = dataclasses.replace(Frontier.read(measured), rows=rows, device=device)
    assert frontier.choose("25%", budget).rule == rule
    with pytest.raises(ValueError, match="measured at 25% slots, not at 10%"):
        frontier.choose("10%", budget)


def test_a_quality_budget_is_a_share_or_per_cent() -> None:
    assert parse_quality_budget("1%") == parse_quality_budget("0.01") == 0.01
    for text in ("much", "-1%", "200%"):
        with pytest.raises(ValueError, match="such as 1%"):
            parse_quality_budget(text)


def test_generate_takes_the_rule_from_the_frontier_and_refuses_without(
    measured: Path, tiny_moe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"generate --model {tiny_moe.folder} --prompt x --device cpu --max-new-tokens 3"
    given = f"{words} --expert-slots 3 --quality-budget 99% --frontier {measured}"
    code, _, error = run(given, capsys)
    assert code == 0
    best = Frontier.read(measured).choose("3", 0.99)
    assert best.rule != "fetch"
    assert f"SPECULATIVE ({best.rule})" in error
    refused = {
        f"{words} --quality-budget 1%": "Measure it: foreroute evaluate",
        f"{given} --on-miss skip": "leave out --on-miss",
        f"{words} --expert-slots 4 --quality-budget 1% --frontier {measured}": "measured at 3",
    }
    for command, message in refused.items():
        code, output, error = run(command, capsys)
        assert (code, output) == (2, "")
        assert message in error


def test_a_frontier_of_another_model_is_refused(
    measured: Path, make_tiny_moe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_moe(num_hidden_layers=2)
    code, _, error = run(
        f"generate --model {other.folder} --prompt x --device cpu --expert-slots 3 "
        f"--quality-budget 1% --frontier {measured}",
        capsys,
    )
    assert code == 2
    assert "Frontier made for" in error


def test_tasks_and_rules_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("", "--tasks a --rules skip"):
        code, _, error = run(f"evaluate {words}", capsys)
        assert code == 2
        assert "Give --tasks" in error


def test_a_measurement_gathered_again_takes_the_place_of_its_older_rows(measured: Path) -> None:
    rows = [row("fetch", 0.0, 100, 2.0), row("skip:0.5", 0.01, 60, 1.0)]
    first = dataclasses.replace(Frontier.read(measured), rows=rows)
    other = dataclasses.replace(first, device="another", rows=rows[:1])
    found = speculation.gathered({}, [first, other], "tiny")
    cheaper = dataclasses.replace(first, rows=[rows[0], row("skip:0.5", 0.01, 50, 1.0)])
    found = speculation.gathered(found, [cheaper], "tiny")
    assert [about["device"] for about in found["measurements"]] == [first.device, "another"]
    kept = [r for r in found["rows"] if r["measurement"] == 0]
    assert [r["rule"] for r in kept] == ["fetch", "skip:0.5"]
    assert speculation.of_fetch(kept[1], found["rows"], "bytes_per_token") == 0.5
    assert "| 25% | `skip:0.5` | 0.50 |" in speculation.table(kept, is_timed=False)
