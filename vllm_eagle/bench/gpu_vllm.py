"""The part of `vllm-eagle gpu-check` that needs vLLM: answers beside those of plain vLLM, and the speed of a pair of 8B shape.

Each is a command that users have, too, in a process of its own, so that one that dies takes no other with it.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_FEW = ("--limit", "16", "--max-tokens", "64", "--only", "vllm_chain3", "chain5", "tree16", "tree60")
COMMANDS: Mapping[str, Sequence[str]] = {
    "exact_float32_t0": ("compare", "--dtype", "float32", *_FEW),
    "exact_float32_t1": ("compare", "--dtype", "float32", "--temperature", "1", *_FEW),
    # Here rounding may decide between two tokens; the gaps in the result tell whether it did.
    "exact_bfloat16_t0": ("compare", "--dtype", "bfloat16", *_FEW),
    # Random weights of 8B shape; acceptance as recorded on the shipped pair.
    "bench_8b_replayed": (
        *("bench", "--replay", "8b", "--only", "vllm_chain3", "trees", "--concurrency", "1", "8", "64"),
        *("--rounds", "3", "--max-tokens", "128"),
    ),
}


def check(commands: Mapping[str, Sequence[str]] = COMMANDS) -> dict[str, dict[str, Any]]:
    """Per command its exit status and its result, the last line of what it printed; None if that is no JSON."""
    found = {}
    for name, arguments in commands.items():
        print(f"vllm-eagle {' '.join(arguments)}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "vllm_eagle.cli", *arguments], stdout=subprocess.PIPE, text=True, check=False)
        found[name] = {"command": " ".join(arguments), "status": done.returncode, "result": _last_json(done.stdout)}
    return found


def failed(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the commands that did not end well."""
    return [name for name, each in found.items() if each["status"] or each["result"] is None]


def _last_json(text: str) -> Any:
    lines = text.splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
