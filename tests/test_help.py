"""Every flag of every command says what it is for."""

import re
import sys

import pytest

from foreroute.data.cli import main as collect_traces
from foreroute.export.cli import main as export_estimator
from foreroute.runtime.cli import main as foreroute
from foreroute.train.cli import main as train_estimator

SUBCOMMANDS = (
    *("generate", "collect", "doctor", "bench", "simulate", "pack", "plan", "profile", "report"),
    *("compare-predictors", "score", "serve", "evaluate", "tune"),
)
COMMANDS = [
    (collect_traces, ()),
    (train_estimator, ()),
    (export_estimator, ()),
    *((foreroute, (name,)) for name in SUBCOMMANDS),
]


def help_of(monkeypatch, capsys, main, words) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *words, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "words"),
    COMMANDS,
    ids=lambda v: "-".join(v) or v if isinstance(v, tuple) else v.__module__,
)
def test_every_flag_has_words_and_a_type(monkeypatch, capsys, main, words):
    text = help_of(monkeypatch, capsys, main, words)
    options = re.split(r"\n(?=  -)", text.partition("options:")[2])[1:]
    assert len(options) > 3
    bare = [o for o in options if re.split(r"\s{2,}|\n", o.strip(), maxsplit=1)[1].startswith("(")]
    assert not bare
    assert "Unvalidated" not in text


def test_every_subcommand_is_looked_at(monkeypatch, capsys):
    text = help_of(monkeypatch, capsys, foreroute, ())
    listed = re.findall(r"^    ([a-z-]+) ", text, re.MULTILINE)
    assert set(listed) == set(SUBCOMMANDS)
