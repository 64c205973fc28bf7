"""A model's files and what is known of them before a weight is read: made once, handed down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Unpack

import torch
from torch import nn

from foreroute.data.adapters import load_config, resolve_dtype, resolve_model
from foreroute.data.adapters.discovery import discover
from foreroute.data.adapters.loading import HubSettings
from foreroute.data.adapters.weight_files import WeightFiles, find_weight_files
from foreroute.data.adapters.weightless import experts_by_path, outline
from foreroute.estimators.host_memory import require_host_memory
from foreroute.runtime.store.encodings import Encoder, encoder_named, native_encoder
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.prepared import PreparedModel

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which model to load, from which files, and how its experts will be stored."""

    name: str
    """`bundled`, a local folder or a Hub id."""
    hub: HubSettings
    """Where its files come from."""
    config: Any
    """As transformers loads it; told to dequantise all but the experts."""
    expert_dtype: str
    """What the experts are stored as; `auto` where it is as the checkpoint has them."""
    encoder: Encoder | None
    """How the experts are stored; None where it is as the model has them."""
    prepared: PreparedModel | None = None
    """Its manifest, where `foreroute pack` has made it."""
    asked_dtype: torch.dtype | None
    """What the user asked for or the config says; None where only the files can say."""

    @classmethod
    def open(
        cls,
        name: str,
        *,
        dtype: str | torch.dtype = "auto",
        expert_dtype: str = "auto",
        device: torch.device = CPU,
        **hub: Unpack[HubSettings],
    ) -> Checkpoint:
        """Read a model's config; no file of weights is opened.

        Args:
            name: `bundled`, a local folder or a Hub id.
            dtype: `auto`, `float32`, `bfloat16`, `float16`, or one of torch's.
            expert_dtype: How experts are stored: `auto`, lossless, bf16, fp8, int8 or int4; see
                `default_expert_dtype`.
            device: Where the model will run.
            **hub: See `HubSettings`.

        Raises:
            FileNotFoundError: If there is no such model.
            ValueError: If it cannot be read, or its experts cannot be stored that way.
        """
        config = load_config(name, **hub)
        prepared = PreparedModel.find(resolve_model(name))
        if prepared is not None:
            encoder = prepared.encoder(expert_dtype, _encoder(config, "auto"))
            expert_dtype = prepared.expert_dtype
        else:
            expert_dtype = (
                default_expert_dtype(config, device) if expert_dtype == "auto" else expert_dtype
            )
            encoder = _encoder(config, expert_dtype)
        known = resolve_dtype(dtype)
        if not isinstance(known, torch.dtype):
            known = config.dtype or config.get_text_config().dtype
        return cls(
            name=name,
            hub=hub,
            config=config,
            expert_dtype=expert_dtype,
            encoder=encoder,
            prepared=prepared,
            asked_dtype=known,
        )

    @property
    def source(self) -> str:
        """The folder or Hub id."""
        return resolve_model(self.name, self.hub.get("subfolder", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is told about where files come from."""
        return dict(self.hub) | {"revision": self.hub.get("revision") or "main"}

    @cached_property
    def files(self) -> WeightFiles:
        """The files of weights, downloaded if they are not here."""
        return find_weight_files(self.source, self.config, **self.settings)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters, as transformers decides; the files' where nothing says it."""
        return self.asked_dtype or self.files.dtype

    @cached_property
    def outline(self) -> Any:
        """The model on the meta device: every shape, no number."""
        trusted = self.hub.get("trust_remote_code", False)
        return outline(self.config, self.dtype, trust_remote_code=trusted)

    @cached_property
    def experts(self) -> dict[str, nn.Module]:
        """The experts modules of the outline, by dotted path.

        Raises:
            ValueError: If the model has none that can be taken over; says why.
        """
        experts = experts_by_path(self.outline)
        if not experts:
            discover(self.outline, self.name)  # says why there are none
        return experts

    @property
    def expert_bytes(self) -> int:
        """Size of all experts, as the model has them."""
        return sum(p.nbytes for module in self.experts.values() for p in module.parameters())

    @property
    def stored_bytes(self) -> int:
        """Size of all experts, as they will be stored."""
        return sum(
            RowLayout.of(module, self.encoder).row_bytes * len(next(module.parameters()))
            for module in self.experts.values()
        )

    @property
    def other_bytes(self) -> int:
        """Size of everything but the experts."""
        whole: int = sum(p.nbytes for p in self.outline.parameters())
        return whole - self.expert_bytes

    def require_host_memory(self) -> None:
        """Refuse a model whose experts the host cannot hold.

        Raises:
            ValueError: If less memory is available; gives the numbers.
        """
        require_host_memory(self.stored_bytes, self.other_bytes, model_name=self.name)

    def require_room_for_whole(self) -> None:
        """Refuse a model that the host cannot hold the way stock transformers loads it.

        Raises:
            ValueError: If less memory is available; gives the numbers.
        """
        require_host_memory(
            self.expert_bytes,
            self.other_bytes,
            model_name=self.name,
            remedy="The stock model is loaded whole, in full precision; foreroute generate is not.",
        )


def default_expert_dtype(config: Any, device: torch.device) -> str:
    """What `expert_dtype=auto` stands for.

    On a GPU 12 bits without loss: faster at the same memory and exact (docs/gpu.md); what is not
    in bfloat16 stays as it is all the same. On a CPU, and of a checkpoint in fewer bits, `auto`:
    as the checkpoint has them.
    """
    is_quantised = getattr(config, "quantization_config", None) is not None
    return "lossless" if device.type == "cuda" and not is_quantised else "auto"


def _encoder(config: Any, expert_dtype: str) -> Encoder | None:
    """How the experts will be stored; a checkpoint in fewer bits keeps its own way."""
    chosen = encoder_named(expert_dtype)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return chosen
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    native = native_encoder(quantization)
    if chosen is not None:
        raise ValueError(
            f"The checkpoint comes in {quantization['quant_method']} already, which is kept; "
            f"expert_dtype={expert_dtype} needs a checkpoint in full precision."
        )
    # Everything but the experts is dequantised by transformers while it loads.
    config.quantization_config = quantization | {"dequantize": True}
    return native
