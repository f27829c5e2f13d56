"""The part of `vllm-eagle gpu-check` that runs engines: its commands exist, and what fails is seen."""

import shlex
from collections.abc import Sequence

import pytest

from vllm_eagle.bench import gpu_vllm
from vllm_eagle.bench.compare import variants
from vllm_eagle.cli import build_parser
from vllm_eagle.pair import HEAD


@pytest.mark.parametrize("name", gpu_vllm.COMMANDS)
def test_commands_are_known(name: str) -> None:
    args = build_parser().parse_args(gpu_vllm.COMMANDS[name])
    if args.run.__name__ == "_compare":
        assert set(args.only) <= variants(str(HEAD), args.temperature).keys()
    else:
        assert args.replay == "8b"


def test_an_engine_is_compared() -> None:
    """A short one of the same kind, on what is here."""
    command = shlex.split("compare --limit 2 --max-tokens 8 --only tree16")
    found = gpu_vllm.check({"exact": command})
    assert gpu_vllm.failed(found) == []
    assert found["exact"]["result"]["identical"] == 2
    assert found["exact"]["command"] == shlex.join(command)


@pytest.mark.parametrize("command", [("compare", "--only", "none"), ("doctor", "--matrix")])
def test_a_failure_is_seen(command: Sequence[str]) -> None:
    """An error, and a command whose last line is no JSON."""
    found = gpu_vllm.check({"broken": command})
    assert gpu_vllm.failed(found) == ["broken"]
    assert found["broken"]["result"] is None
