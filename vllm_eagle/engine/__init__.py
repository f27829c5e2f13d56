"""The only files that know vLLM's worker and runner. Read worker, runner, scorer, proposer; seams and support act at start-up."""
