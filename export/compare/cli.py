"""The commands `foreroute compare-predictors` and `foreroute score`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from foreroute.export.compare.plan import ComparisonPlan
    from foreroute.export.compare.predicted import PredictedExperts
    from foreroute.export.compare.truth import TrueRouting


def compare_predictors(
    out: Path,
    model: str | None = None,
    dataset: str = "python-stdlib",
    also_test: str = "",
    forms: str = "all",
    inputs: str = "all",
    tokens: int | None = None,
    held_out_tokens: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 8,
    minutes: float = 60,
    disk: str = "8GiB",
    stream: str = "",
    quick: bool = False,
    readout_us: float = 0.0,
    model_name: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> None:
    """Record, train, calibrate and measure every form of predictor on one model, side by side.

    Killed at any point, or out of time, the same command goes on; with --out alone too.

    Args:
        out: Folder of the comparison: traces, predictions, one row a predictor, and index.html.
        model: bundled, a folder or a Hub id.
        dataset: Text to train on and, other documents of it, to measure on; as collect-traces.
        also_test: Text of other kinds to measure on too; a comma list.
        forms: Forms to compare: all, or a comma list.
        inputs: Inputs to compare: all that the model allows, or a comma list.
        tokens: Training tokens of the predictors of the next layer, further ones get a quarter;
            200,000 unless said, 16,384 with --quick.
        held_out_tokens: Tokens of each text that are measured on; 8,192, or 4,096 with --quick.
        sequence_length: Tokens of a sequence.
        batch_size: Sequences that the model runs over together.
        minutes: Begin nothing new after so many.
        disk: Most that training traces may take; fewer tokens are recorded if they need more.
        stream: Store no training traces: most memory for them, such as 20GiB. The model runs
            again over what does not fit.
        quick: Smaller forms, fewer tokens, hardly a learning curve: minutes on the bundled model.
        readout_us: What running one layer's attention early takes, microseconds; for the worth
            of predictors that read it.
        model_name: What tables call the model.
        device: auto, cpu or cuda.
        overwrite: Begin anew, whatever lies in the folder.
    """
    from foreroute.data.adapters import resolve_device
    from foreroute.estimators import FORMS, SOURCE_FIELDS
    from foreroute.estimators.output import claim
    from foreroute.export.compare.compare import Comparison
    from foreroute.export.compare.finish import add_hybrids, add_worth, write_results
    from foreroute.export.compare.page import write_page
    from foreroute.export.compare.plan import (
        FULL_TOKENS,
        QUICK_TOKENS,
        ComparisonPlan,
        open_comparison,
        scale_of,
    )
    from foreroute.train.quiet import quieten_lightning

    quieten_lightning()
    plan: ComparisonPlan | None = None
    if model is not None:
        plan = ComparisonPlan(
            model=model,
            dataset=dataset,
            other_datasets=_words(also_test),
            forms=() if forms == "all" else _known(_words(forms), FORMS),
            inputs=() if inputs == "all" else _known(_words(inputs), SOURCE_FIELDS),
            scale=scale_of(tokens or (QUICK_TOKENS if quick else FULL_TOKENS), is_quick=quick),
            held_out_tokens=held_out_tokens or (4096 if quick else 8192),
            sequence_length=sequence_length,
            batch_size=batch_size,
            disk=disk,
            stream=stream,
            model_name=model_name,
        )
    with claim(out):
        plan = open_comparison(out, plan, overwrite=overwrite)
        comparison = Comparison(plan, out, resolve_device(device), say=_say)
        left = comparison.measure(minutes)
        add_hybrids(comparison)
        worth = functools.partial(worth_on_profiles, on_demand={})
        add_worth(comparison, worth, readout_us)
        results = write_results(comparison, left)
        write_page(comparison, results)
        if left:
            _say(f"{left} predictors are left: the same command goes on with them.")
    print(out / "index.html")


def score(traces: Path, predictions: Path, json: Path | None = None, worth: bool = True) -> None:
    """Score anybody's predictions of where an MoE routes, as compare-predictors scores its own.

    Args:
        traces: A published trace set, traces of collect-traces, or a comparison's folder.
        predictions: A safetensors file: expert_ids [tokens, layers, predictions], likeliest first,
            -1 for none; target_layers [layers]; and, where known, confidence in 0..1.
        json: Write the figures there too.
        worth: Replay them on three machines for the time that they save; needs confidence.
    """
    from foreroute.estimators.artifacts import require_file_place, write_json
    from foreroute.export.compare.finish import saved_of
    from foreroute.export.compare.predicted import PredictedExperts
    from foreroute.export.compare.score import score as score_predictions
    from foreroute.export.compare.sources import find_truth

    require_file_place(json)
    truth = find_truth(traces)
    said = PredictedExperts.load(predictions)
    found = score_predictions(truth, said)
    if worth and said.confidence is not None:
        entries = worth_on_profiles(truth, [said], 0.0)
        found |= {"worth": entries} | saved_of(entries)
    for name, value in found.items():
        if isinstance(value, int | float | str):
            print(f"{name:20} {value}")
    if json is not None:
        write_json(json, found)
        print(json)


def worth_on_profiles(
    truth: TrueRouting,
    said: Sequence[PredictedExperts],
    extra_us: float,
    on_demand: dict[tuple[str, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """What predictions save on each of the machines that worth is told on; see `finish.Worth`.

    `on_demand` remembers what was replayed on demand, for further predictions of the same truth.
    """
    from foreroute.export.compare.finish import WORTH_TOKENS
    from foreroute.runtime.planning.machine import find_profile
    from foreroute.runtime.simulator import worth

    is_next_token = said[0].expert_ids.shape[0] < truth.num_tokens
    part = truth.first(WORTH_TOKENS)
    ids = part.expert_ids.numpy()
    route = worth.route_to_replay("the traces' held-out tokens", ids, truth.num_experts)
    entries = []
    for name in worth.PROFILES:
        profile = find_profile(name)
        if is_next_token:
            predictions = _over_all_tokens(part, said[0])
            entries += worth.worth_of_protecting(route, predictions, profile, on_demand=on_demand)
        else:
            predictions = worth.predictions_over_layers(
                [_arrays(part, p.first(WORTH_TOKENS)) for p in said], route.num_layers
            )
            entries += worth.worth_of(
                route, predictions, profile, extra_us=extra_us, on_demand=on_demand
            )
    return [entry.to_dict() for entry in entries]


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _known(words: tuple[str, ...], known: Collection[str]) -> tuple[str, ...]:
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"Unknown {', '.join(unknown)}; known: {', '.join(known)}.")
    return words


def _arrays(truth: TrueRouting, said: PredictedExperts) -> Any:
    assert said.confidence is not None
    places = truth.positions(said.target_layers)
    return said.expert_ids.numpy(), said.confidence.numpy(), places


def _over_all_tokens(truth: TrueRouting, said: PredictedExperts) -> Any:
    """Predictions of the tokens that follow another, set among all tokens."""
    import dataclasses

    import torch

    from foreroute.runtime.simulator.worth import predictions_over_layers

    assert said.confidence is not None
    followers = (~truth.starts).nonzero().squeeze(1)
    here = said.first(len(followers))
    shape = (truth.num_tokens, *here.expert_ids.shape[1:])
    ids, confidence = torch.full(shape, -1), torch.zeros(shape)
    ids[followers] = here.expert_ids.long()
    confidence[followers] = here.confidence if here.confidence is not None else 0.0
    whole = dataclasses.replace(here, expert_ids=ids, confidence=confidence)
    return predictions_over_layers([_arrays(truth, whole)], len(truth.layer_indices))


def _say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)
