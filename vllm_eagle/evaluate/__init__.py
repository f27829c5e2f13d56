"""`vllm-eagle eval`: how good a head is, without starting vLLM.

Read in this order: texts (the target writes the answers), accuracy (alpha per depth), simulate (trees drafted and walked along
those answers), measured (both, of one kind of prompts or of all), calibration (confidence against acceptance), command (table,
JSON, picture).
"""
