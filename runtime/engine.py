"""The runtime engine: generates with a model whose experts are in host memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from foreroute.data.adapters import MoELayer, first_tensor, routed_through, router_logits_of
from foreroute.data.adapters.early_attention import decoder_layer
from foreroute.data.adapters.seam import SEAM_NAME
from foreroute.estimators.stack import EstimatorStack
from foreroute.export.bundle import load_bundle
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.early_readout import EarlyReadouts
from foreroute.runtime.host.layer import OffloadedLayer
from foreroute.runtime.host.ledger import TRIAL_STEPS, HostLedger, time_copy
from foreroute.runtime.host.predictor import HostPredictor
from foreroute.runtime.host.residency import Residency
from foreroute.runtime.host.run_state import RunState
from foreroute.runtime.host.slot_cache import SlotCache
from foreroute.runtime.host.speculation import AgreementGuard, gate_weights_of
from foreroute.runtime.host.transfers import Transfers
from foreroute.runtime.planning.machine import find_profile
from foreroute.runtime.policies import GiveUp, PrefetchChooser, find_policy, find_prefetch_rule
from foreroute.runtime.slot_plan import plan_slots, read_recording
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded
from foreroute.runtime.streamer import TimingStreamer

logger = logging.getLogger(__name__)

ATTENTION_SHARE = 0.5
"""Of a layer's compute, taken to be its attention: what there is to hide behind of a fetch for
experts that are predicted from their own layer's input."""


class Engine:
    """Runs one offloaded model under one configuration, until closed.

    Example:
        >>> engine = Engine.from_pretrained("bundled", expert_slots="25%")  # doctest: +SKIP
        >>> ids = engine.generate(**inputs, max_new_tokens=64)              # doctest: +SKIP
        >>> engine.stats().hit_rate                                         # doctest: +SKIP
    """

    def __init__(
        self, offloaded: OffloadedModel, config: EngineConfig, stack: EstimatorStack | None = None
    ) -> None:
        """Attach to a model; other engines on the same model must be closed.

        Args:
            offloaded: The model and its experts' store.
            config: How to run it.
            stack: Estimators that predict; if None, the training-free next router.

        Raises:
            ValueError: If the configuration does not fit the model.
        """
        self.offloaded = offloaded
        self.config = config
        self.model = offloaded.moe.model
        self.geometry = geometry = offloaded.moe.geometry
        self.device = offloaded.device
        recording = read_recording(offloaded, config)
        self.slots_per_layer = plan_slots(offloaded, config, recording)
        if config.on_miss == "predicted":  # refuse unknown gate rules before anything runs
            one = torch.zeros(1, 1)
            gate_weights_of(one, one.long(), geometry.gate_family, 1.0, torch.float32)
        self._run = RunState(
            config=config,
            gate_family=geometry.gate_family,
            gate_scale=geometry.gate_scale,
            transfers=Transfers.for_device(self.device),
            predictor=self._make_predictor(stack),
            guard=AgreementGuard(config.agreement_floor),
            policy=find_policy(config.eviction),
            chooser=self._make_chooser(),
        )
        self.layers = self._make_layers()
        self._link_targets()
        self._run.give_up = self._make_give_up()
        if recording is not None:
            self._warm([list(layer) for layer in zip(*recording.rows(), strict=True)])
        self._attachments = contextlib.ExitStack()
        self._attach()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        bundle: str | Path | None = None,
        expert_slots: str | int = "25%",
        prefetch: str | None = None,
        on_miss: str = "fetch",
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        expert_dtype: str = "auto",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Engine:
        """Load a model with its experts in host memory, and estimators if there is a bundle.

        Args:
            model: `bundled`, a local folder or a Hub id.
            bundle: Folder that `export-estimator` wrote.
            expert_slots: Slots per MoE layer, `8` or `25%`.
            prefetch: `none`, `auto` or `all`; unless said, auto if there is a bundle.
            on_miss: `fetch` (exact), `skip` or `predicted`.
            device: `auto`, `cpu` or `cuda`.
            dtype: `auto`, `float32`, `bfloat16`, `float16`, or one of torch's; `torch_dtype` is
                taken as another name for it.
            revision: Branch, tag or commit of a Hub id.
            expert_dtype: How experts are stored and copied: `auto` (as the checkpoint has them),
                `bf16`, `fp8`, `int8` or `int4`; fewer bits than the checkpoint change the output.
            trust_remote_code: Run code that came with the checkpoint.
            **settings: Other fields of `EngineConfig`.

        Raises:
            ValueError: If the model, the bundle and the settings do not fit together.
            FileNotFoundError: If the model or the bundle is missing.
        """
        dtype = settings.pop("torch_dtype", dtype)
        config = EngineConfig(
            expert_slots=str(expert_slots),
            prefetch=prefetch or ("auto" if bundle else "none"),  # type: ignore[arg-type]
            on_miss=on_miss,  # type: ignore[arg-type]
            **settings,
        )
        loaded = load_bundle(Path(bundle)) if bundle else None
        offloaded = load_offloaded(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            expert_dtype=expert_dtype,
            trust_remote_code=trust_remote_code,
        )
        if loaded is not None:
            loaded.require_fits(offloaded.moe.geometry)
        return cls.open(offloaded, config, loaded.stack if loaded else None)

    @classmethod
    def open(
        cls, offloaded: OffloadedModel, config: EngineConfig, stack: EstimatorStack | None = None
    ) -> Engine:
        """The engine that fits model, device and configuration: decisions on the GPU if possible.

        Args:
            offloaded: The model and its experts' store.
            config: How to run it.
            stack: Estimators that predict.
        """
        if offloaded.device.type == "cuda" and config.decide_on != "host":
            from foreroute.runtime.device.driver import GraphEngine, why_not_on_device

            reason = why_not_on_device(offloaded, config, stack)
            if reason is None:
                return GraphEngine(offloaded, config, stack)
            logger.info("Decoding is driven by the host: %s.", reason)
        return Engine(offloaded, config, stack)

    def _make_predictor(self, stack: EstimatorStack | None) -> HostPredictor | None:
        if not self.config.looks_ahead:
            return None
        geometry = self.geometry
        budget = self.config.budget or geometry.top_k
        if budget > geometry.num_experts:
            raise ValueError(
                f"budget {budget} is more than the {geometry.num_experts} experts of a layer."
            )
        if self.config.on_miss == "predicted" and budget < geometry.top_k:
            raise ValueError(
                f"on_miss=predicted runs {geometry.top_k} predicted experts: the budget must be at "
                f"least that, not {budget}."
            )
        if stack is None:
            stack = EstimatorStack.training_free(geometry, self.offloaded.moe.anchors)
        stack, readouts = stack.to(self.device), None
        if "readout" in stack.input_fields:
            readouts = EarlyReadouts(self.offloaded.moe, stack)
        return HostPredictor(stack, budget, readouts)

    def _make_chooser(self) -> PrefetchChooser | None:
        """What decides on prefetches; speculative execution needs every prediction."""
        config, geometry = self.config, self.geometry
        if config.prefetch != "auto" or not config.is_exact:
            return None
        machine, expert_bytes = find_profile(config.profile), self.offloaded.expert_bytes
        return PrefetchChooser(
            rule=find_prefetch_rule("whole"),
            layer_ms=machine.layer_ms_for(geometry.top_k * expert_bytes),
            copy_ms=machine.copy_ms(expert_bytes),
        )

    def _make_give_up(self) -> GiveUp | None:
        """What ends prefetching that does not pay; speculative execution always looks ahead."""
        run = self._run
        if run.chooser is None:
            return None
        if not run.transfers.can_hide:
            logger.info("Nothing is prefetched: copies to this device hide behind nothing.")
            return GiveUp(None, 0)
        first = self.layers[0].residency
        copy_ms = time_copy(run.transfers, first.rows[0], first.cache.slots[0])
        run.ledger = HostLedger(copy_ms)
        return GiveUp(run.ledger, TRIAL_STEPS)

    def _warm(self, rows: list[list[tuple[int, ...]]]) -> None:
        """Fill the slots with what a recording used most, [L][T], not counted in the statistics."""
        for layer, uses in zip(self.layers, rows, strict=True):
            layer.residency.warm(uses)

    @property
    def num_slots(self) -> int:
        """Slots per MoE layer; the mean where layers have different ones."""
        return round(sum(self.slots_per_layer) / len(self.slots_per_layer))

    def _make_layers(self) -> list[OffloadedLayer]:
        store = self.offloaded.store
        layers = []
        for moe_layer, rows, layout, num_slots in zip(
            self.offloaded.moe.layers, store.rows, store.layouts, self.slots_per_layer, strict=True
        ):
            cache = SlotCache(
                moe_layer.num_experts, num_slots, layout, self.device, self._run.policy
            )
            layers.append(OffloadedLayer(moe_layer, Residency(rows, cache, self._run), self._run))
        return layers

    def _link_targets(self) -> None:
        """Tell each layer which one its state predicts."""
        predictor = self._run.predictor
        by_idx: dict[int, Any] = {layer.layer_idx: layer for layer in self.layers}
        for layer in self.layers:
            target_idx = predictor.target_of(layer.layer_idx) if predictor else None
            layer.target = by_idx[target_idx] if target_idx is not None else None
            if layer.target is not None:
                distance = self.layers.index(layer.target) - self.layers.index(layer)
                layer.target.seen_from = distance or ATTENTION_SHARE

    def _attach(self) -> None:
        if self.model.get_experts_implementation() == {"": SEAM_NAME}:
            raise ValueError("This model is attached to another engine; close that one first.")
        moe_layers = self.offloaded.moe.layers
        handlers = {m.experts: own for m, own in zip(moe_layers, self.layers, strict=True)}
        self._attachments.enter_context(routed_through(self.model, handlers))
        needs_logits = self.config.on_miss == "predicted" and self.config.weights == "true"
        needs_logits = needs_logits or self._run.policy.likely_bonus > 0
        predictor = self._run.predictor
        if predictor is not None and predictor.readouts is not None:
            predictor.readouts.attach(self._attachments, lambda: not self._run.is_prefill)
        for moe_layer, own in zip(moe_layers, self.layers, strict=True):
            if predictor is not None:
                self._hook_residual(moe_layer, own)
                if moe_layer.is_input_apart:
                    self._hook_router_input(moe_layer, own)
                if "layer_input" in predictor.stack.input_fields:
                    self._hook_layer_input(moe_layer, own)
            if needs_logits:
                self._hook_router(moe_layer, own)
        handle = self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        self._attachments.callback(handle.remove)

    def _hook_residual(self, moe_layer: MoELayer, own: OffloadedLayer) -> None:
        def keep(_: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
            own.residual = first_tensor(inputs, settings).flatten(0, -2)

        source = moe_layer.residual_source
        handle = source.register_forward_pre_hook(keep, with_kwargs=True)
        self._attachments.callback(handle.remove)

    def _hook_layer_input(self, moe_layer: MoELayer, own: OffloadedLayer) -> None:
        def keep(_: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
            own.layer_input = first_tensor(inputs, settings).flatten(0, -2)
            if own.target is own and not self._run.is_prefill:
                own.expect_own(own.layer_input)

        decoder = decoder_layer(self.offloaded.moe, moe_layer)
        handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
        self._attachments.callback(handle.remove)

    def _hook_router_input(self, moe_layer: MoELayer, own: OffloadedLayer) -> None:
        def keep(_: nn.Module, inputs: tuple[Any, ...], settings: dict[str, Any]) -> None:
            own.router_input = first_tensor(inputs, settings).flatten(0, -2)

        handle = moe_layer.router.register_forward_pre_hook(keep, with_kwargs=True)
        self._attachments.callback(handle.remove)

    def _hook_router(self, moe_layer: MoELayer, own: OffloadedLayer) -> None:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            own.router_logits = router_logits_of(output, moe_layer.num_experts)

        self._attachments.callback(moe_layer.router.register_forward_hook(keep).remove)

    def _begin_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass over one token per sequence is a decode step, any other is prefill."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        self._run.is_prefill = tokens.shape[1] > 1
        self._run.phase.forwards += 1
        if not self._run.is_prefill:
            self._run.begin_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass of the model, through the engine."""
        with self._must_really_run(), torch.no_grad():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate tokens; takes what transformers' `generate` takes and returns what it returns.

        Inputs are moved to the engine's device. Times go into `stats()` (not with beam search,
        which hands out no tokens while it runs).
        """
        args = tuple(self._on_device(value) for value in args)
        kwargs = {name: self._on_device(value) for name, value in kwargs.items()}
        kwargs.setdefault("disable_compile", True)  # the host decides between layers
        if not _uses_beams(kwargs):
            streamer = TimingStreamer(self._run.stats, streamer)
            kwargs |= self._decoding(kwargs, streamer)
        with self._must_really_run():
            return self.model.generate(*args, streamer=streamer, **kwargs)

    def _decoding(self, settings: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """What else `generate` is called with, where an engine decodes in its own way."""
        return {}

    def _on_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @contextlib.contextmanager
    def _must_really_run(self) -> Any:
        """Fail if the model's experts went past the engine."""
        before = [layer.num_calls for layer in self.layers]
        implementations = set(self.model.get_experts_implementation().values())
        if implementations != {SEAM_NAME}:
            raise RuntimeError(
                f"The model's experts do not go through foreroute any more (they are set to "
                f"{', '.join(sorted(map(str, implementations)))}). Make a new engine."
            )
        yield
        idle = [
            layer.layer_idx
            for layer, calls in zip(self.layers, before, strict=True)
            if layer.num_calls == calls
        ]
        if idle:
            raise RuntimeError(f"The experts of layers {idle} did not run through foreroute.")

    def stats(self) -> RuntimeStats:
        """Counters and times since the start or the last `reset_stats`; live, not a copy."""
        return self._run.stats

    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        self._run.stats = RuntimeStats()

    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        stats, self._run.stats = self._run.stats, RuntimeStats()
        for layer in self.layers:
            layer.residency.fill()
        self._run.stats = stats

    def check_integrity(self) -> None:
        """Check every layer's slots: tables consistent, and each slot equal to its host row.

        Raises:
            RuntimeError: If not.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for layer in self.layers:
            layer.residency.check_integrity()

    def close(self) -> None:
        """Detach from the model; its experts stay in the store, for another engine."""
        self._attachments.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _uses_beams(settings: dict[str, Any]) -> bool:
    """Whether the arguments of `generate` ask for beam search."""
    config = settings.get("generation_config")
    return int(settings.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1
