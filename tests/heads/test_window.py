"""Where the window over a head comes from when nobody asks for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_eagle.heads.window import trained_length, window_of


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "draft_window": 300}, 300),
        ({"transformer_layer_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 9}, 4096),
        ({"model_type": "eagle", "model": {"max_position_embeddings": 512}}, 512),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 256, "max_position_embeddings": 2048}, 256),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        ({}, None),
    ],
)
def test_what_a_head_says_of_its_length(tmp_path: Path, config: dict[str, Any], length: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_length(tmp_path) == length
    assert window_of(None, tmp_path, 8192) == (length or 0)
    assert window_of(0, tmp_path, 8192) == 0
    assert window_of(100, tmp_path, 8192) == 100


@pytest.mark.parametrize("asked", [None, 2048, 4096])
def test_a_window_as_long_as_any_text_is_none(tmp_path: Path, asked: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    assert window_of(asked, tmp_path, 2048) == 0
