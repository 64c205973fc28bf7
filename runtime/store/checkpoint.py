"""A model's files and what is known of them before a weight is read: made once, handed down."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from foreroute.data.adapters import load_config, resolve_dtype, resolve_model
from foreroute.data.adapters.discovery import discover
from foreroute.data.adapters.loading import HubSettings, find_prepared
from foreroute.data.adapters.weight_files import WeightFiles, find_weight_files
from foreroute.data.adapters.weightless import experts_by_path, outline
from foreroute.estimators.host_memory import require_host_memory
from foreroute.runtime.parallel import SliceRanks
from foreroute.runtime.policies.slots import RESERVE_BYTES
from foreroute.runtime.store.encodings import Encoder, encoder_named, native_encoder
from foreroute.runtime.store.host_store import RowLayout
from foreroute.runtime.store.prepared import PreparedModel
from foreroute.runtime.store.quantised import DecodedTensors, are_in_blocks, require_readable

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which model to load, from which files, and how its experts will be stored."""

    name: str
    """`bundled`, a local folder or a Hub id."""
    hub: HubSettings
    """Where its files come from."""
    config: Any
    """As transformers loads it."""
    quantization: dict[str, Any] | None
    """How the checkpoint is quantised, in its config's words."""
    expert_dtype: str
    """What the experts are stored as; `auto` where it is as the checkpoint has them."""
    encoder: Encoder | None
    """How the experts are stored; None where it is as the model has them."""
    prepared: PreparedModel | None = None
    """What its manifest says, where `foreroute pack` has made it."""
    manifest: Path | None = None
    """That file: in the model's folder, or in the Hub's cache."""
    num_parts: int = 1
    """Processes that divide everything but the experts by transformers' tensor parallel plan."""
    is_shared: bool = False
    """Whether its rows are mapped, one copy for all engines of a host."""
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
        known = resolve_dtype(dtype)
        if not isinstance(known, torch.dtype):
            known = config.dtype or config.get_text_config().dtype
        quantization = _quantization(config)
        manifest = find_prepared(name, config, **hub)
        prepared = PreparedModel.read(manifest) if manifest is not None else None
        if prepared is not None:
            encoder = prepared.encoder(expert_dtype, _encoder(quantization, "auto"))
            expert_dtype = prepared.expert_dtype
        else:
            if expert_dtype == "auto":
                expert_dtype = default_expert_dtype(quantization, device)
            encoder = _encoder(quantization, expert_dtype)
        return cls(
            name=name,
            hub=hub,
            config=config,
            quantization=quantization,
            expert_dtype=expert_dtype,
            encoder=encoder,
            prepared=prepared,
            manifest=manifest,
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
    def rows_folder(self) -> Path:
        """A prepared model's folder, its rows in it; they are downloaded if they are not here.

        Raises:
            ValueError: If they cannot be downloaded, or are not in the cache while offline.
        """
        assert self.manifest is not None
        assert self.prepared is not None
        if not Path(self.source).is_dir():
            self.prepared.download_rows(self.manifest, self.source, **self.settings)
        return self.manifest.parent

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors of the files as numbers, by name; what is quantised is decoded when read."""
        if self.quantization is None:
            return self.files
        return DecodedTensors(self.files, self.quantization, self.dtype)

    @property
    def expert_tensors(self) -> Mapping[str, Any]:
        """Where the experts are read from: the files as they are, if they are kept so."""
        is_kept = self.quantization is not None and native_encoder(self.quantization) is not None
        return self.files if is_kept and self.encoder is not None else self.tensors

    def divided(self, ranks: SliceRanks) -> Checkpoint:
        """The same, everything but the experts divided by transformers' own plan, if it has one.

        Args:
            ranks: The processes that do so.

        Raises:
            ValueError: If there is one process, or the attention's heads cannot be divided so.
        """
        if ranks.is_alone:
            raise ValueError("tp_plan=auto divides a model among processes that torchrun starts.")
        if not self.outline.tp_plan:
            logger.warning("%s has no tensor parallel plan: each process has all of it.", self.name)
            return self
        text, count = self.config.get_text_config(), ranks.num_ranks
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(text, name, None) or count
            if heads % count:
                works = [str(n) for n in range(2, heads + 1) if heads % n == 0]
                raise ValueError(
                    f"{count} processes do not divide the model's {heads} {name}, as tp_plan=auto "
                    f"does; these do: {', '.join(works) or 'none'}."
                )
        return replace(self, num_parts=count)

    @property
    def division(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is told about dividing all but the experts."""
        if self.num_parts == 1:
            return {}
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=self.num_parts, tp_plan="auto")}

    def shared(self, ranks: SliceRanks) -> Checkpoint:
        """The same, its rows mapped instead of copied.

        Args:
            ranks: The processes that hold a slice of each expert each.

        Raises:
            ValueError: If it is not prepared, or several processes cut it.
        """
        if self.prepared is None:
            raise ValueError(
                f"share_experts maps the rows of a prepared model, which {self.name} is not: "
                "foreroute pack makes one."
            )
        if not ranks.is_alone:
            raise ValueError(
                "Slices are copied out of a prepared model's rows, once for all processes of "
                "torchrun: leave out share_experts."
            )
        return replace(self, is_shared=True)

    def settled(self) -> Checkpoint:
        """The same, now that the files are here: experts in blocks may not all be so."""
        block = (self.quantization or {}).get("weight_block_size")
        if self.encoder is None or not block or self.prepared is not None:
            return self
        if are_in_blocks(self.files, int(block[0])):
            return self
        return replace(self, encoder=None, expert_dtype="auto")

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

    def is_held_by(self, device: torch.device, *, is_stock: bool = False) -> bool:
        """Whether a device holds the whole model, as far as its size tells.

        Args:
            device: A CPU holds what the host does, which is asked elsewhere.
            is_stock: With experts as stock transformers has them, in place of how they are stored.
        """
        if device.type != "cuda":
            return True
        experts = self.expert_bytes if is_stock else self.stored_bytes
        total: int = torch.cuda.mem_get_info(device)[1]
        return experts + self.other_bytes + RESERVE_BYTES <= total

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


def default_expert_dtype(quantization: dict[str, Any] | None, device: torch.device) -> str:
    """What `expert_dtype=auto` stands for.

    On a GPU 12 bits without loss: faster at the same memory and exact (docs/gpu.md); what is not
    in bfloat16 stays as it is all the same. On a CPU, and of a checkpoint whose own way is kept,
    `auto`: as the checkpoint has them.
    """
    is_kept = quantization is not None and native_encoder(quantization) is not None
    return "lossless" if device.type == "cuda" and not is_kept else "auto"


def _encoder(quantization: dict[str, Any] | None, expert_dtype: str) -> Encoder | None:
    """How the experts will be stored; a checkpoint in fewer bits keeps its own way if it can."""
    chosen = encoder_named(expert_dtype)
    if quantization is None:
        return chosen
    require_readable(quantization)
    native = native_encoder(quantization)
    if native is not None and chosen is not None:
        raise ValueError(
            f"The checkpoint comes in {quantization['quant_method']} already, which is kept; "
            f"expert_dtype={expert_dtype} needs a checkpoint in full precision."
        )
    return native or chosen


def _quantization(config: Any) -> dict[str, Any] | None:
    """What a config says about how its checkpoint is quantised."""
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None)
        given = given or getattr(part, "compression_config", None)
        if given is not None:
            return dict(given if isinstance(given, dict) else given.to_dict())
    return None
