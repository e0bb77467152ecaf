"""The nearest number that would have worked."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest_of(value: int, choices: Iterable[int]) -> int:
    """The choice closest to `value`, the smaller of two equally close."""
    return min(choices, key=lambda choice: (abs(choice - value), choice))


def nearest_multiples(value: int, base: int) -> str:
    """The multiples of `base` either side of `value`, 0 left out: "8 or 16"."""
    below = value // base * base
    return f"{below} or {below + base}" if below else str(base)
