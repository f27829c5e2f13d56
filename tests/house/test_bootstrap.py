"""Set-up starts with a bare Python."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_runs_with_nothing_installed() -> None:
    """-S: without site-packages, so without numpy, as on a fresh machine."""
    command = [sys.executable, "-S", "-m", "vllm_eagle.bootstrap", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dev" in done.stdout
    bare = subprocess.run([sys.executable, "-S", "-c", "import numpy"], capture_output=True, check=False)
    assert bare.returncode != 0, "numpy is here all the same, so this test shows nothing"


def test_the_package_has_what_it_names() -> None:
    import vllm_eagle

    for name in vllm_eagle.__all__:
        assert getattr(vllm_eagle, name).__name__ == name
