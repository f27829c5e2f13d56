"""Print the first table of bench/README.md from two runs of `vllm-eagle compare`.

`python -m vllm_eagle.bench.passes.table T0.json T1.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "vllm_chain": "vLLM's own chain of {} (its default path)",
    "vllm_ngram": "vLLM's n-gram lookup of {}",
    "vllm_medusa": "vLLM's Medusa, {} heads",
    "chain": "our chain of {}",
    "static": "static tree of 16",
    "tree": "dynamic tree of {}",
}


def table(greedy: dict[str, Any], sampled: dict[str, Any]) -> str:
    """Markdown: tau of every variant at both temperatures, coupled and not."""
    temperature = sampled["settings"]["temperature"]
    lines = [f"| variant | | T = 0 | T = {temperature:g} | T = {temperature:g}, uncoupled |", "|---|---|---|---|---|"]
    for variant, tau in greedy["tau"].items():
        kind = variant.rstrip("0123456789")
        cells = [f"{tau:.2f}"]
        for name in (variant, f"{variant}_uncoupled"):
            cells.append(f"{sampled['tau'][name]:.2f}" if name in sampled["tau"] else "")
        lines.append(f"| {variant} | {NAMES[kind].format(variant.removeprefix(kind))} | " + " | ".join(cells) + " |")
    identical = (f"{run['identical']} of {run['prompts']}" for run in (greedy, sampled))
    lines.append(f"| identical | prompts whose tokens equal plain vLLM's in all our variants | {' | '.join(identical)} | |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    print(table(*(json.loads(Path(path).read_text()) for path in sys.argv[1:3])))


if __name__ == "__main__":
    main()
