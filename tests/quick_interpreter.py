"""Takes out of Triton's interpreter what makes the tests of kernels slow and finds nothing here."""

import dataclasses
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
