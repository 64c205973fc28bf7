"""Takes out of Triton's interpreter what makes the tests of kernels slow and finds nothing here."""

import dataclasses
import math
from collections.abc import Iterable
from types import ModuleType

from triton.language import core
from triton.runtime import interpreter


def patch_the_language_once() -> None:
    """Let the interpreter put its own functions into `triton.language` once a process.

    It does so at every launch and every call of a device function, each time going through all of
    the language: a third of the time. It also asserts after every sum and product of indices that
    they do not overflow, by doing them again in 64 bits; those of tests are small.
    """
    patch_language, patched = interpreter._patch_lang, set[frozenset[int]]()
    languages = (interpreter.tl, core)

    def patch(function: object) -> interpreter._LangPatchScope:
        values = function.__globals__.values()
        seen = frozenset(id(v) for v in values if isinstance(v, ModuleType) and v in languages)
        if seen not in patched:
            patch_language(function)
            patched.add(seen)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_types() -> None:
    """Let what the interpreter derives from types and shapes be derived once: a third of the time.

    At every operation it lists all dtypes to find one's name in NumPy, and checks the same few
    shapes again.
    """
    dtypes, shapes, blocks = {}, {}, {}
    find_dtype, check_block = interpreter._get_np_dtype, core.block_type.__init__

    def dtype_of(type_: core.dtype) -> object:
        scalar = type_.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = find_dtype(scalar)
        return dtypes[scalar.name]

    def make_block(block: core.block_type, element: core.dtype, shape: Iterable[object]) -> None:
        key = element.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            check_block(block, element, shape)
            blocks[key] = block.shape, block.numel, block.name
        block.element_ty = element
        block.shape, block.numel, block.name = blocks[key]

    def make_tensor(tensor: core.tensor, handle: object, type_: core.dtype) -> None:
        shape = type_.shape if type_.is_block() else ()
        if id(shape) not in shapes:
            sizes = core.tuple([core.constexpr(size) for size in shape])
            shapes[id(shape)] = core.constexpr(math.prod(shape)), sizes, shape  # so the id stays
        tensor.handle, tensor.type, tensor.dtype = handle, type_, type_.scalar
        tensor.numel, tensor.shape, _ = shapes[id(shape)]

    interpreter._get_np_dtype = dtype_of
    core.block_type.__init__, core.tensor.__init__ = make_block, make_tensor
