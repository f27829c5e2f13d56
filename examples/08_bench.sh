#!/usr/bin/env bash
# Measure speed on a target of a realistic size: the shipped one, grown to 296 million parameters that compute the same function.
# On two CPU cores half an hour with fast bfloat16, hours without. What vllm_eagle/bench/README.md shows was measured with further
# options, which stand there.
#
#     bash examples/08_bench.sh [FOLDER]
set -euo pipefail
FOLDER=${1:-bench}
PACKAGE=$(python -c "import pathlib, vllm_eagle; print(pathlib.Path(vllm_eagle.__file__).parent)")
[[ -d $FOLDER/target ]] || python -m vllm_eagle.bench.speed.grow "$PACKAGE/pair/target" "$FOLDER/target"
vllm-eagle bench --model "$FOLDER/target" --head "$PACKAGE/pair/head" --threads 2 --out "$FOLDER/results" \
    --only vllm_chain3 fixed trees --concurrency 1 4 16 64 --rounds 5
