"""What a head must know of its target, from the target's config.json and the headers of its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_eagle.heads import checkpoint

EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight", "model.language_model.embed_tokens.weight")
LM_HEADS = ("lm_head.weight", "model.lm_head.weight")
# Embeddings of models that vLLM builds in another way than Llama: it cannot share them with a head.
_ELSEWHERE = (
    "wte.weight",
    "word_embeddings.weight",
    "decoder.embed_tokens.weight",
    "model.tok_embeddings.weight",
    "embed_in.weight",
)
_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")


@dataclass(frozen=True, slots=True)
class Target:
    """Sizes of a target, and where its weights are."""

    path: Path
    architectures: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_positions: int | None

    @classmethod
    def read(cls, folder: Path) -> "Target":
        """Read a target's config.json.

        Raises:
            ValueError: no such folder, or its config lacks a size.
        """
        config = checkpoint.read_config(folder)
        settings = config.get("text_config", config)  # multimodal models keep the language model's settings there
        missing = [name for name in _SIZES if not isinstance(settings.get(name), int)]
        if missing:
            raise ValueError(
                f"--target {folder}: config.json lacks {', '.join(missing)}; EAGLE heads are for decoders laid out like Llama"
            )
        return cls(
            path=folder,
            architectures=tuple(config.get("architectures") or ()),
            hidden_size=settings["hidden_size"],
            vocab_size=settings["vocab_size"],
            num_layers=settings["num_hidden_layers"],
            max_positions=settings.get("max_position_embeddings"),
        )

    @property
    def default_aux_layers(self) -> tuple[int, int, int]:
        """The layers that EAGLE-3's authors, and vLLM, read if none are named."""
        return (2, self.num_layers // 2, self.num_layers - 3)

    def problems(self) -> list[str]:
        """Why no head can draft for it, as the names of its weights show; empty if they are not here."""
        if not checkpoint.has_weights(self.path):
            return []
        names = checkpoint.tensor_names(self.path)
        elsewhere = sorted(name for name in names if name.endswith(_ELSEWHERE))
        if not elsewhere or not names.isdisjoint(EMBEDDINGS):
            return []
        return [
            f"the target has its embedding in {elsewhere[0]}, where no head finds it; EAGLE heads are for decoders laid out "
            "like Llama, with model.embed_tokens"
        ]

    def tensor(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """One of the target's weights, under the first of these names that it has."""
        if not checkpoint.has_weights(self.path):
            return None
        found = checkpoint.read_tensors(self.path, only=names)
        return next((found[name] for name in names if name in found), None)

    def lm_head(self) -> torch.Tensor | None:
        """[vocab, hidden], or None; the embedding stands in where the two are tied."""
        found = self.tensor(LM_HEADS)
        return self.tensor(EMBEDDINGS) if found is None else found
