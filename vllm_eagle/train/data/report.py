"""What was read from data files, and what was left out, by reason, with file and line."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eagle import files

NUM_SHOWN = 3  # findings per reason in the summary

# Reasons that keep the row; all others leave it out.
OVER_LONG = "over-long, cut"
REWRITTEN = "answer rewritten by the chat template, no loss on it"
PARTLY = "answer not all in the loss"
UNSHOWN = "tools that the chat template does not show"
CUT_ANSWER = "answer cut at --max-tokens"
_KEPT = {OVER_LONG, REWRITTEN, PARTLY, UNSHOWN, CUT_ANSWER}

OUTSIDE = "token outside the target's vocabulary"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row that was left out or changed."""

    file: str
    line: int  # from 1; in a .json array the number of the row
    reason: str
    detail: str


class DataReport:
    """Counts of what was read, and every finding. Readers add to it as they go."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_examples = 0
        self.num_tokens = 0
        self.num_loss_tokens = 0
        self.findings: list[Finding] = []
        self.dropped_turns: Counter[str] = Counter()  # questions of dialogues that were not asked, by reason

    @property
    def counts(self) -> dict[str, int]:
        """Findings by reason, the most frequent first."""
        return dict(Counter(finding.reason for finding in self.findings).most_common())

    def add(self, path: Path | str, line: int, reason: str, detail: str = "") -> None:
        """Record one finding."""
        self.findings.append(Finding(str(path), line, reason, detail))

    def summary(self) -> str:
        """A few lines: totals, then per reason the count and the first findings."""
        totals = (
            f"{self.num_rows} rows read: {self.num_examples} examples, {self.num_tokens} tokens, "
            f"{self.num_loss_tokens} of them in answers or plain text"
        )
        return "\n".join([totals, *self.complaints()])

    def complaints(self) -> list[str]:
        """One line per reason: its count and the first findings; then the turns that were dropped."""
        lines = []
        for reason, count in self.counts.items():
            shown = [finding for finding in self.findings if finding.reason == reason][:NUM_SHOWN]
            places = ", ".join(f"{f.file}:{f.line}" + (f" ({f.detail})" if f.detail else "") for f in shown)
            more = ", ..." if count > len(shown) else ""
            lines.append(f"  {'kept' if reason in _KEPT else 'left out'}: {count} x {reason}: {places}{more}")
        if dropped := +self.dropped_turns:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
            lines.append(f"  turns dropped: {dropped.total()} ({reasons})")
        return lines

    def write(self, path: Path) -> None:
        """Write every finding as one JSON line {"file", "line", "reason", "detail"}."""
        files.write_text(path, "".join(json.dumps(asdict(finding)) + "\n" for finding in self.findings))

    def as_dict(self) -> dict[str, Any]:
        """Totals and counts by reason, for JSON."""
        return {
            "num_rows": self.num_rows,
            "num_examples": self.num_examples,
            "num_tokens": self.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "counts": self.counts,
        }
