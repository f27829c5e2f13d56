"""Train the small Llama that ships with the project, from scratch, on CPU.

    python train_target.py tokenizer --corpus CORPUS --out DIR      byte-level BPE, 4096 entries
    python train_target.py train --corpus CORPUS --out DIR --minutes 85
    python train_target.py eval --corpus CORPUS --model DIR

CORPUS holds `{gsm8k,code_chat,code_text}.{train,heldout}.jsonl.gz`, rows with `messages` or `text`. The model exists so that
tests, demo and benchmarks have a target with real, peaked, non-repeating text; it is no assistant.

Two single-threaded ranks share one copy of the weights: each computes the gradient of its own windows, then each updates its
half of the matrices. Hidden matrices are updated by Muon (`torch.optim.Muon`, update size matched to AdamW's), embeddings, LM
head and norms by AdamW. The learning rate falls with wall time, so a run ends when it was told to.
"""

import argparse
import gzip
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

SEQ = 512
MIX = {"gsm8k": 0.70, "code_chat": 0.20, "code_text": 0.10}  # share of windows per domain
SPECIALS = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NUM_RANKS = 2


def rows(corpus: Path, name: str, split: str) -> Iterator[dict]:
    with gzip.open(corpus / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def render(row: dict) -> str:
    if "messages" in row:
        return "<s>" + "".join(f"<|{m['role']}|>\n{m['content']}</s>" for m in row["messages"])
    return "<s>" + row["text"] + "</s>"


def train_tokenizer(corpus: Path, out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    shuffled = random.Random(0)
    texts: list[str] = []
    for name, max_chars in {"gsm8k": 3_500_000, "code_chat": 1_500_000, "code_text": 2_500_000}.items():
        domain = list(rows(corpus, name, "train"))
        shuffled.shuffle(domain)
        num_chars = 0
        for row in domain:
            parts = [m["content"] for m in row["messages"]] if "messages" in row else [row["text"]]
            texts += parts
            num_chars += sum(map(len, parts))
            if num_chars > max_chars:
                break
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=SPECIALS, show_progress=False, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=SPECIALS[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)


def encode(tokenizer, corpus: Path, name: str, split: str) -> list[np.ndarray]:
    texts = [render(row) for row in rows(corpus, name, split)]
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, dtype=np.int16) for e in encoded]


class Windows:
    """Endless packed windows of SEQ tokens from one domain; documents are reshuffled every epoch."""

    def __init__(self, docs: list[np.ndarray], seed: int):
        self.docs, self.random = docs, random.Random(seed)
        self.order: list[int] = []
        self.buffer = np.zeros(0, np.int16)
        self.num_tokens = sum(map(len, docs))
        self.num_read = 0

    def next(self) -> np.ndarray:
        while len(self.buffer) < SEQ:
            if not self.order:
                self.order = list(range(len(self.docs)))
                self.random.shuffle(self.order)
            parts = [self.docs[i] for i in self.order[-64:]]
            del self.order[-64:]
            self.buffer = np.concatenate([self.buffer, *parts])
        window, self.buffer = self.buffer[:SEQ], self.buffer[SEQ:]
        self.num_read += SEQ
        return window


def heldout(tokenizer, corpus: Path) -> dict[str, torch.Tensor]:
    domains = {"gsm8k": ["gsm8k"], "code": ["code_chat", "code_text"]}
    out = {}
    for domain, names in domains.items():
        tokens = [np.concatenate(encode(tokenizer, corpus, name, "heldout")) for name in names]
        out[domain] = torch.from_numpy(np.concatenate([t[: len(t) // SEQ * SEQ].reshape(-1, SEQ) for t in tokens]).astype(np.int64))
    return out


@torch.no_grad()
def evaluate(model, windows: dict[str, torch.Tensor], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Held-out loss per domain: nats per token and per UTF-8 byte, top-1 accuracy, mean entropy in nats."""
    result = {}
    for domain, ids in windows.items():
        ids = ids[:limit]
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in ids.split(8):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.float32):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            logprobs = logits.log_softmax(-1)
            nll = -logprobs.gather(-1, batch[:, 1:, None]).sum()
            entropy = -(logprobs.exp() * logprobs).sum()
            totals += torch.stack([nll, (logits.argmax(-1) == batch[:, 1:]).sum(), entropy]).double()
        nll, top1, entropy = (totals / (ids.shape[0] * (SEQ - 1))).tolist()
        result[domain] = {
            "nll": round(nll, 4),
            "ppl": round(math.exp(nll), 3),
            "top1": round(top1, 4),
            "entropy_nats": round(entropy, 4),
            "tokens": ids.shape[0] * (SEQ - 1),
        }
    return result


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        use_cache=False,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # residual branches start small (GPT-2)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def save(model, tokenizer, out: Path, info: dict) -> None:
    from transformers import GenerationConfig, LlamaForCausalLM

    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.config.use_cache = True
    copy.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    copy.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(info, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def optimizers(model, rank: int, args) -> list[torch.optim.Optimizer]:
    """Each rank updates every second matrix; the other rank sees the result through shared memory."""
    hidden, other = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (hidden if is_matrix else other).append(parameter)
    hidden.sort(key=torch.Tensor.numel, reverse=True)
    other.sort(key=torch.Tensor.numel, reverse=True)
    muon = torch.optim.Muon(hidden[rank::NUM_RANKS], lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(other[rank::NUM_RANKS], lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def share_memory(model, flat: torch.Tensor) -> None:
    """Make every parameter a view of `flat` (shared between ranks)."""
    offset = 0
    for parameter in model.parameters():
        view = flat[offset : offset + parameter.numel()].view_as(parameter)
        parameter.data = view
        offset += parameter.numel()


def run_rank(rank: int, args, weights: torch.Tensor, gradients: torch.Tensor, control: torch.Tensor, barrier) -> None:
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    is_main = rank == 0
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    streams = {
        name: Windows(encode(tokenizer, args.corpus, name, "train")[rank::NUM_RANKS], args.seed + i) for i, name in enumerate(MIX)
    }
    model = build_model()
    if is_main:
        weights.copy_(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    barrier.wait()
    share_memory(model, weights)
    flat = torch.zeros_like(weights)
    offset = 0
    for parameter in model.parameters():  # gradients are views of one flat buffer
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    opts = optimizers(model, rank, args)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of, dynamic=False)
    credit = {name: 0.13 * rank * (name == "gsm8k") for name in MIX}

    def micro_batch() -> torch.Tensor:
        windows = []
        for _ in range(args.micro_batch):  # low-discrepancy mix of domains
            for name in MIX:
                credit[name] += MIX[name]
            name = max(credit, key=credit.get)
            credit[name] -= 1
            windows.append(streams[name].next())
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    if not is_main:
        barrier.wait()  # rank 0 compiles first, rank 1 finds its cache
    step_loss(micro_batch()).backward()
    flat.zero_()
    if is_main:
        barrier.wait()
    barrier.wait()

    windows = heldout(tokenizer, args.corpus) if is_main else {}
    start = time.time()
    last_log = last_eval = start
    num_steps = num_tokens = logged_tokens = 0
    losses: list[float] = []
    while True:
        if is_main:
            done = (time.time() - start) / (args.minutes * 60)
            warm = min(1.0, done / args.warmup, (num_steps + 1) / 25)
            control[0] = args.lr * warm * max(0.02, min(1.0, (1 - done) / args.decay))
            control[1] = float(done >= 1)
        for _ in range(args.accumulate):
            loss = step_loss(micro_batch()) / args.accumulate
            loss.backward()
        gradients[rank].copy_(flat)
        barrier.wait()
        if control[1] > 0:
            break
        torch.mean(gradients, 0, out=flat)
        flat.mul_(min(1.0, 1.0 / (float(flat.norm()) + 1e-6)))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = float(control[0])
            opt.step()
        flat.zero_()
        barrier.wait()
        num_steps += 1
        num_tokens += args.micro_batch * args.accumulate * NUM_RANKS * SEQ
        if not is_main:
            continue
        losses.append(loss.item() * args.accumulate)
        now = time.time()
        if now - last_log >= 60 or num_steps in (1, 10):
            epochs = {name: round(s.num_read / s.num_tokens, 2) for name, s in streams.items()}
            record = {"step": num_steps, "tokens": num_tokens, "loss": round(sum(losses) / len(losses), 4)}
            record |= {"lr": round(float(control[0]), 6), "tokens_per_s": round((num_tokens - logged_tokens) / (now - last_log))}
            print(json.dumps(record | {"epochs": epochs}), flush=True)
            losses, logged_tokens, last_log = [], num_tokens, now
        if now - last_eval >= args.eval_minutes * 60:
            short = {k: v["nll"] for k, v in evaluate(model, windows, limit=16).items()}
            print(json.dumps({"step": num_steps, "heldout_nll": short}), flush=True)
            save(model, tokenizer, args.out / "checkpoint", {"steps": num_steps, "tokens": num_tokens})
            last_eval = time.time()
    if is_main:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "corpus"}
        info = {"steps": num_steps, "tokens": num_tokens, "seconds": round(time.time() - start), "mix": MIX}
        info |= {"epochs": {name: round(s.num_read / s.num_tokens, 2) for name, s in streams.items()}, "settings": settings}
        save(model, tokenizer, args.out / "final", info)
        print("done", json.dumps(info), flush=True)


def train(args) -> None:
    num_weights = sum(p.numel() for p in build_model().parameters())
    weights = torch.zeros(num_weights).share_memory_()
    gradients = torch.zeros(NUM_RANKS, num_weights).share_memory_()
    control = torch.zeros(2, dtype=torch.float64).share_memory_()  # learning rate, stop flag
    barrier = mp.get_context("spawn").Barrier(NUM_RANKS)
    mp.spawn(run_rank, args=(args, weights, gradients, control, barrier), nprocs=NUM_RANKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tokenizer", "train", "eval"])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of the tokenizer; `train` adds checkpoint/ and final/")
    parser.add_argument("--model", type=Path, help="checkpoint to evaluate")
    parser.add_argument("--minutes", type=float, default=85)
    parser.add_argument("--micro-batch", type=int, default=2, help="windows per rank and backward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the run")
    parser.add_argument("--decay", type=float, default=0.6, help="share of the run in which the rate falls to zero")
    parser.add_argument("--eval-minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "tokenizer":
        train_tokenizer(args.corpus, args.out)
    elif args.command == "train":
        train(args)
    else:
        from transformers import AutoTokenizer, LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        print(json.dumps(evaluate(model, heldout(AutoTokenizer.from_pretrained(args.model), args.corpus)), indent=1))


if __name__ == "__main__":
    main()
