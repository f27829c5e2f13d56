"""Command-line flags: trees when asked for, contradictions refused by name, nothing changed for everybody else."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_eagle import plugin
from vllm_eagle.algorithm.config import CONFIG_KEY
from vllm_eagle.options.devices import CPU, is_tree_mode
from vllm_eagle.options.flags import annotations, flag
from vllm_eagle.pair import TARGET

COMMON = ("--model", str(TARGET), "--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 28))


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=True))


@pytest.fixture(scope="module")
def ours_and_stock() -> tuple[FlexibleArgumentParser, FlexibleArgumentParser]:
    """With and without our flags; used alike, because vLLM fills in fields of the defaults that a parser holds."""
    plugin.register()
    unwrapped = EngineArgs.add_cli_args._vllm_eagle_wraps  # type: ignore[attr-defined]
    stock = AsyncEngineArgs.add_cli_args(unwrapped(FlexibleArgumentParser()), async_args_only=True)
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()), stock


def options(namespace: Namespace) -> Any:
    return (namespace.additional_config or {}).get(CONFIG_KEY)


def configured(parser: FlexibleArgumentParser, *arguments: str) -> Any:
    return AsyncEngineArgs.from_cli_args(parser.parse_args([*COMMON, *arguments])).create_engine_config()


def test_a_head_is_all_it_takes(parser: FlexibleArgumentParser, random_models: dict[str, Path]) -> None:
    for kind in ("eagle", "eagle3"):
        config = configured(parser, "--model", str(random_models["target"]), "--speculative-model", str(random_models[kind]))
        assert config.speculative_config.method == kind
        assert config.speculative_config.num_speculative_tokens == 64
        assert config.parallel_config.worker_cls == CPU.worker_cls
        assert config.scheduler_config.scheduler_cls == CPU.scheduler_cls
        assert config.additional_config[CONFIG_KEY] == {}


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (("--speculative-tree-topk", "4"), 64),
        (("--no-speculative-tree-budget",), 16),
        (("--speculative-tree-mode", "chain"), 16),
        (("--speculative-tree-mode", "static"), 16),
        (("--num-speculative-tokens", "24"), 24),
    ],
)
def test_trees_have_room_where_the_budget_chooses(
    parser: FlexibleArgumentParser, random_models: dict[str, Path], flags: tuple[str, ...], number: int
) -> None:
    pair = ("--model", str(random_models["target"]), "--speculative-model", str(random_models["eagle"]))
    assert configured(parser, *pair, *flags).speculative_config.num_speculative_tokens == number


def test_every_option_has_a_flag(parser: FlexibleArgumentParser) -> None:
    values = {
        "mode": "static",
        "coupled": False,
        "budget": False,
        "draft_vocab": False,
        "show_text": True,
        "static_shape": [[0], [1], [0, 0]],
    }
    arguments = []
    expected: dict[str, Any] = {}
    for i, name in enumerate(annotations()):
        expected[name] = value = values.get(name, i + 1)
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            arguments += [flag(name), value if isinstance(value, str) else json.dumps(value)]
    assert options(parser.parse_args(arguments)) == expected


@pytest.mark.parametrize("flags_first", [True, False])
@pytest.mark.parametrize(
    "given",
    [("--additional-config", '{"vllm_eagle": {"topk": 4}, "other": 1}'), ("--additional-config.vllm_eagle.topk", "4")],
)
def test_flags_and_json_merge(parser: FlexibleArgumentParser, given: tuple[str, ...], flags_first: bool) -> None:
    flags = ("--speculative-model", "head", "--speculative-tree-max-depth", "3")
    namespace = parser.parse_args([*flags, *given] if flags_first else [*given, *flags])
    assert options(namespace) == {"model": "head", "max_depth": 3, "topk": 4}
    assert namespace.additional_config.get("other") == (1 if "other" in given[-1] else None)


@pytest.mark.parametrize("flags_first", [True, False])
def test_a_flag_that_contradicts_json_is_refused(
    parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str], flags_first: bool
) -> None:
    flags, given = ("--speculative-tree-topk", "8"), ("--additional-config", '{"vllm_eagle": {"topk": 4}}')
    with pytest.raises(SystemExit):
        parser.parse_args([*flags, *given] if flags_first else [*given, *flags])
    assert "--speculative-tree-topk 8 contradicts vllm_eagle.topk = 4 in --additional-config" in capsys.readouterr().err


def test_a_repeated_flag_overrides_as_on_every_command_line(parser: FlexibleArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("speculative-model: head\nspeculative-tree-topk: 4\nno-speculative-tree-coupled: true\n")
    arguments = ["serve", "model", "--config", str(tmp_path / "serve.yaml"), "--speculative-tree-topk", "2"]
    serve = FlexibleArgumentParser()
    serve.add_argument("command")
    serve.add_argument("model_tag")
    serve.add_argument("--config")
    namespace = AsyncEngineArgs.add_cli_args(serve).parse_args(arguments)
    assert options(namespace) == {"model": "head", "topk": 2, "coupled": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--speculative-model", "HEAD", "--spec-model", "HEAD"), r"--speculative-model .* and vLLM's own option for 'model'"),
        (("--speculative-model", "HEAD", "--speculative-config", '{"model": "x"}'), "option for 'model'"),
        (
            ("--speculative-model", "HEAD", "--num-speculative-tokens", "4", "--spec-tokens", "5"),
            "--num-speculative-tokens .* option for 'num_speculative_tokens'",
        ),
        (("--num-speculative-tokens", "4"), "set --speculative-model"),
        (("--speculative-tree-topk", "4"), "set --speculative-model"),
        (("--speculative-tree-topk", "4", "--speculative-config", '{"method": "ngram", "model": "ngram"}'), "drafts no trees"),
        (
            ("--speculative-model", "HEAD", "--spec-method", "mtp"),
            "drafts with a module of the target itself, got the model .*; remove it",
        ),
        (("--speculative-model", "HEAD", "--spec-method", "medusa"), '"medusa" drafts no trees'),
        (("--speculative-model", "TARGET"), "no EAGLE head, its weights have neither fc.weight"),
        (("--speculative-model", "/no/such/head"), "no such folder"),
        (("--speculative-model", "HEAD", "--speculative-tree-topk", "0"), "topk=0 is not possible"),
        (("--speculative-model", "HEAD", "--speculative-tree-static-shape", "[[0]]"), 'static_shape needs mode "static"'),
        (("--speculative-model", "HEAD", "--scheduler-cls", "a.B"), "scheduler_cls=a.B contradicts draft trees"),
        (("--speculative-model", "HEAD", "--worker-cls", "a.B"), "worker_cls=a.B contradicts draft trees"),
        (("--speculative-model", "HEAD", "--async-scheduling"), "async_scheduling=true contradicts draft trees"),
    ],
)
def test_contradictions_are_refused_by_name(
    parser: FlexibleArgumentParser, random_models: dict[str, Path], arguments: tuple[str, ...], message: str
) -> None:
    names = {"HEAD": str(random_models["eagle"]), "TARGET": str(random_models["target"])}
    with pytest.raises(ValueError, match=message):
        configured(parser, "--model", names["TARGET"], *(names.get(argument, argument) for argument in arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--additional-config", '{"other": 1}'),
        ("--additional-config.other.deep", "1", "--additional-config.b", "2"),
        ("--speculative-config", '{"method": "eagle", "model": "HEAD", "num_speculative_tokens": 3}'),
        ("-sc", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'),
        ("--speculative", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'),
        ("--speculative-config.method", "ngram", "--speculative-config.num_speculative_tokens", "3"),
        ("--spec-method", "eagle", "--spec-model", "HEAD", "--spec-tokens", "2"),
        ("--max-num-seq", "8", "--enforce", "--num-gpu", "100"),
    ],
)
def test_without_our_flags_nothing_changes(
    ours_and_stock: tuple[FlexibleArgumentParser, FlexibleArgumentParser],
    random_models: dict[str, Path],
    arguments: tuple[str, ...],
) -> None:
    arguments = tuple(argument.replace("HEAD", str(random_models["eagle"])) for argument in arguments)
    arguments = ("--model", str(random_models["target"]), *COMMON[2:], *arguments)
    found, expected = (parser.parse_args([*arguments]) for parser in ours_and_stock)
    assert vars(found) == vars(expected)
    config = AsyncEngineArgs.from_cli_args(found).create_engine_config()
    original = EngineArgs.create_engine_config._vllm_eagle_wraps  # type: ignore[attr-defined]
    stock = original(AsyncEngineArgs.from_cli_args(expected))
    assert config.compute_hash() == stock.compute_hash()
    assert config.parallel_config.worker_cls == stock.parallel_config.worker_cls != CPU.worker_cls
    assert config.scheduler_config.get_scheduler_cls() is stock.scheduler_config.get_scheduler_cls()
    assert not is_tree_mode(config.speculative_config)


def test_help_shows_the_flags_and_their_group() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    shown = subprocess.run([vllm, "serve", "--help=EAGLE draft trees"], capture_output=True, text=True, timeout=120, check=True)
    for name in annotations():
        assert flag(name) in shown.stdout
    assert "--additional-config" in shown.stdout
