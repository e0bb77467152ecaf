"""Scores as integers: the total order in which a selection ranks them."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))  # below the order of every score
GREATEST = tl.constexpr(2**31 - 1)  # the order of NaN
INFINITY = tl.constexpr(0x7F800000)  # the order of +inf; that of -inf is -INFINITY - 1


@triton.jit
def order_of(score):
    """fp32 -> int32 that compares as the scores do: -0.0 equals 0.0, and NaN is above +inf, so that it shows."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == score, order, GREATEST)


@triton.jit
def score_of(order):
    """The way back: int32 -> fp32."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
