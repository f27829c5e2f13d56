"""Targets with M-RoPE that see pictures: positions of nodes in three rows, behind text and pictures; heads see text alone."""

import json
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine import pictures
from tests.engine.engines import engine, tokens, tree_stats, trees
from tests.engine.families import MARGIN, NUM_DRAFT_TOKENS, NUM_TOKENS, PROMPTS, expected_tau, overfitted, said
from tests.engine.test_targets import knowing_head
from tests.tiers import exhaustive
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import save_head

PARAMS = [SamplingParams(temperature=i % 2, seed=i, max_tokens=50, ignore_eos=True, detokenize=False) for i in range(8)]


def answers(llm: LLM) -> list[list[list[int]]]:
    """Each prompt greedy and sampled, one beside the other."""
    prompts = [prompt for prompt in pictures.prompts() for _ in range(2)]
    return tokens(llm.generate(prompts, [each.clone() for each in PARAMS], use_tqdm=False))


@exhaustive
@pytest.mark.parametrize("family", pictures.TARGETS)
def test_trees_are_exact_behind_pictures(family: str, tmp_path: Path) -> None:
    target, head = pictures.random_target(tmp_path / "target", family), knowing_head(tmp_path / "head", pictures.VOCAB)
    with pictures.seeing(target, family):
        with engine(target, **pictures.OPTIONS) as llm:
            plain = answers(llm)
        with engine(target, **pictures.OPTIONS, **trees(head, 16)) as llm:
            found = answers(llm)
            stats = tree_stats(llm)
    print(family, stats["tau"], stats["num_moved"])
    assert found == plain
    assert stats["num_moved"] > 0  # branches off the first child were accepted
    assert stats["tau"] > 1.1


@exhaustive
@pytest.mark.parametrize(("family", "has_rows"), [("Qwen2VL", False), ("Qwen3VL", True)])
def test_eagle3_heads_are_accepted_as_eval_expects(family: str, has_rows: bool, tmp_path: Path) -> None:
    """Heads with positions in three rows of their own, and without, that have learnt texts. Behind pictures they are exact, too."""
    target = pictures.random_target(tmp_path / "target", family)
    text_model = FrozenTarget(pictures.text_model(tmp_path / "text", target, family), torch.float32)
    asked = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS + MARGIN, ignore_eos=True, detokenize=False)
    with pictures.seeing(target, family), engine(target, **pictures.OPTIONS) as llm:
        plain = answers(llm)
        replies = tokens(llm.generate(asked, params, use_tqdm=False))
    texts = said(replies, temperature=0.0)
    head = overfitted(text_model, "eagle3", texts)
    save_head(head, tmp_path / "head", torch.float32)
    settings = json.loads((tmp_path / "head" / "config.json").read_text())
    if has_rows:
        settings["rope_parameters"] |= pictures.TARGETS[family][1]["rope_parameters"] | {"rope_type": "mrope"}
        (tmp_path / "head" / "config.json").write_text(json.dumps(settings))
    params.max_tokens = NUM_TOKENS
    with pictures.seeing(target, family), engine(target, **pictures.OPTIONS, **trees(tmp_path / "head", NUM_DRAFT_TOKENS)) as llm:
        found = tokens(llm.generate(asked, params, use_tqdm=False))
        measured = tree_stats(llm)["tau"]
        behind_pictures = answers(llm)
    print(family, measured)
    assert found == [[reply[:NUM_TOKENS]] for [reply] in replies]
    assert measured == pytest.approx(expected_tau(text_model, head, texts, 0.0), rel=0.03)
    assert measured > 1.5
    assert behind_pictures == plain
