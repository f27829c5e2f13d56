"""The only room that knows vLLM's worker and runner. Here: what any engine shares; v1/ is the one for vLLM's V1 model runner.

seams and support act at start-up; worker is what all workers share.
"""
