"""Let the target write the answers, or whole dialogues, itself: the head then learns the text that it will draft.

    vllm-eagle regenerate --target MODEL --data FILE [FILE ...] --out FILE [--temperature 0 0.7 1]
    vllm-eagle regenerate --target MODEL --self N --out FILE [--turns 2]

With --data every answer of a dialogue is replaced by the target's, in order, each with the answers before it as context; a
question at the end gets an answer, too. System turns stay. Dialogues with tool turns are left out: the tool's reply belongs to the
old answer.

With --self the target writes whole dialogues: it is given its chat template up to where a user begins and writes that turn, too
(Magpie, arXiv 2406.08464), then the answer, then the next user turn. Turns that are empty, too short, cut off, loops, repetitions
of earlier ones, or that contain the template's own marks are left out and counted.

Several temperatures take turns, row by row. Every answer carries its "finish_reason", and a row its tools and the chat template's
arguments, so that training sees each answer behind the prompt that it was written for, word for word. One that reaches --max-tokens
("length") ends its dialogue; training then teaches no end of turn behind it. How many did, and which turns were dropped, is said.

Finished dialogues are appended to OUT in chunks. The same command continues where it stopped; OUT.meta.json says what OUT was made
with, and other arguments are refused. Rows of files that are left out are tried again by the next run.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import check_files
from vllm_eagle.train.data.template import ChatTemplate, add_template_argument, parse_arguments
from vllm_eagle.train.features.target import load_config, load_tokenizer
from vllm_eagle.train.regenerate.file_turns import FileTurns
from vllm_eagle.train.regenerate.journal import Journal
from vllm_eagle.train.regenerate.own_turns import OwnTurns
from vllm_eagle.train.regenerate.rewrite import Answer, Generate, Regenerator, Settings, Source
from vllm_eagle.train.regenerate.users import Users

USER_TOP_P = 0.995  # Magpie's: without it a user turn goes astray at the unlikeliest tokens
OpenEngine = Callable[[Settings, int], AbstractContextManager[Generate]]  # settings, seed


@contextmanager
def open_vllm(settings: Settings, seed: int) -> Iterator[Generate]:
    """A vLLM engine in this process that samples with `seed`."""
    from vllm_eagle.bench.engines.offline import engine, prepare_environment

    prepare_environment()
    import torch
    from vllm import SamplingParams

    options = {"dtype": settings.dtype, "max_model_len": settings.max_model_len, "seed": seed, "max_num_seqs": 128}
    if not torch.cuda.is_available():
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}
    with engine(settings.target, **options) as llm:

        def generate(
            prompts: list[list[int]], temperatures: list[float], user_stops: tuple[str, ...] | None = None
        ) -> list[Answer]:
            # Special tokens are what the target wrote, too; the one that ends a text is never part of it.
            sampling: dict[str, Any] = {"max_tokens": settings.max_tokens, "skip_special_tokens": False}
            if user_stops is not None:
                sampling |= {"top_p": USER_TOP_P, "stop": list(user_stops)}
            # No seed per request: vLLM 0.32 on CPU fails when the prompt of a seeded request is split over two steps.
            params = [SamplingParams(temperature=t, **sampling) for t in temperatures]
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            return [(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]

        yield generate


def regenerate(settings: Settings, report: DataReport, open_engine: OpenEngine = open_vllm, progress: bool = True) -> int:
    """Write the dialogues that OUT does not hold yet; returns their number.

    Args:
        settings: what to do.
        report: gets the rows that were left out.
        open_engine: opens what generates, given settings and seed. Only called if there is work.
        progress: show a bar.

    Raises:
        ValueError: a file is missing, the target has no chat template, one that cannot be cut where a user begins or does not use
            an argument, or too few positions, OUT was made with other arguments, or hardly any user turn that the target writes can
            be used.
    """
    check_files(list(settings.data))
    config = load_config(settings.target).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.max_model_len > longest:
        raise ValueError(f"--max-model-len is {settings.max_model_len}, but {settings.target} has only {longest} positions")
    template = ChatTemplate(load_tokenizer(settings.target), settings.target, settings.chat_template_kwargs)
    users = None if settings.own is None else Users(template, settings.target, settings.turns)
    journal = Journal(settings.out, settings.arguments())
    known = journal.rows()
    # Another seed than the run before: its random numbers would come again, for other questions.
    with _opened_late(open_engine, settings, settings.seed + len(known)) as generate:
        source: Source
        if users is not None:
            source = OwnTurns(settings, template, users, generate, report, known)
        else:
            source = FileTurns(settings, report, {(row["source"]["data"], row["source"]["line"]) for row in known})
        return Regenerator(settings, template, generate, journal, report, source, getattr(config, "vocab_size", None)).run(progress)


@contextmanager
def _opened_late(open_engine: OpenEngine, settings: Settings, seed: int) -> Iterator[Generate]:
    """Opens the engine when it is first asked."""
    opened: list[Generate] = []
    with ExitStack() as stack:

        def generate(
            prompts: list[list[int]], temperatures: list[float], user_stops: tuple[str, ...] | None = None
        ) -> list[Answer]:
            if not opened:
                opened.append(stack.enter_context(open_engine(settings, seed)))
            return opened[0](prompts, temperatures, user_stops) if user_stops is not None else opened[0](prompts, temperatures)

        yield generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--target", required=True, help="folder of the target model")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="dialogues or prompts (.jsonl, .json, .gz)")
    parser.add_argument("--self", type=int, metavar="N", dest="own", help="instead: N dialogues that the target writes itself")
    parser.add_argument("--turns", type=int, default=2, help="with --self: most user turns of a dialogue (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write, or to continue")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="in turns (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="per answer (default %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=1024, help="prompt and answer (default %(default)s)")
    parser.add_argument("--limit", type=int, help="use the first N dialogues")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    add_template_argument(parser)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Regenerate; prints what was left out, and how many dialogues there are."""
    settings = Settings(
        target=args.target,
        data=tuple(args.data),
        out=args.out,
        temperatures=tuple(args.temperature),
        max_tokens=args.max_tokens,
        max_model_len=args.max_model_len,
        limit=args.limit,
        own=args.own,
        turns=args.turns,
        seed=args.seed,
        dtype=args.dtype,
        chat_template_kwargs=parse_arguments(args.chat_template_kwargs),
    )
    report = DataReport()
    num_written = regenerate(settings, report)
    print("\n".join([*report.complaints(), f"{num_written} dialogues added to {settings.out}"]))
    return 0


def main() -> None:
    """Command line, as `vllm-eagle regenerate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
