"""What trees are and what is done with them, in tensors and numbers: knows nothing of vLLM, of files or of devices' own ways.

Read tree.py, then draft.py, verify.py, accept.py, compact.py; config.py says what can be asked of a tree.
"""
