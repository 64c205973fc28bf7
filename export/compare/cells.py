"""Which predictors are compared: forms, inputs, horizons, sizes, and what others published."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from foreroute.estimators import FORMS, TRAINING_FREE_FORM, EstimatorSpec, InputKind, MoEGeometry
from foreroute.estimators.pairs import predictable_layers
from foreroute.estimators.priors import PriorName
from foreroute.train.losses import LossName
from foreroute.train.run import FitConfig, InitName

PAPER, PROMOE, SPEC_PREFETCH = "arXiv 2603.19289", "ProMoE", "SpecPrefetch"
"""Where a published form comes from; docs/estimators.md says what was changed."""
SMALL_RATE = 1e-3
"""Learning rate of forms that start from nothing."""
BUILT_IN = ("next-router", "low-rank", "ridge", "linear", "mlp", "mlp-free", "shared-mlp")
"""Forms that are compared in sizes and with inputs of their own; others with the default's."""
FURTHER = (2, 3, 4)
"""Horizons beyond the next layer."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is spent on a comparison."""

    tokens: int
    """Training tokens of the predictors of the next layer."""
    further_tokens: int
    """Training tokens of those of further layers and of the next token."""
    epochs: int = 5
    """Passes over them."""
    batch_size: int = 2048
    """Tokens per optimizer step."""
    learning_rate: float = 3e-3
    """Step size for forms that start from the next router."""
    wide: int = 0
    """Hidden units of a second, wide `mlp`; 0 for none."""
    shared: tuple[tuple[int, int], ...] = ((256, 1),)
    """Hidden units and hidden layers of each `shared-mlp`."""
    free_width: int = 256
    """Hidden units of `mlp-free`."""
    curve_shares: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 4)
    """Shares of the training tokens at which learning curves are measured too."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One predictor to fit and to measure."""

    form: str
    """Name of a form."""
    input_kind: InputKind
    """What is read."""
    horizon: int = 1
    """Layers ahead."""
    tokens_ahead: int = 0
    """Tokens ahead, 0 or 1."""
    rank: int = EstimatorSpec.rank
    """As in `EstimatorSpec`, as are the next two."""
    width: int = 256
    depth: int = 1
    loss: LossName = "boundary"
    """What training makes small."""
    init: InitName = "ridge"
    """Where `low-rank` starts."""
    epochs: int = 5
    """Passes over the training tokens."""
    batch_size: int = 2048
    """Tokens per optimizer step."""
    learning_rate: float = 3e-3
    """At the first step."""
    tokens: int = 0
    """Training tokens at most."""
    prior: PriorName = "none"
    """What is added to its scores, weighted layer by layer."""
    after: str = ""
    """Whose form it is, if it is published."""
    is_curve: bool = False
    """Whether it is a point of a learning curve only."""

    @property
    def slug(self) -> str:
        """Names its files."""
        words = [self.form, self.input_kind, f"h{self.horizon}t{self.tokens_ahead}"]
        words += [f"r{self.rank}w{self.width}d{self.depth}", self.loss, self.init]
        words += [self.prior.replace("-", "_"), str(self.tokens), self.after.replace(" ", "_")]
        return "-".join(word for word in words if word)

    @property
    def group(self) -> tuple[str, int, int, int]:
        """Cells that are alike in it share prepared tokens."""
        tokens = 0 if self.is_curve else self.tokens
        return self.input_kind, self.horizon, self.tokens_ahead, tokens

    def spec(self, geometry: MoEGeometry) -> EstimatorSpec:
        """The spec of this cell, over all layers that its horizon allows."""
        return EstimatorSpec(
            form=self.form,
            input_kind=self.input_kind,
            horizon=self.horizon,
            tokens_ahead=self.tokens_ahead,
            rank=self.rank,
            width=self.width,
            depth=self.depth,
            target_layers=predictable_layers(geometry, self.horizon),
        )

    def fit_config(self) -> FitConfig:
        """How it is trained."""
        return FitConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            loss=self.loss,
            init=self.init,
        )


def catalogue(
    scale: Scale, geometry: MoEGeometry, recorded: Iterable[str], *, has_anchors: bool
) -> list[Cell]:
    """Everything to compare on a model, cells that share prepared tokens next to each other.

    Args:
        scale: What to spend.
        geometry: The model's routing.
        recorded: Optional trace fields that are there.
        has_anchors: Whether the model's routers are known; without, forms that start from them and
            all inputs but the router's are left out.
    """
    cells = list(_every(scale, set(recorded), geometry.num_experts))
    if not has_anchors:
        free = ("linear", "mlp-free", "shared-mlp")
        cells = [
            dataclasses.replace(cell, input_kind="router-input")
            for cell in cells
            if cell.form in free and cell.input_kind == "quasi-hidden"
        ]
    within = [cell for cell in cells if cell.horizon < geometry.num_layers]
    return list(dict.fromkeys(within))


def _every(scale: Scale, recorded: set[str], num_experts: int) -> Iterator[Cell]:
    common = {"epochs": scale.epochs, "batch_size": scale.batch_size}

    def cell(form: str, input_kind: InputKind, horizon: int = 1, **changes: Any) -> Cell:
        is_near = horizon <= 1 and not changes.get("tokens_ahead")
        settings: dict[str, Any] = {"tokens": scale.tokens if is_near else scale.further_tokens}
        settings |= common | {"learning_rate": scale.learning_rate}
        return Cell(form=form, input_kind=input_kind, horizon=horizon, **(settings | changes))

    yield from _default_input(scale, cell, num_experts)
    yield from (cell(form, "router-input") for form in (TRAINING_FREE_FORM, "ridge", "low-rank"))
    yield cell(
        "low-rank",
        "router-input",
        after=SPEC_PREFETCH,
        loss="kl",
        init="zero",
        epochs=1,
        learning_rate=1e-4,
    )
    mlps = [256, scale.wide] if scale.wide else [256]
    if "readout" in recorded:
        for form in (TRAINING_FREE_FORM, "ridge", "low-rank"):
            yield cell(form, "attention-readout")
        yield from (cell("mlp", "attention-readout", width=width) for width in mlps)
    if "layer_input" in recorded:
        width = scale.free_width
        rates: dict[str, Any] = {"learning_rate": SMALL_RATE, "width": width}
        yield cell("mlp-free", "pre-attention", after=PROMOE, loss="bce", **rates)
        for form in (TRAINING_FREE_FORM, "ridge", "low-rank", "mlp"):
            yield cell(form, "pre-attention", 0)
    for horizon in FURTHER:
        for form in (TRAINING_FREE_FORM, "ridge", "low-rank", "mlp"):
            yield cell(form, "quasi-hidden", horizon)
    yield from (cell("low-rank", "quasi-hidden", 4, prior=p) for p in PRIORS)
    for horizon in FURTHER if "readout" in recorded else ():
        for form in (TRAINING_FREE_FORM, "low-rank"):
            yield cell(form, "attention-readout", horizon)
    for form in (TRAINING_FREE_FORM, "ridge", "low-rank", "mlp"):
        yield cell(form, "quasi-hidden", 0, tokens_ahead=1)
    yield from (cell("low-rank", "quasi-hidden", 0, tokens_ahead=1, prior=p) for p in PRIORS)


PRIORS: tuple[PriorName, ...] = ("previous-token", "decayed-frequency")


def _default_input(scale: Scale, cell: Any, num_experts: int) -> Iterator[Cell]:
    """All forms on the default input, one layer ahead, with learning curves."""
    free = {"learning_rate": SMALL_RATE}
    forms = [cell("ridge", "quasi-hidden"), cell("low-rank", "quasi-hidden")]
    if num_experts > EstimatorSpec.rank:  # the default's rank is not the full one
        forms.append(cell("low-rank", "quasi-hidden", rank=num_experts))
    forms.append(cell("mlp", "quasi-hidden"))
    if scale.wide:
        forms.append(cell("mlp", "quasi-hidden", width=scale.wide, **free))
    forms.append(cell("mlp-free", "quasi-hidden", width=scale.free_width, **free))
    forms += [cell(name, "quasi-hidden") for name in FORMS if name not in BUILT_IN]
    forms += [
        cell("shared-mlp", "quasi-hidden", width=w, depth=d, loss="kl", after=PAPER, **free)
        for w, d in scale.shared
    ]
    yield cell(TRAINING_FREE_FORM, "quasi-hidden")
    yield cell("linear", "quasi-hidden")
    yield from forms
    yield from (cell("low-rank", "quasi-hidden", prior=prior) for prior in PRIORS)
    for share in scale.curve_shares:
        for form in forms:
            tokens = round(scale.tokens * share)
            yield dataclasses.replace(form, tokens=tokens, is_curve=True)
