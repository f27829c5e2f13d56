"""What differs between two vLLMs where we hook in: `python -m tests.seams [OTHER_PYTHON]`, `python -m tests.seams --record`.

With OTHER_PYTHON (of an environment that has another vLLM; `tests.overlay` makes one) this environment's vLLM is compared with
that one's, without it with what was recorded when its version was tested. --record does that: run it when all tests passed.
For developers: CI does not run it.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

Fingerprints = dict[str, tuple[str, str, str]]  # symbol -> parameters, hash of the body, our file
ROOT = Path(__file__).parents[1]


def main() -> int:
    """Print the table of differences, or record."""
    parser = argparse.ArgumentParser(prog="python -m tests.seams", description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="Python of the environment to compare with")
    parser.add_argument("--record", action="store_true", help="write this vLLM's bodies to vllm_eagle/engine/seams.json")
    parser.add_argument("--json", action="store_true", help="print this vLLM's fingerprints only")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    from vllm_eagle.engine import seams

    here = all_fingerprints()
    if args.json:
        print(json.dumps([vllm.__version__, here]))
    elif args.record:
        version = seams.known_version()
        if version is None:
            print(f"seams: {vllm.__version__} is not in TESTED_VERSIONS of {seams.__file__}; add it first", file=sys.stderr)
            return 1
        recorded = json.loads(seams.BODIES.read_text())
        recorded[version] = {symbol: body for symbol, (_, body, _) in sorted(here.items())}
        seams.BODIES.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    elif args.other:
        command = [str(args.other), "-m", "tests.seams", "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"seams: {' '.join(command)} failed: {(done.stderr.splitlines() or ['no message'])[-1]}", file=sys.stderr)
            return 1
        other, there = json.loads(done.stdout.splitlines()[-1])
        print_table(other, {symbol: tuple(found) for symbol, found in there.items()}, vllm.__version__, here)
    else:
        print("\n".join([*seams.changed_seams(), *seams.changed_bodies()]) or "as tested")
    return 0


def all_fingerprints() -> Fingerprints:
    """Of the front end, of CPU and, if its modules can be imported, CUDA."""
    from vllm_eagle.engine import cuda_seams, seams

    cuda = [*cuda_seams.of_attention(), *cuda_seams.of_the_runner()] if find_spec("triton") else []
    return seams.fingerprints([*seams._seams(), *seams._serving_seams(), *cuda])


def print_table(old_version: str, old: Fingerprints, new_version: str, new: Fingerprints) -> None:
    """Symbols that differ, with what differs."""
    print(f"| {old_version} -> {new_version} | signature | body | our file |\n|---|---|---|---|")
    differ = [symbol for symbol in new if old.get(symbol) != new[symbol]]
    for symbol in differ:
        (before, old_body, _), (after, body, file) = old.get(symbol, ("gone", "", "")), new[symbol]
        signature = "same" if before == after else f"`{before}` -> `{after}`"
        print(f"| {symbol} | {signature} | {'same' if old_body == body else 'changed'} | {file} |")
    print(f"\n{len(new) - len(differ)} of {len(new)} symbols are the same.")


if __name__ == "__main__":
    sys.exit(main())
