"""Clients of a soak test: read streamed answers, break off, dawdle, ask for what must be refused; and judge each answer at once."""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp

from vllm_eagle.bench.soak.pool import COMPLETIONS, Ask, Refused

# A loaded machine answers slowly, which is no error; only silence of minutes is.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=120, sock_read=600)
MOST_FAILURES = 50  # kept with all details
LOGPROB_TOLERANCE = 1e-2
# What a client does with its next request, and how often of 50 times.
BEHAVIOURS = {"reads": 34, "breaks off": 7, "leaves at once": 3, "dawdles": 3, "asks nonsense": 3}


@dataclass(slots=True)
class Choice:
    """One answer, put together from the pieces that came."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)  # of the tokens, if asked for
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Answer:
    """What came back for one request."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens, if asked for
    usage: int | None = None  # tokens that the server says it generated
    error: str | None = None  # anything that a client would take for a failure
    complete: bool = False

    def add(self, piece: Mapping[str, Any]) -> None:
        """Take in a piece of a stream, or a whole answer."""
        if "error" in piece:
            self.error = str(piece["error"])[:500]
        if piece.get("usage"):
            self.usage = piece["usage"]["completion_tokens"]
        for part in piece.get("choices", ()):
            choice = self.choices.setdefault(part["index"], Choice())
            message = part.get("delta") or part.get("message") or {}
            choice.text += part.get("text") or message.get("content") or ""
            choice.token_ids += part.get("token_ids") or ()
            choice.logprobs += (part.get("logprobs") or {}).get("token_logprobs") or ()
            choice.finish_reason = part.get("finish_reason") or choice.finish_reason
            choice.stop_reason = part.get("stop_reason") or choice.stop_reason
            for position in part.get("prompt_logprobs") or ():
                # The prompt's own token stands first, the likeliest ones after it.
                self.prompt_logprobs.append(next(iter(position.values()))["logprob"] if position else 0.0)

    @property
    def num_tokens(self) -> int:
        """Tokens received."""
        return sum(len(choice.token_ids) for choice in self.choices.values())


def difference(expected: Answer, found: Answer) -> str | None:
    """How a complete answer differs from the reference; None if it does not."""
    if expected.choices.keys() != found.choices.keys():
        return f"choices {sorted(found.choices)} in place of {sorted(expected.choices)}"
    for index, choice in found.choices.items():
        twin = expected.choices[index]
        if choice.token_ids != twin.token_ids:
            return f"choice {index}: {_first_difference(twin.token_ids, choice.token_ids)}"
        for name in ("text", "finish_reason", "stop_reason"):
            if getattr(choice, name) != getattr(twin, name):
                return f"choice {index}: {name} {getattr(choice, name)!r} in place of {getattr(twin, name)!r}"
        if not _close(twin.logprobs, choice.logprobs):
            return f"choice {index}: logprobs {choice.logprobs[:8]} in place of {twin.logprobs[:8]}"
    if not _close(expected.prompt_logprobs, found.prompt_logprobs):
        return f"prompt logprobs {found.prompt_logprobs[:8]} in place of {expected.prompt_logprobs[:8]}"
    return None


def prefix_difference(expected: Answer, found: Answer) -> str | None:
    """How the beginning of an answer that was broken off differs from the reference; None if it does not."""
    for index, choice in found.choices.items():
        beginning = expected.choices[index].token_ids[: len(choice.token_ids)]
        if choice.token_ids != beginning:
            return f"choice {index}: {_first_difference(beginning, choice.token_ids)}"
    return None


def _first_difference(expected: list[int], found: list[int]) -> str:
    pairs = zip(expected, found, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return (
        f"token {place}: {found[place : place + 5]} in place of {expected[place : place + 5]} "
        f"(lengths {len(found)} and {len(expected)})"
    )


def _close(expected: Sequence[float], found: Sequence[float]) -> bool:
    return len(expected) == len(found) and all(abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(expected, found, strict=True))


class Connection:
    """Requests to one server."""

    def __init__(self, url: str, slow: bool = False):
        self._url = url
        # A small receive buffer, so that the server feels it when its client does not read.
        connector = aiohttp.TCPConnector(limit=0, socket_factory=_small_socket if slow else None)
        self._session = aiohttp.ClientSession(url, timeout=TIMEOUT, connector=connector)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, ask: Ask, most_pieces: int | None = None, pause_s: float = 0.0) -> Answer:
        """Ask and read the answer; break off after `most_pieces`, and sleep before each piece."""
        body = dict(ask.body)
        if ask.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._session.post(ask.path, json=body) as response:
            answer = Answer(response.status)
            if response.status != 200:
                answer.error = (await response.text())[:500]
            elif not ask.streams:
                answer.add(await response.json())
                answer.complete = True
            else:
                await _read(response, answer, most_pieces, pause_s)
            if most_pieces is not None and not answer.complete:
                response.close()  # the connection, not only our interest in it
        if answer.complete and answer.usage != answer.num_tokens:
            answer.error = f"{answer.num_tokens} tokens came, usage says {answer.usage}"
        return answer

    async def status(self, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status and text of the answer to a request that must be refused."""
        async with self._session.post(COMPLETIONS, json=body) as response:
            return response.status, (await response.text())[:500]


def _small_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    return found


async def _read(response: aiohttp.ClientResponse, answer: Answer, most_pieces: int | None, pause_s: float) -> None:
    pieces = 0
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        if pause_s:
            await asyncio.sleep(pause_s)
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            answer.complete = True
            return
        answer.add(json.loads(data))
        pieces += 1
        if pieces == most_pieces:
            return
    answer.error = answer.error or "the stream ended without [DONE]"


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that must not happen, with what is needed to look into it."""

    seconds: float  # since the start
    behaviour: str
    what: str
    body: Mapping[str, Any]
    number: int | None = None  # in the pool


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    started_s: float = field(default_factory=time.monotonic)
    requests: Counter[str] = field(default_factory=Counter)  # by behaviour
    equal: Counter[str] = field(default_factory=Counter)  # complete answers that equal the reference, by kind
    equal_beginnings: int = 0
    refused: int = 0
    tokens: int = 0
    errors: int = 0
    mismatches: int = 0
    slowest_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def fail(self, behaviour: str, what: str, body: Mapping[str, Any], number: int | None = None) -> None:
        """Keep a failure; the first ones with all details."""
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(Failure(round(time.monotonic() - self.started_s, 1), behaviour, what, body, number))


class Script:
    """What the clients of a run share: requests in turn, behaviours in a random order, answers to compare with."""

    def __init__(self, asks: Sequence[Ask], reference: Mapping[int, Answer], nonsense: Sequence[Refused], seed: int):
        self.reference = reference  # by number of the request
        self.draw = random.Random(seed)
        # In turn, so that even a short run has every kind.
        self.asks = cycle(asks)
        self.nonsense = cycle(nonsense)
        behaviours = [name for name, weight in BEHAVIOURS.items() for _ in range(weight)]
        self.draw.shuffle(behaviours)
        self.behaviours = cycle(behaviours)


class Client:
    """Asks one thing after the other until the time is up."""

    def __init__(self, url: str, script: Script, tally: Tally):
        self._url = url
        self._script = script
        self._tally = tally

    async def run(self, until_s: float) -> None:
        """Go on until `until_s` of time.monotonic(), and finish the last request."""
        async with Connection(self._url) as fast, Connection(self._url, slow=True) as slow:
            while time.monotonic() < until_s:
                behaviour = next(self._script.behaviours)
                self._tally.requests[behaviour] += 1
                if behaviour == "asks nonsense":
                    await self._ask_nonsense(fast)
                    continue
                ask = next(self._script.asks)
                try:
                    await self._act(behaviour, ask, slow if behaviour == "dawdles" else fast)
                except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
                    self._tally.errors += 1
                    self._tally.fail(behaviour, f"{type(error).__name__}: {error}", ask.body, ask.number)
                    await asyncio.sleep(1)  # a dead server must not be asked thousands of times

    async def _act(self, behaviour: str, ask: Ask, connection: Connection) -> None:
        draw, start_s = self._script.draw, time.monotonic()
        if behaviour == "leaves at once":
            task = asyncio.create_task(connection.ask(ask))
            await asyncio.sleep(draw.choice([0.0, 0.005, 0.05, 0.3]))
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, Answer):  # it was faster
                judge(self._tally, self._script.reference, behaviour, ask, outcome)
        else:
            most_pieces = draw.randint(1, 12) if behaviour == "breaks off" else None
            pause_s = draw.uniform(0.02, 0.3) if behaviour == "dawdles" else 0.0
            answer = await connection.ask(ask, most_pieces, pause_s)
            judge(self._tally, self._script.reference, behaviour, ask, answer)
            self._tally.slowest_s = max(self._tally.slowest_s, time.monotonic() - start_s)

    async def _ask_nonsense(self, connection: Connection) -> None:
        nonsense = next(self._script.nonsense)
        try:
            status, text = await connection.status(nonsense.body)
        except (aiohttp.ClientError, TimeoutError) as error:
            status, text = 0, f"{type(error).__name__}: {error}"
            await asyncio.sleep(1)
        if status == nonsense.status:
            self._tally.refused += 1
        else:
            self._tally.errors += 1
            self._tally.fail(nonsense.name, f"status {status} in place of {nonsense.status}: {text}", nonsense.body)


def judge(tally: Tally, reference: Mapping[int, Answer], behaviour: str, ask: Ask, answer: Answer) -> None:
    """Count an answer as equal, different or failed."""
    tally.tokens += answer.num_tokens
    if answer.error is not None:
        tally.errors += 1
        tally.fail(behaviour, f"status {answer.status}: {answer.error}", ask.body, ask.number)
    elif ask.number in reference:
        compare = difference if answer.complete else prefix_difference
        what = compare(reference[ask.number], answer)
        if what is not None:
            tally.mismatches += 1
            tally.fail(behaviour, what, ask.body, ask.number)
        elif answer.complete:
            tally.equal[ask.kind] += 1
        else:
            tally.equal_beginnings += 1
