"""The engine under pressure: chunked prefill, preemption, prefix cache, length limits, aborts, grammars, modes.

Each compares tokens with plain vLLM in float32. The last tests break the engine on purpose: the comparison must notice.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.test_exactness import PROMPTS_FILE
from tests.tiers import exhaustive, some
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.algorithm.verify import TreeBatch
from vllm_eagle.engine.v1.cpu_runner import EagleTreeCPUModelRunner
from vllm_eagle.engine.v1.scorer import EagleTreeScorer
from vllm_eagle.pair import HEAD, TARGET


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line)["messages"] for line in PROMPTS_FILE.read_text().splitlines()[:12]]
    chats = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in rows]
    return tokenizer(chats, add_special_tokens=False)["input_ids"]


def sampling(num: int, max_tokens: int = 60, **changes: Any) -> list[SamplingParams]:
    """Greedy and seeded requests in turn."""
    return [
        SamplingParams(**({"temperature": [0.0, 1.0, 0.7][i % 3], "seed": i, "max_tokens": max_tokens} | changes))
        for i in range(num)
    ]


def same_as_plain(
    prompts: Sequence[list[int]], params: list[SamplingParams], plain: dict[str, Any], with_trees: dict[str, Any]
) -> dict[str, Any]:
    """Compare two engines; returns the tree engine's counters."""
    with engine(TARGET, **plain) as llm:
        expected = tokens(generate(llm, prompts, params))
    with engine(TARGET, **(with_trees | trees(HEAD, 16))) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        return tree_stats(llm)


def test_chunked_prefill(prompts: list[list[int]]) -> None:
    """Prompts arrive in pieces of at most 48 tokens. Plain vLLM on CPU cannot chunk seeded requests, so it gets whole prompts."""
    stats = same_as_plain(prompts, sampling(12), {}, {"max_num_batched_tokens": 48, "max_num_seqs": 2})
    assert stats["num_accepted"] > 100


def test_preemption(prompts: list[list[int]]) -> None:
    """Twelve requests of up to 200 tokens in 24 blocks of 32."""
    params = sampling(12, max_tokens=100, ignore_eos=True)
    with engine(TARGET) as llm:
        expected = tokens(generate(llm, prompts, params))
    with engine(TARGET, num_gpu_blocks_override=24, enable_prefix_caching=False, **trees(HEAD, 16)) as llm:
        assert tokens(generate(llm, prompts, params)) == expected
        preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0


def test_prefix_cache_hits_on_blocks_that_trees_wrote(prompts: list[list[int]]) -> None:
    params = sampling(6, max_tokens=80, ignore_eos=True)
    with engine(TARGET) as llm:
        first = tokens(generate(llm, prompts[:6], params))
        longer = [prompt + out[0] for prompt, out in zip(prompts[:6], first, strict=True)]
        second = tokens(generate(llm, longer, params))
    with engine(TARGET, **trees(HEAD, 16)) as llm:
        assert tokens(generate(llm, prompts[:6], params)) == first
        found = generate(llm, longer, params)
        assert tokens(found) == second
        assert sum(output.num_cached_tokens for output in found) > 6 * 64


def test_requests_that_reach_the_models_length(prompts: list[list[int]]) -> None:
    """Prompts of every length near the limit; the longest leaves room for one token."""
    base = (prompts[0] * 4)[:128]
    near = [base[:length] for length in (127, 126, 125, 120, 112, 111, 90)]
    stats = same_as_plain(near, sampling(7, max_tokens=200, ignore_eos=True), {"max_model_len": 128}, {"max_model_len": 128})
    assert stats["num_accepted"] > 0


def test_nobody_waits_for_drafting(prompts: list[list[int]]) -> None:
    """vLLM sends a step's tokens off before it asks for the next drafts."""
    with engine(TARGET, **trees(HEAD, 16)) as llm:
        core = llm.llm_engine.engine_core.engine_core
        llm.llm_engine.add_request("a", {"prompt_token_ids": prompts[0]}, SamplingParams(temperature=0.0, max_tokens=60))
        for _ in range(3):
            drafted = tree_stats(llm)["num_drafted"]
            outputs, executed = core.step_fn()
            assert sum(len(output.new_token_ids) for output in outputs[0].outputs) > 0
            assert tree_stats(llm)["num_drafted"] == drafted
            core.post_step(executed)
            assert tree_stats(llm)["num_drafted"] > drafted


def run_by_hand(llm: LLM, prompts: list[list[int]], aborts: bool) -> dict[str, list[int]]:
    """Drive the engine step by step: abort two requests in flight, then submit one of their ids again with another prompt."""
    core = llm.llm_engine
    outputs: dict[str, list[int]] = {}

    def add(name: str, prompt: list[int]) -> None:
        core.add_request(
            name, {"prompt_token_ids": prompt}, SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
        )

    for i in range(5):
        add(f"r{i}", prompts[i])
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 4 and aborts:
            core.abort_request(["r1", "r3"])
            add("r1", prompts[7])
    return outputs


def test_aborted_requests_and_a_resubmitted_id(prompts: list[list[int]]) -> None:
    with engine(TARGET) as llm:
        plain = run_by_hand(llm, prompts, aborts=True)
    with engine(TARGET, **trees(HEAD, 16)) as llm:
        found = run_by_hand(llm, prompts, aborts=True)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert len(runner._stored) <= 1  # trees of finished requests are dropped; the last step's are not yet
    assert found == plain
    assert plain.keys() == {"r0", "r1", "r2", "r4"}


def test_grammars_in_a_batch_with_free_requests(prompts: list[list[int]]) -> None:
    """Constrained requests draft chains, the others trees."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n", "ok"]}
    grammars = [StructuredOutputsParams(regex=r"\d{3}-\d{4}"), StructuredOutputsParams(choice=["yes please", "no thanks"])]
    grammars.append(StructuredOutputsParams(json=schema))
    params = [
        SamplingParams(temperature=[0.0, 1.0][i % 2], seed=i, max_tokens=40, structured_outputs=grammars[i // 2] if i < 6 else None)
        for i in range(10)
    ]
    config = {"structured_outputs_config": StructuredOutputsConfig(backend="xgrammar")}
    with engine(TARGET, **config) as llm:
        expected = tokens(generate(llm, prompts[:10], params))
    with engine(TARGET, **config, **trees(HEAD, 16)) as llm:
        found = generate(llm, prompts[:10], params)
        assert tokens(found) == expected
        assert tree_stats(llm)["num_accepted"] > 0
    assert found[0].outputs[0].text[3] == "-"
    assert found[2].outputs[0].text in ("yes please", "no thanks")


class EveryThirdToken(LogitsProcessor):
    """A custom processor with state: the output's length decides which tokens are forbidden."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update:
            for index in batch_update.removed:
                self._outputs.pop(index, None)
            for index, _, _, output_token_ids in batch_update.added:
                self._outputs[index] = output_token_ids
            for source, target, _ in batch_update.moved:
                self._outputs[target], swapped = self._outputs.get(source), self._outputs.get(target)
                self._outputs[source] = swapped

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, output_token_ids in self._outputs.items():
            if output_token_ids is not None and index < len(logits):
                logits[index, len(output_token_ids) % 3 :: 3] = float("-inf")
        return logits


def test_custom_logits_processors(prompts: list[list[int]]) -> None:
    """vLLM refuses them under speculation; with trees they see what they see in plain decoding."""
    processors = {"logits_processors": [EveryThirdToken]}
    same_as_plain(prompts[:4], sampling(4), processors, processors)


def test_unseeded_sampling_gets_noise_of_its_own(prompts: list[list[int]]) -> None:
    """Two equal unseeded prompts differ, and drafting is as good as with seeds."""
    with engine(TARGET, **trees(HEAD, 16)) as llm:
        found = tokens(generate(llm, [prompts[0]] * 8, SamplingParams(temperature=1.0, max_tokens=40)))
        assert len({tuple(out[0]) for out in found}) > 1
        assert tree_stats(llm)["tau"] > 1.5


@pytest.mark.parametrize("size", some(("tiny", "shipped"), "tiny"))
def test_compiled(size: str, prompts: list[list[int]], random_models: dict[str, Path]) -> None:
    target, head = (random_models["target"], random_models["eagle"]) if size == "tiny" else (TARGET, HEAD)
    asked = [[i + 3, 9, 300, 40] for i in range(5)] if size == "tiny" else prompts[:5]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    with engine(target) as llm:
        expected = tokens(generate(llm, asked, params))
    with engine(target, **(trees(head, 16) | {"enforce_eager": False})) as llm:
        assert tokens(generate(llm, asked, params)) == expected
        assert tree_stats(llm)["num_verified"] > 0


@exhaustive  # servers, which the default tier runs, are multi-process
def test_multi_process(prompts: list[list[int]], tmp_path: Path) -> None:
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
    with engine(TARGET) as llm:
        expected = tokens(generate(llm, prompts[:5], SamplingParams(**params)))
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from vllm import SamplingParams\n"
        "from tests.engine.engines import engine, generate, tokens, trees\n"
        "from vllm_eagle.pair import HEAD, TARGET\n"
        "if __name__ == '__main__':\n"
        "    prompts, params, out = json.loads(sys.argv[1])\n"
        "    with engine(TARGET, **trees(HEAD, 16)) as llm:\n"
        "        json.dump(tokens(generate(llm, prompts, SamplingParams(**params))), open(out, 'w'))\n"
    )
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    out = tmp_path / "tokens.json"
    arguments = json.dumps([prompts[:5], params, str(out)])
    done = subprocess.run([sys.executable, script, arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text()) == expected


def without_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagleTreeCPUModelRunner, "_compact", lambda self, batch: None)


def with_a_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TreeBatch.__init__

    def causal(self: TreeBatch, *args: Any, **fields: Any) -> None:
        fields["ancestors"] = np.tril(np.ones_like(fields["ancestors"]))
        original(self, *args, **fields)

    monkeypatch.setattr(TreeBatch, "__init__", causal)


def with_noise_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    original = EagleTreeScorer.score

    def rewinding(self: EagleTreeScorer, logits: Any, trees: Any, metadata: Any, *args: Any) -> Any:
        states = {row: g.get_state() for row, g in metadata.generators.items()}
        result = original(self, logits, trees, metadata, *args)
        for row, state in states.items():
            metadata.generators[row].set_state(state)
        return result

    monkeypatch.setattr(EagleTreeScorer, "score", rewinding)


def with_positions_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    by_slot = property(lambda self: (self.context_lens[:, None] + np.arange(self.depths.shape[1]))[self.is_node])
    monkeypatch.setattr(TreeBatch, "positions", by_slot)


def with_a_dropped_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk skips over the first accepted child as if the sampled token had been emitted twice."""
    original = DraftTree.child
    monkeypatch.setattr(DraftTree, "child", lambda self, node, token: None if node else original(self, 0, int(self.token_ids[-1])))


BREAKAGES = [without_compaction, with_a_causal_mask, with_noise_used_twice, with_positions_by_slot, with_a_dropped_node]


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_comparison_notices_a_broken_engine(breakage: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    params = sampling(4, max_tokens=32, temperature=1.0)
    with engine(TARGET) as llm:
        expected = tokens(generate(llm, prompts[:4], params))
    breakage(monkeypatch)
    with engine(TARGET, **trees(HEAD, 16)) as llm:
        assert tokens(generate(llm, prompts[:4], params)) != expected


def test_a_changed_draft_list_is_refused(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """If anything between worker and scheduler reorders draft tokens, the step must fail and not verify a wrong tree."""
    original = EagleTreeCPUModelRunner._scheduled_tree
    monkeypatch.setattr(EagleTreeCPUModelRunner, "_scheduled_tree", lambda self, req_id, ids: original(self, req_id, ids[::-1]))
    with engine(TARGET, **trees(HEAD, 16)) as llm, pytest.raises(RuntimeError, match="no prefix of the tree"):
        generate(llm, prompts[:1], SamplingParams(temperature=0, max_tokens=20))
