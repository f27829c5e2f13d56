"""Draft trees in vLLM's V2 model runner: everything on the device, nothing waited for. The engine of CUDA.

worker.py      hands vLLM the runner; checks, warm-up (warm_up.py), counters
runner.py      one step: positions by depth, trees for attention, compaction, request options
slots.py       the trees, by the slot of their request
sampler.py     all nodes sampled, the walk; rows.py: vLLM's sampler, asked row by row
by_depth.py    the walk where parameters depend on the path
speculator.py  the head's first pass over accepted tokens, then levels, then the next trees; noise.py: what sampling will use
backlog.py     what the head has not seen while nothing was drafted; catching_up.py: its passes over that
graphs.py      drafting as one CUDA graph
scheduler.py   how many drafts each request has in its next step; grammars.py: what may follow each node of a constrained request

late.py        copies and times that are looked at once they have arrived
counting.py    what steps came to, for metrics and page
budgeting.py   ... and for the budget, whose plan (drafts.py) goes through the scheduler; split.py: between requests, on the device
measuring.py   what passes cost, at start
"""
