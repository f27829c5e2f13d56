#!/usr/bin/env bash
# Measure speed on a target of a realistic size: the shipped one, grown to 296 million parameters that compute the same function.
# Half an hour on two CPU cores. One OpenMP thread: beside the worker, vLLM's engine process keeps a core busy.
#
#     bash examples/08_bench.sh [FOLDER]
set -euo pipefail
FOLDER=${1:-bench}
PACKAGE=$(python -c "import pathlib, vllm_eagle; print(pathlib.Path(vllm_eagle.__file__).parent)")
[[ -d $FOLDER/target ]] || python -m vllm_eagle.bench.grow "$PACKAGE/pair/target" "$FOLDER/target"
vllm-eagle bench --model "$FOLDER/target" --head "$PACKAGE/pair/head" --threads 1 --out "$FOLDER/results" \
    --only vllm_chain3 fixed trees --concurrency 1 4 16 64 --rounds 5
