"""Draft accuracy per depth, alpha 0..4 (EAGLE-1, arXiv 2401.15077, section 4): chains, at T = 0 or coupled at T > 0.

Teacher-forced: at every position of the answer the chain's tokens are the text's, its features the head's own; alpha n is how often
the draft after n features of its own is what the target emits. Free-running: chains start where decoding would start one and end
at the first miss; alpha n is how often the node at depth n is accepted once all before it were.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from vllm_eagle.algorithm.draft import NOISE_WEIGHT
from vllm_eagle.algorithm.noise import gumbel
from vllm_eagle.evaluate.texts import Read
from vllm_eagle.train.features.target import FrozenTarget
from vllm_eagle.train.head.models import Head
from vllm_eagle.train.head.unroll import unroll

ALPHA_DEPTH = 5  # alpha 0..4, as the papers report it
CERTAINTIES = (0.0, 0.5, 0.9)  # classes of the target's largest probability, each up to the next
ROWS = 512  # rows of logits at a time


@dataclass(slots=True)
class Accuracy:
    """Counts over all texts; lists are by depth."""

    depth: int
    forced: list[int] = field(init=False)
    forced_tries: list[int] = field(init=False)
    free: list[int] = field(init=False)
    free_tries: list[int] = field(init=False)
    entropy: float = 0.0  # nats, summed over positions
    certainty: float = 0.0  # the target's largest probability, summed
    positions: int = 0
    # By how sure the target is: positions, and those where the first draft is right.
    tries_by_certainty: list[int] = field(default_factory=lambda: [0] * len(CERTAINTIES))
    hits_by_certainty: list[int] = field(default_factory=lambda: [0] * len(CERTAINTIES))

    def __post_init__(self) -> None:
        self.forced, self.forced_tries, self.free, self.free_tries = ([0] * self.depth for _ in range(4))

    def merge(self, other: "Accuracy") -> None:
        """Add the counts of other texts."""
        for mine, theirs in (
            (self.forced, other.forced),
            (self.forced_tries, other.forced_tries),
            (self.free, other.free),
            (self.free_tries, other.free_tries),
            (self.tries_by_certainty, other.tries_by_certainty),
            (self.hits_by_certainty, other.hits_by_certainty),
        ):
            mine[:] = map(sum, zip(mine, theirs, strict=True))
        self.entropy += other.entropy
        self.certainty += other.certainty
        self.positions += other.positions

    def as_dict(self) -> dict[str, object]:
        """Rates, rounded."""
        rate = [round(a / max(1, b), 4) for a, b in zip(self.forced, self.forced_tries, strict=True)]
        free = [round(a / max(1, b), 4) for a, b in zip(self.free, self.free_tries, strict=True)]
        steps = self.free_tries[0]
        return {
            "alpha_teacher_forced": rate,
            "alpha_free_running": free,
            f"tau_chain{self.depth}": round(1 + sum(self.free) / max(1, steps), 4),
            "target_entropy_nats": round(self.entropy / max(1, self.positions), 4),
            "target_largest_probability": round(self.certainty / max(1, self.positions), 4),
            "alpha_0_by_certainty": [
                {
                    "likeliest": [low, high],
                    "share": round(tries / max(1, self.positions), 4),
                    "alpha_0": round(hits / max(1, tries), 4),
                }
                for low, high, tries, hits in zip(
                    CERTAINTIES, (*CERTAINTIES[1:], 1.0), self.tries_by_certainty, self.hits_by_certainty, strict=True
                )
            ],
            "positions": self.forced_tries[0],
        }


@torch.no_grad()
def measure_accuracy(
    target: FrozenTarget,
    head: Head,
    batches: Iterable[Read],
    depth: int = ALPHA_DEPTH,
    temperature: float = 0.0,
    token_shift: int = 1,  # see unroll()
    window: int = 0,  # likewise
) -> Accuracy:
    """Alpha for chains of `depth` nodes, and how uncertain the target itself is."""
    total = Accuracy(depth)
    for read in batches:
        drafts = _drafts(head, read, depth, temperature, token_shift, window)
        for i, text in enumerate(read.texts):
            _count(total, text.token_ids, text.num_prompt, text.num_answer, [step[i] for step in drafts])
        _count_uncertainty(total, target, read, drafts[0], temperature)
    return total


def _drafts(
    head: Head, read: Read, depth: int, temperature: float, token_shift: int, window: int
) -> list[torch.Tensor]:  # depth times [batch, seq] int64
    """The chain's token at every row and depth; row t of depth i stands for token t + 2 + i."""
    rows = torch.zeros_like(read.token_ids, dtype=torch.bool)
    for i, text in enumerate(read.texts):
        rows[i, text.num_prompt - 1 : text.num_prompt + text.num_answer - 1] = True
    where = rows.nonzero()
    drafts = []
    for step, ready in enumerate(unroll(head, read.token_ids, read.features.inputs, depth, token_shift, window)):
        tokens = torch.zeros_like(read.token_ids)
        for some in where.split(ROWS):
            logits = head.logits(ready[some[:, 0], some[:, 1]], step).float()
            ids = head.target_ids if head.target_ids is not None else torch.arange(logits.shape[1], device=logits.device)
            if temperature > 0:
                logits = logits / temperature + NOISE_WEIGHT * _noise(read, some, step, head.config.vocab_size)[:, ids]
            tokens[some[:, 0], some[:, 1]] = ids[logits.argmax(-1)]
        drafts.append(tokens.cpu())
    return drafts


def _noise(read: Read, rows: torch.Tensor, step: int, vocab_size: int) -> torch.Tensor:  # [rows, vocab]
    """Noise of the drafted positions; `rows` [rows, 2] are text and row."""
    seeds = [read.texts[i].seed_at(t + 2 + step) for i, t in rows.tolist()]
    return gumbel(torch.tensor(seeds, device=rows.device), vocab_size)


def _count(total: Accuracy, tokens: list[int], num_prompt: int, num_answer: int, drafts: list[torch.Tensor]) -> None:
    """Add one text. A chain's root is an answer's token; what it drafts may lie beyond the answer, as on a server."""
    hits = []  # by root: accepted nodes in a row, and all single hits
    for root in range(num_prompt, num_prompt + num_answer - 1):
        row = root - 1
        single = [root + 1 + i < len(tokens) and int(drafts[i][row]) == tokens[root + 1 + i] for i in range(total.depth)]
        hits.append(single)
        for i, hit in enumerate(single):
            if root + 1 + i < num_prompt + num_answer:
                total.forced[i] += hit
                total.forced_tries[i] += 1
    at = 0
    while at < len(hits):
        accepted = 0
        for i, hit in enumerate(hits[at]):
            total.free_tries[i] += 1
            if not hit:
                break
            total.free[i] += 1
            accepted += 1
        at += accepted + 1


def _count_uncertainty(total: Accuracy, target: FrozenTarget, read: Read, first: torch.Tensor, temperature: float) -> None:
    """How sure the target is of each token after the answer's first, and whether the chain's `first` node [batch, seq] is it."""
    for i, text in enumerate(read.texts):
        start, end = text.num_prompt, text.num_prompt + text.num_answer - 1  # features whose next token is drafted
        truth = torch.tensor(text.token_ids[start + 1 : end + 1])
        hits = (first[i, start - 1 : end - 1] == truth).tolist()
        certainty: list[float] = []
        for some in read.features.last[i, start:end].split(ROWS):
            logs = (target.logits(some) / (temperature or 1.0)).log_softmax(-1)
            total.entropy += float(-(logs.exp() * logs).sum())
            certainty += logs.amax(-1).exp().tolist()
        total.certainty += sum(certainty)
        total.positions += len(certainty)
        for hit, value in zip(hits, certainty, strict=True):
            place = sum(value > bound for bound in CERTAINTIES[1:])
            total.tries_by_certainty[place] += 1
            total.hits_by_certainty[place] += hit
