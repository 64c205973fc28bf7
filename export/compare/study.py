"""Fits and measures groups of cells that share prepared tokens."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.data.traces import Traces
from foreroute.estimators import SOURCE_FIELDS, TRAINING_FREE_FORM, EstimatorSpec, EstimatorStack
from foreroute.estimators.calibration import membership
from foreroute.estimators.expected_cost import FetchCosts, expected_cost
from foreroute.estimators.priors import PriorName, prior_scores
from foreroute.export.compare.cells import Cell
from foreroute.export.compare.parts import FirstTokens, InMemory, ShuffledLabels
from foreroute.export.compare.predicted import PredictedExperts
from foreroute.export.compare.score import PREDICTIONS_PER_EXPERT
from foreroute.train.calibrate import MarginHistogram
from foreroute.train.datamodule import BatchStream, Shards
from foreroute.train.fit import train_stack
from foreroute.train.measure import MEASURE_BATCH, predictor_of
from foreroute.train.prepared import PreparedBatch, PreparedShards, prepare
from foreroute.train.prior import fit_prior_weights
from foreroute.train.ridge import set_to_ridge
from foreroute.train.shards import PairedShards, RoutingBatch
from foreroute.train.split import split_off_validation
from foreroute.train.stacks import build_stack

CHOOSING_TOKENS = 16_384
"""Tokens that probabilities, shares and priors are chosen by, at most."""
CHECK_TOKENS = 65_536
"""Tokens that a check learns from, at most: what it needs of them is in memory at once."""
VECTOR_TOKENS = 65_536
"""Tokens that default vectors are means over, at least where there are so many."""


class Tests(NamedTuple):
    """What is measured on: never trained on, and in the order of its `TrueRouting`."""

    name: str
    traces: Traces


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one cell."""

    predicted: dict[str, PredictedExperts]
    """By name of the tests."""
    stack: EstimatorStack
    training_tokens: int
    seconds: float
    """Fitting alone."""
    chosen_cost: list[float]
    """Expected cost of each pair on the tokens to choose by, in copies of one expert per token."""


class Study:
    """One model's traces, and what each predictor makes of them."""

    def __init__(self, traces: Traces, tests: Sequence[Tests], device: torch.device) -> None:
        """Split the training traces by sequence.

        Args:
            traces: To train on and to choose by.
            tests: To measure on; other documents.
            device: Where to fit and to predict.
        """
        self.traces, self.tests, self.device = traces, tests, device
        self.geometry = traces.geometry
        fitting, choosing = split_off_validation(range(traces.num_sequences))
        most = max(1, CHOOSING_TOKENS // max(1, traces.num_tokens // traces.num_sequences))
        self.fitting, self.choosing = fitting, choosing[-most:]
        self.vectors = traces.default_vectors(self._first_shards(VECTOR_TOKENS))[0]

    def _first_shards(self, num_tokens: int) -> list[int]:
        found, total = [], 0
        for shard in self.traces.manifest.shards:
            if total < num_tokens:
                found.append(shard.shard_idx)
                total += shard.num_tokens
        return found

    def stack(self, cell: Cell) -> EstimatorStack:
        """A fresh stack on the device."""
        torch.manual_seed(0)
        return build_stack(self.traces, cell.spec(self.geometry), self.vectors, self.device)

    def shards(self, spec: EstimatorSpec, sequences: range) -> PairedShards:
        """Training tokens as the spec pairs them."""
        fields = SOURCE_FIELDS[spec.input_kind]
        return PairedShards(self.traces, spec, sequences, source_fields=fields, cache_bytes=0)

    def predicted(
        self, layers: tuple[int, ...], scores: Tensor, probabilities: Tensor | None
    ) -> PredictedExperts:
        """The best-ranked experts of some layers."""
        count = PREDICTIONS_PER_EXPERT * self.geometry.top_k
        return PredictedExperts.of_scores(scores, probabilities, layers, count)

    def predict_leaked(self, cell: Cell) -> dict[str, PredictedExperts]:
        """The target routers on their own input, as if it were known: must be right.

        Args:
            cell: Of the next router on router input.

        Returns:
            Of the first tests alone.
        """
        stack, test = self.stack(cell), self.tests[0]
        own = dataclasses.replace(stack.spec, input_kind="pre-attention", horizon=0)
        sequences = range(test.traces.num_sequences)
        shards = PairedShards(
            test.traces, own, sequences, source_fields=("router_input",), cache_bytes=0
        )
        with torch.inference_mode():
            scores = [predictor_of(stack)(batch) for batch in _batches(shards, self.device)]
        return {test.name: self.predicted(stack.target_layers, torch.cat(scores, dim=1), None)}


class Group:
    """Tokens that the cells of one group share, prepared once."""

    def __init__(self, study: Study, cells: Sequence[Cell]) -> None:
        """Read and prepare.

        Args:
            study: The traces.
            cells: Of one group.
        """
        self._study = study
        self._fits: dict[Cell, tuple[EstimatorStack, int]] = {}
        plain = study.stack(_plain(cells[0], is_anchored=study.traces.anchors is not None))
        spec = plain.spec
        self._choosing = _batches(study.shards(spec, study.choosing), study.device)
        self._prepared = InMemory([prepare(plain, batch) for batch in self._choosing])
        self._tests = {
            test.name: _batches(_test_shards(test, spec), study.device) for test in study.tests
        }
        most = max(cell.tokens for cell in cells)
        shards = FirstTokens(study.shards(spec, study.fitting), most)
        self._fitting = PreparedShards(plain, shards, seed=0)

    def measure(self, cell: Cell) -> Outcome:
        """Fit one cell and predict with it."""
        start = time.monotonic()
        stack, num_tokens = self._fitted(cell)
        seconds = time.monotonic() - start
        scores, ids = self._scored(stack, self._choosing)
        weights = None
        if cell.prior != "none":
            prior = self._prior(cell.prior, self._choosing)
            weights = fit_prior_weights(scores, prior, ids)
            scores = _with_prior(scores, prior, weights)
        histogram = MarginHistogram(self._study.geometry.top_k)
        histogram.update(scores, ids)
        calibration = histogram.fit("isotonic").to(self._study.device)
        predicted = {}
        for name, batches in self._tests.items():
            found, _ = self._scored(stack, batches)
            if weights is not None:
                found = _with_prior(found, self._prior(cell.prior, batches), weights)
            predicted[name] = self._study.predicted(stack.target_layers, found, calibration(found))
        is_true = membership(ids, self._study.geometry.num_experts)
        cost = expected_cost(calibration(scores), is_true, FetchCosts()).mean(dim=1)
        return Outcome(
            predicted=predicted,
            stack=stack,
            training_tokens=num_tokens,
            seconds=round(seconds, 1),
            chosen_cost=cost.tolist(),
        )

    def predict_shuffled(self, cell: Cell) -> dict[str, PredictedExperts]:
        """Predictions of a form fitted to the routing of other tokens: what is left is frequency.

        Returns:
            By name of the tests.
        """
        stack = self._study.stack(cell)
        labels = ShuffledLabels(FirstTokens(self._fitting, min(cell.tokens, CHECK_TOKENS)))
        _fit(stack, cell, labels, InMemory[PreparedBatch]([]))
        return {
            name: self._study.predicted(stack.target_layers, self._scored(stack, batches)[0], None)
            for name, batches in self._tests.items()
        }

    def predict_by_prior(self, name: PriorName, cell: Cell) -> dict[str, PredictedExperts]:
        """What a prior alone predicts of the layers of a cell, by name of the tests."""
        layers = cell.spec(self._study.geometry).target_layers
        return {
            test: self._study.predicted(layers, self._prior(name, batches), None)
            for test, batches in self._tests.items()
        }

    def predict_by_frequency(self, cell: Cell) -> dict[str, PredictedExperts]:
        """Each layer's most frequent experts on the training tokens, by name of the tests."""
        layers = cell.spec(self._study.geometry).target_layers
        num_experts = self._study.geometry.num_experts
        training = FirstTokens(self._fitting, cell.tokens)
        counts = sum(
            membership(training.read(shard_idx).target_ids.to(self._study.device), num_experts)
            .sum(dim=1)
            .float()
            for shard_idx in training.rows
        )
        assert isinstance(counts, Tensor)
        return {
            name: self._study.predicted(
                layers,
                counts.unsqueeze(1).expand(-1, sum(b.num_tokens for b in batches), -1),
                None,
            )
            for name, batches in self._tests.items()
        }

    def _fitted(self, cell: Cell) -> tuple[EstimatorStack, int]:
        """A trained stack, and the tokens it learned from; fitted once for all priors."""
        plain = dataclasses.replace(cell, prior="none")
        if plain not in self._fits:
            stack, num_tokens = self._study.stack(cell), 0
            if list(stack.parameters()):
                fitting = FirstTokens(self._fitting, cell.tokens)
                num_tokens = fitting.num_tokens
                _fit(stack, cell, fitting, self._prepared)
            self._fits[plain] = (stack.eval().requires_grad_(False), num_tokens)
        return self._fits[plain]

    @torch.inference_mode()
    def _scored(
        self, stack: EstimatorStack, batches: Sequence[RoutingBatch]
    ) -> tuple[Tensor, Tensor]:
        """What experts are ranked by, [P, T, E], and the true ones, [P, T, K]."""
        predict = predictor_of(stack)
        scores = torch.cat([predict(batch) for batch in batches], dim=1)
        return scores, torch.cat([batch.target_ids for batch in batches], dim=1)

    def _prior(self, name: PriorName, batches: Sequence[RoutingBatch]) -> Tensor:
        previous = torch.cat([batch.previous_ids for batch in batches], dim=1)
        starts = torch.cat([batch.starts for batch in batches])
        return prior_scores(name, previous, starts, self._study.geometry.num_experts)


def _plain(cell: Cell, *, is_anchored: bool) -> Cell:
    """A cell of the same input and layers that has nothing to fit, or nothing to start from."""
    form = TRAINING_FREE_FORM if is_anchored else "linear"
    return dataclasses.replace(cell, form=form, prior="none")


def _batches(shards: PairedShards, device: torch.device) -> list[RoutingBatch]:
    """All tokens on the device, in order, a few thousand at a time."""
    return [batch.to(device) for batch in BatchStream(shards, MEASURE_BATCH)]


def _test_shards(test: Tests, spec: EstimatorSpec) -> PairedShards:
    sequences, fields = range(test.traces.num_sequences), SOURCE_FIELDS[spec.input_kind]
    return PairedShards(test.traces, spec, sequences, source_fields=fields, cache_bytes=0)


def _with_prior(scores: Tensor, prior: Tensor, weights: Tensor) -> Tensor:
    return torch.addcmul(scores, prior, weights.view(-1, 1, 1))


def _fit(
    stack: EstimatorStack,
    cell: Cell,
    fitting: Shards[PreparedBatch],
    choosing: Shards[PreparedBatch],
) -> None:
    """Train a stack in place, as `train-estimator` does."""
    if stack.form.is_closed_form:
        set_to_ridge(stack, (fitting.read(shard_idx) for shard_idx in fitting.rows))
        return
    with tempfile.TemporaryDirectory() as folder, fast_products():
        config = cell.fit_config()
        train_stack(stack, fitting, choosing, config, Path(folder), show_progress=False)


@contextmanager
def fast_products() -> Iterator[None]:
    """Products in TF32 on a GPU, while a form is trained; predictions are float32 throughout."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
