"""What a comparison is to do, and the folder in which it is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from foreroute.estimators.artifacts import read_versioned, write_json
from foreroute.estimators.byte_sizes import parse_bytes
from foreroute.estimators.output import new_folder
from foreroute.export.compare.cells import Scale

FORMAT_VERSION = 1
PLAN_NAME = "comparison.json"
RESULTS_NAME = "results.json"
TRUTH_FOLDER, ROWS_FOLDER, PREDICTIONS_FOLDER = "truth", "rows", "predictions"
QUICK_TOKENS = 16_384
FULL_TOKENS = 200_000


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """Everything that decides what a comparison finds, but for the time it is given."""

    model: str
    """`bundled`, a local folder or a Hub id."""
    dataset: str
    """Text to train on and, other documents of it, to measure on."""
    other_datasets: tuple[str, ...] = ()
    """Text of other kinds, to measure on too."""
    scale: Scale
    """What is fitted, on how much."""
    forms: tuple[str, ...] = ()
    """Forms to compare; all if empty."""
    inputs: tuple[str, ...] = ()
    """Inputs to compare; all that can be recorded if empty."""
    held_out_tokens: int
    """Tokens of each text that everything is measured on."""
    sequence_length: int = 512
    """Tokens."""
    batch_size: int = 8
    """Sequences that the model runs over together."""
    disk: str = "8GiB"
    """Most that the training traces may take; fewer tokens are recorded if they need more."""
    stream: str = ""
    """If given, training traces are not stored: most memory for them, and the model runs again
    over what does not fit."""
    model_name: str = ""
    """What tables call the model."""

    def __post_init__(self) -> None:
        """Check the numbers a user can set.

        Raises:
            ValueError: If one cannot be used.
        """
        for name in ("held_out_tokens", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        parse_bytes(self.disk)
        if self.stream:
            parse_bytes(self.stream)

    @property
    def name(self) -> str:
        """What tables call the model."""
        return self.model_name or Path(self.model).name


def scale_of(tokens: int, *, is_quick: bool) -> Scale:
    """What is fitted on so many training tokens.

    Args:
        tokens: Of the predictors of the next layer; those of further layers get a quarter.
        is_quick: Leave out wide forms and most of the learning curves.
    """
    further = max(1, tokens // 4)
    if is_quick:
        return Scale(
            tokens=tokens,
            further_tokens=further,
            epochs=3,
            shared=((256, 1), (512, 2)),
            curve_shares=(1 / 4,),
        )
    return Scale(
        tokens=tokens,
        further_tokens=further,
        wide=2048,
        shared=((256, 1), (2048, 2), (2048, 5)),
        free_width=1024,
    )


def open_comparison(
    folder: Path, plan: ComparisonPlan | None, *, overwrite: bool
) -> ComparisonPlan:
    """Begin a comparison's folder, or go on with the one that is there.

    Args:
        folder: Of the comparison.
        plan: What to do; None to go on with what is there.
        overwrite: Begin anew, whatever is there.

    Raises:
        ValueError: If there is another comparison, something else, or nothing to go on with.
    """
    path = folder / PLAN_NAME
    if path.is_file() and not overwrite:
        there = read_versioned(
            path, FORMAT_VERSION, ComparisonPlan, "Compare again with --overwrite."
        )
        if plan is not None and plan != there:
            changed = [
                field.name
                for field in dataclasses.fields(plan)
                if getattr(plan, field.name) != getattr(there, field.name)
            ]
            raise ValueError(
                f"{folder} was begun with another {', '.join(changed)}. Go on with the same "
                "settings, choose another --out, or pass --overwrite."
            )
        return there
    if plan is None:
        raise ValueError(f"{folder} holds no comparison to go on with; give a --model.")
    inputs = (plan.model, plan.dataset, *plan.other_datasets)
    with new_folder(folder, "comparison", overwrite=overwrite, inputs=inputs) as partial:
        for name in (TRUTH_FOLDER, ROWS_FOLDER, PREDICTIONS_FOLDER):
            (partial / name).mkdir()
        write_json(
            partial / PLAN_NAME, dataclasses.asdict(plan) | {"format_version": FORMAT_VERSION}
        )
    return plan
