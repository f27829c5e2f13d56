"""Training: what the head sees, what it learns from, and that a run can be cut anywhere."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests.models import VOCAB, random_target
from tests.tiers import exhaustive
from vllm_eagle.bench.engines.offline import encode_prompts
from vllm_eagle.cli import main
from vllm_eagle.evaluate.accuracy import measure_accuracy
from vllm_eagle.evaluate.texts import read_texts, write_answers
from vllm_eagle.heads.formats import read_head
from vllm_eagle.heads.judge import judge
from vllm_eagle.heads.target import Target
from vllm_eagle.heads.window import trained_length
from vllm_eagle.pair import TARGET, TRAINING_ANSWERS
from vllm_eagle.train.data.examples import Example
from vllm_eagle.train.features.finish import Finish
from vllm_eagle.train.features.target import Features, FrozenTarget, default_aux_layers, head_config
from vllm_eagle.train.head.files import load_head, save_head
from vllm_eagle.train.head.layer import Memory
from vllm_eagle.train.head.models import Eagle3Head, Head, aux_layers
from vllm_eagle.train.head.objective import LossWeights, Objective
from vllm_eagle.train.head.unroll import unroll
from vllm_eagle.train.head.vocabulary import count_tokens, coverage, draft_vocabulary
from vllm_eagle.train.run import checkpoint
from vllm_eagle.train.run.build import new_head
from vllm_eagle.train.run.loop import train
from vllm_eagle.train.run.settings import DEFAULT_WEIGHTS, TrainSettings

METHODS = ["eagle", "eagle3", "medusa"]


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_target(tmp_path_factory.mktemp("train") / "target")


@pytest.fixture(scope="module")
def target(target_path: Path) -> FrozenTarget:
    return FrozenTarget(target_path, torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "texts.jsonl"
    rows = [{"text": "".join(chr(97 + (i * i + j * (i % 5 + 1)) % 26) for j in range(20 + 3 * i))} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(target_path: Path, data: Path, out: Path, method: str = "eagle", **changes: object) -> TrainSettings:
    base = TrainSettings(
        target=str(target_path),
        data=(data,),
        out=out,
        method=method,  # type: ignore[arg-type]
        weights=DEFAULT_WEIGHTS[method],
        steps=6,
        batch_tokens=256,
        max_length=64,
        lr=1e-3,
        warmup=2,
        dtype="float32",
        draft_vocab=128 if method == "eagle3" else None,
        holdout=0.1,
        log_every=1,
        eval_every=3,
        checkpoint_every=3,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def head_for(target: FrozenTarget, method: str, token_ids: torch.Tensor, layers: int = 1) -> Head:
    torch.manual_seed(0)
    examples = [Example(row.int(), torch.ones(len(row), dtype=torch.bool)) for row in token_ids]
    draft_vocab = 128 if method == "eagle3" else None
    options = TrainSettings(target.path, (), Path(), method, DEFAULT_WEIGHTS[method], draft_vocab=draft_vocab, head_layers=layers)
    return new_head(target, options, examples)[0]


class ChainMemory(Memory):
    """The obvious way: all rows so far of one chain, the new ones see every earlier one and themselves."""

    def __init__(self, window: int = 0) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.window = window

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        earlier = self.layers.get(layer)
        past = 0 if earlier is None else earlier[0].shape[2]
        key, value = (key, value) if earlier is None else (torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2))
        self.layers[layer] = key, value
        groups = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ keys.transpose(2, 3) / query.shape[3] ** 0.5
        seen = torch.ones(query.shape[2], keys.shape[2]).tril(past).bool()
        if self.window:
            seen = seen.triu(past - self.window + 1)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize(("window", "layers"), [(0, 1), (2, 1), (5, 3), (0, 2)])
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_unrolled_rows_are_chains_drafted_one_by_one(target: FrozenTarget, method: str, window: int, layers: int) -> None:
    token_ids = torch.randint(2, VOCAB, (1, 14), generator=torch.Generator().manual_seed(3))
    head = head_for(target, method, token_ids, layers)
    features = target.features(token_ids, aux_layers(head.config))
    inputs = features.fused if method == "eagle3" else features.last
    with torch.no_grad():
        together = list(unroll(head, token_ids, inputs, 4, window=window))
        for row in (0, 3, 7):
            memory = ChainMemory(window)
            places = torch.arange(row + 1)[None]
            hidden, ready = head(token_ids[:, 1 : row + 2], head.fuse(inputs[:, : row + 1]), places, memory)
            for step in range(4):
                torch.testing.assert_close(together[step][0, row], ready[0, -1], rtol=1e-4, atol=1e-4)
                following = token_ids[:, row + 2 + step : row + 3 + step]
                hidden, ready = head(following, hidden[:, -1:], torch.tensor([[row + 1 + step]]), memory)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_head_only(target: FrozenTarget, method: str) -> None:
    token_ids = torch.randint(2, VOCAB, (2, 16), generator=torch.Generator().manual_seed(4))
    head = head_for(target, method, token_ids)
    objective = Objective(head, target.lm_head, DEFAULT_WEIGHTS[method], target.finish)
    outcome = objective(
        token_ids, torch.ones_like(token_ids, dtype=torch.bool), target.features(token_ids, aux_layers(head.config))
    )
    outcome.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert {id(p) for p in objective.parameters()}.isdisjoint({id(p) for p in target.model.parameters()})


@pytest.mark.parametrize("method", METHODS)
def test_head_overfits_one_batch(target: FrozenTarget, method: str) -> None:
    token_ids = torch.randint(2, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
    head = head_for(target, method, torch.arange(VOCAB)[None])
    if isinstance(head, Eagle3Head):  # the likeliest tokens of a random target are not those of the data
        head = Eagle3Head(_with(head.config, draft_vocab_size=VOCAB), target.embed)
    weights = replace(DEFAULT_WEIGHTS[method], noise=0.0, num_steps=min(2, DEFAULT_WEIGHTS[method].num_steps))
    objective = Objective(head, target.lm_head, weights, target.finish)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.0)
    features = target.features(token_ids, aux_layers(head.config))
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    for step in range(200):
        # Slower at the end: between tokens that are nearly as likely, the last steps would decide by rounding.
        optimizer.param_groups[0]["lr"] = 3e-3 if step < 150 else 3e-4
        outcome = objective(token_ids, mask, features)
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (outcome.num_agreed / outcome.num_positions).min() > 0.95, outcome


def _with(config: object, **changes: object) -> object:
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_loss_counts_answers_only(target: FrozenTarget) -> None:
    token_ids = torch.randint(2, VOCAB, (1, 10), generator=torch.Generator().manual_seed(6))
    head = head_for(target, "eagle", token_ids)
    objective = Objective(head, target.lm_head, LossWeights(noise=0.0, num_steps=3), target.finish).eval()
    mask = torch.zeros_like(token_ids, dtype=torch.bool)
    mask[0, [0, 1, 2, 8]] = True  # token 0 is never predicted, token 1 comes from the target; 2 and 8 can be drafted
    features = target.features(token_ids)
    assert objective(token_ids, mask, features).num_positions.tolist() == [2, 1, 1]
    nothing = objective(token_ids, torch.zeros_like(mask), features)
    assert nothing.loss.item() == 0
    assert nothing.num_positions.tolist() == [0, 0, 0]
    # Tokens outside the answer and behind it change nothing for its first token.
    first = torch.zeros_like(mask)
    first[0, 2] = True
    changed = token_ids.clone()
    changed[0, 4:] = 7
    same = [objective(ids, first, target.features(ids)).loss.item() for ids in (token_ids, changed)]
    assert same[0] == pytest.approx(same[1], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("eagle", {}),
        ("eagle3", {"weights": replace(DEFAULT_WEIGHTS["eagle3"], num_steps=2)}),
        ("eagle", {"accumulate": 2}),
        ("eagle", {"cache_gb": 0.01}),
    ],
)
def test_resumed_run_equals_an_uncut_one(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, object]
) -> None:
    """Cut in the second epoch (of 6 or 7 batches), so that order, noise and cache of both take part."""

    class KilledError(Exception):
        pass

    def settings_in(folder: str) -> TrainSettings:
        cache = {"cache_dir": tmp_path / folder / "cache"} if "cache_gb" in changes else {}
        return settings(target_path, data, tmp_path / folder, method, steps=12, checkpoint_every=9, **changes, **cache)

    train(settings_in("whole"), progress=False)
    real_save = checkpoint.save

    def save_and_die(accelerator: object, out: Path, position: dict[str, object]) -> None:
        real_save(accelerator, out, position)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KilledError):
            train(settings_in("cut"), progress=False)
    # Whatever was logged after the checkpoint is dropped.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "kind": "train", "loss": -1.0}) + "\n")
    train(replace(settings_in("cut"), resume=True), progress=False)
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def points(folder: Path) -> list[tuple[int, str, float, float]]:
    """Losses and accuracies of a run, without its speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(p["step"], p["kind"], p["loss"], p["alpha_0"]) for p in found]


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_a_weight(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = iter([1.0, float("nan")])
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, parameters, most: torch.tensor(next(norms)))
    with pytest.raises(ValueError, match=r"the gradient is nan at step 2; lower --lr"):
        train(settings(target_path, data, tmp_path / "head", steps=3, log_every=3), progress=False)
    assert not (tmp_path / "head" / "model.safetensors").exists()


@pytest.mark.parametrize("room", [0.01, 0.0001])
def test_later_epochs_take_features_from_the_cache(
    target_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    rows: list[int] = []
    compute = FrozenTarget.features

    def counted(self: FrozenTarget, token_ids: torch.Tensor, aux: Sequence[int] = ()) -> Features:
        rows.append(len(token_ids))
        return compute(self, token_ids, aux)

    monkeypatch.setattr(FrozenTarget, "features", counted)
    plain = settings(target_path, data, tmp_path / "plain", steps=21, holdout=0.0)
    num_examples = train(plain, progress=False)["facts"]["examples"]
    without = sum(rows)
    rows.clear()
    train(replace(plain, out=tmp_path / "cached", cache_dir=tmp_path / "cache", cache_gb=room), progress=False)
    if room == 0.01:
        assert sum(rows) == num_examples + 1  # and the row that the target is checked with
    else:
        assert num_examples + 1 < sum(rows) < without - num_examples // 2
    for one, other in zip(points(tmp_path / "plain"), points(tmp_path / "cached"), strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-3)


def test_run_leaves_everything_behind(target_path: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{broken\n')
    out = tmp_path / "run"
    both = replace(settings(target_path, data, out, price_per_hour=2.0), data=(data, bad))
    card = train(both, progress=False)
    assert card["data"]["num_rows"] == 26
    assert sum(card["data"]["counts"].values()) == 1
    assert json.loads((out / "data_report.jsonl").read_text())["line"] == 2
    assert card["result"]["tokens"] > 0
    assert card["result"]["cost"]["price"] is not None
    assert len(card["data_sha256"]) == 64
    assert card["versions"]["torch"]
    assert card == json.loads((out / "run_card.json").read_text())
    assert (out / "curves.png").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events*"))
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        train(settings(target_path, data, out), progress=False)
    with pytest.raises(ValueError, match="--resume: --lr, --noise differ"):
        train(replace(both, resume=True, lr=5.0, weights=LossWeights(noise=0.3)), progress=False)
    with pytest.raises(ValueError, match="--resume: --chat-template-kwargs differ"):
        train(replace(both, resume=True, chat_template_kwargs={"style": "plain"}), progress=False)
    bad.write_text('{"text": "other"}\n')
    with pytest.raises(ValueError, match="--resume: the data has changed"):
        train(replace(both, resume=True), progress=False)


def test_two_processes_learn_as_one_with_accumulation(target_path: Path, tmp_path: Path) -> None:
    """Four batches of unequal numbers of answer tokens per step, on one process or on two."""
    data = tmp_path / "equal.jsonl"  # of equal lengths, so that one process and two cut the same batches
    rows = [{"text": chr(97 + i) * 20 + "abc" * 10} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(out: str, accumulate: int) -> list[str]:
        found = ["train", "--target", str(target_path), "--data", str(data), "--out", str(tmp_path / out)]
        found += ["--method", "eagle3", "--unroll-steps", "2", "--draft-vocab", "64", "--steps", "3", "--batch-tokens", "128"]
        found += ["--max-length", "64", "--lr", "1e-3", "--warmup", "1", "--dtype", "float32", "--holdout", "0"]
        return [*found, "--accumulate", str(accumulate)]

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vllm_eagle.cli"]
    command = [*launch, *arguments("two", 2)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(arguments("one", 4)) == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert json.loads((tmp_path / "two" / "run_card.json").read_text())["facts"]["processes"] == 2
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_every_position_of_a_step_counts_alike(target_path: Path, data: Path, tmp_path: Path) -> None:
    """One step over two batches has the gradient of one batch that holds both."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": "xyz" * n}) + "\n" for n in (4, 20)))
    common = {"steps": 1, "holdout": 0.0, "weights": LossWeights(noise=0.0)}
    train(settings(target_path, few, tmp_path / "split", batch_tokens=62, accumulate=2, **common), progress=False)
    train(settings(target_path, few, tmp_path / "whole", batch_tokens=500, **common), progress=False)
    split, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("split", "whole"))
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_head_of_two_layers_is_trained(target_path: Path, target: FrozenTarget, data: Path, tmp_path: Path, method: str) -> None:
    train(settings(target_path, data, tmp_path / "head", method, head_layers=2, steps=2))
    found = read_head(tmp_path / "head")
    assert (found.num_layers, judge(found, Target.read(target_path)).verdict) == (2, "fits")
    assert 50 <= (trained_length(tmp_path / "head") or 0) <= 64  # texts of 20 to 89 tokens, cut to 64
    train(settings(target_path, data, tmp_path / "more", method, init=tmp_path / "head", draft_vocab=None, steps=2))
    first, more = (load_head(tmp_path / name, target).state_dict() for name in ("head", "more"))
    assert not torch.equal(first["layers.1.mlp.up_proj.weight"], more["layers.1.mlp.up_proj.weight"])


def test_training_goes_on_from_another_head(target_path: Path, data: Path, tmp_path: Path) -> None:
    first = settings(target_path, data, tmp_path / "first")
    train(first, progress=False)
    card = train(replace(first, out=tmp_path / "second", init=tmp_path / "first", lr=1e-9), progress=False)
    assert card["facts"]["init"] == str(tmp_path / "first")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="is a head of --method eagle, not eagle3"):
        train(settings(target_path, data, tmp_path / "third", "eagle3", init=tmp_path / "first", draft_vocab=None), progress=False)


@exhaustive
def test_a_minute_of_training_raises_alpha(tmp_path: Path) -> None:
    """From scratch, on 400 answers of the shipped target: 50 steps, 45,000 tokens. An untrained head agrees by chance.

    In float32: CPUs without instructions for bfloat16 take several times as long with it.
    """
    data = tmp_path / "answers.jsonl"
    with gzip.open(TRAINING_ANSWERS, "rt") as answers:
        data.write_text("".join(islice(answers, 400)))
    run = TrainSettings(
        target=str(TARGET),
        data=(data,),
        out=tmp_path / "head",
        steps=50,
        batch_tokens=1024,
        lr=2e-3,
        warmup=10,
        dtype="float32",
        holdout=0.05,
        log_every=5,
        eval_every=50,
    )
    held_out = train(run, progress=False)["facts"]["held_out"]
    assert held_out["alpha_0"] > 0.25, held_out
    untrained = FrozenTarget(TARGET, torch.float32)
    head = head_for(untrained, "eagle", torch.arange(64)[None])
    texts = write_answers(untrained, encode_prompts(str(TARGET), None, 4), 32, 6)
    assert measure_accuracy(untrained, head, read_texts(untrained, texts, [])).as_dict()["alpha_teacher_forced"][0] < 0.05


def test_draft_vocabulary_is_consistent() -> None:
    texts = [(torch.tensor([5, 5, 7, 9]), torch.tensor([1, 1, 1, 0]).bool()), (torch.tensor([9, 2]), torch.tensor([1, 1]).bool())]
    counts = count_tokens(texts, 12)
    assert counts.tolist() == [0, 0, 1, 0, 0, 2, 0, 1, 0, 1, 0, 0]
    d2t, t2d = draft_vocabulary(counts, 3)
    ids = torch.arange(3) + d2t
    assert ids.tolist() == [2, 5, 7]  # the most frequent, of equal ones the first, in the target's order
    assert t2d.nonzero()[:, 0].tolist() == ids.tolist()
    assert coverage(counts, t2d) == pytest.approx(4 / 5)
    d2t, _ = draft_vocabulary(counts, 3, always=[11])
    assert (torch.arange(3) + d2t).tolist() == [2, 5, 11]
    for size in (0, 13):
        with pytest.raises(ValueError, match="--draft-vocab"):
            draft_vocabulary(counts, size)


@pytest.mark.parametrize("method", METHODS)
def test_saved_head_is_read_back(target: FrozenTarget, tmp_path: Path, method: str) -> None:
    head = head_for(target, method, torch.arange(100)[None])
    save_head(head, tmp_path / "head", torch.float32)
    again = load_head(tmp_path / "head", target)
    assert type(again) is type(head)
    before, after = head.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    other = random_target(tmp_path / "other", vocab_size=VOCAB)
    config = json.loads((tmp_path / "head" / "config.json").read_text()) | {"vocab_size": 99}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    if method != "medusa":
        with pytest.raises(ValueError, match=r"its vocabulary has 99 tokens|config.json make it"):
            load_head(tmp_path / "head", FrozenTarget(other, torch.float32))


def test_features_are_what_vllm_gives_to_heads(target: FrozenTarget) -> None:
    token_ids = torch.arange(3, 11)[None]
    features = target.features(token_ids, [1, 2, 4])
    states = target.model(input_ids=token_ids, output_hidden_states=True)
    seen: list[torch.Tensor] = []
    handle = target.layers[3].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    target.model(input_ids=token_ids)
    handle.remove()
    # transformers' hidden_states[n] is the input of layer n, but for the last, which is normed already.
    expected = torch.cat([states.hidden_states[1], states.hidden_states[2], seen[0]], -1)
    torch.testing.assert_close(features.fused, expected)
    torch.testing.assert_close(target.lm_head(features.last), states.logits)
    assert [default_aux_layers(n) for n in (32, 6, 4)] == [[2, 16, 29], [1, 3, 5], [1, 2, 3]]


def test_targets_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    capped = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05)
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "gemma2")
    assert FrozenTarget(tmp_path / "gemma2", torch.float32).finish == Finish(cap=0.05)
    monkeypatch.setattr(Finish, "of", lambda config: Finish())  # as if the config did not say so
    with pytest.raises(ValueError, match="Gemma2ForCausalLM computes its logits otherwise"):
        FrozenTarget(tmp_path / "gemma2", torch.float32)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"gpt2 lacks intermediate_size"):
        FrozenTarget(tmp_path / "gpt2", torch.float32)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        FrozenTarget(tmp_path / "t5", torch.float32)
    with pytest.raises(ValueError, match=r"target .*nowhere"):
        FrozenTarget(tmp_path / "nowhere", torch.float32)


def test_a_heads_rotary_embedding_is_as_much_of_the_targets_as_a_llama_layer_can_have() -> None:
    from transformers import CohereConfig, Gemma3TextConfig, Glm4Config, LlamaConfig

    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192}
    assert head_config(LlamaConfig(rope_parameters=dict(llama3))).rope_parameters == llama3
    of_a_part = Glm4Config(
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    )
    assert head_config(of_a_part).rope_parameters == {"rope_type": "default", "rope_theta": 2e4}
    both = Gemma3TextConfig()
    assert head_config(both).rope_parameters["rope_theta"] == both.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert head_config(CohereConfig(layer_norm_eps=3e-5)).rms_norm_eps == 3e-5


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_heads_for_other_families(tmp_path: Path, family: str) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, num_key_value_heads=1, head_dim=16)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "target")
    target = FrozenTarget(tmp_path / "target", torch.float32)
    token_ids = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(7))
    for method in ("eagle", "eagle3"):
        head = head_for(target, method, token_ids) if method == "eagle" else _small_eagle3(target, token_ids)
        objective = Objective(head, target.lm_head, DEFAULT_WEIGHTS[method], target.finish)
        features = target.features(token_ids, aux_layers(head.config))
        assert objective(token_ids, torch.ones_like(token_ids, dtype=torch.bool), features).loss.isfinite()


def test_the_end_of_answers_is_in_the_draft_vocabulary(target: FrozenTarget) -> None:
    """Even if no answer in the data ends."""
    head = _small_eagle3(target, torch.randint(100, VOCAB, (8, 40), generator=torch.Generator().manual_seed(8)))
    assert target.end_tokens == {1}
    assert isinstance(head, Eagle3Head)
    assert head.target_ids is not None
    assert 1 in head.target_ids.tolist()


def _small_eagle3(target: FrozenTarget, token_ids: torch.Tensor) -> Head:
    options = TrainSettings(target.path, (), Path(), "eagle3", DEFAULT_WEIGHTS["eagle3"], draft_vocab=32)
    return new_head(target, options, [Example(row.int(), torch.ones(len(row), dtype=torch.bool)) for row in token_ids])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr must be positive"),
        ({"steps": 0}, "--steps must be positive"),
        ({"holdout": 0.9}, "--holdout is a share"),
        ({"warmup": -1}, "--warmup must not be negative"),
        ({"grad_clip": 0.0}, "--grad-clip must be positive"),
        ({"weights": LossWeights(noise=-0.1)}, "--noise must not be negative"),
        ({"weights": LossWeights(regression=0, classification=0)}, "are both 0, so nothing would be learnt"),
        ({"init": Path("x"), "draft_vocab": 5}, "--init brings its own"),
        ({"aux_layers": (1, 2, 3)}, "--aux-layers is for --method eagle3"),
        ({"method": "eagle3", "aux_layers": (1, 1, 3)}, "--aux-layers needs three different"),
        ({"method": "eagle3", "aux_layers": (3, 2, 1)}, "--aux-layers needs three different layers in rising order"),
        ({"cache_gb": 1.0}, "--cache-dir and --cache-gb belong together"),
        ({"weights": LossWeights(num_steps=0)}, "--unroll-steps must be at least 1"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, tmp_path, **changes)


def test_nothing_to_resume_and_wrong_layers(target_path: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run; start without --resume"):
        train(settings(target_path, data, tmp_path / "new", resume=True), progress=False)
    with pytest.raises(ValueError, match=r"--aux-layers .* from 0 to 4"):
        train(settings(target_path, data, tmp_path / "new", "eagle3", aux_layers=(1, 2, 9)), progress=False)


def test_lm_head_of_the_head_is_not_the_targets(target: FrozenTarget) -> None:
    head = head_for(target, "eagle3", torch.arange(64)[None])
    assert isinstance(head, Eagle3Head)
    assert isinstance(head.lm_head, nn.Linear)
    torch.testing.assert_close(head.lm_head.weight, target.lm_head.weight[head.target_ids])
    assert head.lm_head.weight.data_ptr() != target.lm_head.weight.data_ptr()
