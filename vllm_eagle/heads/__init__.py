"""Draft heads as files: read the formats that heads come in, check them, write the one that vLLM loads. Imports no vLLM.

checkpoint  a folder with config.json and weights: read without running code, write as safetensors
formats     what a head is: EAGLE-1 or EAGLE-3, in which format, under vLLM's names for tensors and settings
check       what is wrong with a head, whether it fits a target, what is odd about it
convert     `vllm-eagle convert IN OUT`
inspect     `vllm-eagle inspect HEAD`
"""
