"""The command line as a user types it, in processes of its own."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import exhaustive, some
from vllm_eagle.cli import main

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_eagle.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def test_compare_finds_identical_tokens_and_writes_json(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "def add(a, b):"}, {"messages": [{"role": "user", "content": "What is 3 + 4?"}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.json"
    done = run("compare", "--prompts", str(prompts), "--max-tokens", "40", "--only", "vllm_chain3", "tree16", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    assert result["prompts"] == result["identical"] == 2
    assert result["tau"].keys() == {"vllm_chain3", "tree16"}
    assert result["tau"]["tree16"] > 1


def test_gpu_check_wants_torch_and_triton_alone() -> None:
    """The kernels may be tried where nothing else is installed."""
    code = """
import sys

class Missing:
    def find_spec(self, name, *unused):
        if name.split(".")[0] in ("vllm", "transformers", "safetensors", "xformers", "datasets", "psutil"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from vllm_eagle import cli
sys.exit(cli.main(["gpu-check", "--help"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--interpret" in done.stdout


def test_who_has_seen_enough_may_stop_reading() -> None:
    """As `head` does."""
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "vllm_eagle.cli", "doctor", "--matrix"]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    finally:
        os.close(write)
    assert done.returncode == 141
    assert "BrokenPipe" not in done.stderr


def test_doctor_finds_nothing_wrong_here() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout
    assert "signatures and bodies as tested" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--model", "x"], "target and --head belong together"),
        (["compare", "--prompts", "/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
        (["compare", "--only", "tree99"], "unknown variant tree99; known: vllm_chain3"),
        (["compare", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["compare", "--json", "/nowhere/out.json"], "its folder does not exist"),
        (["demo", "--num-draft-tokens", "500"], "set num_draft_tokens to an integer from 1 to 127"),
        (["demo", "--prompts", "0"], "--prompts at least 1"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_broken_prompt_files_name_the_line(tmp_path: Path) -> None:
    """In a process of its own, whose status and last line are what a user sees."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt"\n')
    done = run("compare", "--prompts", str(prompts))
    assert done.returncode == 2
    assert f"{prompts}, line 2: no JSON" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("example", some(["01_offline_vllm.py", "02_offline_helper.py"], "01_offline_vllm.py"))
def test_examples_run_as_they_stand(example: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "examples" / example], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "A: " in done.stdout


@exhaustive
def test_training_example_runs_as_it_stands(tmp_path: Path) -> None:
    """With fewer steps than a user would take: what matters here is that every command of it works on the next one's input."""
    environment = os.environ | {"STEPS": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples" / "03_train_a_head.sh"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "identical: yes" in done.stdout
    assert "teacher-forced" in done.stdout
    assert (tmp_path / "run" / "eval" / "reliability.png").exists()


def test_vllms_own_command_line_loads_the_plugin() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "--version"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert importlib.metadata.version("vllm") in done.stdout
