"""`vllm-eagle train` without data: the target writes dialogues, a head learns from them and is measured on others of them.

Each part goes on where a killed run stopped: the dialogues by their journal, the training by its checkpoints; eval is done again.
"""

import gc
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_eagle import files
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.evaluate.command import EvalSettings, alpha_table, evaluate
from vllm_eagle.heads.checkpoint import read_config
from vllm_eagle.train.data.template import ChatTemplate
from vllm_eagle.train.features.target import check_config, load_config, load_tokenizer
from vllm_eagle.train.regenerate.rewrite import Settings
from vllm_eagle.train.regenerate.users import Users
from vllm_eagle.train.run import checkpoint, own_data, resume
from vllm_eagle.train.run.build import chosen_aux_layers
from vllm_eagle.train.run.card import CARD
from vllm_eagle.train.run.loop import train
from vllm_eagle.train.run.settings import TrainSettings

TREES = {
    "tree16": TreeConfig(num_draft_tokens=16),
    "chain3": TreeConfig(num_draft_tokens=3, mode="chain"),
    "chain5": TreeConfig(num_draft_tokens=5, mode="chain"),
}
EVAL_TURNS, EVAL_TOKENS = 64, 128
DISK_SHARE = 0.1  # of the free disk space may be used for the target's features while a head is trained


def train_from_nothing(
    settings: TrainSettings,
    number: int,
    write_dialogues: Callable[[Settings], None] = own_data.write_in_a_child,
    progress: bool = True,
) -> str:
    """Data, training, eval; returns the summary. The run card gets "self" and "eval".

    Args:
        settings: of the training; no data.
        number: of dialogues.
        write_dialogues: writes what is missing.
        progress: show bars.

    Raises:
        ValueError: target or options cannot be used, or one of the parts fails.
    """
    own_data.check_number(number)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "several processes can train, but not write the data; run `vllm-eagle regenerate --target "
            f"{shlex.quote(settings.target)} --self {number} --out FILE` first, then give --data FILE"
        )
    asked = own_data.data_settings(settings, number)
    config = load_config(settings.target)
    check_config(config, settings.target)
    chosen_aux_layers(config, settings)
    if settings.init is not None:
        read_config(settings.init)
    template = ChatTemplate(load_tokenizer(settings.target), settings.target, settings.chat_template_kwargs)
    Users(template, settings.target, asked.turns)
    settings = replace(settings, data=(asked.out.with_name("train.jsonl"),))
    if settings.resume and checkpoint.newest(settings.out) is None:
        settings = replace(settings, resume=False)  # it was the data that was not finished
    resume.check_out(settings)
    asked.out.parent.mkdir(parents=True, exist_ok=True)

    _say(progress, f"1 of 3: {settings.target} writes {number} dialogues")
    data_seconds = own_data.write(asked, write_dialogues)
    _, prompts = own_data.split(asked.out, number)
    _say(progress, f"2 of 3: training on them, into {settings.out}")
    keeping = settings if settings.cache_dir is not None else _keeping_features(settings, asked.out.with_name("features"))
    card = train(keeping, progress)
    if keeping.cache_dir is not None and keeping is not settings:
        shutil.rmtree(keeping.cache_dir)
    gc.collect()
    _say(progress, "3 of 3: eval on held-out turns")
    start = time.perf_counter()
    found = _evaluate(settings, prompts, min(EVAL_TOKENS, asked.max_tokens // 2), progress)
    found |= {"seconds": round(time.perf_counter() - start, 1)}
    card |= {
        "self": {
            "readme": f"{number} dialogues that {settings.target} wrote itself; use them again: "
            f"vllm-eagle train --target {shlex.quote(settings.target)} --data {shlex.quote(str(asked.out))} --out NEW",
            "dialogues": number,
            "seconds": round(data_seconds, 1),
        },
        "eval": found,
    }
    files.write_text(settings.out / CARD, json.dumps(card, indent=1) + "\n")
    return summary(settings, card)


def _keeping_features(settings: TrainSettings, folder: Path) -> TrainSettings:
    """With the target's features on disk, so that later epochs need no target."""
    free_gb = shutil.disk_usage(settings.out).free / 2**30
    return replace(settings, cache_dir=folder, cache_gb=DISK_SHARE * free_gb)


def summary(settings: TrainSettings, card: dict[str, Any]) -> str:
    """How good the head is, what it cost, and how to serve it."""
    found, made, trained = card["eval"], card["self"], card["result"]
    lines = [f"{settings.out}: {found['prompts']} held-out turns, {found['tokens']:,} tokens, T=0", alpha_table(found)]
    taus = ", ".join(f"{tree['tau']:.2f} ({name})" for name, tree in found.get("trees", {}).items())
    lines += [f"{'tau':<20}{taus}"] if taus else []
    times = trained["tokens"] / card["data"]["num_tokens"]
    costs = (
        f"data {made['seconds']:,.0f} s ({made['dialogues']:,} dialogues)",
        f"training {trained['seconds']:,.0f} s ({trained['tokens']:,} tokens: {times:.1f} times {card['data']['num_tokens']:,})",
        f"eval {found['seconds']:,.0f} s",
    )
    lines.append(f"{'cost':<20}{', '.join(costs)}")
    if taus:
        model, head = shlex.quote(settings.target), shlex.quote(str(settings.out))
        arguments = settings.chat_template_kwargs
        defaults = f" --default-chat-template-kwargs {shlex.quote(json.dumps(arguments))}" if arguments else ""
        lines.append(f"{'serve it':<20}vllm serve {model} --speculative-model {head}{defaults}")
    return "\n".join(lines)


def _evaluate(settings: TrainSettings, prompts: Path, max_tokens: int, progress: bool) -> dict[str, Any]:
    asked = EvalSettings(
        target=settings.target,
        head=settings.out,
        prompts=prompts,
        limit=EVAL_TURNS,
        num_draft_tokens=(),
        mode="dynamic",
        temperature=0.0,
        seed=settings.seed,
        max_tokens=max_tokens,
        dtype=settings.dtype,
        batch=32,
        out=settings.out / "eval",
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    return evaluate(asked, TREES, progress)


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)
