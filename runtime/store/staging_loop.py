"""The loop of a thread that answers a staging area's lanes, in machine code.

Imported by the thread alone, as numba takes a while to load. Words are read and written whole and
in order (acquire, release): the device sees a piece before the word that says it is there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from foreroute.runtime.simulator.compiled import compiled

# numba's cache looks at one file alone, so these stand here again; a test holds them together.
PIECE_BITS, EXPERT_BITS, LAYER_BITS, LINE_BYTES = 14, 12, 10, 64


def _pointer(builder: Any, address: Any, bits: int) -> Any:
    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


def _code_of_word_at(typing_context: Any, address: Any) -> Any:
    """The word of 64 bits at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], 64), "acquire", 8)

    return types.int64(types.int64), generate


def _code_of_set_word(typing_context: Any, address: Any, word: Any) -> Any:
    """Write a word of 64 bits, after everything that was written before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(builder, arguments[0], 64)
        builder.store_atomic(arguments[1], place, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _code_of_copy(typing_context: Any, to: Any, source: Any, num_bytes: Any) -> Any:
    """Copy bytes between addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, source = (_pointer(builder, address, 8) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_word_at: Any = intrinsic(_code_of_word_at)
_set_word: Any = intrinsic(_code_of_set_word)
_copy: Any = intrinsic(_code_of_copy)


@compiled
def answer(
    asked: int,
    answered: int,
    buffers: int,
    piece_bytes: int,
    layers: Any,
    first: int,
    end: int,
    most_looks: int,
) -> int:
    """Copy the pieces that lanes first..end ask for, until they have asked for nothing for long.

    Args:
        asked: Address of the lanes' words, a cache line each.
        answered: Address of the answers, likewise.
        buffers: Address of the lanes' rooms, of one piece each.
        piece_bytes: Size of a piece; a row's last one may be shorter.
        layers: By layer, the address of its first row and the bytes of a row, [L, 2] int64.
        first: Lane.
        end: Lane.
        most_looks: Looks at all of them that find nothing before it returns.

    Returns:
        How many were copied.
    """
    num_served, looks = 0, 0
    while looks < most_looks:
        looks += 1
        for lane in range(first, end):
            word = _word_at(asked + lane * LINE_BYTES)
            if word == _word_at(answered + lane * LINE_BYTES):
                continue
            piece = word & ((1 << PIECE_BITS) - 1)
            expert = word >> PIECE_BITS & ((1 << EXPERT_BITS) - 1)
            layer = word >> (PIECE_BITS + EXPERT_BITS) & ((1 << LAYER_BITS) - 1)
            row_bytes, begin = layers[layer, 1], piece * piece_bytes
            source = layers[layer, 0] + expert * row_bytes + begin
            _copy(buffers + lane * piece_bytes, source, min(piece_bytes, row_bytes - begin))
            _set_word(answered + lane * LINE_BYTES, word)
            num_served, looks = num_served + 1, 0
    return num_served
