"""Two tiers: what a contributor runs, and what is wide, marked `exhaustive` and run by `pytest -m exhaustive`.

The default tier covers each promise once; where a promise is wide (every parameter, every kind of tree), it takes a few of the
cases and the exhaustive tier all others.
"""

from collections.abc import Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def some(values: Iterable[Any], *essential: Any) -> list[Any]:
    """Values of `parametrize`, of which the default tier runs the essential ones."""
    found = list(values)
    assert all(value in found for value in essential), "an essential case is none of the cases"
    return [
        value if value in essential else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=exhaustive)
        for value in found
    ]
