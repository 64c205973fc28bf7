"""Hands an engine to lm-evaluation-harness: its own tasks, prompts and metrics, our decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from foreroute.estimators.artifacts import first_line
from foreroute.runtime.engine import Engine


class StepwiseLM(HFLM):  # type: ignore[misc]
    """Reads texts token by token, as decoding does.

    Speculative execution acts on decode steps alone: a text read in one wide pass is computed
    exactly, and its likelihood says nothing about what speculation costs.
    """

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits of a batch of texts padded on the right, [B, T, vocabulary]."""
        cache, logits = None, []
        with torch.no_grad():
            for at in range(inps.shape[1]):
                output = self.model(
                    input_ids=inps[:, at : at + 1], past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                logits.append(output.logits)
        return torch.cat(logits, dim=1)


def score(
    engine: Engine,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run tasks on an engine.

    The exact engine reads texts in one pass, like the stock model; a speculative one token by
    token, so that its price is in the figures.

    Args:
        engine: Open.
        tokenizer: The model's.
        tasks: Names that the harness knows.
        batch_size: Sequences per forward pass.
        limit: Examples per task; all if None.
        num_fewshot: Examples in the prompt; the task's own number if None.
        include_path: Folder with more tasks.
        seed: Of all that is drawn.

    Returns:
        Per task, its metrics as the harness names them, the standard errors left out.

    Raises:
        ValueError: If a task is unknown, or its data cannot be had.
    """
    manager = _manager(tasks, include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm_eval --tasks list` lists "
            "them, and --include-path takes a folder of your own."
        )
    wrapper = HFLM if engine.config.is_exact else StepwiseLM
    model = wrapper(pretrained=engine.model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ConnectionError) as error:
        raise ValueError(f"The data of a task cannot be had: {first_line(error)}") from error
    return {task: _figures(values) for task, values in found["results"].items()}


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Knows the user's own tasks, and the harness' own where those do not suffice: it has many."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """What is measured: names such as `acc,none`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and "stderr" not in name and isinstance(value, int | float)
    }
