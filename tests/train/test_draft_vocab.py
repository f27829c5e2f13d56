"""EAGLE-1 heads that draft a part of the vocabulary: trained on it, written, read, and chosen anew without training."""

import json
from pathlib import Path

import pytest
import torch

from tests.models import VOCAB, random_target
from tests.train.test_train import settings
from vllm_eagle.cli import main
from vllm_eagle.heads import draft_vocab
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head, save_head
from vllm_eagle.train.head.models import EagleHead
from vllm_eagle.train.head.objective import LossWeights, Objective
from vllm_eagle.train.run.build import new_head
from vllm_eagle.train.run.loop import train

TEXTS = ["abab" * 6, "abcabc" * 4, "aabb" * 5] * 4


@pytest.fixture
def target_path(tmp_path: Path) -> Path:
    return random_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def test_a_trained_head_brings_its_vocabulary(target_path: Path, data: Path, tmp_path: Path) -> None:
    card = train(settings(target_path, data, tmp_path / "head", draft_vocab=3), progress=False)
    assert card["facts"]["draft_vocab"] == 3
    assert 0.5 < card["facts"]["draft_vocab_coverage"] <= 1
    ids = draft_vocab.read(tmp_path / "head", VOCAB)
    assert ids is not None
    assert len(ids) == 3
    target = FrozenTarget(target_path, torch.float32)
    head = load_head(tmp_path / "head", target)
    assert isinstance(head, EagleHead)
    assert head.target_ids is not None
    assert head.target_ids.tolist() == ids
    ready = torch.randn(2, 5, target.config.hidden_size)
    torch.testing.assert_close(head.logits(ready), target.lm_head(ready)[..., ids])
    # It goes on with the same tokens, and without the file with all of them.
    train(settings(target_path, data, tmp_path / "more", init=tmp_path / "head"), progress=False)
    assert draft_vocab.read(tmp_path / "more", VOCAB) == ids
    (tmp_path / "head" / draft_vocab.FILE).unlink()
    assert load_head(tmp_path / "head", target).target_ids is None


def test_loss_and_accuracy_over_a_vocabulary(target_path: Path, data: Path, tmp_path: Path) -> None:
    """Positions whose token cannot be drafted teach no distribution; in evaluation they count as wrong."""
    target = FrozenTarget(target_path, torch.float32)
    options = settings(target_path, data, tmp_path / "head")
    head, _ = new_head(target, options, [])
    assert isinstance(head, EagleHead)
    head.limit_to(torch.tensor([3, 7]))
    weights = LossWeights(regression=0, classification=1, noise=0)
    objective = Objective(head, target.lm_head, weights, target.finish)
    token_ids = torch.tensor([[1, 2, 3, 7, 9, 11]])
    mask, features = torch.ones_like(token_ids, dtype=torch.bool), target.features(token_ids)
    found = objective(token_ids, mask, features)
    assert found.num_positions.tolist() == [4]
    # By hand: of the tokens that are drafted, 3 and 7 at places 2 and 3 belong to the vocabulary.
    from vllm_eagle.train.head.unroll import unroll

    ready = next(unroll(head, token_ids, features.last, 1))
    losses = []
    for place in (1, 2):  # whose features give tokens 2 and 3
        theirs = target.lm_head(features.last[0, place])[[3, 7]].softmax(-1)
        losses.append(-(theirs * head.logits(ready[0, place - 1]).log_softmax(-1)).sum())
    assert found.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    objective.eval()
    likeliest = target.lm_head(features.last[0]).argmax(-1)
    drafts = torch.tensor([3, 7])[head.logits(ready[0]).argmax(-1)]
    expected = sum(int(drafts[place - 1] == likeliest[place]) for place in range(1, 5))
    assert objective(token_ids, mask, features).num_agreed.tolist() == [expected]


def test_a_vocabulary_is_chosen_without_training(
    target_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    train(settings(target_path, data, out), progress=False)
    weights = (out / "model.safetensors").read_bytes()
    command = ["draft-vocab", str(out), "--target", str(target_path), "--data", str(data), "--size"]
    for size in (4, 2):
        assert main([*command, str(size)]) == 0
        assert f"{size} tokens" in capsys.readouterr().out
        assert len(draft_vocab.read(out, VOCAB) or []) == size
    assert (out / "model.safetensors").read_bytes() == weights
    assert main([*command, str(VOCAB + 1)]) == 2
    assert "--size" in capsys.readouterr().err
    train(settings(target_path, data, tmp_path / "eagle3", "eagle3"), progress=False)
    command[1] = str(tmp_path / "eagle3")
    assert main([*command, "4"]) == 2
    assert "among its weights" in capsys.readouterr().err


def test_a_chosen_vocabulary_holds_the_end_of_answers(
    target_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the only answer is cut. What is left out is said."""
    save_head(new_head(FrozenTarget(target_path, torch.float32), settings(target_path, data, tmp_path), [])[0], tmp_path / "head")
    (target_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    answers = tmp_path / "answers.jsonl"
    cut = {"role": "assistant", "content": "abcd" * 5, "finish_reason": "length"}
    answers.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}, cut]}) + "\n{broken\n")
    command = ["draft-vocab", str(tmp_path / "head"), "--target", str(target_path), "--data", str(answers), "--size", "3"]
    assert main(command) == 0
    chosen = draft_vocab.read(tmp_path / "head", VOCAB)
    assert chosen is not None
    assert chosen[0] == 1
    assert "left out: 1 x broken JSON" in capsys.readouterr().err


def test_medusa_has_none(target_path: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--draft-vocab is for EAGLE heads"):
        settings(target_path, data, tmp_path / "head", "medusa", draft_vocab=4)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"vocab_size": VOCAB + 1, "token_ids": [1]}, f"vocabulary of {VOCAB + 1}"),
        ({"vocab_size": VOCAB, "token_ids": [2, 1]}, "should rise"),
        ({"vocab_size": VOCAB, "token_ids": [VOCAB]}, f"from 0 to {VOCAB - 1}"),
        ({"vocab_size": VOCAB, "token_ids": [True]}, f"from 0 to {VOCAB - 1}"),
        ({"vocab_size": VOCAB, "token_ids": []}, "at least one"),
        ([1, 2], "should hold"),
        ("{", "draft_vocab.json: "),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(tmp_path: Path, found: object, words: str) -> None:
    (tmp_path / draft_vocab.FILE).write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(ValueError, match=words) as error:
        draft_vocab.read(tmp_path, VOCAB)
    assert "vllm-eagle draft-vocab" in str(error.value)


def test_inspect_and_convert_know_it(target_path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = tmp_path / "head"
    train(settings(target_path, data, head, draft_vocab=3), progress=False)
    assert main(["inspect", str(head), "--target", str(target_path)]) == 0
    assert f"{VOCAB}, of which it drafts 3" in capsys.readouterr().out
    assert main(["convert", str(head), str(tmp_path / "converted")]) == 0
    assert draft_vocab.read(tmp_path / "converted", VOCAB) == draft_vocab.read(head, VOCAB)
    draft_vocab.write(head, [1, 2], VOCAB + 1)
    capsys.readouterr()
    assert main(["inspect", str(head)]) == 1
    assert f"draft_vocab.json: it is for a vocabulary of {VOCAB + 1}" in " ".join(capsys.readouterr().out.split())
    assert main(["convert", str(head), str(tmp_path / "again")]) == 2
    assert f"vocabulary of {VOCAB + 1}" in capsys.readouterr().err
