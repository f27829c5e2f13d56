"""The results of `vllm-eagle bench` as Markdown and as a plot."""

import json
from pathlib import Path
from typing import Any


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
        "| requests | variant | first token, ms (p50, p99) | next token, ms (p50, p99) | between pieces, ms (p50, p99) "
        "| tokens/s of an answer | ratios of the rounds | identical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, column in result["concurrency"].items():
        for name, found in column.items():
            following = found["next_token_ms"]
            each = (found["first_token_ms"], following, found["gap_ms"])
            times = " | ".join("-" if x is None else f"{x['p50']:.1f}, {x['p99']:.1f}" for x in each)
            lines.append(
                f"| {number} | {name} | {times} | {1000 / max(following['p50'], 1e-3):.1f} | "
                f"{', '.join(f'{x:.2f}' for x in found['ratios'])} | {found['identical']} of {found['answers']} |"
            )
    return "\n".join(lines)


def write(result: dict[str, Any], folder: Path) -> None:
    """bench.json, bench.md and bench.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result) + "\n")
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items() if value is not None)
    memory = ", ".join(f"{name} {mebibytes}" for name, mebibytes in result["memory_mib"].items())
    (folder / "bench.md").write_text(
        f"{settings}; {result['cores']} cores; MiB: {memory}\n\n{table(result)}\n\n{details(result)}\n"
    )
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
