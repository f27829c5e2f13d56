"""Random targets that see pictures: Qwen2-VL, Qwen2.5-VL and Qwen3-VL in their real architectures, and prompts with pictures.

vLLM's classes of these models want torchvision, which the lock files leave out: its CPU build is on few registries. Pictures are
processed by numpy, and videos not at all, so nothing of it runs: `seeing` lets it be imported. All else is as in a published model.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available
from vllm.model_executor.models import registry
from vllm.multimodal.processing import context

from tests import models
from tests.engine.families import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, even_embedding

VOCAB = models.VOCAB
START, END, PICTURE, VIDEO = range(VOCAB - 4, VOCAB)  # tokens that stand for pictures, the tokenizer's last
_MARKERS = {START: "<|vision_start|>", END: "<|vision_end|>", PICTURE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2}
_SMALL_TOWER: dict[str, Any] = {**_TOWER, "hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 128}
# Class in transformers: its tower, and what its layers have besides.
TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2VL": ({**_TOWER, "embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2}, {"rope_parameters": _ROPE}),
    "Qwen2_5_VL": ({**_SMALL_TOWER, "window_size": 56, "fullatt_block_indexes": [1]}, {"rope_parameters": _ROPE}),
    "Qwen3VL": (
        {**_SMALL_TOWER, "patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        {"rope_parameters": _ROPE | {"mrope_interleaved": True}, "head_dim": HEAD_DIM},
    ),
}
OPTIONS: dict[str, Any] = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "max_num_batched_tokens": 512}


def random_target(folder: Path, family: str) -> Path:
    """Layers that add a little to the token's embedding: enough that attention decides, so little that drafts are right.

    Args:
        folder: to be made; the model, its tokenizer and its pictures' processor.
        family: of TARGETS.
    """
    torch.manual_seed(8)
    folder.mkdir()
    _tokenizer(folder)
    tower, layers = TARGETS[family]
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 4, "num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 512, "tie_word_embeddings": False}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(
        text_config=sizes | layers,
        vision_config=tower,
        image_token_id=PICTURE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "o_proj" in name:
                parameter *= 0.5
            elif "down_proj" in name:
                parameter.zero_()
        even_embedding(model)
    model.save_pretrained(folder)
    patch_size = config.vision_config.patch_size
    Qwen2VLImageProcessorPil(patch_size=patch_size, min_pixels=4 * patch_size**2, max_pixels=64 * patch_size**2).save_pretrained(
        folder
    )
    return folder


def text_model(folder: Path, target: Path, family: str) -> Path:
    """The part of a target that knows text, as a model of its own: with positions that rise by one it is an ordinary one."""
    kind = {"Qwen3VL": "Qwen3"}.get(family, "Qwen2")
    found = json.loads((target / "config.json").read_text())["text_config"]
    config = getattr(transformers, f"{kind}Config")(
        **{name: found[name] for name in found.keys() - {"model_type", "architectures", "dtype", "rope_parameters", "layer_types"}},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    weights = {name: x for name, x in load_file(target / "model.safetensors").items() if "visual" not in name}
    model.load_state_dict({name.replace("language_model.", ""): x for name, x in weights.items()})
    model.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    models._tokenizer(folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    names = {token: name for name, token in vocabulary.items()}
    for token, name in _MARKERS.items():
        vocabulary[name] = vocabulary.pop(names[token])
        added = {"id": token, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        found["added_tokens"].append(added | {"normalized": False, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(found))


@contextmanager
def seeing(folder: Path, family: str) -> Iterator[None]:
    """vLLM's engines in this process see pictures, where torchvision is not installed, too."""
    of_family = getattr(transformers, f"{family}Processor")

    class PicturesAlone(of_family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder)
    # What vLLM works out of videos before it sees that there are none.
    sizes = {"patch_size": pictures.patch_size, "merge_size": pictures.merge_size, "size": pictures.size, "fps": 2}
    limits = {"min_frames": 2, "max_frames": 4, "valid_kwargs": pictures.valid_kwargs}
    videos = SimpleNamespace(**sizes, **limits, temporal_patch_size=2)
    processor = PicturesAlone(pictures, PreTrainedTokenizerFast.from_pretrained(folder), videos)
    _import_without_torchvision()
    with (
        patch.object(context, "cached_processor_from_config", lambda *args, **kwargs: processor),
        patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()),  # which would have to import it, too
    ):
        yield


def _import_without_torchvision() -> None:
    """Import what asks for torchvision when it is imported, and does not use it here."""
    if is_torchvision_available():
        return
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")
    sys.modules |= {name: ModuleType(name) for name in names}
    sys.modules["torchvision.transforms.v2"].functional = sys.modules[names[-1]]  # type: ignore[attr-defined]
    try:
        importlib.import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl")
        importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    finally:
        for name in names:
            del sys.modules[name]


def prompts() -> list[Mapping[str, Any]]:
    """Text alone, a picture in it, two of other shapes, and one with hardly any text behind it."""
    text = [3 + (7 * i) % 250 for i in range(60)]
    seen = [START, PICTURE, END]
    return [
        {"prompt_token_ids": text[:23]},
        {"prompt_token_ids": [*text[:7], *seen, *text[7:20]], "multi_modal_data": {"image": picture(0, 140, 70)}},
        {
            "prompt_token_ids": [*text[:3], *seen, *text[3:9], *seen, *text[9:40]],
            "multi_modal_data": {"image": [picture(1, 64, 64), picture(2, 60, 130)]},
        },
        {"prompt_token_ids": [*text[30:], *seen], "multi_modal_data": {"image": picture(3, 96, 64)}},
    ]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
