"""Evaluation without vLLM agrees with vLLM, and counts what it says it counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.heads import heads
from tests.heads.cases import DESIGNS
from tests.models import random_eagle3_head
from tests.tiers import some
from tests.train.test_train import ChainMemory
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Level
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.cli import main
from vllm_eagle.evaluate import calibration
from vllm_eagle.evaluate.accuracy import Accuracy, _count
from vllm_eagle.evaluate.command import EvalSettings, evaluate, kind_table
from vllm_eagle.evaluate.simulate import Replay, _Levels, replay
from vllm_eagle.evaluate.texts import read_texts, write_answers
from vllm_eagle.heads.formats import read_config, read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.target import Target
from vllm_eagle.pair import EAGLE3_HEAD, HEAD, TARGET
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head, save_head
from vllm_eagle.train.head.models import aux_layers
from vllm_eagle.train.head.unroll import UnrolledMemory

SETTINGS = EvalSettings(
    target=str(TARGET),
    head=HEAD,
    prompts=None,
    limit=6,
    num_draft_tokens=(16,),
    mode="dynamic",
    temperature=0.0,
    seed=0,
    max_tokens=48,
    dtype="float32",
    batch=4,
    out=None,
)


@pytest.mark.parametrize(("head", "temperature"), some([(HEAD, 0.0), (HEAD, 1.0), (EAGLE3_HEAD, 0.0)], (HEAD, 1.0)))
def test_tau_is_what_vllm_measures(tmp_path: Path, head: Path, temperature: float) -> None:
    result = evaluate(replace(SETTINGS, head=head, temperature=temperature, out=tmp_path))
    prompts = encode_prompts(str(TARGET), None, SETTINGS.limit)
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=SETTINGS.max_tokens) for i in range(len(prompts))]
    with engine(TARGET, **trees(head)) as llm:
        generate(llm, prompts, params)
        measured = tree_stats(llm)["tau"]
    found = result["trees"]["tree16"]
    assert found["tau"] == pytest.approx(measured, rel=0.03)
    by_certainty = result["alpha_0_by_certainty"]
    assert sum(c["share"] for c in by_certainty) == pytest.approx(1, abs=1e-3)
    assert sum(c["share"] * c["alpha_0"] for c in by_certainty) == pytest.approx(result["alpha_teacher_forced"][0], abs=1e-3)
    assert found["tau"] > 2.5  # and not because nothing was accepted
    assert json.loads((tmp_path / "eval.json").read_text())["trees"]["tree16"]["tau"] == found["tau"]
    assert (tmp_path / "reliability.png").stat().st_size > 5_000


def test_kinds_are_what_they_are_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And all of them together are what the same rows are without kinds."""
    rows = [{"prompt": text} for text in ("What is 3 + 4?", "def add(a, b):", "Name five rivers.", "for i in range(", "Hello,")]
    kinds = ("math", "code", None, "code", "math")

    def measured(name: str, chosen: list[dict[str, str]]) -> dict[str, Any]:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
        return evaluate(replace(SETTINGS, prompts=path, limit=None, max_tokens=24, num_draft_tokens=(4, 8)))

    told = [row if kind is None else row | {"kind": kind} for row, kind in zip(rows, kinds, strict=True)]
    result, untold = measured("told.jsonl", told), measured("untold.jsonl", rows)
    apart = result.pop("by_kind")
    assert result["prompts"] == 5
    assert "by_kind" not in untold
    assert_alike(result, untold)
    assert list(apart) == ["math", "code"]
    for kind, found in apart.items():
        alone = measured(f"{kind}.jsonl", [row for row, other in zip(rows, kinds, strict=True) if other == kind])
        assert found["prompts"] == 2
        assert_alike(found, {name: value for name, value in alone.items() if name in found}, "calibration")
    table = kind_table(result | {"by_kind": apart}).splitlines()
    assert table[0].split() == ["kind", "prompts", "alpha", "0", "1", "2", "3", "4", "tau", "tree4", "tau", "tree8"]
    assert table[2].split()[:3] == ["code", "2", f"{apart['code']['alpha_teacher_forced'][0]:.3f}"]
    assert table[2].split()[-1] == f"{apart['code']['trees']['tree8']['tau']:.2f}"
    assert len(set(map(len, table))) == 1
    options = ["--max-tokens", "8", "--num-draft-tokens", "4"]
    assert main(["eval", "--prompts", str(tmp_path / "told.jsonl"), *options]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["kind", "math", "code"]
    assert json.loads(last)["by_kind"].keys() == apart.keys()


def assert_alike(one: Any, other: Any, *left_out: str) -> None:
    """Figures within the rounding of batches of other sizes."""
    if isinstance(one, dict):
        assert one.keys() == other.keys() - set(left_out)
        for name, value in one.items():
            assert_alike(value, other[name], *left_out)
    elif isinstance(one, list):
        for value, its in zip(one, other, strict=True):
            assert_alike(value, its, *left_out)
    else:
        assert one == (pytest.approx(other, abs=2e-4) if isinstance(other, float) else other)


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle3_norms"])
def test_random_heads_accept_as_often_as_in_vllm(random_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Chance alone accepts these drafts, so that one wrong number anywhere in the head would show in which."""
    norms = {"norm_before_residual": True, "norm_output": True}
    path = random_eagle3_head(tmp_path / "head", **norms) if kind == "eagle3_norms" else random_models[kind]
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(2, 500, (20 + 7 * i,), generator=generator).tolist() for i in range(6)]
    params = [SamplingParams(temperature=1.0, seed=40 + i, max_tokens=40, ignore_eos=True) for i in range(6)]
    with engine(random_models["target"], **trees(path, 16)) as llm:
        outputs = tokens(generate(llm, prompts, params))
        measured = tree_stats(llm)
    target = FrozenTarget(random_models["target"], torch.float32)
    head = load_head(path, target).eval()
    texts = write_answers(target, prompts, 40, 9, temperature=1.0, seed=40)
    assert [text.token_ids[text.num_prompt :][:40] for text in texts] == [output[0] for output in outputs]
    # The server went on to the 40th token whatever it was.
    texts = [replace(text, num_answer=40) for text in texts]
    found = replay(head, read_texts(target, texts, aux_layers(head.config)), TreeConfig(16), temperature=1.0)
    assert found.num_accepted > 5
    assert found.tau == pytest.approx(measured["tau"], rel=0.01)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_nodes_of_a_tree_are_chains_run_one_by_one(random_models: dict[str, Path], kind: str, window: int) -> None:
    """Positions, ancestors and parents: root row 6, two children, a child of the second."""
    target = FrozenTarget(random_models["target"], torch.float32)
    head = load_head(random_models[kind], target).eval()
    token_ids = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(12))
    inputs = target.features(token_ids, aux_layers(head.config)).inputs
    places, trunk, chain = torch.arange(11)[None], UnrolledMemory(window), ChainMemory(window)
    with torch.no_grad():
        hidden, _ = head(token_ids[:, 1:], head.fuse(inputs[:, :11]), places, trunk)
        levels = _Levels(head, trunk.first, torch.tensor([6]), hidden[:, 6], window)
        first = levels(Level(1, torch.tensor([[9, 4]]), torch.tensor([[0, 0]]), torch.eye(2, dtype=torch.bool)[None]))
        second = levels(Level(2, torch.tensor([[33]]), torch.tensor([[1]]), torch.tensor([[[False, True, True]]])))
        hidden, _ = head(token_ids[:, 1:8], head.fuse(inputs[:, :7]), places[:, :7], chain)
        for token, position, found in ((4, 7, first[0, 1]), (33, 8, second[0, 0])):
            hidden, ready = head(torch.tensor([[token]]), hidden[:, -1:], torch.tensor([[position]]), chain)
            torch.testing.assert_close(found, head.logits(ready)[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_is_read_and_written_as_vllm_has_it(random_models: dict[str, Path], tmp_path: Path, name: str) -> None:
    target = FrozenTarget(random_models["target"], torch.float32)
    head = load_head(DESIGNS[name].write(tmp_path / "head"), target).eval()
    save_head(head, tmp_path / "again", torch.float32)
    found = judge(read_head(tmp_path / "again"), Target.read(random_models["target"]))
    assert (found.verdict, found.differences) == ("fits", ())
    again = load_head(tmp_path / "again", target)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in head.state_dict().items())
    texts = write_answers(target, [[5, 6, 7]], 8, 9)
    assert replay(head, read_texts(target, texts, aux_layers(head.config)), TreeConfig(8)).num_nodes > 0


def test_heads_of_other_formats_are_read(random_models: dict[str, Path], tmp_path: Path) -> None:
    target = FrozenTarget(random_models["target"], torch.float32)
    weights = heads.eagle1_weights(qkv_bias=True)
    biased = load_head(heads.write(tmp_path / "safeailab", heads.eagle1_settings(), weights, pickled=True), target)
    assert torch.equal(biased.fc.bias, weights["fc.bias"].float())
    assert torch.equal(biased.layers[0].self_attn.q_proj.bias, weights["layers.0.self_attn.q_proj.bias"].float())
    assert torch.equal(biased.embed(torch.arange(9)), weights["embed_tokens.weight"][:9].float())
    weights = heads.eagle3_weights("layers.0.")
    other = load_head(heads.write(tmp_path / "speculators", heads.speculators_settings(), weights), target)
    assert other.target_ids.tolist() == (torch.arange(len(weights["d2t"])) + weights["d2t"]).tolist()
    for name, head in (("biased", biased), ("other", other)):  # what is written again vLLM reads as it is
        save_head(head, tmp_path / name, torch.float32)
        assert judge(read_head(tmp_path / name), None).verdict == "fits"
        again = load_head(tmp_path / name, target)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in head.state_dict().items())
    assert read_config(tmp_path / "other")["num_aux_hidden_states"] == 3
    texts = write_answers(target, [[5, 6, 7]], 8, 9)
    for head in (biased, other):
        assert replay(head.eval(), read_texts(target, texts, aux_layers(head.config)), TreeConfig(8)).num_nodes > 0


def test_alpha_counts() -> None:
    """Prompt of 2, answer of 6 tokens; drafts at depth 0 and 1, right where marked."""
    tokens = [0, 0, 10, 11, 12, 13, 14, 15, 16, 17]
    depth0 = torch.tensor([0, 11, 12, 99, 14, 15, 0, 0, 0, 0])  # row r drafts token r + 2
    depth1 = torch.tensor([0, 12, 99, 14, 99, 16, 0, 0, 0, 0])  # row r drafts token r + 3
    total = Accuracy(2)
    _count(total, tokens, 2, 6, [depth0, depth1])
    # Roots 2..6 (the last token of the answer is no root), rows 1..5. Teacher-forced, tokens within the answer only:
    assert total.forced == [4, 2]
    assert total.forced_tries == [5, 4]
    # Free-running: root 2 accepts both and emits 3 tokens; root 5 accepts one of two; the answer is over.
    assert total.free == [2, 1]
    assert total.free_tries == [2, 2]
    assert total.as_dict()["tau_chain2"] == 2.5


def test_replay_counts() -> None:
    tree = DraftTree(np.array([5, 6, 7, 8]), np.array([0, 0, 0, 1]), np.log(np.array([1.0, 0.6, 0.3, 0.3], dtype=np.float32)))
    result = Replay()
    assert result.add(tree, [6, 8, 1]) == 2
    assert result.add(tree, [7]) == 1
    assert result.add(tree, []) == 0
    assert (result.num_steps, result.num_accepted, result.num_nodes) == (3, 3, 9)
    assert result.tau == 2
    assert result.expected_tau == pytest.approx(2.2)
    first = sorted(zip(np.round(result.confidences[:3], 3).tolist(), result.accepted[:3], strict=True))
    assert first == [(0.3, False), (0.5, True), (0.6, True)]
    assert result.accepted[3:5] == [False, True]
    assert len(result.accepted) == 7


def test_reliability() -> None:
    found = calibration.reliability([0.05, 0.95, 1.0, 0.95], [False, True, True, False])
    assert found.counts == [1, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert found.acceptance[-1] == pytest.approx(2 / 3)
    assert np.isnan(found.acceptance[1])
    assert found.error == pytest.approx((0.05 + 3 * abs(2.9 / 3 - 2 / 3)) / 4)
    assert found.as_dict()["acceptance"][1] is None
    with pytest.raises(ValueError, match="no node was drafted"):
        calibration.reliability([], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "x"], "belong together"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--num-draft-tokens", "0"], "num_draft_tokens=0 is not possible"),
        (["--max-tokens", "4000"], "the target takes 2048"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--target", str(TARGET), "--head", "nowhere"], "nowhere: no such folder"),
        (["--target", str(TARGET), "--head", str(TARGET)], "no EAGLE head"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["eval", *options]) == 2
    assert message in capsys.readouterr().err
