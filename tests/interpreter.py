"""Triton's interpreter made several times faster, for CI on machines without a GPU; what it computes stays the same.

At every call of a @triton.jit function from another one the interpreter goes through the members of triton.language again,
to replace what the launch around it has replaced already: here that happens once a launch. And at every operation it builds
its table of dtypes anew: here each entry is looked up once.
"""

from __future__ import annotations

from typing import Any


def speed_up_the_interpreter() -> None:
    """Call after TRITON_INTERPRET is set and before the first launch. Another Triton than this knows is left as it is."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor", "_get_np_dtype")):
        return
    _patch_the_language_once_a_launch(interpreter)
    _remember_dtypes(interpreter)


def _patch_the_language_once_a_launch(interpreter: Any) -> None:
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules = (interpreter.tl, interpreter.tl.core)
    seen_by: dict[Any, set[int]] = {}  # which of `modules` a function has among its globals
    done: set[int] = set()  # of `modules`, since the running launch began

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.clear()

    def patch_once(fn: Any) -> Any:
        if fn not in seen_by:
            seen_by[fn] = {id(value) for value in fn.__globals__.values() if any(value is module for module in modules)}
        if seen_by[fn] and seen_by[fn] <= done:
            return interpreter._LangPatchScope()
        done.update(seen_by[fn])
        return patch_lang(fn)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_once


def _remember_dtypes(interpreter: Any) -> None:
    get_np_dtype = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_np_dtype(dtype)
        return known[name]

    interpreter._get_np_dtype = np_dtype
