"""The results of `vllm-eagle bench` as Markdown and as a plot."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUILT_IN = "built in"  # prompts


def table(result: dict[str, Any]) -> str:
    """One row per variant, one column per number of requests: tokens per second, times plain vLLM's, tau."""
    columns = result["concurrency"]
    names = list(next(iter(columns.values())))
    lines = ["| requests at once | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [f"{x['tokens_per_s']:.1f} ({x['ratio']:.2f}x, tau {x['tau']:.2f})" for x in (c[name] for c in columns.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(result: dict[str, Any]) -> str:
    """Latencies, speed of one answer, spread and identical answers."""
    lines = [
        "| requests | variant | first token, ms (p50, p99) | per token of an answer, ms (p50, p99 of the answers' means) "
        "| between outputs, ms (p50, p99) | tokens/s of an answer | ratios of the rounds | identical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, column in result["concurrency"].items():
        for name, found in column.items():
            each = (found["first_token_ms"], found["next_token_ms"], found["gap_ms"])
            times = " | ".join("-" if x is None else f"{x['p50']:.1f}, {x['p99']:.1f}" for x in each)
            lines.append(
                f"| {number} | {name} | {times} | {found['answer_tokens_per_s']:.1f} | "
                f"{', '.join(f'{x:.2f}' for x in found['ratios'])} | {found['identical']} of {found['answers']} |"
            )
    return "\n".join(lines)


def differences(result: dict[str, Any]) -> list[str]:
    """One line per variant some of whose answers are not plain vLLM's."""
    lines = []
    for name, found in _by_variant(result):
        differing, answers = (sum(number) for number in zip(*found, strict=True))
        if differing:
            judged = "FAIL: greedy answers in float32 must not" if _must_be_identical(name, result) else "no failure here"
            lines.append(f"{name}: {differing} of {answers} answers differ from plain vLLM's ({judged})")
    return lines


def is_wrong(result: dict[str, Any]) -> bool:
    """Whether answers differ that must not."""
    found = _by_variant(result)
    return any(_must_be_identical(name, result) and any(differing for differing, _ in each) for name, each in found)


def _by_variant(result: dict[str, Any]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Differing answers and all answers, by number of requests at once."""
    columns = list(result["concurrency"].values())
    for name in columns[0]:
        yield name, [(column[name]["answers"] - column[name]["identical"], column[name]["answers"]) for column in columns]


def _must_be_identical(name: str, result: dict[str, Any]) -> bool:
    """Ours, greedy and in float32: coarser types round by the shape of a batch; vLLM's own sides are not ours to judge."""
    settings = result["settings"]
    return not name.startswith("vllm_") and settings["dtype"] == "float32" and settings["temperature"] == 0


def conditions(result: dict[str, Any]) -> str:
    """Machine, versions and the command: what a number means nothing without."""
    settings = result["settings"]
    unsaid = {"prefix_caching"} | ({"prompts"} if settings["prompts"] == BUILT_IN else set())
    unsaid |= {"model", "head"} if settings["replay"] else set()
    options = [_option(name, value) for name, value in settings.items() if name not in unsaid]
    memory = [("Host memory", result["host_mib"]), ("GPU memory, KV cache included", result["device_mib"])]
    return "\n".join(
        [
            f"- Machine: {result['machine']}, {result['cores']} cores",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- dtype: {settings['dtype']}",
            f"- Options of `vllm-eagle bench`: `{' '.join(filter(None, options))}`",
            f"- Prefix caching: {'on' if settings['prefix_caching'] else 'off, for all alike'}",
            *([f"- {result['note']}"] if result["note"] else []),
            *(f"- {what}, MiB: {', '.join(f'{n} {mib}' for n, mib in found.items())}" for what, found in memory if found),
        ]
    )


def _option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return ""
    if value is True:
        return option
    return f"{option} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def write(result: dict[str, Any], folder: Path) -> None:
    """bench.json, bench.md and bench.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result) + "\n")
    found = [conditions(result), table(result), details(result), *differences(result)]
    (folder / "bench.md").write_text("\n\n".join(found) + "\n")
    _draw(result, folder / "bench.png")


def _draw(result: dict[str, Any], path: Path) -> None:
    """Tokens per second as a multiple of plain vLLM's, by requests at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = result["concurrency"]
    numbers = [int(number) for number in columns]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in next(iter(columns.values())):
        axes.plot(numbers, [column[name]["ratio"] for column in columns.values()], marker="o", label=name)
    axes.set(xscale="log", xlabel="requests at once", ylabel="output tokens per second, times plain vLLM", ylim=(0, None))
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
