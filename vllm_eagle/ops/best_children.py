"""The best children of drafted nodes, and how sure the head is of each: top-k and log-softmax of rows of logits, read once.

Two launches: parts of the vocabulary, each with its best tokens and the logarithm of its sum, then the best of all parts. For many
rows the vocabulary is not cut further than it must be. The C++ twin for CPUs is native/best_children.cpp.
"""

import torch
import triton
import triton.language as tl

_CHUNK = 4096  # tokens of one program


@triton.jit
def _pick(scores, place, TOPK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The greatest of `scores`, greatest first and of equals the first one: values and places [BLOCK_K]; places past TOPK are 0."""
    rank = tl.arange(0, BLOCK_K)
    values, places = tl.full([BLOCK_K], float("-inf"), tl.float32), tl.zeros([BLOCK_K], tl.int32)
    for k in range(TOPK):
        best, at = tl.max(scores, 0), tl.argmax(scores, 0)
        values, places = tl.where(rank == k, best, values), tl.where(rank == k, at, places)
        scores = tl.where(place == at, float("-inf"), scores)
    return values, places


@triton.jit
def _log_sum(scores):
    """log(sum(exp)); NaN if any is."""
    top = tl.max(scores, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log(tl.sum(tl.exp(scores - base), 0))


# Not specialized on the width of a level, which changes from step to step: that would compile while requests wait.
@triton.jit(do_not_specialize=["width"])
def _parts(
    logits, factors, noise, values, tokens, log_sums, vocab_size, width, logits_row, noise_row, num_parts,
    TOPK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    request = row // width
    place = tl.arange(0, CHUNK)
    token = part * CHUNK + place
    is_token = token < vocab_size
    scores = tl.load(logits + row.to(tl.int64) * logits_row + token, mask=is_token, other=float("-inf")).to(tl.float32)
    scores = scores * tl.load(factors + request)
    if NOISE:
        scores += tl.load(noise + request.to(tl.int64) * noise_row + token, mask=is_token, other=0.0)
    best, at = _pick(scores, place, TOPK, BLOCK_K)
    rank = tl.arange(0, BLOCK_K)
    out = (row * num_parts + part) * TOPK + rank
    tl.store(values + out, best, mask=rank < TOPK)
    tl.store(tokens + out, tl.minimum(part * CHUNK + at, vocab_size - 1), mask=rank < TOPK)
    tl.store(log_sums + row * num_parts + part, _log_sum(scores))


@triton.jit
def _whole(
    part_values, part_tokens, part_log_sums, values, tokens, num_parts,
    TOPK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK_P)
    log_sum = _log_sum(tl.load(part_log_sums + row * num_parts + part, mask=part < num_parts, other=float("-inf")))
    place = tl.arange(0, BLOCK_C)
    count = num_parts * TOPK
    scores = tl.load(part_values + row * count + place, mask=place < count, other=float("-inf"))
    best, at = _pick(scores, place, TOPK, BLOCK_K)
    at = tl.minimum(at, count - 1)  # of NaNs alone, any place may be called the greatest
    rank = tl.arange(0, BLOCK_K)
    token = tl.load(part_tokens + row * count + at, mask=rank < TOPK, other=0)
    tl.store(values + row * TOPK + rank, best - log_sum, mask=rank < TOPK)
    tl.store(tokens + row * TOPK + rank, token, mask=rank < TOPK)


def best_children(
    logits: torch.Tensor,  # [num_reqs, width, vocab], the last stride is 1
    factors: torch.Tensor,  # [num_reqs] float32, on the logits
    noise: torch.Tensor | None,  # [num_reqs, vocab] float32, added after that
    num_children: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # log confidences float32 and token ids int64, [num_reqs, width, children], best first
    """log_softmax of `logits * factor + noise` at its best tokens; of equal ones the lower token first. Equals `reference`."""
    num_reqs, width, vocab_size = logits.shape
    rows, topk = logits.reshape(num_reqs * width, vocab_size), min(num_children, vocab_size)
    num_parts = triton.cdiv(vocab_size, _CHUNK)
    chunk = _CHUNK if num_parts > 1 else triton.next_power_of_2(vocab_size)
    block_k = triton.next_power_of_2(topk)
    part_values = logits.new_empty(len(rows), num_parts, topk, dtype=torch.float32)
    part_tokens = logits.new_empty(len(rows), num_parts, topk, dtype=torch.int32)
    log_sums = logits.new_empty(len(rows), num_parts, dtype=torch.float32)
    values = logits.new_empty(num_reqs, width, topk, dtype=torch.float32)
    tokens = logits.new_empty(num_reqs, width, topk, dtype=torch.int64)
    _parts[(len(rows), num_parts)](
        rows, factors, noise if noise is not None else factors, part_values, part_tokens, log_sums,
        vocab_size, width, rows.stride(0), noise.stride(0) if noise is not None else 0, num_parts,
        TOPK=topk, BLOCK_K=block_k, CHUNK=chunk, NOISE=noise is not None, num_warps=8,
    )  # fmt: skip
    _whole[(len(rows),)](
        part_values, part_tokens, log_sums, values, tokens, num_parts,
        TOPK=topk, BLOCK_K=block_k, BLOCK_P=triton.next_power_of_2(num_parts),
        BLOCK_C=triton.next_power_of_2(num_parts * topk), num_warps=2,
    )  # fmt: skip
    return values, tokens


def reference(
    logits: torch.Tensor, factors: torch.Tensor, noise: torch.Tensor | None, num_children: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    ranking = logits.float() * factors[:, None, None]
    if noise is not None:
        ranking = ranking + noise[:, None]
    values, tokens = ranking.sort(dim=-1, descending=True, stable=True)
    return values[..., :num_children] - ranking.logsumexp(-1, keepdim=True), tokens[..., :num_children]
