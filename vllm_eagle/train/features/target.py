"""The frozen target: loads a decoder with transformers and reads the features that heads learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_eagle.train.features.finish import Finish

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")


@dataclass(frozen=True, slots=True)
class Features:
    """What one forward pass of the target shows."""

    last: torch.Tensor  # [batch, seq, hidden], the vectors before the LM head (after the final norm)
    fused: torch.Tensor  # [batch, seq, hidden * aux layers], inputs of the aux layers side by side; empty without aux layers

    @property
    def inputs(self) -> torch.Tensor:
        """What the head reads: EAGLE-3 the fused features, all others the last."""
        return self.fused if self.fused.shape[-1] else self.last


class FrozenTarget:
    """A decoder from transformers, in evaluation mode and without gradients.

    Raises:
        ValueError: there is no such model, it is broken, or no decoder whose LM head reads the features that vLLM gives to heads.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"):
        from transformers import AutoModelForCausalLM

        self.path = str(path)
        self.config: Any = load_config(path)
        check_config(self.config, self.path)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except Exception as error:  # of transformers, safetensors or torch, each with classes of its own
            torn = _torn_file(Path(path))
            where = f"{path}/{torn} is broken" if torn else "transformers cannot load it"
            raise ValueError(f"target {path}: {where} ({_first_line(error)})") from None
        self.model = model.to(device).eval().requires_grad_(False)
        decoder = self.model.get_decoder()
        layers = getattr(decoder, "layers", None)
        lm_head = self.model.get_output_embeddings()
        if layers is None or lm_head is None or not hasattr(decoder, "norm"):
            raise ValueError(
                f"target {path}: {type(model).__name__} has no list of decoder layers, no norm behind them or no LM head to read "
                "features from"
            )
        self.decoder: Any = decoder
        self.layers: nn.ModuleList = layers
        self.lm_head: Any = lm_head
        self.embed: Any = _table(self.model.get_input_embeddings())
        self.finish = Finish.of(self.config)
        self._check_finite()
        self._check_logits()

    @property
    def end_tokens(self) -> set[int]:
        """Tokens after which a server ends an answer."""
        return end_tokens(getattr(self.model, "generation_config", None) or self.config)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the LM head's weights, and so of features."""
        return self.lm_head.weight.dtype

    @property
    def norm_gain(self) -> torch.Tensor:
        """[hidden], what the final norm multiplies a normed vector with. Some families store one less."""
        signs = torch.ones(self.lm_head.weight.shape[1], dtype=self.dtype, device=self.device)
        signs[1::2] = -1
        # Of mean 0 and one size, so that RMSNorm and LayerNorm alike leave the signs, and so large that no epsilon counts.
        return (self.decoder.norm(1024 * signs) - self.decoder.norm(0 * signs)) * signs

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """Features before the LM head [..., hidden] -> [..., vocab] float32, as the target samples from them."""
        return self.finish(self.lm_head(last).float())

    @torch.no_grad()
    def features(
        self,
        token_ids: torch.Tensor,  # [batch, seq] int64, right-padded
        aux_layers: Sequence[int] = (),  # layer n is the input of decoder layer n, as vLLM counts them
    ) -> Features:
        """Run the target over whole texts."""
        seen: dict[int, torch.Tensor] = {}

        def record(index: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                seen[index] = output[0] if isinstance(output, tuple) else output

            return hook

        def record_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[0] = args[0] if args else kwargs["hidden_states"]

        handles = [self.layers[i - 1].register_forward_hook(record(i)) for i in aux_layers if i > 0]
        if 0 in aux_layers:
            handles.append(self.layers[0].register_forward_pre_hook(record_input, with_kwargs=True))
        try:
            last = self.decoder(input_ids=token_ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        fused = torch.cat([seen[i] for i in aux_layers], dim=-1) if aux_layers else last[..., :0]
        return Features(last, fused)

    def _check_finite(self) -> None:
        """One NaN in a rare token's embedding would show itself hours later."""
        for name, tensor in self.model.named_parameters():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"target {self.path}: {name} holds NaN or infinity; download the model again")

    @torch.no_grad()
    def _check_logits(self) -> None:
        """The LM head on the last features must give the model's logits, with no scale or cap that the config does not name."""
        ids = torch.arange(1, 9, device=self.device)[None] % self.config.vocab_size
        ours = self.logits(self.features(ids).last)
        theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        if not bool(torch.isfinite(theirs).all()):
            raise ValueError(f"target {self.path}: its logits are no numbers in {self.dtype}; give another --dtype")
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()):
            raise ValueError(
                f"target {self.path}: {type(self.model).__name__} computes its logits otherwise than by LM head, cap and scale "
                f"({self.finish}), so a head cannot learn them from features; targets like Llama, Qwen2, Qwen3 and Mistral work"
            )


def end_tokens(config: Any) -> set[int]:
    """Tokens after which a server ends an answer, by a model's config or generation config."""
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _torn_file(folder: Path) -> str | None:
    """The first weight file that cannot be opened, for errors that do not name it."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return file.name
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _table(embedding: Any) -> nn.Module:
    """The embedding without the scale that some targets (Gemma) put into it: vLLM shares the table with heads, and scales apart."""
    if type(embedding) is nn.Embedding:
        return embedding
    return nn.Embedding.from_pretrained(embedding.weight.detach())


def load_config(path: str | Path) -> Any:
    """The target's config, as transformers reads it.

    Raises:
        ValueError: there is none, or of an unknown kind.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"target {path}: transformers cannot read its config ({_first_line(error)})") from None


def load_tokenizer(path: str | Path) -> Any:
    """The target's tokenizer.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a torn tokenizer.json raises a bare one
        raise ValueError(f"target {path}: no tokenizer that transformers can load ({_first_line(error)})") from None


def check_config(config: Any, path: str) -> None:
    """Refuse targets that the head's layer cannot stand for.

    Raises:
        ValueError: encoder-decoder, multimodal, or a size is missing.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"target {path}: {config.model_type} is an encoder-decoder; EAGLE heads need a decoder such as Llama or Qwen3"
        )
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"target {path}: the config of {config.model_type} lacks {', '.join(missing)}; "
            "a head is one Llama layer of the target's shape, so targets like Llama, Qwen2, Qwen3 and Mistral work"
        )


def default_aux_layers(num_layers: int) -> list[int]:
    """Low, mid and high layer, as EAGLE-3's authors and vLLM choose them; spread evenly in a target too shallow for that."""
    layers = [2, num_layers // 2, num_layers - 3]
    return layers if layers[0] < layers[1] < layers[2] else [max(1, num_layers // 6), num_layers // 2, num_layers - 1]


def _rope(target: Any) -> dict[str, Any]:
    """The target's rotary embedding, as far as a Llama layer can have it: of full attention, over the whole of each head."""
    rope = getattr(target, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # some have one per kind of layer
    plain = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return plain if rope.get("partial_rotary_factor", 1.0) != 1.0 else plain | rope


def head_config(target: Any, draft_vocab_size: int | None = None, aux: Sequence[int] = (), num_layers: int = 1) -> Any:
    """LlamaConfig of a head for `target` (a transformers config); with `aux` layers it is an EAGLE-3 head's."""
    from transformers import LlamaConfig

    head_dim = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    shared = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": getattr(target, "num_key_value_heads", None) or target.num_attention_heads,
        "head_dim": head_dim,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": next((eps for name in _EPSILONS if (eps := getattr(target, name, None)) is not None), 1e-5),
        "rope_parameters": _rope(target),
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if not aux:
        return LlamaConfig(**shared, architectures=["LlamaForCausalLM"])
    return LlamaConfig(
        **shared,
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=draft_vocab_size or target.vocab_size,
        eagle_aux_hidden_state_layer_ids=list(aux),
    )
