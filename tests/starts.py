"""Engines and servers that a run has started, in all its processes together: they are what a test run's time goes into.

In the default run the start that is one too many fails, and with it the test that asked for it: share an engine or a server that is
there, or mark the test exhaustive.
"""

import os
from pathlib import Path
from typing import Literal

Kind = Literal["engine", "server"]
# Of the default run. A server takes 15 to 40 s, the first engine of a process 5 s, the next ones half a second.
MOST: dict[Kind, int] = {"engine": 130, "server": 2}
_FILE, _LIMITED = "EAGLE_TEST_STARTS", "EAGLE_TEST_STARTS_LIMITED"


def begin(file: Path, limited: bool) -> None:
    """Of a run: before its processes are started, which inherit this. Each start is a line or two in the file."""
    file.touch()
    os.environ[_FILE] = str(file)
    os.environ[_LIMITED] = str(int(limited))


def starts(kind: Kind) -> None:
    """Say so before one is started.

    Raises:
        AssertionError: the default run has started as many as it may.
    """
    _add(f"{kind} starts")
    file = os.environ.get(_FILE)
    number = 0 if file is None else Path(file).read_text(encoding="utf-8").count(f"{kind} starts")
    if number > MOST[kind] and os.environ[_LIMITED] == "1":
        raise AssertionError(f"the default run may start {MOST[kind]} {kind}s, this is one more; share one, or see {__file__}")


def started(kind: Kind, seconds: float) -> None:
    """Say so once it is up."""
    _add(f"{kind} {seconds:.1f}")


def _add(line: str) -> None:
    file = os.environ.get(_FILE)
    if file is not None:
        with open(file, "a", encoding="utf-8") as lines:  # so short a line is written at once
            lines.write(line + "\n")


def summary(file: Path) -> str:
    """One line."""
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    parts = []
    for kind in MOST:
        number = lines.count([kind, "starts"])
        seconds = sum(float(second) for first, second in lines if first == kind and second != "starts")
        parts.append(f"{number} {kind}s in {seconds:.0f} s")
    return f"started {', '.join(parts)}"
