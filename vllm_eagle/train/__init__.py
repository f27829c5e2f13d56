"""Train EAGLE heads: data/ in, head/ out; regenerate/ has the target write the data, run/ is one run of `vllm-eagle train`."""
