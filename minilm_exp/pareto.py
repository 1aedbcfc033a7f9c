"""Pareto fronts: what nothing beats."""

from __future__ import annotations

from collections.abc import Sequence


def on_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether no other point is at least as good in all values and better in one.

    Args:
        points: Of as many values each; more is better.
    """

    def beats(other: Sequence[float], point: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(other, point)) and tuple(other) != tuple(point)

    return [not any(beats(other, point) for other in points) for point in points]
