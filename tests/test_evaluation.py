"""lm-evaluation-harness on an engine: exact figures are stock's, speculation has its price."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from foreroute.data.adapters import load_model, load_tokenizer
from foreroute.runtime import Engine
from foreroute.runtime.evaluation.score import StepwiseLM, score

TASKS = ("next_line", "write_line", "text_bits")
DOCUMENTS = [
    {"text": "def parse(line):\n    return int(line)\n", "right": "return", "wrong": "import"},
    {"text": "class Reader:\n    def rows(self):\n        pass\n", "right": "pass", "wrong": "x"},
    {"text": "with open(path) as file:\n    yield file\n", "right": "yield", "wrong": "class"},
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
BODIES = {
    "next_line": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{[right, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "write_line": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "text_bits": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    for name, body in BODIES.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + body)
    return folder


def test_exact_figures_are_the_stock_models(tiny_moe: Any, tasks: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    stock = load_model(str(tiny_moe.folder))
    stock.set_experts_implementation("batched_mm")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=2)
    expected = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3") as engine:
        found = score(engine, tokenizer, TASKS, batch_size=2, include_path=tasks)
        assert engine.stats().decode.forwards > 0  # the harness generated through the engine
    for task, values in found.items():
        assert values
        for metric, value in values.items():
            assert expected["results"][task][f"{metric},none"] == value, (task, metric)


def test_reading_token_by_token_gives_the_same_logits_within_rounding(tiny_moe: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    tokens = torch.arange(5, 17).view(2, 6)
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3") as engine:
        given = {"pretrained": engine.model, "tokenizer": tokenizer}
        wide, stepwise = HFLM(**given), StepwiseLM(**given)
        expected, got = wide._model_call(tokens), stepwise._model_call(tokens)
    assert torch.allclose(got, expected, atol=1e-4)  # products of other shapes round otherwise


def test_speculation_changes_the_likelihoods_it_is_scored_by(tiny_moe: Any, tasks: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_moe.folder))
    bits = []
    for on_miss in ("fetch", "skip"):
        settings = {"expert_slots": "2", "on_miss": on_miss, "agreement_floor": 0.0}
        with Engine.from_pretrained(str(tiny_moe.folder), **settings) as engine:
            found = score(engine, tokenizer, ["text_bits"], include_path=tasks)
            bits.append(found["text_bits"]["bits_per_byte"])
            assert engine.stats().agreement == 1 if on_miss == "fetch" else True
    assert bits[0] != bits[1]


def test_unknown_tasks_are_refused_in_one_line(tiny_moe: Any, tasks: Path) -> None:
    with Engine.from_pretrained(str(tiny_moe.folder), expert_slots="3") as engine:
        tokenizer = load_tokenizer(str(tiny_moe.folder))
        with pytest.raises(ValueError, match="knows no task 'no_such_task'"):
            score(engine, tokenizer, ["no_such_task"], include_path=tasks)
