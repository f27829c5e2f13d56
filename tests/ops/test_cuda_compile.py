"""What Triton makes of the kernels for real GPUs, none of which is here: cuda_compile.py."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def has_ptxas() -> bool:
    triton = find_spec("triton")
    return triton is not None and (Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file()


pytestmark = pytest.mark.skipif(
    not has_ptxas(), reason="needs triton with NVIDIA's ptxas: pip install --no-deps -r vllm_eagle/locks/interop.lock"
)
# Most bytes of shared memory that a program may have, by compute capability: CUDA's programming guide.
SHARED_MEMORY = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "120": 99 << 10}


def run(what: str, cache: Path) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.cuda_compile", what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_and_fit_into_shared_memory(tmp_path: Path) -> None:
    found = run("cubins", tmp_path)
    assert found.keys() == SHARED_MEMORY.keys()
    for capability, kernels in found.items():
        assert "_part" in {kernel["kernel"] for kernel in kernels}
        for kernel in kernels:
            assert kernel["cubin_bytes"] > 1000
            assert kernel["shared_bytes"] <= SHARED_MEMORY[capability], (capability, kernel)
    every = {kernel["kernel"] for kernels in found.values() for kernel in kernels}
    assert every == {"_part", "_merge", "_move", "_parts", "_whole", "_order", "_climb", "_walk"}


def test_steps_compile_nothing_after_the_warm_up(tmp_path: Path) -> None:
    for backend, found in run("variants", tmp_path).items():
        assert {"_part", "_merge", "_move", "_parts", "_whole", "_order", "_climb", "_walk"} == set(found["warm_up"]), backend
        assert found["later"] == [], backend
