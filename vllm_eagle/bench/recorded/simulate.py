"""`vllm-eagle simulate`: what the budget would do, and win, on hardware that is not here, from 1 to thousands of requests.

The budget is the real one. Trees, and how far each was accepted, are replayed from a recording; what passes cost comes from
a file of measured points or from a roofline. Not simulated: prompts, sampling, what lies between passes, limits of memory.

Recording: `python -m vllm_eagle.bench.recorded.record`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_eagle.algorithm.tree import node_depths
from vllm_eagle.budget.budget import Budget, Plan
from vllm_eagle.budget.cost_curve import CostCurve

RECORDED = Path(__file__).parents[1] / "results" / "trees.json"
_STEPS, _FEWEST_STEPS, _TREES = 1400, 80, 40_000  # steps of a run, and trees, which make runs of many requests shorter
_LENGTH = 256  # of an answer, in tokens
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of fixed trees


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A drafted tree and what became of it. Nodes without the root, most confident first."""

    scores: np.ndarray  # [num_nodes] float
    depths: np.ndarray  # [num_nodes] int, from 1
    parent_scores: np.ndarray  # [num_nodes] float, 0 of the root
    is_inner: np.ndarray  # [num_nodes] bool, has children: the head ran over it
    path: np.ndarray  # [num_accepted] int, places of accepted nodes, going down

    def rows(self, depth: int) -> np.ndarray:
        """What the head runs over after the root, to draft so many levels in full: [depth - 1] int."""
        return np.bincount(self.depths[self.is_inner], minlength=depth)[1:depth]

    def drafted(self, depth: int, plan: Plan) -> np.ndarray:
        """Places of the nodes that are drafted in so many levels."""
        expanded = (self.parent_scores > plan.node_floor) | (self.depths == 1)
        return np.flatnonzero((self.depths <= depth) & expanded)

    def hopeful(self, depth: int, plan: Plan) -> np.ndarray:
        """Which nodes of some depth could be expanded: [num_nodes] bool."""
        return (self.depths == depth) & (self.scores > plan.node_floor)

    def accepted(self, num_nodes: int, depth: int) -> int:
        """How many tokens the first nodes, down to some depth, would have yielded beside the bonus token."""
        return int((self.path[:depth] < num_nodes).sum())


def read(path: Path) -> list[Recorded]:
    """Trees from a file of `record`.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        trees = json.loads(path.read_text())["trees"]
        return [_recorded(tree["parents"], tree["scores"], tree["path"]) for tree in trees]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--trees {path}: is no recording of trees ({error!r}); make one with vllm_eagle.bench.recorded.record"
        ) from None


def _recorded(parents: list[int], scores: list[float], path: list[int]) -> Recorded:
    depths, above = node_depths(np.array([parents]))[0], np.array(parents[1:])
    is_inner = np.isin(np.arange(1, len(parents)), above)
    return Recorded(np.array(scores[1:]), depths[1:], np.array(scores)[above], is_inner, np.array(path, np.int64) - 1)


def roofline(
    weight_bytes: float, flops_per_token: float, bandwidth: float, flops: float, overhead_s: float, most: int
) -> CostCurve:
    """A pass reads all weights once and computes each token: whatever takes longer, and an overhead."""
    tokens = [2**i for i in range(int(most).bit_length() + 1)]
    return CostCurve(tokens, [overhead_s + max(weight_bytes / bandwidth, n * flops_per_token / flops) for n in tokens])


def _walked(most: int, goes_on: float, generator: np.random.Generator) -> int:
    stops = generator.random(most) >= goes_on
    return int(stops.argmax()) if stops.any() else most


def with_budget(
    trees: Sequence[Recorded],
    target: CostCurve,
    head: CostCurve,
    num_requests: int | Sequence[int],
    num_draft_tokens: int,
    depth_limit: int,
    hidden_s: float = 0.0,
    hidden_tree_s: float = 0.0,
    noise: float = 0.0,
    goes_on: Sequence[float] | None = None,
    slowness: Sequence[float] | None = None,
) -> dict[str, float]:
    """Tokens per second, nodes per request and levels, after the budget has learned.

    Args:
        trees: what is drafted, and what becomes of it.
        target: seconds of its passes; the budget knows them.
        head: likewise.
        num_requests: in every step, or step by step; the second half counts.
        num_draft_tokens: most nodes of a request.
        depth_limit: most levels.
        hidden_s: what a pass with drafts takes besides; the budget has to find out.
        hidden_tree_s: and for each tree in it.
        noise: standard deviation of the logarithm of what passes take, as the budget sees it.
        goes_on: probability, step by step, that a walk does where the recorded one did; None: always.
        slowness: how many times as long everything takes, step by step, as the budget sees it; None: once.
    """
    # Its own curves: it corrects them.
    budget = Budget(_copy(target), _copy(head), num_draft_tokens, depth_limit)
    if isinstance(num_requests, int):
        num_requests = [num_requests] * max(_FEWEST_STEPS, min(_STEPS, _TREES // num_requests))
    steps, most = len(num_requests), max(num_requests)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(trees))
    # Of each request: tokens so far, which end at some length, and tokens that the head has not seen.
    lengths, missed = generator.integers(_LENGTH, size=most), np.zeros(most, np.int64)
    tokens = seconds = nodes = levels = 0.0
    for step, number in enumerate(num_requests):
        if step == steps // 2:
            tokens = seconds = nodes = levels = 0.0
        plan = budget.plan(number)
        missed[:number] += 1
        by_missed = np.argsort(missed[:number], kind="stable")
        drafting = by_missed[missed[by_missed] <= plan.most_missed][: plan.most_requests] if plan.depth else by_missed[:0]
        drawn = [trees[order[(step * number + i) % len(trees)]] for i in drafting]
        kept, drafting_s, emitted = [0] * len(drawn), 0.0, np.zeros(most, np.int64)
        emitted[:number] = 1
        seen_s = (generator.lognormal(sigma=noise) if noise else 1.0) * (1.0 if slowness is None else slowness[step])
        if drawn:
            rows: list[int] = []
            while 1 + len(rows) < plan.depth:
                hopeful = [tree.hopeful(1 + len(rows), plan) for tree in drawn]
                if not budget.pays(plan, np.concatenate([tree.scores[nodes] for tree, nodes in zip(drawn, hopeful, strict=True)])):
                    break
                rows.append(sum(int(tree.is_inner[nodes].sum()) for tree, nodes in zip(drawn, hopeful, strict=True)))
            levels += 1 + len(rows)
            first_rows = int(missed[drafting].sum())
            missed[drafting] = 0
            first_s, levels_s = float(head(np.array(first_rows))), float(head(np.array(rows)).sum()) if rows else 0.0
            budget.costs.saw_drafting(first_s * seen_s, first_rows, levels_s * seen_s, len(drawn), rows, plan.depth)
            chosen = [tree.drafted(1 + len(rows), plan)[:num_draft_tokens] for tree in drawn]
            scores, depths = (
                [of[places] for of, places in zip(each, chosen, strict=True)]
                for each in ([tree.scores for tree in drawn], [tree.depths for tree in drawn])
            )
            kept = budget.keep(scores, depths, plan.depth, number)
            drafting_s = first_s + levels_s
            for request, tree, places, count in zip(drafting, drawn, chosen, kept, strict=True):
                path = tree.path if goes_on is None else tree.path[: _walked(len(tree.path), goes_on[step], generator)]
                accepted = np.isin(places[:count], path)
                emitted[request] += accepted.sum()
                budget.calibration.update(tree.scores[places[:count]], accepted)
        missed[:number] += emitted[:number] - 1
        lengths += emitted
        ended = lengths >= _LENGTH  # others take their places, and the head sees their prompts at once
        lengths[ended], missed[ended] = 0, 0
        pass_s = float(target(np.array(number + sum(kept))))
        if sum(kept):
            pass_s += hidden_s + hidden_tree_s * np.count_nonzero(kept)
        budget.saw_pass(pass_s * seen_s, number + sum(kept), int(np.count_nonzero(kept)))
        tokens += emitted.sum()
        seconds += drafting_s + pass_s
        nodes += sum(kept) / number
    measured = steps - steps // 2
    return {"tokens_per_s": tokens / seconds, "nodes": nodes / measured, "levels": levels / measured}


def best_fixed(
    trees: Sequence[Recorded], target: CostCurve, head: CostCurve, num_requests: int, num_draft_tokens: int, depth_limit: int
) -> dict[str, float]:
    """The fastest tree of one size and depth for all requests and steps."""
    found = {"tokens_per_s": num_requests / float(target(np.array(num_requests))), "nodes": 0.0, "levels": 0.0}
    for depth in range(1, depth_limit + 1):
        mean_rows = np.array(_rows(trees, depth)) * num_requests / len(trees)
        drafting_s = float(head(np.array([num_requests, *mean_rows])).sum())
        for size in (size for size in _SIZES if size <= num_draft_tokens):
            accepted = np.mean(
                [tree.accepted(int(np.searchsorted((tree.depths <= depth).cumsum(), size)) + 1, depth) for tree in trees]
            )
            seconds = float(target(np.array(num_requests * (1 + size)))) + drafting_s
            rate = num_requests * (1 + float(accepted)) / seconds
            if rate > found["tokens_per_s"]:
                found = {"tokens_per_s": rate, "nodes": float(size), "levels": float(depth)}
    return found


def _rows(trees: Sequence[Recorded], depth: int) -> list[int]:
    """What the head runs over after the committed tokens, to draft so many levels of all trees."""
    return np.sum([tree.rows(depth) for tree in trees], axis=0).tolist()


def _copy(curve: CostCurve) -> CostCurve:
    tokens, seconds = zip(*curve.points, strict=True)
    return CostCurve(tokens, seconds)


def simulate(
    trees: Sequence[Recorded], target: CostCurve, head: CostCurve, numbers: Sequence[int], num_draft_tokens: int, depth_limit: int
) -> dict[str, Any]:
    """Plain decoding, the best fixed tree and the budget, by number of requests."""
    result = {}
    for number in numbers:
        plain = number / float(target(np.array(number)))
        variants = {
            name: function(trees, target, head, number, num_draft_tokens, depth_limit)
            for name, function in (("best_fixed", best_fixed), ("budget", with_budget))
        }
        result[str(number)] = {"plain": {"tokens_per_s": plain}} | variants
        for variant in result[str(number)].values():
            variant["ratio"] = variant["tokens_per_s"] / plain
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| requests | plain, tokens/s | best fixed tree | budget | nodes per request | levels |", "|---" * 6 + "|"]
    for number, found in result.items():
        budget, fixed = found["budget"], found["best_fixed"]
        lines.append(
            f"| {number} | {found['plain']['tokens_per_s']:.0f} | {fixed['ratio']:.2f}x ({fixed['nodes']:.0f} nodes) "
            f"| {budget['ratio']:.2f}x | {budget['nodes']:.1f} | {budget['levels']:.1f} |"
        )
    return "\n".join(lines)


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    numbers = [int(number) for number in result]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in (("best_fixed", "o--"), ("budget", "o-")):
        axes.plot(numbers, [found[name]["ratio"] for found in result.values()], style, label=name.replace("_", " ") + " tree")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="requests at once", ylabel="tokens per second, times plain decoding", ylim=(0, None))
    axes.set_xticks(numbers, result.keys(), fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-eagle simulate`; the defaults are an 8B model in bfloat16 on an H100."""
    parser.add_argument("--curve", type=Path, help='JSON {"target": [[tokens, seconds], ...], "head": ...} instead of a roofline')
    parser.add_argument("--parameters", type=float, default=8e9, help="of the target (default %(default)g)")
    parser.add_argument("--bytes-per-parameter", type=float, default=2.0)
    parser.add_argument("--head-share", type=float, default=0.1, help="of the target's cost (default %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second (default %(default)g)")
    parser.add_argument("--flops", type=float, default=4e14, help="that matrix products reach (default %(default)g)")
    parser.add_argument("--overhead", type=float, default=1e-3, help="seconds of a target pass beside (default %(default)g)")
    parser.add_argument("--head-overhead", type=float, default=3e-4, help="seconds of a level beside (default %(default)g)")
    parser.add_argument("--trees", type=Path, default=RECORDED, help="recorded trees (default: of the shipped pair)")
    parser.add_argument("--requests", type=int, nargs="+", default=[4**i for i in range(7)], help="at once (default %(default)s)")
    parser.add_argument(
        "--num-draft-tokens", type=int, default=64, help="most nodes per tree, of those recorded (default %(default)s)"
    )
    parser.add_argument("--max-depth", type=int, default=8, help="most levels (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for simulation.json, simulation.md and simulation.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate, print a table and, last, one JSON line."""
    numbers = (args.parameters, args.bytes_per_parameter, args.head_share, args.bandwidth, args.flops, *args.requests)
    if min(*numbers, args.num_draft_tokens, args.max_depth) <= 0 or min(args.overhead, args.head_overhead) < 0:
        raise ValueError("all numbers must be positive, overheads at least 0")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is no folder; name another one")
    trees = read(args.trees)
    recorded = max((len(tree.scores) for tree in trees), default=0)
    if args.num_draft_tokens > recorded:
        raise ValueError(
            f"--num-draft-tokens {args.num_draft_tokens}: the trees of {args.trees} have {recorded} nodes, and what more would "
            f"bring is not known; use at most {recorded}, or --trees with a recording of larger ones "
            f"(python -m vllm_eagle.bench.recorded.record --num-nodes {args.num_draft_tokens} OUT)"
        )
    most = max(args.requests) * (1 + args.num_draft_tokens)
    if args.curve is not None:
        target, head = _curves(args.curve)
    else:
        weights, work = args.parameters * args.bytes_per_parameter, 2 * args.parameters
        target = roofline(weights, work, args.bandwidth, args.flops, args.overhead, most)
        share = args.head_share
        head = roofline(share * weights, share * work, args.bandwidth, args.flops, args.head_overhead, most)
    found = simulate(trees, target, head, args.requests, args.num_draft_tokens, args.max_depth)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "run"}
    result = {"requests": found, "settings": settings, "curves": {"target": target.points, "head": head.points}}
    print(table(found))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "simulation.json").write_text(json.dumps(result) + "\n")
        (args.out / "simulation.md").write_text(table(found) + "\n")
        _draw(found, args.out / "simulation.png")
    print(json.dumps(result))
    return 0


def _curves(path: Path) -> tuple[CostCurve, CostCurve]:
    try:
        points = json.loads(path.read_text())
        target, head = (CostCurve(*zip(*points[name], strict=True)) for name in ("target", "head"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--curve {path}: {error!r}") from None
    return target, head
