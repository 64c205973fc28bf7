"""How an expert's matrix is stored in fewer bits, and how it becomes a matrix again."""

from __future__ import annotations

from foreroute.estimators.artifacts import shown
from foreroute.runtime.store.encodings.encoding import Encoder, Encoding, Part
from foreroute.runtime.store.encodings.fewer_bits import (
    Cast,
    ChannelScaled,
    Fp8,
    Int4,
    Int8,
    Plain,
)
from foreroute.runtime.store.encodings.lossless import Lossless, TooManyExceptions
from foreroute.runtime.store.encodings.native import (
    Fp8Blocks,
    Mxfp4,
    native_encoder,
)
from foreroute.runtime.store.encodings.parameter import EncodedParameter, EncodedWeights

__all__ = [
    "EXPERT_DTYPES",
    "Cast",
    "ChannelScaled",
    "EncodedParameter",
    "EncodedWeights",
    "Encoder",
    "Encoding",
    "Fp8",
    "Fp8Blocks",
    "Int4",
    "Int8",
    "Lossless",
    "Mxfp4",
    "Part",
    "Plain",
    "TooManyExceptions",
    "encoder_named",
    "native_encoder",
    "without",
]

EXPERT_DTYPES: dict[str, type[Encoding]] = {
    "bf16": Cast,
    "lossless": Lossless,
    "fp8": Fp8,
    "int8": Int8,
    "int4": Int4,
}
"""What experts can be stored as when they are loaded."""


def encoder_named(name: str) -> Encoder | None:
    """The encoder an `expert_dtype` stands for; None for `auto`.

    Raises:
        ValueError: If the name is another; the message lists the known ones.
    """
    if name == "auto":
        return None
    if name not in EXPERT_DTYPES:
        known = ", ".join(EXPERT_DTYPES)
        raise ValueError(f"Unknown expert_dtype {shown(name)}; known: auto, {known}.")
    encoding = EXPERT_DTYPES[name]
    return lambda _, rows, columns: encoding(rows, columns)


def without(encoder: Encoder, *parameters: str) -> Encoder:
    """The same, but for some parameters: in bfloat16."""

    def encode(name: str, rows: int, columns: int) -> Encoding:
        return Cast(rows, columns) if name in parameters else encoder(name, rows, columns)

    return encode
