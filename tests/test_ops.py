"""The Triton kernels against plain torch, through Triton's interpreter: `vllm-eagle gpu-check --interpret`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vllm_eagle.cli import main
from vllm_eagle.ops.cases import Case


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/interop.lock")
def test_kernels_equal_their_references(tmp_path: Path) -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "vllm_eagle.cli", "gpu-check", "--interpret", "--seeds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    assert found["failed"] == []
    kernels = {name.split()[0] for name in found["comparisons"]}
    assert kernels == {"tree_attention", "move_slots", "best_children", "rerank", "walk"}
    assert found["device"] == "interpreter"
    assert "timings" not in found


@pytest.mark.parametrize(
    ("found", "tolerance", "fails"),
    [
        ([1.0, 2.0], 0.0, False),
        ([1.0, 2.0001], 0.0, True),
        ([1.0, 2.0001], 1e-3, False),
        ([1.0, 2.1], 1e-3, True),
        ([1.0, float("nan")], 1e-3, True),
        ([1.0], 1e-3, True),
    ],
)
def test_a_wrong_answer_is_seen(found: list[float], tolerance: float, fails: bool) -> None:
    case = Case("x", lambda device, seed: [(torch.tensor(found), torch.tensor([1.0, 2.0]))], tolerance)
    assert (case.error(torch.device("cpu"), 0) > 1) == fails


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check"]) == 2
    assert "no CUDA device here; --interpret compares the kernels on the CPU" in capsys.readouterr().err
    assert main(["gpu-check", "--interpret", "--seeds", "0"]) == 2
