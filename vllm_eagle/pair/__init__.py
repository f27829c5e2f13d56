"""The models that ship with the project: a small Llama, an EAGLE-1 and an EAGLE-3 head for it, training text. See README.md.

real.py fetches a target that does not ship.
"""

from pathlib import Path

TARGET = Path(__file__).with_name("target")
HEAD = Path(__file__).with_name("head")
EAGLE3_HEAD = Path(__file__).with_name("eagle3")
REAL_HEAD = Path(__file__).with_name("real_head")  # for the target of real.py
REAL_EAGLE3_HEAD = Path(__file__).with_name("real_eagle3")
TRAINING_ANSWERS = Path(__file__).parents[1] / "prompts" / "gsm8k_answers.jsonl.gz"  # 1600 answers of the target, for a first try
