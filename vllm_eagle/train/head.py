"""Train an EAGLE-1 head: one decoder layer that extrapolates the target's features by one step.

    python -m vllm_eagle.train.head --target MODEL --data FILE [FILE ...] --out DIR --minutes 30

The head reads the target's feature at position t (the vector before the LM head) and the embedding of token t + 1 and predicts
the feature at t + 1; the target's frozen LM head turns it into a token. Loss: SmoothL1 on features plus 0.1 times the
cross-entropy against the target's own token distribution; uniform noise on the input features stands for the head's own errors
(EAGLE-1, arXiv 2401.15077, sections 3.2 and 3.3). The target is never touched. Features are computed on the fly.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vllm_eagle.train.data import PackedWindows, encode_rows

REGRESSION_WEIGHT = 1.0
CLASSIFICATION_WEIGHT = 0.1
NOISE_WIDTH = 0.2  # uniform noise on input features, from -0.1 to 0.1


class EagleHead(nn.Module):
    """fc(cat(embedding of the next token, feature)) -> one decoder layer without input norm."""

    def __init__(self, config: Any):
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layer = LlamaDecoderLayer(config, layer_idx=0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(
        self,
        embeddings: torch.Tensor,  # [batch, seq, hidden] of tokens 1..seq
        features: torch.Tensor,  # [batch, seq, hidden] of positions 0..seq - 1
    ) -> torch.Tensor:  # [batch, seq, hidden], predicted features of positions 1..seq
        """Extrapolate every feature by one step."""
        hidden = self.fc(torch.cat([embeddings, features], dim=-1))
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        # No mask argument: torch's attention is then causal.
        return self.layers[0](hidden, position_ids=positions, position_embeddings=self.rotary(hidden, positions))


def head_loss(
    predicted: torch.Tensor,  # [batch, seq, hidden]
    features: torch.Tensor,  # [batch, seq, hidden], the target's at the same positions
    lm_head: nn.Module,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and how often head and target agree on the most likely token (alpha at depth 0, greedy)."""
    regression = F.smooth_l1_loss(predicted.float(), features.float())
    with torch.no_grad():
        target_logits = lm_head(features).float()
    logits = lm_head(predicted).float()
    classification = F.cross_entropy(logits.flatten(0, 1), target_logits.softmax(-1).flatten(0, 1))
    agreement = (logits.argmax(-1) == target_logits.argmax(-1)).float().mean()
    return REGRESSION_WEIGHT * regression + CLASSIFICATION_WEIGHT * classification, agreement


def export(head: EagleHead, config: Any, out: Path, card: dict[str, Any]) -> None:
    """Write the head as vLLM loads it: config.json, and weights without embedding and LM head, which are the target's."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in head.state_dict().items() if "rotary" not in k}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    settings = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    settings |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(settings, indent=1))
    (out / "training.json").write_text(json.dumps(card, indent=1))


def train(args: argparse.Namespace) -> None:
    """Run the training that the command line asks for."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval().requires_grad_(False)
    head = EagleHead(target.config)
    windows = PackedWindows(encode_rows(tokenizer, args.data), args.window, args.seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start = last_log = time.time()
    num_steps, agreements, losses = 0, [], []
    while (done := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1, (num_steps + 1) / 50) * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = windows.batch(args.batch)
        with torch.no_grad():
            features = target.model(input_ids=ids, use_cache=False).last_hidden_state
            noise = (torch.rand_like(features[:, :-1]) - 0.5) * NOISE_WIDTH
            embeddings = target.model.embed_tokens(ids[:, 1:])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = head(embeddings, features[:, :-1] + noise)
            loss, agreement = head_loss(predicted, features[:, 1:], target.lm_head)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
        losses.append(loss.item())
        agreements.append(agreement.item())
        if time.time() - last_log > args.log_seconds:
            last_log = time.time()
            tokens_per_s = num_steps * ids.numel() / (last_log - start)
            record = {"step": num_steps, "loss": sum(losses) / len(losses), "alpha0": sum(agreements) / len(agreements)}
            print(json.dumps(record | {"lr": rate, "epochs": windows.num_epochs, "tokens_per_s": tokens_per_s}), flush=True)
            losses, agreements = [], []
    card = {"steps": num_steps, "tokens": num_steps * args.batch * args.window, "seconds": round(time.time() - start)}
    card |= {"lr": args.lr, "window": args.window, "batch": args.batch, "epochs": round(windows.num_epochs, 2)}
    export(head, target.config, args.out, card | {"data": [path.name for path in args.data], "seed": args.seed})
    print(json.dumps(card), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="folder of the target model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files, rows with messages or text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the head")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
