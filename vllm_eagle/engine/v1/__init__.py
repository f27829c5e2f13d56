"""vLLM's V1 model runner with draft trees. Read runner, proposer, scorer; planning and costs feed the budget."""
