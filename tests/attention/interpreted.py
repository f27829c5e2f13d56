"""A file of tests that needs Triton's interpreter, which is chosen when triton is imported: it runs in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_all_of_it starts")
starts_it = pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs triton")


def run(file: str) -> None:
    """All that is marked `interpreted` in this file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
