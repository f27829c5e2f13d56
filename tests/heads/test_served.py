"""What is judged to fit is served, with the tau that `eval` says; what is not is refused by the words of `inspect`."""

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from tests.engine.engines import engine, generate, tokens, tree_stats, trees
from tests.engine.families import NUM_DRAFT_TOKENS, NUM_TOKENS, PROMPTS, answers, expected_tau, overfit
from tests.heads import cases
from tests.heads.cases import BASES, DESIGNS, Base
from tests.tiers import exhaustive
from vllm_eagle.evaluate.texts import Text
from vllm_eagle.heads import served as serving
from vllm_eagle.heads.inspect import inspect
from vllm_eagle.heads.window import window_of
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.files import load_head

pytestmark = exhaustive
SEEDS = range(0, 120, 3)


@pytest.fixture(scope="module")
def frozen(random_models: dict[str, Path]) -> FrozenTarget:
    return FrozenTarget(random_models["target"], torch.float32)


@pytest.fixture(scope="module")
def texts(frozen: FrozenTarget) -> list[Text]:
    return answers(frozen, 1.0)


@pytest.fixture(scope="module")
def knowing(frozen: FrozenTarget, texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """The bases with weights that know the target, so that tau says whether all of them are where they belong."""
    return {name: _knowing(base, frozen, texts, tmp_path_factory.mktemp(name)) for name, base in BASES.items()}


def _knowing(base: Base, frozen: FrozenTarget, texts: list[Text], folder: Path) -> Base:
    head = load_head(base.write(folder / "head"), frozen)
    overfit(head, frozen, texts)
    learnt = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
    names = {name: name if name in learnt else name.replace("layers.0.", "midlayer.") for name in base.weights()}
    return Base(base.settings, lambda: {name: learnt[theirs].clone() for name, theirs in names.items()})


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "cache", lambda: tmp_path / "cache")


def assert_served(folder: Path, frozen: FrozenTarget, texts: list[Text]) -> float:
    """Returns tau."""
    target = Path(frozen.path)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=NUM_TOKENS, ignore_eos=True) for i in range(len(PROMPTS))]
    with engine(target, **trees(folder, NUM_DRAFT_TOKENS)) as llm:
        found = tokens(generate(llm, PROMPTS, params))
        stats = tree_stats(llm)
    assert found == [[text.token_ids[text.num_prompt :][:NUM_TOKENS]] for text in texts]
    expected = expected_tau(frozen, load_head(folder, frozen).eval(), texts, 1.0, window_of(None, folder, 1024))
    assert stats["tau"] == pytest.approx(expected, rel=0.03)
    return float(stats["tau"])


@pytest.mark.parametrize("name", BASES)
def test_every_format_is_served(
    name: str, knowing: dict[str, Base], frozen: FrozenTarget, texts: list[Text], tmp_path: Path
) -> None:
    assert assert_served(knowing[name].write(tmp_path / "head"), frozen, texts) > 1.5


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_is_served(name: str, frozen: FrozenTarget, texts: list[Text], tmp_path: Path) -> None:
    knowing = _knowing(DESIGNS[name], frozen, texts, tmp_path / "learnt")
    assert assert_served(knowing.write(tmp_path / "head"), frozen, texts) > 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_any_head_that_fits_is_served_and_any_other_refused(
    seed: int, knowing: dict[str, Base], frozen: FrozenTarget, texts: list[Text], tmp_path: Path
) -> None:
    target = Path(frozen.path)
    base, changes, what = cases.random_case(seed, target, knowing)
    folder = base.write(tmp_path / "head", *changes)
    print(what)
    try:
        found = inspect(folder, target)
        reason = ([*found["wrong"], *found["misfits"]] or [None])[0]
    except ValueError as unreadable:
        reason = str(unreadable)
    if reason is None:
        print("tau", assert_served(folder, frozen, texts))
        return
    with pytest.raises(ValueError, match="speculative model") as refused, engine(target, **trees(folder)):
        pass
    assert reason in str(refused.value)
