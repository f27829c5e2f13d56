"""What a long context costs in acceptance, and what `draft_window` wins back.

    python -m vllm_eagle.bench.heads.contexts [--real | --model MODEL] [--head HEAD] --json FILE

Dialogues that get longer: the same questions are asked last, behind as many earlier turns as fit into each length. Earlier turns
are other questions with the target's own answers. Along what the target answers at T = 0, trees are drafted as a server would draft
them (evaluate/simulate.py), once per window. The target reads each text once for all of them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.bench.engines.offline import BUILT_IN_PROMPTS, encode_prompts
from vllm_eagle.evaluate.simulate import Replay, replay
from vllm_eagle.evaluate.texts import Text, read_texts, write_answers
from vllm_eagle.train.data.prompts import read_prompts
from vllm_eagle.train.data.rows import Message
from vllm_eagle.train.data.template import ChatTemplate
from vllm_eagle.train.features.target import Features, FrozenTarget, load_tokenizer
from vllm_eagle.train.head.files import load_head
from vllm_eagle.train.head.models import Head, aux_layers

LENGTHS = (256, 512, 1024, 1536, 2048, 4096, 8192)
WINDOWS = (0, 128, 256, 512, 1024, 2048, 4096)  # 0: none
TREE = TreeConfig.from_options(16, {"budget": False})


def turns(target: FrozenTarget, prompts: Path, most: int, max_tokens: int) -> list[list[Message]]:
    """Questions from all over the file, and the target's answers to them."""
    asked = [prompt.asked for prompt in read_prompts(prompts)]
    encoded, tokenizer = encode_prompts(target.path, prompts), load_tokenizer(target.path)
    every = -(-len(asked) // most)
    asked, encoded = asked[::every], encoded[::every]
    answers = write_answers(target, encoded, max_tokens, 0)
    found = []
    for messages, text in zip(asked, answers, strict=True):
        said = tokenizer.decode(text.token_ids[text.num_prompt :], skip_special_tokens=True)
        assert not isinstance(messages, str)
        found.append([*messages, {"role": "assistant", "content": said}])
    return found


def dialogue(template: ChatTemplate, earlier: Sequence[list[Message]], question: list[Message], length: int) -> list[int]:
    """Token ids of the question behind the last of the earlier turns, as many as fit into `length` tokens."""
    found: list[int] = []
    for first in range(len(earlier), -1, -1):
        messages = [*(message for turn in earlier[first:] for message in turn), *question]
        ids = template.encode(template.rendered(messages, {}, add_generation_prompt=True))
        if len(ids) > length:
            break
        found = ids
    return found


def measure(
    target: FrozenTarget, heads: dict[str, Head], texts: Sequence[Text], windows: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By head and window: tau and steps of trees along the texts."""
    found = {name: {window: Replay() for window in windows} for name in heads}
    nothing = torch.empty(0)
    by_aux: dict[tuple[int, ...], list[str]] = {}  # so that heads of one kind, and EAGLE-1 heads beside any, share a reading
    for name in sorted(heads, key=lambda name: -len(aux_layers(heads[name].config))):
        aux = tuple(aux_layers(heads[name].config))
        by_aux.setdefault(aux or next(iter(by_aux), ()), []).append(name)
    for text in texts:  # long ones: one at a time
        for aux, alike in by_aux.items():
            (read,) = read_texts(target, [text], aux)
            for name in alike:
                own = read if aux_layers(heads[name].config) else replace(read, features=Features(read.features.last, nothing))
                for window, total in found[name].items():
                    total.merge(replay(heads[name], [own], replace(TREE, draft_window=window)))
    return {name: {str(window): total.as_dict() for window, total in by_window.items()} for name, by_window in found.items()}


def run(
    model: str,
    heads: Sequence[Path],
    prompts: Path,
    lengths: Sequence[int],
    windows: Sequence[int],
    questions: int,
    most_turns: int,
    max_tokens: int,
    out: Path,
) -> dict[str, Any]:
    """Measure heads of one target, and write what is known after each length. Windows as long as the context are none."""
    target = FrozenTarget(model, torch.float32)
    loaded = {path.name: load_head(path, target).eval().float() for path in heads}
    positions = int(target.config.max_position_embeddings)
    every, template = turns(target, prompts, most_turns, max_tokens), ChatTemplate(load_tokenizer(model), model)
    step = max(1, len(every) // questions)
    result: dict[str, Any] = {"target": Path(model).name, "questions": questions, "max_tokens": max_tokens, "lengths": {}}
    for length in (length for length in lengths if length <= positions):
        room = min(length, positions - max_tokens - TREE.depth_limit - 1)
        asked = []
        for i in range(0, step * questions, step):
            others = [*every[i + 1 :], *every[:i]]
            asked.append(dialogue(template, others, every[i][:-1], room))
        texts = write_answers(target, asked, max_tokens, TREE.depth_limit + 1, batch=1)
        chosen = [window for window in windows if window < length]
        mean = sum(text.num_prompt for text in texts) / len(texts)
        result["lengths"][str(length)] = {"prompt_tokens": round(mean)} | measure(target, loaded, texts, chosen)
        out.write_text(json.dumps(result) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per head and length, a column per window."""
    windows = sorted({int(w) for by_head in result["lengths"].values() for h in by_head.values() if isinstance(h, dict) for w in h})
    lines = [
        "| head | context | " + " | ".join("no window" if w == 0 else str(w) for w in windows) + " |",
        "|" + "---|" * (2 + len(windows)),
    ]
    names = [name for name in next(iter(result["lengths"].values())) if name != "prompt_tokens"]
    for name in names:
        for found in result["lengths"].values():
            cells = [f"{found[name][str(w)]['tau']:.2f}" if str(w) in found[name] else "" for w in windows]
            lines.append(f"| {name} | {found['prompt_tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    from vllm_eagle.pair import HEAD, REAL_HEAD, TARGET

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct")
    parser.add_argument("--model", help="(default: the shipped one)")
    parser.add_argument("--head", type=Path, nargs="+", help="for it (default: the shipped one)")
    parser.add_argument("--prompts", type=Path, default=BUILT_IN_PROMPTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--turns", type=int, default=192, help="most questions that are taken from the file (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, heads = args.model or str(TARGET), args.head or [HEAD]
    if args.real:
        from vllm_eagle.pair.real import real_target

        model, heads = str(real_target()), args.head or [REAL_HEAD]
    with torch.inference_mode():
        result = run(model, heads, args.prompts, args.lengths, args.windows, args.questions, args.turns, args.max_tokens, args.json)
    print(table(result))


if __name__ == "__main__":
    main()
