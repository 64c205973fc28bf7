"""The engine on a GPU: residency on the device, and one CUDA graph for each decode step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foreroute.runtime.config import EngineConfig
from foreroute.runtime.decode_graph import DecodeGraph
from foreroute.runtime.device_layer import DeviceLayer, DeviceRun
from foreroute.runtime.engine import Engine
from foreroute.runtime.expert_form import find_expert_form
from foreroute.runtime.fusions import fuse_norms
from foreroute.runtime.graph_sampling import decode_loop
from foreroute.runtime.kernels.plan import HITS, MISSES, PREFETCHES, WASTED, lrfu
from foreroute.runtime.offload import OffloadedModel
from foreroute.runtime.prefill import StreamedPrefill
from foreroute.runtime.stats import PhaseStats, RuntimeStats

HALF_LIFE_STEPS = 20.0
PREFILL_GROUP = 16
UNSUPPORTED_ARGUMENTS = (
    "return_dict_in_generate",
    "past_key_values",
    "assistant_model",
    "inputs_embeds",
    "prompt_lookup_num_tokens",
    "custom_generate",
)


def why_not_on_device(offloaded: OffloadedModel, config: EngineConfig) -> str | None:
    """What keeps this model from deciding on the GPU, in one line; None if nothing does."""
    if offloaded.device.type != "cuda":
        return "it needs a CUDA device"
    if not config.is_exact or config.cache == "none":
        return "speculative execution and running without a cache are decided on the host"
    if len(set(map(_shape_of, offloaded.store.layouts))) > 1:
        return "its layers have experts of different shapes"
    if any(layout.encoded for layout in offloaded.store.layouts):
        return "its experts are stored in fewer bits, which the kernels do not decode"
    if find_expert_form(offloaded.moe.layers[0].experts) is None:
        return "its experts' activation has no kernel"
    return None


def _shape_of(layout: Any) -> tuple[Any, ...]:
    return tuple((name, spec.shape, spec.dtype) for name, spec in layout.parameters.items())


class GraphEngine(Engine):
    """Runs an offloaded model with every decision on the GPU; always exact."""

    layers: list[DeviceLayer]  # type: ignore[assignment]

    def _make_layers(self) -> list[DeviceLayer]:  # type: ignore[override]
        offloaded, store = self.offloaded, self.offloaded.store
        form = find_expert_form(offloaded.moe.layers[0].experts)
        assert form is not None  # `why_not_on_device` was asked before
        self._device_run = DeviceRun(
            rule=lrfu(HALF_LIFE_STEPS),
            form=form,
            prefill=StreamedPrefill(store.layouts[0], PREFILL_GROUP, self.device),
            prefetcher=self._run.prefetcher,
            ahead=torch.cuda.Stream(device=self.device, priority=-1),
        )
        self._graph: DecodeGraph | None = None
        return [
            DeviceLayer(layer, rows, layout, self.num_slots, self._device_run, self.device)
            for layer, rows, layout in zip(
                offloaded.moe.layers, store.rows, store.layouts, strict=True
            )
        ]

    def _attach(self) -> None:
        super()._attach()
        fuse_norms(self.model, self._attachments)

    def _begin_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._begin_forward(module, args, kwargs)
        self._device_run.is_prefill = self._run.is_prefill

    def _decoding(self, settings: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Decode steps are replays of one captured graph, unless something else is asked for."""
        if any(map(settings.get, UNSUPPORTED_ARGUMENTS)):
            return {}
        # transformers hands no streamer to a callable: it must come along
        return {"custom_generate": partial(self._decode_loop, streamer=streamer)}

    def _decode_loop(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        graph = self.graph_for(len(input_ids), int(generation_config.max_length))
        return decode_loop(
            model,
            graph,
            input_ids,
            mask,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            on_step=self._count_step,
        )

    def _count_step(self) -> None:
        self._run.stats.decode.forwards += 1

    def graph_for(self, batch: int, length: int) -> DecodeGraph:
        """The captured step for so many sequences of at most this length; captured when needed."""
        graph = self._graph
        if graph is None or graph.batch != batch or graph.length < length:
            self._graph = None  # its cache's memory is free before the next one's is taken
            stats, self._run.stats = self._run.stats, RuntimeStats()
            counters = [layer.tables.counters.clone() for layer in self.layers]
            routers = [layer.router for layer in self.offloaded.moe.layers]
            self._graph = DecodeGraph(self.model, batch, length, routers)
            for layer, before in zip(self.layers, counters, strict=True):
                layer.tables.counters.copy_(before)
            self._run.stats = stats
        assert self._graph is not None
        return self._graph

    def stats(self) -> RuntimeStats:
        """Counters and times so far; reads the counters off the device."""
        stats, expert_bytes = self._run.stats, self.offloaded.expert_bytes
        totals = torch.stack([layer.tables.counters for layer in self.layers]).sum(0).tolist()
        stats.decode = PhaseStats(
            forwards=stats.decode.forwards,
            lookups=totals[HITS] + totals[MISSES],
            hits=totals[HITS],
            misses=totals[MISSES],
            fetched_bytes=totals[MISSES] * expert_bytes,
            prefetches=totals[PREFETCHES],
            prefetched_bytes=totals[PREFETCHES] * expert_bytes,
            wasted_bytes=totals[WASTED] * expert_bytes,
        )
        stats.prefill.fetched_bytes = self._device_run.prefill.prompt_bytes
        return stats

    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        super().reset_stats()
        self._device_run.prefill.prompt_bytes = 0
        for layer in self.layers:
            layer.tables.counters.zero_()

    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        for layer in self.layers:
            layer.fill()
        self.reset_stats()

    def check_integrity(self) -> None:
        """Check every layer's tables, and each slot against its host row.

        Raises:
            RuntimeError: If they disagree.
        """
        torch.cuda.synchronize(self.device)
        for layer in self.layers:
            layer.check_integrity()

    def close(self) -> None:
        """Detach from the model and drop the captured graph."""
        self._graph = None
        super().close()
