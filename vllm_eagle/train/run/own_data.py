"""Training data that the target writes itself, in a process of its own: when it ends, the engine's memory is free for training.

OUT/self/dialogues.jsonl    what `vllm-eagle regenerate --self` writes, and its meta; `train --data` reads it again
OUT/self/train.jsonl        the part to train on
OUT/self/prompts.jsonl      the held-out part: a prompt per turn
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from vllm_eagle import files
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.features.target import load_config
from vllm_eagle.train.regenerate.command import regenerate
from vllm_eagle.train.regenerate.rewrite import Settings
from vllm_eagle.train.run.settings import TrainSettings

DEFAULT_NUMBER = 2000  # dialogues
FEWEST = 16
HELD_OUT_EVERY = 20  # one dialogue of so many is held out; of few dialogues more, up to a third
GRACE = 30  # seconds in which an engine that has done its work may leave
MAX_TOKENS, MAX_MODEL_LEN = 256, 1024


def check_number(number: int) -> None:
    """Refuse too few dialogues.

    Raises:
        ValueError: they are.
    """
    if number < FEWEST:
        raise ValueError(f"--self is {number}; a head needs at least {FEWEST} dialogues to learn from and to be measured on")


def data_settings(settings: TrainSettings, number: int) -> Settings:
    """What is to be written for a training run.

    Raises:
        ValueError: the target cannot be read, or has too few positions for a dialogue.
    """
    longest = load_config(settings.target).to_dict().get("max_position_embeddings")
    length = min(MAX_MODEL_LEN, longest or MAX_MODEL_LEN)
    return Settings(
        target=settings.target,
        data=(),
        out=folder(settings.out) / "dialogues.jsonl",
        max_tokens=min(MAX_TOKENS, length // 4),
        max_model_len=length,
        own=number,
        seed=settings.seed,
        chat_template_kwargs=settings.chat_template_kwargs,
    )


def folder(out: Path) -> Path:
    """Where the data of a run lies."""
    return out.resolve() / "self"


def write_in_a_child(settings: Settings) -> None:
    """`regenerate` in another process, which ends with this one.

    Raises:
        ValueError: what `regenerate` raises, or the process was killed; dialogues written so far are kept.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(settings, theirs))
    process.start()
    theirs.close()
    try:
        message = ours.recv()
        process.join(GRACE)
    except EOFError:
        process.join()
        raise ValueError(
            f"the process in which {settings.target} wrote its dialogues ended early (exit status {process.exitcode}); what it "
            "wrote is kept, and the same command with --resume goes on"
        ) from None
    finally:
        process.terminate()
        process.join()
    if message:
        raise ValueError(message)


def _child(settings: Settings, answer: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = DataReport()
    try:
        regenerate(settings, report)
    except ValueError as error:
        answer.send(str(error))
    except KeyboardInterrupt:
        os._exit(130)  # the parent says what is to be said
    else:
        print("\n".join(report.complaints()), file=sys.stderr, flush=True)
        answer.send("")


def _end_with_parent() -> None:
    """A killed run leaves no engine behind that would go on writing beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def write(settings: Settings, write_dialogues: Callable[[Settings], None]) -> float:
    """Have the dialogues written that are not there yet; returns the seconds of all runs that were not killed outright."""
    clock = settings.out.with_name("seconds.json")
    before: float = json.loads(clock.read_text()) if clock.exists() else 0.0
    start = time.perf_counter()
    try:
        write_dialogues(settings)
    finally:
        seconds = before + time.perf_counter() - start
        files.write_text(clock, json.dumps(round(seconds, 1)))
    return seconds


def split(dialogues: Path, number: int) -> tuple[Path, Path]:
    """Write the first `number` dialogues as a part to train on, and prompts of the held-out ones; returns both files."""
    rows = [json.loads(line) for line in dialogues.read_text(encoding="utf-8").splitlines()[:number]]
    every = min(HELD_OUT_EVERY, max(3, len(rows) // 32))
    train = [row for i, row in enumerate(rows) if i % every != every - 1]
    prompts = [
        row | {"messages": row["messages"][:k]}
        for row in rows[every - 1 :: every]
        for k, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    ]
    parts = dialogues.with_name("train.jsonl"), dialogues.with_name("prompts.jsonl")
    for path, some in zip(parts, (train, prompts), strict=True):
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    return parts
