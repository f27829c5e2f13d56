"""The only files that know vLLM's worker and runner. Read in this order: worker, runner, scorer, proposer; seams and support at start-up."""
