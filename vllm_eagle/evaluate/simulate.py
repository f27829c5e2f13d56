"""Draft trees grown and walked along known answers: what a server would draft, verify and accept, without a server.

The drafting is the real one (`draft.grow`), the head runs as a torch module. Its keys and values of the text come from one pass
over all of it: the true features are known everywhere, and a step's first pass would compute the same rows again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vllm_eagle.algorithm.accept import accept
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.algorithm.draft import Level, NoiseAt, Request, grow
from vllm_eagle.algorithm.noise import gumbel
from vllm_eagle.algorithm.tree import DraftTree
from vllm_eagle.evaluate.texts import Read
from vllm_eagle.train.head.layer import Memory
from vllm_eagle.train.head.models import Head
from vllm_eagle.train.head.unroll import UnrolledMemory


@dataclass(slots=True)
class Replay:
    """What happened to the trees of all texts."""

    num_steps: int = 0
    num_accepted: int = 0
    num_nodes: int = 0
    expected: float = 0.0  # sum of the nodes' path probabilities, which is what the head thinks will be accepted
    # Nodes whose parent was accepted: the head's confidence in them, and whether they were accepted.
    confidences: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Mean tokens per target pass, the bonus token included."""
        return 1 + self.num_accepted / max(1, self.num_steps)

    @property
    def expected_tau(self) -> float:
        """The same by the head's own confidence."""
        return 1 + self.expected / max(1, self.num_steps)

    def merge(self, other: "Replay") -> None:
        """Add what happened on other texts."""
        self.num_steps += other.num_steps
        self.num_accepted += other.num_accepted
        self.num_nodes += other.num_nodes
        self.expected += other.expected
        self.confidences += other.confidences
        self.accepted += other.accepted

    def add(self, tree: DraftTree, following: Sequence[int]) -> int:
        """Walk `tree` along the tokens that the target emits after the root; returns how many nodes were accepted."""
        # Where the text ends, -1 is no child's token.
        depths = tree.depths
        targets = [following[depth] if depth < len(following) else -1 for depth in depths.tolist()]
        path = accept(tree, targets).path
        self.num_steps += 1
        self.num_accepted += len(path)
        self.num_nodes += tree.num_nodes - 1
        self.expected += float(torch.from_numpy(tree.scores[1:]).exp().sum())
        on_path = {0, *path}
        for node in range(1, tree.num_nodes):
            parent = int(tree.parents[node])
            if parent in on_path:
                self.confidences.append(float(torch.tensor(tree.scores[node] - tree.scores[parent]).exp()))
                self.accepted.append(node in on_path)
        return len(path)

    def as_dict(self) -> dict[str, object]:
        """Means, rounded."""
        return {
            "tau": round(self.tau, 4),
            "tau_by_confidence": round(self.expected_tau, 4),
            "steps": self.num_steps,
            "nodes_per_step": round(self.num_nodes / max(1, self.num_steps), 2),
        }


@torch.no_grad()
def replay(head: Head, batches: Iterable[Read], config: TreeConfig, temperature: float = 0.0) -> Replay:
    """Draft trees at every step of decoding all texts. Not for Medusa heads, whose drafts do not depend on each other."""
    result = Replay()
    for read in batches:
        _Batch(head, read, config, temperature).run(result)
    return result


class _Batch:
    def __init__(self, head: Head, read: Read, config: TreeConfig, temperature: float):
        self._head, self._texts, self._config, self._temperature = head, read.texts, config, temperature
        ids = F.pad(read.token_ids[:, 1:], (0, 1))
        self._window = config.draft_window or 0
        self._trunk = UnrolledMemory(self._window)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self._hidden, self._ready = head(ids, head.fuse(read.features.inputs), positions, self._trunk)

    def run(self, result: Replay) -> None:
        roots = {i: text.num_prompt for i, text in enumerate(self._texts)}
        while roots := {i: root for i, root in roots.items() if root < self._end(i)}:
            chosen = list(roots)
            trees = self._grow(chosen, [roots[i] for i in chosen])
            for i, tree in zip(chosen, trees, strict=True):
                roots[i] += 1 + result.add(tree, self._texts[i].token_ids[roots[i] + 1 :])

    def _end(self, i: int) -> int:
        """Index of the answer's last token; a request that has emitted it is finished."""
        return self._texts[i].num_prompt + self._texts[i].num_answer - 1

    def _grow(self, chosen: list[int], roots: list[int]) -> list[DraftTree]:
        rows = torch.tensor([root - 1 for root in roots], device=self._hidden.device)
        index = torch.tensor(chosen, device=self._hidden.device)
        requests = [
            Request(self._texts[i].token_ids[root], self._config.num_draft_tokens, self._temperature)
            for i, root in zip(chosen, roots, strict=True)
        ]
        trunk = [(keys[index], values[index]) for keys, values in self._trunk.first]
        run_head = _Levels(self._head, trunk, rows, self._hidden[index, rows], self._window)
        noise = self._noise(chosen, roots) if self._temperature > 0 and self._config.coupled else None
        root_logits, ids = self._head.logits(self._ready[index, rows]).float(), self._head.target_ids
        return grow(requests, root_logits, run_head, self._config, noise, token_ids=ids)

    def _noise(self, chosen: list[int], roots: list[int]) -> NoiseAt:
        ids = self._head.target_ids
        tokens = self._head.config.vocab_size if ids is None else ids

        def noise_at(depth: int) -> torch.Tensor:
            seeds = [self._texts[i].seed_at(root + depth) for i, root in zip(chosen, roots, strict=True)]
            return gumbel(torch.tensor(seeds, device=self._hidden.device), tokens)

        return noise_at


class _Levels(Memory):
    """Runs the head over one level after the other, each row over its text up to the root and its ancestors in the tree.

    A window is longer than any tree is deep (TreeConfig), so it hides none of the ancestors.
    """

    def __init__(
        self,
        head: Head,
        trunk: list[
            tuple[torch.Tensor, torch.Tensor]
        ],  # by layer keys and values of the whole text [num_reqs, kv_heads, seq, head_dim]
        rows: torch.Tensor,  # [num_reqs] int64, row of the root
        hidden: torch.Tensor,  # [num_reqs, hidden], what the head made of the root
        window: int = 0,  # newest positions that a row sees; 0: all
    ):
        self._head, self._layers, self._rows = head, list(trunk), rows
        self._hidden = hidden[:, None]
        self._window, self._places = window, torch.arange(trunk[0][0].shape[2], device=rows.device)
        self._context = (self._places <= rows[:, None])[:, None]  # [num_reqs, 1, seq]
        self._mask = self._context

    def __call__(self, level: Level) -> torch.Tensor:
        width = level.token_ids.shape[1]
        context = self._context
        if self._window:
            context = context & (self._places > (self._rows + level.depth - self._window)[:, None])[:, None]
        self._mask = torch.cat([context.expand(-1, width, -1), level.ancestors], 2)[:, None]
        parents = level.parent_rows[:, :, None].expand(-1, -1, self._hidden.shape[2])
        positions = (self._rows + level.depth)[:, None].expand(-1, width)
        self._hidden, ready = self._head(level.token_ids, self._hidden.gather(1, parents), positions, self)
        return self._head.logits(ready).float()

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        keys, values = self._layers[layer]
        self._layers[layer] = keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        query = query.to(value.dtype)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, enable_gqa=True)
