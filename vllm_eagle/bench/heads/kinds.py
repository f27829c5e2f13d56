"""Kinds of heads on the same prompts: n-gram lookup, Medusa, EAGLE-1 and EAGLE-3, in vLLM and by `vllm-eagle eval`.

    python -m vllm_eagle.bench.heads.kinds --target MODEL --eagle HEAD --eagle3 HEAD --medusa HEAD --json FILE

Chains of 5 run through vLLM's own code at T = 0 (its chains on CPU are broken above), trees of 16 through ours at T = 0 and 1. What
`eval` expects of each stands beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_eagle.bench.engines.offline import encode_prompts, prepare_environment
from vllm_eagle.bench.passes.compare import Settings, measure, variants
from vllm_eagle.evaluate.command import EvalSettings, evaluate

CHAIN, TREE = "vllm_chain5", "tree16"
NAMES = {"eagle": "EAGLE-1", "eagle3": "EAGLE-3", "medusa": "Medusa, 5 heads", "ngram": "n-gram lookup of 5"}


def measure_head(target: str, head: str, kind: str, temperature: float, max_tokens: int) -> dict[str, Any]:
    """tau in vLLM, and what `eval` says."""
    medusa = head if kind == "medusa" else None
    named = variants(head, temperature, medusa)
    names = [CHAIN, TREE] if temperature == 0 else [TREE]
    if kind in ("medusa", "ngram"):
        names = [name for name in named if name.startswith(f"vllm_{kind}")]
    settings = Settings(target, head, None, None, temperature, 0, max_tokens, "float32", names, medusa)
    compared = measure(settings, encode_prompts(target, None), {name: named[name] for name in names})
    found = {"vllm": compared["tau"], "identical": compared["identical"], "prompts": compared["prompts"]}
    if kind == "ngram":
        return found
    asked = EvalSettings(
        target=target,
        head=Path(head),
        prompts=None,
        limit=None,
        num_draft_tokens=(16,),
        mode="dynamic",
        temperature=temperature,
        seed=0,
        max_tokens=max_tokens,
        dtype="float32",
        batch=32,
        out=None,
    )
    return found | {"eval": evaluate(asked)}


def table(result: dict[str, Any]) -> str:
    """Markdown, one row per kind of head."""
    lines = [
        "| drafter | alpha 0 | 1 | 2 | 3 | 4 | chain of 5 | eval | tree of 16 | eval | T = 1: alpha 0 | tree of 16 | eval |",
        "|" + "---|" * 13,
    ]
    for kind, by_temperature in result["heads"].items():
        greedy, sampled = by_temperature["T=0"], by_temperature.get("T=1", {})
        cells = [NAMES[kind]]
        found = greedy.get("eval", {})
        cells += [f"{alpha:.3f}" for alpha in found.get("alpha_teacher_forced", [])] or [""] * 5
        cells += [f"{next(tau for name, tau in greedy['vllm'].items() if name.startswith('vllm')):.2f}"]
        cells += [_figure(found, "tau_chain5"), _figure(greedy["vllm"], TREE), _figure(found.get("trees", {}).get(TREE, {}), "tau")]
        found = sampled.get("eval", {})
        cells += [f"{found['alpha_teacher_forced'][0]:.3f}" if found else ""]
        cells += [_figure(sampled.get("vllm", {}), TREE), _figure(found.get("trees", {}).get(TREE, {}), "tau")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.2f}" if name in found else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    for kind in ("eagle", "eagle3", "medusa"):
        parser.add_argument(f"--{kind}", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    prepare_environment()
    heads: dict[str, Any] = {}
    for kind in ("medusa", "eagle", "eagle3", "ngram"):  # why last: compare.py
        head = args.eagle if kind == "ngram" else getattr(args, kind)
        temperatures = (0.0, 1.0) if kind in ("eagle", "eagle3") else (0.0,)
        heads[kind] = {f"T={t:g}": measure_head(args.target, head, kind, t, args.max_tokens) for t in temperatures}
        args.json.write_text(json.dumps({"heads": heads}) + "\n")
    print(table({"heads": heads}))


if __name__ == "__main__":
    main()
