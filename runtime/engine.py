"""The runtime engine: generates with a model whose experts are in host memory."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from foreroute.data.adapters import resolve_device, routed_through
from foreroute.data.adapters.seam import ExpertsFunction, is_taken_over
from foreroute.estimators.stack import EstimatorStack
from foreroute.export.bundle import load_bundle
from foreroute.runtime.config import EngineConfig
from foreroute.runtime.driver import Driver
from foreroute.runtime.host.driver import HostDriver
from foreroute.runtime.look_ahead import LookAhead
from foreroute.runtime.parallel import UNSLICED, SliceRanks
from foreroute.runtime.planning.slot_plan import plan_slots, read_recording
from foreroute.runtime.stats import RuntimeStats
from foreroute.runtime.store.offload import OffloadedModel, load_offloaded
from foreroute.runtime.store.pretrained import sort_arguments, take_over
from foreroute.runtime.streamer import TimingStreamer
from foreroute.runtime.turns import Turns, serialised

logger = logging.getLogger(__name__)


class Engine:
    """Runs one offloaded model under one configuration, until closed.

    Example:
        >>> engine = Engine.from_pretrained("bundled", expert_slots="25%")  # doctest: +SKIP
        >>> ids = engine.generate(**inputs, max_new_tokens=64)              # doctest: +SKIP
        >>> engine.stats().hit_rate                                         # doctest: +SKIP
    """

    @torch.inference_mode(False)  # what is allocated here is changed outside of it too
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
        self.geometry = offloaded.moe.geometry
        self.device = offloaded.device
        self.ranks = offloaded.ranks
        """The processes that share the model, each with a slice of every expert."""
        if not self.ranks.is_alone and not config.is_exact:
            raise ValueError(
                f"on_miss={config.on_miss} is for one process: several may have other experts "
                "resident, and would leave out, or put in, slices of different ones."
            )
        recording = read_recording(offloaded, config)
        self.slots_per_layer = plan_slots(offloaded, config, recording)
        self.driver = _make_driver(offloaded, config, self.slots_per_layer, stack)
        """Decides which experts are where, on the host or on the GPU."""
        if recording is not None:
            self.driver.warm(list(zip(*recording.rows(), strict=True)))
        self.turns = Turns(offloaded, self.driver)
        """Makes calls wait for each other; from threads, they are answered one after the other."""
        attachments = contextlib.ExitStack()
        # nothing that is attached holds the engine, so that one dropped without `close` detaches
        self._detach = weakref.finalize(self, attachments.close)
        self._detach.atexit = False
        self._attach(attachments)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        *,
        bundle: str | Path | None = None,
        expert_slots: str | int = "25%",
        prefetch: str | None = None,
        on_miss: str = "fetch",
        is_sliced: bool = False,
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = "auto",
        **settings: Any,
    ) -> Engine:
        """Load a model with its experts in host memory, and estimators if there is a bundle.

        Args:
            model: `bundled`, a local folder or a Hub id, prepared or not; or a causal language
                model of transformers, whose experts are taken over (it runs in this engine only).
            bundle: Folder that `export-estimator` wrote, or a Hub id, `@` a revision.
            expert_slots: Slots per MoE layer, `8` or `25%`.
            prefetch: `none`, `auto` or `all`; unless said, auto if there is a bundle.
            on_miss: `fetch` (exact), or a speculative rule such as `substitute:0.5`; see
                `EngineConfig.on_miss`.
            device: `auto`, `cpu` or `cuda`; `device_map` may name it too.
            dtype: `auto`, `float32`, `bfloat16`, `float16`, or one of torch's; `torch_dtype` is
                taken as another name for it.
            is_sliced: Share the model with the other processes that torchrun started, each with
                a slice of every expert on a GPU of its own; see docs/scaling.md.
            **settings: Other fields of `EngineConfig`; of `HubSettings` (`revision`, `token`,
                `cache_dir`, `local_files_only`, `subfolder`, `trust_remote_code`);
                `attn_implementation`; `pinned_memory`: host memory to page-lock for experts, such
                as 24GiB (as much as the system allows if None); `expert_dtype`: how experts are
                stored and copied, `lossless` (bfloat16 in 12 bits, every bit given back), `auto`
                (that on a GPU, else as the checkpoint has them), `bf16`, `fp8`, `int8` or `int4`
                (fewer bits than the checkpoint's change the output); `share_experts=True`: engines
                of one host share a prepared model's rows in memory; `tp_plan="auto"`: the processes
                of `is_sliced` divide everything else as transformers does, where the model has a
                plan.

        Raises:
            ValueError: If the model, the bundle and the settings do not fit together, or an
                argument of transformers has no meaning here; says what to do instead.
            FileNotFoundError: If the model or the bundle is missing.
        """
        if is_sliced:
            device = SliceRanks.local_device(str(device or "auto"))
        names = [field.name for field in fields(EngineConfig)]
        given = sort_arguments(settings, names, device=device, dtype=dtype)
        config = EngineConfig(
            expert_slots=str(expert_slots),
            prefetch=prefetch or ("auto" if bundle else "none"),  # type: ignore[arg-type]
            on_miss=on_miss,
            **given.config,
        )
        loaded = load_bundle(Path(bundle)) if bundle else None
        ranks = SliceRanks.join(resolve_device(given.device)) if is_sliced else UNSLICED
        if isinstance(model, nn.Module):
            if is_sliced:
                raise ValueError("Slices are cut while a model is loaded: give its name instead.")
            offloaded = take_over(model, given)
        else:
            offloaded = load_offloaded(
                str(model),
                device=given.device,
                dtype=given.dtype,
                ranks=ranks,
                **given.model,
                **given.hub,
            )
        if loaded is not None:
            loaded.require_fits(offloaded.moe.geometry)
        return cls(offloaded, config, loaded.stack if loaded else None)

    @property
    def num_slots(self) -> int:
        """Slots per MoE layer; the mean where layers have different ones."""
        return round(sum(self.slots_per_layer) / len(self.slots_per_layer))

    @property
    def _experts(self) -> list[nn.Module]:
        return [layer.experts for layer in self.offloaded.moe.layers]

    def _attach(self, undo: contextlib.ExitStack) -> None:
        if any(map(is_taken_over, self._experts)):
            raise ValueError("This model is attached to another engine; close that one first.")
        moe_layers = self.offloaded.moe.layers
        handlers: dict[nn.Module, ExpertsFunction] = dict(self.offloaded.others)
        handlers |= {
            m.experts: self.ranks.adding(own)
            for m, own in zip(moe_layers, self.driver.layers, strict=True)
        }
        undo.callback(self.driver.close)
        undo.enter_context(routed_through(self.model, handlers))
        self.driver.attach(undo)
        self.turns.attach(undo)
        self._lend_generate(undo)

    def _lend_generate(self, undo: contextlib.ExitStack) -> None:
        """Let `model.generate` be the engine's, for whoever is handed the model alone."""
        lent = weakref.WeakMethod(self.generate)

        @functools.wraps(self._own_generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            run = lent()
            if run is None:
                raise RuntimeError("The engine of this model is gone. Make a new engine.")
            return run(*args, **kwargs)

        self.model.generate = generate
        undo.callback(delattr, self.model, "generate")

    @property
    def _own_generate(self) -> Any:
        """The model's own `generate`, as its class has it."""
        return functools.partial(type(self.model).generate, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass of the model, through the engine."""
        with self.turns.call(), self._must_really_run(), torch.no_grad():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; takes what transformers' `generate` takes and returns what it returns.

        While the engine is attached, `engine.model.generate` is this. Inputs are moved to the
        engine's device. Times go into `stats()` (not with beam search, which hands out no tokens
        while it runs). Calls from several threads are answered one after the other: put prompts
        that shall run together into one batch.
        """
        names = inspect.signature(self._own_generate).parameters
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {name: self._on_device(value) for name, value in given.items()}
        given.setdefault("disable_compile", True)  # the host decides between layers
        with self.turns.call(), self._must_really_run():
            asked = _asked_of(self.model, given)
            if asked.get("assistant_early_exit"):
                raise ValueError(
                    "assistant_early_exit leaves layers out, which an engine does not: give an "
                    "assistant_model or prompt_lookup_num_tokens."
                )
            if not self.ranks.is_alone:
                self.ranks.share_random_state(self.device)
                given["streamer"] = given.get("streamer") if self.ranks.is_first else None
            if asked.get("num_beams", 1) == 1:
                given["streamer"] = TimingStreamer(self.driver.run.stats, given.get("streamer"))
                given |= self.driver.decoding(asked, given["streamer"])
            return self._own_generate(**given)

    def _on_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @contextlib.contextmanager
    def _must_really_run(self) -> Any:
        """Fail if the model's experts went past the engine."""
        if not self._detach.alive:
            raise ValueError(
                "This engine was closed; Engine(engine.offloaded, config) is a new one."
            )
        before = [layer.num_calls for layer in self.driver.layers]
        if not all(map(is_taken_over, self._experts)):
            set_to = sorted(set(map(str, self.model.get_experts_implementation().values())))
            raise RuntimeError(
                f"The model's experts do not go through foreroute any more (they are set to "
                f"{', '.join(set_to)}). Make a new engine."
            )
        yield
        idle = [
            layer.layer_idx
            for layer, calls in zip(self.driver.layers, before, strict=True)
            if layer.num_calls == calls
        ]
        if idle:
            raise RuntimeError(f"The experts of layers {idle} did not run through foreroute.")

    def stats(self) -> RuntimeStats:
        """Counters and times since the start or the last `reset_stats`; live, not a copy."""
        return self.driver.stats()

    @serialised
    def reset_stats(self) -> None:
        """Start counting anew; resident experts stay."""
        self.driver.reset_stats()

    @serialised
    def fill_slots(self) -> None:
        """Make as many experts resident as fit, lowest ids first, not counted in the statistics."""
        with self.turns.changing_slots():
            self.driver.fill_slots()

    @serialised
    def check_integrity(self) -> None:
        """Check every layer's slots: tables consistent, and each slot equal to its host row.

        Raises:
            RuntimeError: If not.
        """
        self.turns.settle()
        self.driver.check_integrity()

    @serialised
    def close(self) -> None:
        """Detach from the model; its experts stay in the store, for another engine."""
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_driver(
    offloaded: OffloadedModel,
    config: EngineConfig,
    slots_per_layer: list[int],
    stack: EstimatorStack | None,
) -> Driver:
    """The driver that fits model, device and configuration: on the GPU if possible."""
    ahead = LookAhead.for_engine(offloaded, config, stack)
    if offloaded.device.type == "cuda" and config.decide_on != "host":
        from foreroute.runtime.device.driver import DeviceDriver, why_not_on_device

        reason = why_not_on_device(offloaded, config, stack)
        if reason is None:
            return DeviceDriver(offloaded, config, slots_per_layer, ahead)
        logger.info("Decoding is driven by the host: %s.", reason)
    return HostDriver(offloaded, config, slots_per_layer, ahead)


def _asked_of(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a call of `generate` asks for: by its arguments, else its config, else the model's."""
    configs = (model.generation_config, given.get("generation_config"), given)
    asked: dict[str, Any] = {}
    for config in configs:
        values = config if isinstance(config, dict) else vars(config) if config else {}
        asked |= {name: value for name, value in values.items() if value is not None}
    return asked
