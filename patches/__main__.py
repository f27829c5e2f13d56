"""`python -m vllm_eagle.patches status|apply|revert`."""

import argparse
import sys

from vllm_eagle.patches import ledger


def main() -> int:
    """Run the command; status 2 if a patch fits no state of the installed file."""
    parser = argparse.ArgumentParser(prog="python -m vllm_eagle.patches", description="Seam patches for vLLM; all are optional.")
    parser.add_argument("command", choices=["status", "apply", "revert"])
    args = parser.parse_args()
    try:
        for patch in ledger.patches():
            done = ledger.state(patch) if args.command == "status" else ledger.change(patch, reverse=args.command == "revert")
            print(f"{patch.name}: {done}")
            if args.command == "status":
                print("".join(f"  {field}: {patch.header[field]}\n" for field in ledger.HEADER_FIELDS), end="")
    except ValueError as error:
        print(f"patches: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
