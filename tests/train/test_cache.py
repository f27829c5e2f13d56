"""The cache of features on disk."""

from pathlib import Path

import pytest
import torch

from vllm_eagle.train.features.cache import FeatureCache, stack
from vllm_eagle.train.features.target import Features


def features(length: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(*(torch.randn(1, length, width, generator=generator).to(dtype) for width in (8, 24)))


def test_what_is_put_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 10_000, {"target": "a"})
    one, other = features(5, 1), features(7, 2)
    cache.put(3, one, 4)  # the last position is padding
    cache.put(9, other, 7)
    with pytest.raises(ValueError, match="in use by another run"):
        FeatureCache(tmp_path, 10_000, {"target": "a"})
    cache.close()
    for reader in (cache, FeatureCache(tmp_path, 10_000, {"target": "a"})):
        found = reader.get(3)
        assert found is not None
        assert torch.equal(found.last, one.last[:, :4])
        assert torch.equal(found.fused, one.fused[:, :4])
        assert reader.get(4) is None
        assert len(reader) == 2
    pair = stack([found, other], 7)
    assert pair.last.shape == (2, 7, 8)
    assert not pair.last[0, 4:].any()


def test_size_is_bounded_and_what_is_there_stays(tmp_path: Path) -> None:
    size = 10 * 32 * 2
    cache = FeatureCache(tmp_path, 3 * size + size // 2, {})
    for key in range(6):
        cache.put(key, features(10, key), 10)
    assert [cache.get(key) is not None for key in range(6)] == [True] * 3 + [False] * 3
    assert (tmp_path / "features.0.bin").stat().st_size == 3 * size
    cache.put(7, features(5, 7), 5)  # a short one still fits
    assert cache.get(7) is not None


def test_a_torn_entry_is_computed_anew(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 10_000, {})
    cache.put(1, features(3, 1), 3)
    cache.put(2, features(3, 2), 3)
    cache.close()
    index = tmp_path / "index.0.jsonl"
    index.write_text(index.read_text()[:-9])
    again = FeatureCache(tmp_path, 10_000, {})
    assert again.get(1) is not None
    assert again.get(2) is None
    again.put(2, features(3, 5), 3)
    again.close()
    found = FeatureCache(tmp_path, 10_000, {}).get(2)
    assert found is not None
    assert torch.equal(found.last, features(3, 5).last)


def test_features_of_another_run_are_refused(tmp_path: Path) -> None:
    FeatureCache(tmp_path, 10, {"target": "a"})
    with pytest.raises(ValueError, match=r"--cache-dir .* of another target"):
        FeatureCache(tmp_path, 10, {"target": "b"})


def test_processes_read_each_others_features(tmp_path: Path) -> None:
    one, other = (FeatureCache(tmp_path, 10_000, {"target": "a"}, rank) for rank in (0, 1))
    one.put(5, features(3, 5), 3)
    assert other.get(5) is None
    other.refresh()
    found = other.get(5)
    assert found is not None
    assert torch.equal(found.fused, features(3, 5).fused)
