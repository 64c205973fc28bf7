"""A tuning runs each command once, goes on where it was ended, and types what the commands take."""

import inspect
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pages import loaded_from_elsewhere
from toys import toy_geometry

from foreroute.data.collect import collect_traces
from foreroute.estimators.artifacts import write_json
from foreroute.export.cli import export
from foreroute.export.report.bench_page import bench_page, read_bench
from foreroute.export.report.cli import report
from foreroute.export.report.tune_page import tune_page
from foreroute.runtime import cli
from foreroute.runtime.bench.measure import to_json
from foreroute.runtime.tune import steps
from foreroute.runtime.tune.cli import tune
from foreroute.runtime.tune.plan import Tuning
from foreroute.runtime.tune.steps import Journal, Step, StepFailed, run_all
from foreroute.train.command import train

COMMANDS = {"collect-traces": collect_traces, "train-estimator": train, "export-estimator": export}
SUBCOMMANDS = {"report": report}
MODULE = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write('x'); sys.exit({code})\n"


@dataclass
class Result:
    """A mode's result, as far as it is compared."""

    name: str
    tokens: list[list[int]]
    is_exact: bool = True


def tuning(**changed: Any) -> Tuning:
    settings: dict[str, Any] = {
        "model": "some/model",
        "out": Path("out"),
        "dataset": "python-stdlib",
        "tokens": 1000,
        "form": "low-rank",
        "expert_slots": "25%",
        "device": "cpu",
        "gpu_memory": "24GiB",
        "host_memory": "64GiB",
        "revision": None,
        "prompt": "def parse(",
        "trust_remote_code": True,
    }
    return Tuning(**(settings | changed))


def test_every_flag_is_one_that_its_command_takes() -> None:
    for step in tuning(is_held=False).steps():
        name, rest = step.argv[0], step.argv[1:]
        if name == "foreroute":
            name, rest = rest[0], rest[1:]
            command = SUBCOMMANDS.get(name) or getattr(cli, name)
        else:
            command = COMMANDS[name]
        taken = {"--expert-slots"} if step.name == "collect" else set()  # the console script's own
        taken |= {f"--{flag.replace('_', '-')}" for flag in inspect.signature(command).parameters}
        typed = {word for word in (*rest, *step.again) if word.startswith("--")}
        assert typed <= taken, step.text
        switches = {"--overwrite", "--resume", "--trust-remote-code"}  # take no value
        words = (*rest, *step.again)
        for word, following in itertools.pairwise((*words, "--end")):
            assert word not in switches or following.startswith("--"), step.text


def test_a_model_that_the_device_does_not_hold_is_recorded_in_an_engine() -> None:
    for is_held in (True, False):
        collect = next(s for s in tuning(is_held=is_held).steps() if s.name == "collect")
        assert ("--expert-slots" in collect.argv) is not is_held


def test_no_gpu_means_no_plan() -> None:
    assert "plan" in [step.name for step in tuning().steps()]
    assert "plan" not in [step.name for step in tuning(gpu_memory=None).steps()]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that write an x into the file they are given; `bad` then fails."""
    for name, code in (("good", 0), ("bad", 3)):
        (tmp_path / f"{name}.py").write_text(MODULE.format(code=code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(steps, "MODULES", {"good": "good", "bad": "bad"})


def count(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.usefixtures("modules")
def test_a_tuning_goes_on_after_the_last_step_that_was_done(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    broken = [Step("a", ("good", str(files[0]))), Step("b", ("bad", str(files[1])))]
    with pytest.raises(StepFailed, match="b ended with exit code 3"):
        run_all(broken, Journal(tmp_path), print)
    mended = [broken[0], Step("b", ("good", str(files[1]))), Step("c", ("good", str(files[2])))]
    run_all(mended, Journal(tmp_path), print)
    assert list(map(count, files)) == [1, 2, 1]
    run_all(mended, Journal(tmp_path), print)
    assert list(map(count, files)) == [1, 2, 1]


@pytest.mark.usefixtures("modules")
def test_another_command_makes_what_reads_its_files_anew(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three", "four")]
    a, b, c, d = [Step(file.name, ("good", str(file))) for file in files]
    chain = [a, replace(b, reads=("one",)), c, replace(d, reads=("two",))]
    run_all(chain, Journal(tmp_path), print)
    changed = replace(a, argv=(*a.argv, "changed"))
    run_all([changed, *chain[1:]], Journal(tmp_path), print)
    assert list(map(count, files)) == [2, 2, 1, 2]


@pytest.mark.usefixtures("modules")
def test_what_was_made_from_older_files_is_not_taken_for_done_after_a_kill(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    a, b, c = [Step(file.name, ("good", str(file))) for file in files]
    chain = [a, replace(b, reads=("one",)), replace(c, reads=("two",))]
    run_all(chain, Journal(tmp_path), print)
    changed = replace(a, argv=(*a.argv, "changed"))
    ends_here = replace(chain[1], argv=("bad", str(tmp_path / "other")))
    with pytest.raises(StepFailed):
        run_all([changed, ends_here, chain[2]], Journal(tmp_path), print)
    run_all([changed, *chain[1:]], Journal(tmp_path), print)
    assert list(map(count, files)) == [2, 2, 2]


def test_every_step_names_the_steps_whose_files_it_is_given() -> None:
    given, out = tuning().steps(), Path("out")
    made_by = {out / "profile.json": "profile", out / "traces": "collect"}
    made_by |= {out / "run": "train", out / "bundle": "export"}
    for step in given:
        words = [Path(word) for flag, word in itertools.pairwise(step.argv) if flag != "--out"]
        reached, names = set(step.reads), {made_by[word] for word in words if word in made_by}
        for name in list(reached):
            reached |= set(next(s for s in given if s.name == name).reads)
        assert names <= reached, step.text


def test_too_few_tokens_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 held-out sequences are too few.*--tokens"):
        tune(tmp_path / "out", tokens=25 * 512)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("{", "{}", '{"steps": []}', '{"steps": {"a": {}}}', '{"steps": {"a": 1}}'),
        '{"steps": {"a": {"command": "x", "seconds": "1"}}}',
    ],
)
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / steps.STATE_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"tune\.json is damaged .*begin anew"):
        Journal(tmp_path)


@pytest.mark.parametrize("field", ["device", "model", "modes", "reference", "on-demand", "tpot_ms"])
def test_a_bench_that_lacks_something_is_named(tmp_path: Path, field: str) -> None:
    whole = bench() | {"device": "cpu", "model": toy_geometry(0, 1).to_dict()}
    write_json(tmp_path / "bench.json", whole)
    assert read_bench(tmp_path / "bench.json") == whole
    for part in (whole, whole["modes"], whole["modes"].get("on-demand", {})):
        part.pop(field, None)
    write_json(tmp_path / "bench.json", whole)
    with pytest.raises(ValueError, match=rf"bench\.json is damaged .*{field}.*bench again"):
        read_bench(tmp_path / "bench.json")


def bench() -> dict[str, Any]:
    row: dict[str, Any] = {
        "is_exact": True,
        "tpot_ms": 2.0,
        "tpot_ms_p25": 1.5,
        "tpot_ms_p75": 2.5,
        "ttft_ms": 9.0,
        "hit_rate": None,
        "bytes_per_token": 1e6,
        "wasted_bytes_per_token": 0.0,
        "agreement": 1.0,
        "perplexity_change": None,
    }
    speculative = row | {"is_exact": False, "perplexity_change": 0.01, "hit_rate": 0.5}
    modes = {"stock": row, "on-demand": row, "<b>skip</b>": speculative}
    return {"reference": "stock", "modes": modes, "exact_tokens_equal": True, "notes": ["a < b"]}


def test_the_benchs_page_needs_nothing_from_elsewhere() -> None:
    page = bench_page(bench(), "m & n", "foreroute bench")
    assert loaded_from_elsewhere(page) == []
    assert "<b>skip" not in page
    assert "m &amp; n" in page
    assert "a &lt; b" in page
    assert page.count("data:image/png;base64,") == 1


def test_a_tunings_page_links_to_what_lies_beside_it_and_loads_nothing() -> None:
    row = {"recall_at_k": 0.5, "recall_at_k_by_layer": [0.25, 0.75]}
    summary = {"model": {"top_k": 4}, "estimator": row | {"form": "ridge"}, "baselines": {}}
    page = tune_page("m & n", summary, bench(), [("foreroute doctor --model '<x>'", 2.4)])
    assert loaded_from_elsewhere(page) == []
    assert "<td>trained ridge</td><td>0.500</td><td>0.250</td><td>0.750</td>" in page
    assert "<pre>foreroute doctor --model &#x27;&lt;x&gt;&#x27;   # 2 s</pre>" in page


def test_a_page_that_loads_something_is_caught() -> None:
    for part in (
        '<img src="http://x/y.png">',
        "<script>1</script>",
        '<link rel="stylesheet" href="a.css">',
        "<style>@import 'a'</style>",
        "<p style='background: url(//x)'>",
        '<a href="https://x">',
        '<img srcset="x.png 2x">',
    ):
        assert loaded_from_elsewhere(part), part


@pytest.mark.parametrize(("is_cpu", "is_equal"), [(True, False), (False, True)])
def test_other_kernels_may_give_other_tokens_than_stock_and_no_exact_mode_others_than_another(
    is_cpu: bool, is_equal: bool
) -> None:
    results: list[Any] = [
        Result("stock", [[1, 2]]),
        Result("on-demand", [[1, 3]]),
        Result("prefetch", [[1, 3]]),
    ]
    assert to_json(results, is_cpu=is_cpu)["exact_tokens_equal"] is is_equal
    other = [*results, Result("prefetch-all", [[1, 2]])]
    assert to_json(other, is_cpu=is_cpu)["exact_tokens_equal"] is False
