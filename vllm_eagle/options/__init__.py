"""What users set, and how it becomes vLLM's own arguments: for an engine, on the command line, of one request, per device."""
