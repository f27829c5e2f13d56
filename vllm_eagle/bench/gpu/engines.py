"""The part of `vllm-eagle gpu-check` that needs vLLM: answers beside those of plain vLLM, and the speed of a pair of 8B shape.

Each is a command that users have, too, in a process of its own, so that one that dies takes no other with it. Not run on a GPU yet.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

# Ours alone: how vLLM's own chain fares is no reason to lose what is said of the trees.
_FEW = ("--limit", "16", "--max-tokens", "64", "--only", "tree16")
_ALL = (*_FEW, "chain5", "tree60")
EXACT: Mapping[str, Sequence[str]] = {
    "exact_float32_t0": ("compare", "--dtype", "float32", *_FEW),
    "exact_float32_t1": ("compare", "--dtype", "float32", "--temperature", "1", *_FEW),
    # Here rounding may decide between two tokens; the gaps in the result tell whether it did.
    "exact_bfloat16_t0": ("compare", "--dtype", "bfloat16", *_FEW),
}
EXACT_BESIDES: Mapping[str, Sequence[str]] = {
    "exact_bfloat16_t0_triton": ("compare", "--dtype", "bfloat16", "--attention-backend", "TRITON_ATTN", *_ALL),
    "exact_bfloat16_t0_xformers": ("compare", "--dtype", "bfloat16", "--attention-backend", "CUSTOM", *_FEW),
    "exact_float32_t0_sizes": ("compare", "--dtype", "float32", *_ALL),
}
# Random weights of 8B shape; acceptance as recorded on the shipped pair, at T=1 too, where trees therefore draft without noise:
# what is measured there is what sampling costs. One engine at a time, the most wanted first.
_SPEED = ("bench", "--replay", "8b", "--concurrency", "1", "16", "64", "4", "--rounds", "1", "--max-tokens", "64")
SPEED: Mapping[str, Sequence[str]] = {
    f"speed_{variant}": (*_SPEED, "--temperatures", "0", "1", "--alone", variant)
    for variant in ("plain", "uncoupled", "vllm_chain3", "vllm_chain5", "vllm_chain3_adaptive", "vllm_chain5_adaptive")
}
_MOST_SECONDS = 1800  # of a command
_LAST_SECONDS = 15  # of its time in which a measurement begins nothing more
# vLLM's Triton attention multiplies float32 numbers in TF32 where nothing else is asked for, which leaves 10 bits of them; our
# kernels take all 23. Without this, plain vLLM and trees would differ by that, not by a mistake.
_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}


def check(name: str, arguments: Sequence[str], most_seconds: float = _MOST_SECONDS) -> dict[str, Any]:
    """Run a command: exit status, result (the last line of JSON that it printed, or None) and problem.

    The status is None where it took too long, and was ended; what it had printed until then counts.
    """
    seconds = min(most_seconds, _MOST_SECONDS)
    if "--alone" in arguments:
        arguments = (*arguments, "--minutes", f"{max(seconds - _LAST_SECONDS, 0) / 60:.2f}")
    print(f"vllm-eagle {' '.join(arguments)}", file=sys.stderr, flush=True)
    status, printed = _run([sys.executable, "-m", "vllm_eagle.cli", *arguments], seconds)
    result = _last_json(printed)
    problem = None
    if status is None:
        problem = f"ended after {seconds:.0f} seconds"
    elif status:
        problem = f"exit status {status}"
    elif result is None:
        problem = "no line of it is JSON"
    if problem:
        print(f"{name}: {problem}", file=sys.stderr, flush=True)
    return {"command": " ".join(arguments), "status": status, "result": result, "problem": problem}


def ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By load and variant: tokens per second as a multiple of plain vLLM's, tokens per pass, and how many answers are the same."""
    loads = {
        result["variant"]: result["loads"]
        for name, each in found.items()
        if name.startswith("speed_") and (result := each["result"]) is not None
    }
    by_load: dict[str, dict[str, dict[str, Any]]] = {}
    for load, plain in loads.get("plain", {}).items():
        for variant, by in loads.items():
            if variant != "plain" and load in by:
                mine = by[load]
                same = sum(a == b for a, b in zip(plain["answers"], mine["answers"], strict=True))
                ratio = round(mine["tokens_per_s"] / plain["tokens_per_s"], 3)
                by_load.setdefault(load, {})[variant] = {
                    "ratio": ratio, "tau": mine["tau"], "identical": same, "answers": len(plain["answers"])
                }  # fmt: skip
    return by_load


def _run(command: Sequence[str], most_seconds: float) -> tuple[int | None, str]:
    """Exit status and what was printed; the engines that a command has started end with it."""
    environment = os.environ | _ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(timeout=most_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            return None, printed
        return process.returncode, printed


def _last_json(text: str) -> Any:
    """The last line that is an object: others may say something after it, and the last one may have been cut short."""
    for line in reversed(text.splitlines()):
        with suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    return None
