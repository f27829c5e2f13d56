"""The Triton kernels against plain torch, through Triton's interpreter: `vllm-eagle gpu-check --interpret`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vllm_eagle.bench.gpu import check
from vllm_eagle.cli import main
from vllm_eagle.ops.cases import Case

if find_spec("triton") is not None:
    from vllm_eagle.bench.gpu import timings


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install --no-deps -r vllm_eagle/locks/interop.lock")
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
    assert kernels == {"tree_attention", "own_attention", "latent_tree_attention", "move_slots", "best_children", "rerank", "walk"}
    assert f"--seed {found['seed']}" in done.stderr  # what to give to see a failure again
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


def wrong(device: torch.device, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor(float(seed)), torch.tensor(7.0))]


def broken(device: torch.device, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    raise RuntimeError("no such instruction")


def test_inputs_come_from_seeds_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sets of them, from the first one on; a kernel that cannot be run does not hide the others."""
    monkeypatch.setattr("vllm_eagle.ops.cases.all_cases", lambda: [Case("broken", broken), Case("wrong", wrong)])
    cpu = torch.device("cpu")
    assert dict(check.compare(cpu, 7, 1)) == {"broken": float("inf"), "wrong": 0.0}
    assert dict(check.compare(cpu, 6, 3))["wrong"] == float("inf")


def test_seeds_differ_from_run_to_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "")  # is set by the command; put back afterwards
    monkeypatch.setattr("vllm_eagle.ops.cases.all_cases", list)

    def seed(*arguments: str) -> int:
        assert main(["gpu-check", "--interpret", *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["seed"]

    assert seed() != seed()
    assert seed("--seed", "5") == 5


def test_what_is_known_is_written_before_the_next_thing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "")
    out = tmp_path / "result.json"

    def cases() -> Iterator[Case]:
        yield Case("wrong", wrong)
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_eagle.ops.cases.all_cases", cases)
    with pytest.raises(KeyboardInterrupt):
        main(["gpu-check", "--interpret", "--seed", "7", "--seeds", "1", "--json", str(out)])
    assert json.loads(out.read_text())["comparisons"] == {"wrong": 0.0}


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_small_inputs_come_in_so_many_sets_that_no_cache_holds_them() -> None:
    for batch, context in ((1, 1), (1, 1024), (8, 1024), (64, 32_768)):
        sets = timings.number_of_sets(batch, context)
        assert sets * timings.kv_bytes(batch, context) >= 256 << 20
        assert sets == 1 or (sets - 1) * timings.kv_bytes(batch, context) < 256 << 20


@needs_triton
def test_shapes_without_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of which it is known before, and those that fail on the way."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    cpu = torch.device("cpu")
    (row,) = timings.time_attention(cpu, 64, 32_768, 1e12)
    assert row == {"batch": 64, "context": 32_768, "problem": "8.6 GB of keys and values, of 1.1 GB that are free"}

    def launches(device: torch.device, batch: int, context: int, nodes: int, sets: int) -> int:
        if nodes == 64:
            raise torch.OutOfMemoryError("too much")
        return nodes

    monkeypatch.setattr(timings, "attention_launches", launches)
    monkeypatch.setattr(timings, "microseconds", lambda nodes: 10.0 + nodes)
    rows = list(timings.time_attention(cpu, 1, 1024, 1e12))
    assert [row["nodes"] for row in rows] == [1, 8, 16, 32, 64]
    assert [row.get("times_one_row") for row in rows] == [1.0, 1.636, 2.364, 3.818, None]
    assert rows[-1]["problem"] == "out of memory: too much"


@needs_triton
def test_timed_walks_go_some_way() -> None:
    from vllm_eagle.ops import rerank, walk

    tokens, scores, parents = timings.drafted_levels(12, 8, 8, 8)
    assert tokens.shape == (12, 8 + 7 * 64)
    trees = rerank.reference(torch.zeros(12).long(), tokens, scores, parents, torch.full((12,), 60), 61, 8)
    assert trees.num_nodes.tolist() == [61] * 12
    target_ids = timings.accepted_to(trees.token_ids, trees.parents, trees.depths, trees.num_nodes, torch.arange(12) % 6)
    _, _, lengths = walk.reference(trees.token_ids, trees.parents, trees.num_nodes, target_ids, max_depth=8)
    assert lengths.tolist() == [0, 1, 2, 3, 4, 5] * 2
