"""Draft trees in vLLM's V2 model runner: everything on the device, nothing waited for.

runner.py      one step: positions by depth, trees for attention, compaction, request options
slots.py       the trees, by the slot of their request
sampler.py     all nodes sampled, the walk
by_depth.py    the walk where parameters depend on the path
speculator.py  the head's first pass over accepted tokens, then levels, then the next trees
noise.py       the noise that vLLM's sampler will use
"""
