"""Quantized targets in vLLM's V2 runner: with exact attention (exact_attention.py) answers and scores are those without trees.

INT8 rounds activations, too. Where one lies between two steps, the last bit of attention's sum decides. Measured on the shipped
target: scores of plain decoding moved by 0.37 from float64 to vLLM's Triton kernel, trees differed from plain decoding by 0.22 with
the kernels that serve, and by exactly nothing with attention that is a function of what a row sees alone. So these tests take that.

The quantized layers are vLLM's, by its kernels for CPUs, which take each row for itself: INT8 by oneDNN, 4 bits by its own, which
knows no float32. Those of CUDA (CUTLASS, Marlin and the like) are compiled for GPUs; nothing of ours knows which of them runs.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.v2.bed import Answers, Bed, Case
from tests.engine.v2.test_v2 import MANY, case, same_logprobs, trees, with_trees
from tests.tiers import interpreted
from vllm_eagle.bench.passes.quantize import Scheme, quantize
from vllm_eagle.pair import TARGET

PARAMS = [MANY[kind] | {"logprobs": 5} for kind in ("greedy", "sampled", "filtered", "penalties")]
SCHEMES: dict[Scheme, dict[str, Any]] = {"W8A8": {}, "W4A16": {"dtype": "bfloat16"}}


@pytest.fixture(scope="module", params=SCHEMES)
def plain(bed: Bed, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Case, Answers]:
    model = quantize(TARGET, tmp_path_factory.mktemp("quantized") / request.param, request.param)
    asked = case(PARAMS, 12, str(model), engine=SCHEMES[request.param], attention="exact")
    return asked, bed.run(asked)


@interpreted
@pytest.mark.parametrize("options", [{}, {"budget": True}, {"mode": "static"}])
def test_answers_and_scores_are_those_of_plain_decoding(bed: Bed, plain: tuple[Case, Answers], options: dict[str, Any]) -> None:
    asked, expected = plain
    patches = ("nodes_cost",) if options.get("budget") else ()
    found = bed.run(with_trees(asked, trees(**options), is_async=True, patches=patches))
    assert found.token_ids == expected.token_ids
    for one, other in zip(expected.logprobs, found.logprobs, strict=True):
        same_logprobs(one, other)
    assert found.stats["num_moved"] > 0


@interpreted
@pytest.mark.parametrize("broken", ["no_compaction", "causal_trees", "positions_by_row"])
def test_breaking_the_engine_is_noticed(bed: Bed, plain: tuple[Case, Answers], broken: str) -> None:
    asked, expected = plain
    found = bed.run(with_trees(asked, trees(), patches=(broken,)))
    assert found.token_ids != expected.token_ids


@interpreted
def test_kernels_differ_by_more_without_trees(bed: Bed, plain: tuple[Case, Answers]) -> None:
    """So with those nothing can be shown: plain decoding by vLLM's kernel for CPUs has other scores than by exact attention."""
    asked, expected = plain
    found = bed.run(replace(asked, attention="cpu"))
    apart = []
    for i, token_ids in enumerate(expected.token_ids):
        for place, (token, twin) in enumerate(zip(token_ids, found.token_ids[i], strict=True)):
            if token != twin:
                break
            apart.append(abs(expected.logprobs[i][place][token].logprob - found.logprobs[i][place][token].logprob))
    assert max(apart) > 0.01
