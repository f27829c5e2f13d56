"""Draft heads as files: read the formats that heads come in, check them, write the one that vLLM loads. Imports no vLLM.

checkpoint  a folder with config.json and weights: read without running code, write as safetensors
formats     what a head is: EAGLE-1 or EAGLE-3, in which format, under vLLM's names for tensors and settings
target      what a head must know of its target
check       what is wrong with a head, whether it fits a target, what is odd about it
form        the form in which vLLM builds exactly this head
reading     where vLLM would read the folder as something else
window      how many of the newest tokens it attends to
judge       the one judgement that follows from these: fits, fits after convert, or does not fit
served      the folder that vLLM gets: the head's own, or a converted copy in a cache
convert     `vllm-eagle convert IN OUT`
inspect     `vllm-eagle inspect HEAD`
"""
