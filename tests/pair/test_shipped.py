"""The shipped target is read by other tools, too."""

import json

from transformers import AutoTokenizer

from vllm_eagle.pair import TARGET


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
