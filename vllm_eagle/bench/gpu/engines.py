"""The part of `vllm-eagle gpu-check` that needs vLLM: answers beside those of plain vLLM, and the speed of a pair of 8B shape.

Each is a command that users have, too, in a process of its own, so that one that dies takes no other with it. Not run on a GPU yet.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

# Ours alone: how vLLM's own chain fares is no reason to lose what is said of the trees.
_FEW = ("--limit", "16", "--max-tokens", "64", "--only", "chain5", "tree16", "tree60")
COMMANDS: Mapping[str, Sequence[str]] = {
    "exact_float32_t0": ("compare", "--dtype", "float32", *_FEW),
    "exact_float32_t1": ("compare", "--dtype", "float32", "--temperature", "1", *_FEW),
    # Here rounding may decide between two tokens; the gaps in the result tell whether it did.
    "exact_bfloat16_t0": ("compare", "--dtype", "bfloat16", *_FEW),
    "exact_bfloat16_t0_triton": ("compare", "--dtype", "bfloat16", "--attention-backend", "TRITON_ATTN", *_FEW),
    "exact_bfloat16_t0_xformers": ("compare", "--dtype", "bfloat16", "--attention-backend", "CUSTOM", *_FEW),
    # Random weights of 8B shape; acceptance as recorded on the shipped pair. Plain vLLM, its chains with and without a budget of
    # their own, and our trees in one run, on vLLM's V2 runner all of them: six engines at once want some 130 GB.
    "bench_8b_replayed": (
        *(
            "bench",
            "--replay",
            "8b",
            "--only",
            *("vllm_chain3", "vllm_chain5", "vllm_chain3_adaptive", "vllm_chain5_adaptive", "trees"),
        ),
        *("--concurrency", "1", "4", "16", "64", "--rounds", "10", "--max-tokens", "128"),
    ),
}
_MOST_SECONDS = 1800  # of a command
# vLLM's Triton attention multiplies float32 numbers in TF32 where nothing else is asked for, which leaves 10 bits of them; our
# kernels take all 23. Without this, plain vLLM and trees would differ by that, not by a mistake.
_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}


def check(
    commands: Mapping[str, Sequence[str]] = COMMANDS, most_seconds: float = _MOST_SECONDS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One after the other: name, and exit status, result (the last line of what it printed; None if that is no JSON) and problem.

    The status is None where it took too long, and was ended.
    """
    for name, arguments in commands.items():
        if "CUSTOM" in arguments and find_spec("xformers") is None:
            print(f"{name}: left out, xformers is not installed", file=sys.stderr, flush=True)
            continue
        print(f"vllm-eagle {' '.join(arguments)}", file=sys.stderr, flush=True)
        status, printed = _run([sys.executable, "-m", "vllm_eagle.cli", *arguments], most_seconds)
        result = _last_json(printed)
        problem = None
        if status is None:
            problem = f"ended after {most_seconds:g} seconds without an answer"
        elif status:
            problem = f"exit status {status}"
        elif result is None:
            problem = "its last line is no JSON"
        if problem:
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        yield name, {"command": " ".join(arguments), "status": status, "result": result, "problem": problem}


def failed(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the commands that did not end well."""
    return [name for name, each in found.items() if each["problem"] is not None]


def _run(command: Sequence[str], most_seconds: float) -> tuple[int | None, str]:
    """Exit status and what was printed; the engines that a command has started end with it."""
    environment = os.environ | _ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(timeout=most_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, ""
        return process.returncode, printed


def _last_json(text: str) -> Any:
    lines = text.splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
