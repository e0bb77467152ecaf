"""Makes Triton's interpreter (TRITON_INTERPRET=1) safe for bf16, and about twice as fast.

It holds bf16 as uint16 bit patterns and computes on those: a product is wrong by ten orders of magnitude, without an
error; and it narrows float32 to bf16 by cutting, where GPUs round to the nearest even. After `install` a bf16 tl.dot and
the casts are right, and every other arithmetic on bf16 raises: kernels must widen first.
Written against Triton 3.6; uses its private classes, which is why it runs in interpreted processes only.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patch this process's interpreter; calling it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_bf16_is_safe", False):
        return
    builder._bf16_is_safe = True
    builder.create_dot = _dot(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _refuse_bf16(name, getattr(builder, name)))
    interpreter.ReduceScanOpInterface.check_tensor = _refuse_bf16_reduction(
        interpreter.ReduceScanOpInterface.check_tensor
    )
    _patch_language_once_a_launch()


def _is_bf16(handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else handle.data


def _dot(original):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not (_is_bf16(a) or _is_bf16(b)):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


def _cast(original):
    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widened(src), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            bits = src.data.view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            quiet_nan = (bits >> 16) | 0x40
            narrowed = np.where(np.isnan(src.data), quiet_nan, rounded).astype(np.uint16)
            return interpreter.TensorHandle(narrowed, tl.bfloat16)
        return original(self, src, dst_type)

    return cast_impl


def _refuse_bf16(name: str, original):
    def guarded(self, *args):
        if any(map(_is_bf16, args)):
            raise NotImplementedError(f"bf16 in {name}: widen to float32 first, the interpreter computes on raw bits")
        return original(self, *args)

    return guarded


def _refuse_bf16_reduction(original):
    def guarded(self, inputs):
        if any(_is_bf16(x.handle) for x in inputs):
            raise NotImplementedError("bf16 reduction or scan: widen to float32 first")
        return original(self, inputs)

    return guarded


def _patch_language_once_a_launch() -> None:
    """The interpreter re-inspects triton.language at every nested @jit call (tl.max, tl.zeros, ...): do it once."""
    patched: set[tuple[int, ...]] = set()
    run_grid = interpreter.GridExecutor.__call__

    def call_grid(self, *args, **kwargs):
        patched.clear()
        try:
            return run_grid(self, *args, **kwargs)
        finally:
            patched.clear()

    def call_nested(self, *args, **kwargs):
        modules = tuple(sorted({id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core}))
        if modules not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(modules)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = call_grid
    interpreter.InterpretedFunction.__call__ = call_nested
