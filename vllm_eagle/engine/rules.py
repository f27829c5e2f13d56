"""Rules for what cannot run with draft trees: each looks at vLLM's configuration for one thing."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm.config import VllmConfig

from vllm_eagle.options import devices

PLAIN = "remove the draft-tree options to serve without trees"
Check = Callable[[VllmConfig], str | None]  # what is wrong, where it is set and the way out; None if all is well


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that cannot run with draft trees."""

    feature: str
    why: str
    check: Check


RULES: list[Rule] = []


def refused(feature: str, why: str) -> Callable[[Check], Check]:
    """Add a rule; the function tells whether a configuration breaks it."""

    def add(check: Check) -> Check:
        RULES.append(Rule(feature, why, check))
        return check

    return add


def on_cpu(config: VllmConfig) -> bool:
    """Elsewhere every layer says what it cannot do (`not_supported_reasons`)."""
    return config.device_config.device_type == "cpu"


def engine_of(config: VllmConfig) -> devices.Engine:
    """Ours on its device."""
    return devices.CUDA if config.device_config.device_type == "cuda" else devices.CPU
