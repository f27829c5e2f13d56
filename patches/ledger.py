"""Read, apply and revert the seam patches in this folder. Each is one .patch file with a header of five lines."""

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER_FIELDS = ("Why", "Seam", "Without it", "Upstream", "Remove when")
MAX_CHANGED_LINES = 60


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch file."""

    path: Path
    header: dict[str, str]
    diff: str

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.path.stem

    @property
    def num_changed_lines(self) -> int:
        """Lines added and removed."""
        lines = self.diff.splitlines()
        return sum(line[:1] in "+-" and not line.startswith(("+++", "---")) for line in lines if line)


def read(path: Path) -> Patch:
    """Parse a patch file.

    Raises:
        ValueError: a header field is missing or the diff is empty.
    """
    head, _, diff = path.read_text(encoding="utf-8").partition("\n\n")
    header = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    missing = [field for field in HEADER_FIELDS if field not in header]
    if missing or "@@" not in diff:
        raise ValueError(f"{path}: {'header lacks ' + ', '.join(missing) if missing else 'no diff'}; see patches/README.md")
    return Patch(path, header, diff)


def patches() -> Iterator[Patch]:
    """All patches, by name."""
    for path in sorted(Path(__file__).parent.glob("*.patch")):
        yield read(path)


def site_packages() -> Path:
    """The folder that holds the installed vllm package.

    Raises:
        ValueError: vLLM is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ValueError("vLLM is not installed; run: python -m vllm_eagle.bootstrap")
    return Path(spec.origin).parents[1]


def _git_apply(patch: Patch, *options: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("git") is None:
        raise ValueError("git is not in PATH, and patches are applied with it; install git")
    root = site_packages()
    # A repository around site-packages must not redirect or filter the paths.
    command = ["git", "-c", "core.autocrlf=false", "apply", "--unsafe-paths", f"--directory={root}", *options, "-"]
    return subprocess.run(command, input=patch.diff, text=True, capture_output=True, cwd="/", check=False)


def state(patch: Patch) -> str:
    """ "applied", "not applied", or "does not fit this vLLM".

    Raises:
        ValueError: there is no git to ask.
    """
    if _git_apply(patch, "--check", "--reverse").returncode == 0:
        return "applied"
    return "not applied" if _git_apply(patch, "--check").returncode == 0 else "does not fit this vLLM"


def change(patch: Patch, *, reverse: bool) -> str:
    """Apply or revert one patch; does nothing if that is its state already.

    Raises:
        ValueError: the installed file is in neither state, or there is no git; nothing was changed.
    """
    wanted, opposite = ("not applied", "applied") if reverse else ("applied", "not applied")
    before = state(patch)
    if before == wanted:
        return f"was {wanted} already"
    if before != opposite:
        raise ValueError(f"patch {patch.name} {before}; the installed file was left as it is")
    done = _git_apply(patch, *(["--reverse"] if reverse else []))
    if done.returncode != 0:
        raise ValueError(f"patch {patch.name}: {done.stderr.strip()}")
    return wanted


def table() -> str:
    """The patches as a Markdown table, for patches/README.md."""
    lines = ["| patch | " + " | ".join(field.lower() for field in HEADER_FIELDS) + " |", "|---" * 6 + "|"]
    lines += [f"| {p.name} | " + " | ".join(p.header[field] for field in HEADER_FIELDS) + " |" for p in patches()]
    return "\n".join(lines)
