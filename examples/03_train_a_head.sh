#!/usr/bin/env bash
# A head from scratch for the shipped target, measured and run in vLLM: a minute and a half on two CPU cores.
# With your own model: put its folder into TARGET and your dialogues (JSONL) into DATA.
#
#     bash examples/03_train_a_head.sh OUT
set -euo pipefail
OUT=${1:?name a new folder for the heads}
PACKAGE=$(python -c "import pathlib, vllm_eagle; print(pathlib.Path(vllm_eagle.__file__).parent)")
TARGET=${TARGET:-$PACKAGE/pair/target}
DATA=${DATA:-$PACKAGE/prompts/gsm8k_answers.jsonl.gz}

# Heads learn best from answers that the target wrote itself. The shipped ones are; for others:
#     vllm-eagle regenerate --target $TARGET --data questions.jsonl --out answers.jsonl   # or --self 2000 without questions
vllm-eagle train --target "$TARGET" --data "$DATA" --out "$OUT/head" --steps "${STEPS:-60}" --lr 2e-3
vllm-eagle inspect "$OUT/head" --target "$TARGET"
vllm-eagle eval --target "$TARGET" --head "$OUT/head" --limit 16 --out "$OUT/eval" # alpha, calibration, expected tau
vllm-eagle demo --model "$TARGET" --head "$OUT/head"                               # trees in vLLM, same tokens as without
