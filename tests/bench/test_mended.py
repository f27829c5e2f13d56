"""vLLM's expansion of a batch's values over its drafted tokens, as the benchmarks and the patch mend it."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from vllm_eagle.patches import ledger

from vllm_eagle.bench.engines import mended

COUNTS = torch.tensor([2, 0, 3, 1])


def patched_expand(folder: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    changed = folder / "vllm" / "utils" / "cpu_triton_utils.py"
    changed.parent.mkdir(parents=True)
    shutil.copy(ledger.site_packages() / "vllm" / "utils" / "cpu_triton_utils.py", changed)
    monkeypatch.setattr(ledger, "site_packages", lambda: folder)
    (patch,) = (patch for patch in ledger.patches() if patch.name == "cpu_expand_kernel")
    ledger.change(patch, reverse=False)
    spec = importlib.util.spec_from_file_location("patched", changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._expand_kernel_impl


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (torch.tensor([0.7, 1.0, 0.0, 1.5]), [0.7, 0.7, 1.0, 1.0, 1.0, 1.5]),  # greedy ones divide by one
        (torch.tensor([5, 6, 0, 7], dtype=torch.int32), [5, 5, 1, 1, 1, 7]),
    ],
)
def test_values_arrive_in_their_own_type(
    patched: bool, values: torch.Tensor, wanted: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand = patched_expand(tmp_path, monkeypatch) if patched else mended.expand
    output = values.new_full((6,), -1)
    expand(output, values, COUNTS.cumsum(0).int(), 0, 1, MAX_NUM_TOKENS=128)
    assert output.dtype == values.dtype
    torch.testing.assert_close(output, torch.tensor(wanted, dtype=values.dtype))


def test_what_is_said_of_whom() -> None:
    assert mended.note(["vllm_chain3", "trees"], 0.0, in_process=True) is None
    assert mended.note(["trees", "vllm_ngram5"], 1.0, in_process=True) is None
    assert "mended in their process" in str(mended.note(["vllm_chain3"], 1.0, in_process=True))
    assert "apply patches/cpu_expand_kernel.patch first" in str(mended.note(["vllm_chain3"], 1.0, in_process=False))
