"""What must hold after a soak test. Pure functions of what was seen; thresholds stand here with their reasons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import linear_regression, median

from vllm_eagle.bench.engines.server import Sample
from vllm_eagle.bench.soak.clients import BEHAVIOURS, Tally
from vllm_eagle.bench.soak.pool import KINDS

MIB = 1 << 20
# Thirds of fewer samples say nothing about a trend, nor do those of a run so short that it still meets its first large batches.
FEWEST_SAMPLES = 30
SHORTEST_TREND_S = 300.0
# Allowed growth of a process from the second to the last third of the run: what the largest batch so far needs grows until the end,
# more slowly all the time. A leak of one token's features (1.5 KiB) per generated token would pass this in a minute.
MOST_GROWTH_BYTES = 8 * MIB
MOST_GROWTH_SHARE = 0.01
# Files and threads at rest, compared with rest before the run: kept-alive connections and pools that start with their first use.
MOST_MORE_FDS = 16
MOST_MORE_THREADS = 16
# Tau at the end against tau at the start: a little less, and what the numbers of trees leave to chance. One tree's accepted tokens
# vary by less than TAU_DEVIATION; trees of one request are alike, which is why it is set high.
LEAST_TAU_SHARE = 0.95
TAU_DEVIATION = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the verdict. `passed` is None where it could not be checked."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run has shown."""

    tally: Tally
    before: Sample  # at rest, after warm-up
    samples: Sequence[Sample]  # under load
    after: Sample  # at rest
    log_errors: Sequence[str] | None  # None: there is no log
    comparable_kinds: frozenset[str]


def checks(seen: Seen) -> list[Check]:
    """All checks, in the order of the summary."""
    return [
        *_answers(seen),
        *_leaks(seen),
        *_processes(seen),
        _log(seen.log_errors),
        *_speculation(seen),
        _coverage(seen),
    ]


def failed(found: Sequence[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in found if check.passed is False]


def _answers(seen: Seen) -> Iterator[Check]:
    tally = seen.tally
    total = sum(tally.requests.values())
    yield Check("no unexpected error or status", tally.errors == 0, f"{tally.errors} in {total} requests")
    equal = sum(tally.equal.values())
    yield Check(
        "answers equal the reference",
        tally.mismatches == 0 and equal > 0,
        f"{equal} complete, {tally.equal_beginnings} broken off, {tally.mismatches} different",
    )
    yield Check("what must be refused is refused", tally.refused > 0, f"{tally.refused} with the right status")


def _leaks(seen: Seen) -> Iterator[Check]:
    metrics = seen.after.metrics
    running, waiting = metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]
    yield Check("no request left in the engine", running == waiting == 0, f"running {running:g}, waiting {waiting:g}")
    usage = metrics["vllm:kv_cache_usage_perc"]
    yield Check("no KV cache block in use", usage == 0, f"usage {usage:.2%}, cached prefixes count as free")


def _processes(seen: Seen) -> Iterator[Check]:
    names = set(seen.before.rss_bytes)
    if not names:
        for name in ("processes live on", "memory is flat", "open files and threads"):
            yield Check(name, None, "not our server; give its process with --pid")
        return
    gone = sorted(names - set(seen.after.rss_bytes))
    yield Check("processes live on", not gone, f"gone: {', '.join(gone)}" if gone else ", ".join(sorted(names)))
    yield memory(seen.samples)
    fds, threads = ((getattr(seen.before, name), getattr(seen.after, name)) for name in ("num_fds", "num_threads"))
    yield Check(
        "open files and threads",
        fds[1] - fds[0] <= MOST_MORE_FDS and threads[1] - threads[0] <= MOST_MORE_THREADS,
        f"at rest: files {fds[0]} -> {fds[1]} (at most +{MOST_MORE_FDS}), "
        f"threads {threads[0]} -> {threads[1]} (at most +{MOST_MORE_THREADS})",
    )


def memory(samples: Sequence[Sample]) -> Check:
    """Whether no process has grown from the second third of the samples to the last."""
    seconds = samples[-1].seconds - samples[0].seconds if samples else 0.0
    if len(samples) < FEWEST_SAMPLES or seconds < SHORTEST_TREND_S:
        needed = f"{FEWEST_SAMPLES} in {SHORTEST_TREND_S:.0f} s needed"
        return Check("memory is flat", None, f"{len(samples)} samples in {seconds:.0f} s, {needed}; run longer")
    third = len(samples) // 3
    parts, passed = [], True
    for name in samples[0].rss_bytes:
        found = [(sample.seconds, sample.rss_bytes[name]) for sample in samples if name in sample.rss_bytes]
        if len(found) < len(samples):
            continue  # ended meanwhile; another check
        middle, last = (median(rss for _, rss in found[i * third : (i + 1) * third or None]) for i in (1, 2))
        slope = linear_regression(*zip(*found[third:], strict=True)).slope * 60
        passed &= last - middle <= max(MOST_GROWTH_BYTES, MOST_GROWTH_SHARE * middle)
        parts.append(f"{name.split()[0]} {middle / MIB:.0f} -> {last / MIB:.0f} MiB ({slope / MIB:+.2f} MiB/min)")
    bound = f"at most +{MOST_GROWTH_BYTES // MIB} MiB or {MOST_GROWTH_SHARE:.0%}"
    return Check("memory is flat", passed, f"median of 2nd -> last third: {', '.join(parts)}; {bound}")


def _log(errors: Sequence[str] | None) -> Check:
    if errors is None:
        return Check("no error in the log", None, "not our server; give its log with --log")
    return Check("no error in the log", not errors, f"{len(errors)} lines" + (f", first: {errors[0]}" if errors else ""))


def tau(first: Sample, last: Sample) -> tuple[float, float]:
    """Mean tokens per verified tree between two samples, and the number of trees."""
    trees, accepted = (
        last.metrics.get(name, 0.0) - first.metrics.get(name, 0.0)
        for name in ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    )
    return (1 + accepted / trees if trees else 1.0), trees


def steady_tau(samples: Sequence[Sample]) -> Check:
    """Whether trees of the last third are as good as those of the first."""
    name = "tau does not decay"
    if len(samples) < 4:
        return Check(name, None, f"{len(samples)} samples, 4 needed; run longer")
    third = len(samples) // 3
    (start, many), (end, few) = tau(samples[0], samples[third]), tau(samples[-1 - third], samples[-1])
    if not many or not few:
        return Check(name, False, "no tree was verified in the first or the last third")
    least = LEAST_TAU_SHARE * start - 2 * TAU_DEVIATION * sqrt(1 / many + 1 / few)
    return Check(name, end >= least, f"first third {start:.2f}, last third {end:.2f} (at least {least:.2f})")


def _speculation(seen: Seen) -> Iterator[Check]:
    yield steady_tau(seen.samples)
    off = seen.after.metrics.get("vllm_eagle_speculation_off")
    if off is not None:
        yield Check("speculation is on", off == 0, f"vllm_eagle_speculation_off {off:g}")
    preempted = seen.after.metrics.get("vllm:num_preemptions_total", 0.0)
    yield Check("requests were preempted", preempted > 0, f"{preempted:g} times; a smaller KV cache makes more")


def _coverage(seen: Seen) -> Check:
    missing = [name for name in BEHAVIOURS if not seen.tally.requests[name]]
    missing += [kind for kind in KINDS if kind in seen.comparable_kinds and not seen.tally.equal[kind]]
    detail = f"never seen: {', '.join(missing)}" if missing else f"{len(KINDS)} kinds, {len(BEHAVIOURS)} behaviours"
    return Check("everything occurred", not missing, detail)
