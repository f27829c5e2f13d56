"""What all tests of the V2 engine share."""

from collections.abc import Iterator

import pytest

from tests.engine.v2.bed import Bed


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Engines one after the other; a process of its own for each file."""
    found = Bed()
    yield found
    found.close()
