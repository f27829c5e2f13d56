"""Engine arguments of benchmarks, and the same as options of a server."""

import json
from pathlib import Path

import pytest

from vllm_eagle.bench.engines.drafters import flags, ours, vllm_chain, vllm_medusa
from vllm_eagle.pair import HEAD


def test_options_of_a_server() -> None:
    found = flags({"dtype": "bfloat16", "enforce_eager": True, "seed": None, "enable_lora": False} | vllm_chain(str(HEAD), 3))
    assert found[:5] == ["--dtype", "bfloat16", "--enforce-eager", "--no-enable-lora", "--speculative-config"]
    assert json.loads(found[5]) == {"method": "eagle", "model": str(HEAD), "num_speculative_tokens": 3}
    assert flags(ours("head", 8, topk=2)) == [
        *("--spec-model", "head", "--spec-tokens", "8"),
        *("--additional-config", '{"vllm_eagle": {"topk": 2}}'),
    ]


def test_no_medusa_heads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no num_heads"):
        vllm_medusa(str(tmp_path))
