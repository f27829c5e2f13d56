"""What ships is read by other tools, too, is whole, and stays small."""

import json

from transformers import AutoTokenizer

from vllm_eagle.heads import draft_vocab
from vllm_eagle.heads.formats import read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.pair import REAL_EAGLE3_HEAD, REAL_HEAD, TARGET


def test_the_tokenizer_is_written_for_old_and_new_transformers() -> None:
    """Version 4 knows no TokenizersBackend and takes no list of extra_special_tokens; version 5 reads the older names, too."""
    settings = json.loads((TARGET / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["<|user|>", "<|assistant|>"]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    assert dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) == {
        "<s>": 0,
        "</s>": 1,
        "<|user|>": 2,
        "<|assistant|>": 3,
    }
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "</s>", 2048)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a?"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<s><|user|>\na?</s><|assistant|>\n"


def test_the_heads_of_the_real_target_are_small_and_whole() -> None:
    """They are part of the repository for good."""
    heads = {REAL_HEAD: "EAGLE-1", REAL_EAGLE3_HEAD: "EAGLE-3"}
    assert sum(file.stat().st_size for head in heads for file in head.iterdir()) < 30e6
    for folder, kind in heads.items():
        head = read_head(folder)
        assert head.kind == kind
        assert judge(head, None).verdict == "fits"
        card = json.loads((folder / "run_card.json").read_text())
        assert card["result"]["tokens"] >= 8e6
        assert "/" not in card["settings"]["target"]
    assert len(draft_vocab.read(REAL_HEAD, 49152) or []) == 8192
