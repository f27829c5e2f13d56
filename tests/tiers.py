"""Tiers: what a contributor runs; what is wide, marked `exhaustive` and run by `pytest -m exhaustive`; what takes an hour.

The default tier covers each promise once; where a promise is wide (every parameter, every kind of tree), it takes a few of the
cases and the exhaustive tier all others. CUDA's engine end to end through Triton's interpreter is wide and slow: most of its cases
are marked `interpreted`, for who touches it, and run by `pytest -m interpreted tests/engine/v2`.
"""

from collections.abc import Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive
interpreted = pytest.mark.interpreted


def some(values: Iterable[Any], *essential: Any, others: Any = exhaustive) -> list[Any]:
    """Values of `parametrize`, of which the tier of the test runs the essential ones, and a later one the others."""
    found = list(values)
    assert all(value in found for value in essential), "an essential case is none of the cases"
    return [
        value if value in essential else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=others)
        for value in found
    ]
