"""Run prompts through an engine in this process, one engine after another."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_eagle.bench.engines.workloads import in_context
from vllm_eagle.train.data.prompts import Prompt, read_prompts
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import RowError
from vllm_eagle.train.data.template import ChatTemplate, check_ids
from vllm_eagle.train.features.target import load_config, load_tokenizer

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

BUILT_IN_PROMPTS = Path(__file__).parents[2] / "prompts" / "gsm8k.jsonl"


@dataclass(frozen=True, slots=True)
class Generated:
    """What one engine made of the prompts."""

    token_ids: list[list[int]]
    texts: list[str]
    seconds: float
    tau: float  # mean tokens per target pass of decoding, by vLLM's own counters; 1 without speculation
    first_token_s: list[float] = field(default_factory=list)  # per answer, from asking
    next_token_s: list[float] = field(default_factory=list)  # per answer, mean over its tokens after the first
    num_tokens: int | None = None  # where token ids are not known
    gaps_s: list[float] = field(default_factory=list)  # between outputs of an answer, of all answers; each may hold several tokens
    busy: tuple[float, float] | None = None  # tokens and seconds while nobody had run out of questions; None: all

    @property
    def tokens(self) -> int:
        """All output tokens."""
        return sum(map(len, self.token_ids)) if self.num_tokens is None else self.num_tokens

    @property
    def tokens_per_s(self) -> float:
        """While as many as asked at once were answered: at the end there are fewer, and the more so the less they keep step."""
        tokens, seconds = self.busy or (self.tokens, self.seconds)
        return tokens / seconds

    @property
    def answers(self) -> list[tuple[list[int], str]]:
        """What can be compared of the answers: tokens, where they are known, and text."""
        return list(zip(self.token_ids or [[] for _ in self.texts], self.texts, strict=True))


def prepare_environment(threads: int | None = None) -> None:
    """Before vLLM is imported: engine in this process, quiet, no hub for models that lie on disk; so many threads on CPU."""
    if threads is not None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def timed_arguments(prompts: Sequence[list[int]], max_tokens: int, most: int, dtype: str, enforce_eager: bool) -> dict[str, Any]:
    """Arguments of engines that answer such prompts, `most` at once, while they are timed."""
    longest = max(map(len, prompts))
    return {
        "dtype": dtype,
        "max_model_len": longest + max_tokens + 1,
        "enforce_eager": enforce_eager,
        "max_num_seqs": most,
        # The same prompts come again, in other rounds and at other loads; whoever has seen them must not gain by it.
        "enable_prefix_caching": False,
        # vLLM 0.32 on CPU fails when the prompt of a seeded request is split over two steps, so all must fit into one.
        "max_num_batched_tokens": max(longest + max_tokens + 1, most * longest) + 128 * most,
    }


def encode_prompts(
    model: str, path: Path | None, limit: int | None = None, max_tokens: int = 0, context_tokens: int | None = None
) -> list[list[int]]:
    """As `encode_with_kinds`, the token ids alone."""
    return encode_with_kinds(model, path, limit, max_tokens=max_tokens, context_tokens=context_tokens)[0]


def encode_with_kinds(
    model: str,
    path: Path | None,
    limit: int | None = None,
    arguments: dict[str, Any] | None = None,
    max_tokens: int = 0,
    context_tokens: int | None = None,
) -> tuple[list[list[int]], list[str | None]]:
    """Token ids and kinds of the prompts of a file (see train/data/prompts.py); chats through the model's template.

    What the model cannot take is left out, and said on stderr: prompts that leave no room for an answer, and tokens that it lacks.

    Args:
        model: folder of the model.
        path: the file; None for the built-in prompts.
        limit: most prompts.
        arguments: of the chat template.
        max_tokens: to come after a prompt.
        context_tokens: most of a prompt, which is filled up with others' texts (workloads.py), as far as the target has positions.

    Raises:
        ValueError: the file is missing, broken or empty, or nothing in it can be used.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    tokenizer, config, report = load_tokenizer(model), load_config(model).get_text_config(), DataReport()
    positions = getattr(config, "max_position_embeddings", None)
    path = path or BUILT_IN_PROMPTS
    prompts: list[list[int]] = []
    kinds: list[str | None] = []

    @cache
    def template() -> ChatTemplate:
        return ChatTemplate(tokenizer, model, arguments)

    def encode(prompt: Prompt) -> list[int]:
        if isinstance(prompt.asked, str):
            ids: list[int] = tokenizer(prompt.asked, verbose=False)["input_ids"]
            return ids
        return template().encode(template().rendered(prompt.asked, prompt.options, add_generation_prompt=True))

    asked = read_prompts(path)
    if context_tokens is not None:
        room = context_tokens if positions is None else min(context_tokens, positions - max_tokens)
        asked = iter(in_context(list(asked), room, encode))
    for prompt in asked:
        if len(prompts) == limit:
            break
        try:
            ids = encode(prompt)
            check_ids(ids, tokenizer, getattr(config, "vocab_size", None))
            if positions is not None and len(ids) + max_tokens > positions:
                raise RowError("too long", f"{len(ids)} tokens and {max_tokens} to come, the target takes {positions}")
        except RowError as error:
            report.add(path, prompt.line, error.reason, error.detail)
        else:
            prompts.append(ids)
            kinds.append(prompt.kind)
    if not prompts:
        raise ValueError(f"{path}: holds no prompts that can be used{''.join(f';{line}' for line in report.complaints())}")
    if report.findings:
        print("\n".join(report.complaints()), file=sys.stderr)
    return prompts, kinds


def places_by_kind(kinds: Sequence[str | None]) -> dict[str | None, list[int]]:
    """Which prompts are of each kind, in the order in which kinds first come."""
    places: dict[str | None, list[int]] = {}
    for i, kind in enumerate(kinds):
        places.setdefault(kind, []).append(i)
    return places


@contextlib.contextmanager
def engine(model: str, **settings: Any) -> Iterator["LLM"]:
    """An offline engine that gives its memory back at the end."""
    from vllm import LLM

    llm = LLM(model, **{"disable_log_stats": False, "use_tqdm_on_load": False} | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm: "LLM", prompts: Sequence[list[int]], params: Sequence["SamplingParams"], **options: Any) -> Generated:
    """Generate for all prompts at once; tau counts this call only. `options` go to vLLM's `generate`."""
    before = _counters(llm)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], [p.clone() for p in params], use_tqdm=False, **options)
    seconds = time.perf_counter() - start
    return generated(outputs, seconds, _tau(llm, before))


def generate_by_kind(
    llm: "LLM", prompts: Sequence[list[int]], params: Sequence["SamplingParams"], kinds: Sequence[str | None]
) -> tuple[Generated, dict[str, Generated]]:
    """As `generate`, one kind after the other, since vLLM counts no request apart: the whole, without latencies, and each kind.

    Where there is one kind, or none, this is one call of `generate`.
    """
    places = places_by_kind(kinds)
    before = _counters(llm)
    parts = {kind: generate(llm, [prompts[i] for i in some], [params[i] for i in some]) for kind, some in places.items()}
    by_kind = {kind: part for kind, part in parts.items() if kind is not None}
    if len(parts) == 1:
        return next(iter(parts.values())), by_kind
    token_ids: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    for kind, some in places.items():
        for i, ids, text in zip(some, parts[kind].token_ids, parts[kind].texts, strict=True):
            token_ids[i], texts[i] = ids, text
    return Generated(token_ids, texts, sum(part.seconds for part in parts.values()), _tau(llm, before)), by_kind


def generated(outputs: Sequence["RequestOutput"], seconds: float, tau: float) -> Generated:
    """What vLLM's outputs tell."""
    return Generated(
        token_ids=[list(output.outputs[0].token_ids) for output in outputs],
        texts=[output.outputs[0].text for output in outputs],
        seconds=seconds,
        tau=tau,
        first_token_s=[output.metrics.first_token_latency for output in outputs],
        next_token_s=[
            (output.metrics.last_token_ts - output.metrics.first_token_ts) / max(1, len(output.outputs[0].token_ids) - 1)
            for output in outputs
        ],
    )


def _tau(llm: "LLM", before: tuple[float, float]) -> float:
    drafts, accepted = (after - was for after, was in zip(_counters(llm), before, strict=True))
    return 1 + accepted / drafts if drafts else 1.0


def _counters(llm: "LLM") -> tuple[float, float]:
    values = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
    return values.get("vllm:spec_decode_num_drafts", 0.0), values.get("vllm:spec_decode_num_accepted_tokens", 0.0)
