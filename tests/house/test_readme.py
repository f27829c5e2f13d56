"""The README, and the page of measurements, name things that exist and say what was measured."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.heads import ablation, contexts, draft_vocab, kinds, noise_weight
from vllm_eagle.bench.speed import attention, steps

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "vllm_eagle" / "bench" / "results"
MEASURED = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
BOTH = README + MEASURED


def test_options_and_defaults_are_those_of_the_config() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|none) \|", README, re.M))
    fields = {f.name: f.default for f in dataclasses.fields(TreeConfig) if f.name != "num_draft_tokens"}
    assert rows == {name: "" if default is None else json.dumps(default) for name, default in fields.items()}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:vllm_eagle|tests|examples|patches)/[\w/.]*", BOTH))))
def test_paths_exist(path: str) -> None:
    assert (ROOT / path.rstrip(".")).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python3?(?:\.11)? -m (vllm_eagle[\w.]*)", BOTH))))
def test_modules_exist(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or module == "vllm_eagle.patches"


TABLES = {
    "heads": kinds.table,
    "ablation": ablation.table,
    "attention": attention.table,
    "steps_f32": steps.table,
    "steps_real": steps.table,
    "draft_vocab": draft_vocab.table,
    "contexts": contexts.table,
    "contexts_real": contexts.table,
    "noise_weight": noise_weight.table,
    "noise_weight_real": noise_weight.table,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_committed_runs(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert TABLES[name](result) in MEASURED.replace("\n  |", "\n|")


def test_speeds_are_those_of_the_committed_runs() -> None:
    """Every ratio that is given with its rounds and tau."""
    measured = {
        f"{found['ratio']:.2f}x ({', '.join(f'{ratio:.2f}' for ratio in found['ratios'])}; {found['tau']:.2f})"
        for path in RESULTS.glob("bench_*.json")
        for variants in json.loads(path.read_text())["concurrency"].values()
        for found in variants.values()
    }
    told = re.findall(r"\d+\.\d\dx \([\d., ]+; \d+\.\d\d\)", BOTH)
    assert len(told) > 20
    assert set(told) <= measured


def test_the_table_holds_the_figures_of_the_committed_runs() -> None:
    for name in ("t0", "t1"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert result["identical"] == result["prompts"] == 64
        for variant, tau in result["tau"].items():
            row = re.search(rf"^\| {variant.removesuffix('_uncoupled')} \|.*$", MEASURED, re.M)
            assert row is not None, variant
            assert f"{tau:.2f}" in row.group(), variant
