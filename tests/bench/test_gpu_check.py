"""The part of `vllm-eagle gpu-check` that runs engines: its commands exist, and what fails is seen."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vllm_eagle.algorithm.noise import gumbel, peek_seeds
from vllm_eagle.attention.interface import CUDA_BACKENDS
from vllm_eagle.bench.gpu import engines
from vllm_eagle.bench.passes import gaps
from vllm_eagle.bench.passes.compare import variants
from vllm_eagle.cli import build_parser
from vllm_eagle.pair import HEAD


@pytest.mark.parametrize("name", engines.COMMANDS)
def test_commands_are_known(name: str) -> None:
    args = build_parser().parse_args(engines.COMMANDS[name])
    if args.run.__name__ == "_compare":
        assert set(args.only) <= variants(str(HEAD), args.temperature).keys()
        assert not any(variant.startswith("vllm_") for variant in args.only)  # whose failures are not ours
        assert args.attention_backend in (None, *CUDA_BACKENDS)
    else:
        assert args.replay == "8b"


def test_an_engine_is_compared() -> None:
    """A short one of the same kind, on what is here."""
    command = shlex.split("compare --limit 2 --max-tokens 8 --only tree16")
    found = dict(engines.check({"exact": command}))
    assert engines.failed(found) == []
    assert found["exact"]["result"]["identical"] == 2
    assert found["exact"]["command"] == shlex.join(command)


@pytest.mark.parametrize("command", [("compare", "--only", "none"), ("doctor", "--matrix")])
def test_a_failure_is_seen(command: Sequence[str]) -> None:
    """An error, and a command whose last line is no JSON."""
    found = dict(engines.check({"broken": command}))
    assert engines.failed(found) == ["broken"]
    assert found["broken"]["result"] is None


def test_what_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has started: an engine that goes on would hold the GPU's memory."""
    mark = tmp_path / "mark"
    code = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 4; touch {mark}'])"
    status, _ = engines._run([sys.executable, "-c", code], 1.0)
    assert status is None
    monkeypatch.setattr(engines, "_run", lambda command, most_seconds: (None, ""))
    ((name, found),) = engines.check({"slow": ("doctor",)}, 90)
    assert found["problem"] == "ended after 90 seconds without an answer"
    assert engines.failed({name: found}) == ["slow"]
    time.sleep(4.5)
    assert not mark.exists()


def test_engines_multiply_float32_in_full() -> None:
    """vLLM's Triton attention says nothing of precision, so Triton's default would be TF32."""
    status, printed = engines._run([sys.executable, "-c", "import os; print(os.environ['TRITON_F32_DEFAULT'])"], 60)
    assert (status, printed) == (0, "ieee\n")
    triton = pytest.importorskip("triton")
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    try:
        assert triton.knobs.language.fp32_default == "ieee"
    finally:
        del os.environ["TRITON_F32_DEFAULT"]


def test_noise_of_gaps_is_the_samplers_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = peek_seeds(torch.Generator().manual_seed(5), 3)
    assert torch.equal(gaps.noise_at(5, 2, 50, "cpu"), gumbel(seeds[2], 50))
    generator = torch.Generator().manual_seed(5)
    rows = [torch.empty(50).exponential_(generator=generator) for _ in range(3)]  # what vLLM's sampler draws on a GPU
    monkeypatch.setattr(torch, "Generator", lambda device: generator)  # a GPU's generators work like the CPU's
    assert torch.equal(gaps.noise_at(5, 2, 50, "cuda"), -rows[2].log())
