"""Triton's interpreter, made quicker and bitwise: nothing here touches a GPU."""

import contextlib
import inspect
import sys

import numpy as np
import pytest


@contextlib.contextmanager
def quick_interpreter():
    """Triton's interpreter replaces ``triton.language`` at every call of a device function; here once per launch.

    It is the same replacement every time, and half of the time of a launch.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    def patch_lang(function):
        languages = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if languages in done:
            return None
        done.add(languages)
        return patch(function)

    def call(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
        yield


@contextlib.contextmanager
def products_by_element():
    """Products of tiles as matrix units form them: an element is one chain of sums, wherever in its tile it is.

    The interpreter asks BLAS, which rounds an element by its place in the tile. The scores of a transposed product then
    differ from those of the product; and a row of the bottleneck without row ids is at another place when it is alone,
    and could not have the same bits.
    """
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (x.data.astype(d.data.dtype) for x in (a, b))
        # an axis that is not the last is summed slice by slice
        total = np.add.reduce(np.multiply(left[..., :, :, None], right[..., None, :, :], order="C"), axis=-2)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
