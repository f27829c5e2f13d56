"""Which engine a front end belongs to: the name under which its worker keeps counters (metrics/stats_file.py).

With `--api-server-count` above 1 every API server builds a configuration of its own, with an `instance_id` of its own. The engine
has that of the process which starts them all, and they inherit its environment.
"""

import os
from typing import Any

_STARTED = "EAGLE_TREES_INSTANCE"  # not VLLM_..: vLLM warns of variables of its own that it does not know


def remember(vllm_config: Any) -> None:
    """Tell the API servers that this process is going to start, if it is the one that starts several."""
    if vllm_config.parallel_config._api_process_count > 1 and vllm_config.parallel_config._api_process_rank == -1:
        os.environ[_STARTED] = vllm_config.instance_id


def instance_id(vllm_config: Any) -> str:
    """The engine's, in a process with this configuration."""
    own = str(vllm_config.instance_id)
    return os.environ.get(_STARTED, own) if vllm_config.parallel_config._api_process_count > 1 else own
