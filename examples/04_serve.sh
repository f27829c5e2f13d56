#!/usr/bin/env bash
# The OpenAI server with draft trees: started, asked and stopped. Under a minute on two CPU cores.
#
#     bash examples/04_serve.sh [PORT [OPTION ...]]        # options go to `vllm serve`
#
# With KEEP=1 it stays up until Ctrl-C, for the examples 05 to 07. Your own pair: MODEL=... HEAD=... bash examples/04_serve.sh
# With REAL=1 the target is SmolLM2-135M-Instruct, whose first use downloads 93 MB, with our head for it.
set -euo pipefail
PORT=${1:-8000}
shift || true
PACKAGE=$(python -c "import pathlib, vllm_eagle; print(pathlib.Path(vllm_eagle.__file__).parent)")
if [[ -n ${REAL:-} ]]; then
    [[ -z ${MODEL:-} ]] || { echo "REAL=1 names the model; remove it, or MODEL" >&2; exit 2; }
    MODEL=$(vllm-eagle real-target)
    HEAD=${HEAD:-$PACKAGE/pair/real_head}
fi
MODEL=${MODEL:-$PACKAGE/pair/target}
HEAD=${HEAD:-$PACKAGE/pair/head}
LOG=$(mktemp)

OPTIONS=(
    --speculative-model "$HEAD" --num-speculative-tokens 16           # draft trees of 16 nodes; all else is vLLM's own
    --no-speculative-tree-budget                                      # always: trees hardly pay for a model as small as the shipped one
    --served-model-name demo --host 127.0.0.1 --port "$PORT" --max-model-len 1024
    --dtype float32 --enforce-eager --kv-cache-memory-bytes 268435456 # for a small model on a CPU
    # Compact JSON only: left the choice, a model this small writes whitespace until its tokens are used up.
    --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
)
vllm serve "$MODEL" "${OPTIONS[@]}" "$@" >"$LOG" 2>&1 &
SERVER=$!
trap 'kill $SERVER 2>/dev/null || true; wait $SERVER || true' EXIT

echo "starting on port $PORT, log in $LOG ..."
until curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/health"; do
    kill -0 $SERVER 2>/dev/null || { tail -n 30 "$LOG"; exit 1; }
    sleep 1
done

echo "--- an answer"
curl --silent --fail "http://127.0.0.1:$PORT/v1/chat/completions" -H "Content-Type: application/json" -d '{
    "model": "demo", "temperature": 0, "max_tokens": 120,
    "messages": [{"role": "user", "content": "A baker makes 24 rolls an hour. How many rolls does she make in 5 hours?"}]
}' | python -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'

echo "--- the same, streamed: several tokens an event"
curl --silent --fail --no-buffer "http://127.0.0.1:$PORT/v1/completions" -H "Content-Type: application/json" -d '{
    "model": "demo", "temperature": 0, "max_tokens": 20, "stream": true, "prompt": "She makes 24 rolls an hour, so"
}' | sed -n 's/.*"text":\("[^"]*"\).*/\1/p'

echo "--- target passes that verified a tree, drafted and accepted tokens"
curl --silent --fail "http://127.0.0.1:$PORT/metrics" | grep -E '^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total'

if [[ -n ${KEEP:-} ]]; then
    echo "--- serving at http://127.0.0.1:$PORT/v1; Ctrl-C stops it"
    wait $SERVER
fi
