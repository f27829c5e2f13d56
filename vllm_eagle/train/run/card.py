"""The run card: everything needed to know what made a head, and to make it again."""

import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_eagle import files
from vllm_eagle.train.run.settings import TrainSettings

CARD = "run_card.json"
PACKAGES = ("vllm-eagle", "torch", "transformers", "accelerate", "vllm")


class RunCard:
    """Command, settings, data, versions, device, seconds and cost of one run; `run_card.json` in the head's folder."""

    def __init__(self, settings: TrainSettings, data_hash: str, data: dict[str, Any], facts: dict[str, Any], device: str):
        self._settings = settings
        self.facts = facts
        self._head = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": settings.as_dict(),
            "data_sha256": data_hash,
            "data": data,
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "device": f"{device} ({_device_name(device)})",
        }

    def write(self, out: Path, **result: Any) -> dict[str, Any]:
        """Write what is known so far."""
        card = self._head | {"facts": self.facts} | result
        files.write_text(out / CARD, json.dumps(card, indent=1) + "\n")
        return card

    def finish(self, out: Path, num_tokens: int, seconds: float) -> dict[str, Any]:
        """Write the card with tokens, seconds and cost."""
        hours = seconds / 3600 * self.facts["processes"]
        price = self._settings.price_per_hour
        cost = {"device_hours": round(hours, 4), "price": None if price is None else round(hours * price, 2)}
        result = {
            "tokens": num_tokens,
            "seconds": round(seconds, 1),
            "tokens_per_s": round(num_tokens / seconds) if seconds else None,
        }
        return self.write(out, result=result | {"cost": cost})


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
