"""Drafting over a part of the vocabulary: other drafts, the same answers."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.models import VOCAB, random_eagle1_head, random_target
from tests.tiers import some
from vllm_eagle.algorithm.draft import grow
from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.engine.v1 import proposer
from vllm_eagle.evaluate.command import EvalSettings, evaluate
from vllm_eagle.heads import draft_vocab
from vllm_eagle.pair import HEAD, TARGET

VOCAB_SIZE, NUM_PROMPTS = 4096, 6


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy and sampled ones; with filters, a grammar, allowed tokens and biases, some for tokens that are never drafted."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}, "name": {"type": "string", "maxLength": 8}}}
    common: dict[str, Any] = {"max_tokens": 40}
    changes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 30},
        {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(json=schema)},
        {"temperature": 0.7, "allowed_token_ids": list(range(0, VOCAB_SIZE, 2))},
        {"temperature": 0.0, "logit_bias": {VOCAB_SIZE - 1: 4.0, 300: 6.0}},
    ]
    prompts = encode_prompts(str(TARGET), None, NUM_PROMPTS)
    return prompts, [SamplingParams(seed=i, **(common | change)) for i, change in enumerate(changes)]


def limited(folder: Path, token_ids: list[int]) -> Path:
    """The shipped head, which drafts these tokens."""
    shutil.copytree(HEAD, folder)
    draft_vocab.write(folder, token_ids, VOCAB_SIZE)
    return folder


def test_answers_equal_plain_ones_and_only_the_named_tokens_are_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = requests()
    with engine(TARGET) as llm:
        expected = tokens(generate(llm, prompts, params))
    counts = Counter(token for answers in expected for answer in answers for token in answer)
    frequent = sorted(token for token, _ in counts.most_common(len(counts) // 2))
    drafted: set[int] = set()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        grown = grow(*args, **kwargs)
        drafted.update(token for tree in grown for token in tree.draft_token_ids)
        return grown

    monkeypatch.setattr(proposer, "grow", recorded)
    with engine(TARGET, **trees(limited(tmp_path / "half", frequent))) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        assert tree_stats(llm)["tau"] > 1.7
        assert tree_stats(llm)["num_moved"] > 0
    assert drafted == set(frequent) & drafted
    assert len(drafted) > 20
    drafted.clear()
    with engine(TARGET, **trees(tmp_path / "half", draft_vocab=False)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
    assert not drafted <= set(frequent)


def test_a_vocabulary_of_all_tokens_changes_nothing(tmp_path: Path) -> None:
    """Same drafts, so the same steps."""
    prompts = encode_prompts(str(TARGET), None, NUM_PROMPTS)
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=48) for i in range(len(prompts))]
    found = []
    for head in (HEAD, limited(tmp_path / "all", list(range(VOCAB_SIZE)))):
        with engine(TARGET, **trees(head)) as llm:
            answers = tokens(generate(llm, prompts, params))
            stats = tree_stats(llm)
            found.append((answers, {name: stats[name] for name in ("num_accepted", "num_drafted", "num_moved", "tau")}))
    assert found[0] == found[1]


@pytest.mark.parametrize("temperature", some([0.0, 1.0], 1.0))
def test_tau_is_what_eval_expects(tmp_path: Path, temperature: float) -> None:
    head = limited(tmp_path / "third", list(range(0, VOCAB_SIZE, 3)))
    prompts = encode_prompts(str(TARGET), None, NUM_PROMPTS)
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=48) for i in range(len(prompts))]
    with engine(TARGET, **trees(head)) as llm:
        generate(llm, prompts, params)
        measured = tree_stats(llm)["tau"]
    settings = EvalSettings(
        target=str(TARGET), head=head, prompts=None, limit=NUM_PROMPTS, num_draft_tokens=(16,), mode="dynamic",
        temperature=temperature, seed=0, max_tokens=48, dtype="float32", batch=6, out=None,
    )  # fmt: skip
    assert evaluate(settings)["trees"]["tree16"]["tau"] == pytest.approx(measured, rel=0.03)


def test_a_wrong_file_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    target, head = random_target(tmp_path / "target"), random_eagle1_head(tmp_path / "head")
    draft_vocab.write(head, [1, 2], VOCAB + 1)
    words = rf"draft_vocab.json: it is for a vocabulary of {VOCAB + 1}, .* make it anew with `vllm-eagle draft-vocab`"
    with pytest.raises(ValueError, match=words), engine(target, **trees(head)):
        pass
