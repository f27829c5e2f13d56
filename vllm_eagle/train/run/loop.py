"""The training loop: frozen target, one small head, resumable to the bit.

Several devices and hosts run through Hugging Face's accelerate (`torchrun --nproc-per-node 4 -m vllm_eagle.cli train ...`): it is
a thin layer over torch's data parallelism, needs no service beside the processes, and one process without a launcher is an ordinary
loop; Ray Train would want a cluster for that. What a step does is a function of its number: learning rate, batch, and the random
state that a checkpoint holds.
"""

import functools
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_eagle.evaluate.accuracy import ALPHA_DEPTH
from vllm_eagle.train.data.batches import Batch, Batches
from vllm_eagle.train.data.examples import Example, file_hash, load_examples
from vllm_eagle.train.data.report import DataReport
from vllm_eagle.train.data.rows import check_files
from vllm_eagle.train.features.cache import FeatureCache, stack
from vllm_eagle.train.features.target import Features, FrozenTarget, load_tokenizer
from vllm_eagle.train.head.files import save_head
from vllm_eagle.train.head.models import aux_layers
from vllm_eagle.train.head.objective import Objective, Outcome
from vllm_eagle.train.run import checkpoint, resume
from vllm_eagle.train.run.build import continued_head, new_head, usual_length
from vllm_eagle.train.run.card import RunCard
from vllm_eagle.train.run.curves import Curves
from vllm_eagle.train.run.settings import TrainSettings
from vllm_eagle.train.run.stop import Noted, StoppedError

MOST_HELD_OUT = 256  # examples; more would cost time and say no more


def train(settings: TrainSettings, progress: bool = True) -> dict[str, Any]:
    """Train a head and write it to `settings.out`; returns the run card.

    Raises:
        ValueError: settings, data or target cannot be used, or the disk is full.
        StoppedError: a signal came; the step at which it came is saved.
    """
    run = _Run(settings, progress)
    try:
        return run.run()
    finally:
        if run.cache is not None:
            run.cache.close()


@dataclass(slots=True)
class _Sums:
    """Since the last point of the curves; part of a checkpoint, which may fall between two."""

    loss: float = 0.0
    agreed: int = 0
    counted: int = 0
    steps: int = 0


class _Run:
    def __init__(self, settings: TrainSettings, progress: bool):
        # accelerate before anything else: it decides which device this process has.
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        self.settings, out = settings, settings.out
        check_files(list(settings.data))
        resume_from = resume.check_out(settings)
        # Autocast is ours: accelerate's is a property of the process, and two runs in one process may differ.
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available(), gradient_accumulation_steps=settings.accumulate
        )
        self.autocast = functools.partial(
            torch.autocast, self.accelerator.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"
        )
        self.is_main = self.accelerator.is_main_process
        self.progress = progress and self.is_main
        set_seed(settings.seed)
        for kind in (np.float32, np.float64):
            np.finfo(kind)  # numpy probes the types once, and would warn of flushed denormals
        torch.set_flush_denormal(True)
        tokenizer = load_tokenizer(settings.target)
        self.target = FrozenTarget(settings.target, getattr(torch, settings.dtype), self.accelerator.device)
        max_length = min(settings.max_length, getattr(self.target.config, "max_position_embeddings", settings.max_length))
        report = DataReport()
        examples = load_examples(
            tokenizer,
            list(settings.data),
            max_length,
            report,
            progress=self.progress,
            arguments=settings.chat_template_kwargs,
            vocab_size=self.target.config.vocab_size,
        )
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.train_examples, held_out = _split(examples, settings.holdout, world)
        self.batches = Batches(self.train_examples, settings.batch_tokens, settings.seed, rank, world)
        self.held_out = Batches(held_out, settings.batch_tokens, settings.seed, rank, world) if held_out else None
        if settings.init is None:
            head, facts = new_head(self.target, settings, self.train_examples)
        else:
            head, facts = continued_head(self.target, settings)
        if settings.method != "medusa":
            head.config.draft_window = usual_length(self.train_examples)
        set_seed(settings.seed, device_specific=True)  # from here on every process draws noise of its own
        self.aux = aux_layers(head.config) if settings.method == "eagle3" else []
        objective = Objective(head, self.target.lm_head, settings.loss, self.target.finish)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.num_steps = settings.steps or math.ceil(settings.epochs * self.batches.num_batches() / settings.accumulate)
        data_hash = file_hash(settings.data)
        self.cache = self._open_cache(rank)
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0
        self.sums = _Sums()
        self.signals = Noted()
        if resume_from is not None:
            resume.check_same(out, {"data_sha256": data_hash, "processes": world})
            position = checkpoint.load(self.accelerator, resume_from)
            self.step, self.num_tokens, self.seconds = position["step"], position["tokens"], position["seconds"]
            self.sums = _Sums(**position.get("sums", {}))
        if self.is_main:
            out.mkdir(parents=True, exist_ok=True)
            report.write(out / "data_report.jsonl")
            facts |= {"parameters": sum(p.numel() for p in head.parameters()), "steps": self.num_steps}
            facts |= {"examples": len(self.train_examples), "held_out_examples": len(held_out), "processes": world}
            self.card = RunCard(settings, data_hash, report.as_dict(), facts, str(self.accelerator.device))
            self.card.write(out)
            self.curves = Curves(out, self.step)
            print(report.summary(), file=sys.stderr)

    def run(self) -> dict[str, Any]:
        with self.signals.here():
            self._train()
        return self._finish()

    def _train(self) -> None:
        settings = self.settings
        stream = self._micro_batches()
        bar = self._bar()
        started, seconds_before, tokens_before = time.perf_counter(), self.seconds, self.num_tokens
        self.objective.train()
        while self.step < self.num_steps:
            rate = self._rate()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batches = [next(stream) for _ in range(settings.accumulate)]
            for batch, share in zip(batches, self._shares(batches), strict=True):
                outcome = self._learn(batch, share)
                self.sums.loss += outcome.loss.item() / settings.accumulate
                self.sums.agreed += int(outcome.num_agreed[0])
                self.sums.counted += int(outcome.num_positions[0])
                self.num_tokens += int(batch.lengths.sum()) * self.accelerator.num_processes
            self.step += 1
            self.sums.steps += 1
            self.seconds = seconds_before + time.perf_counter() - started
            speed = (self.num_tokens - tokens_before) / (self.seconds - seconds_before)
            if bar is not None:
                bar.update()
            if self.step % settings.log_every == 0 or self.step == self.num_steps:
                sums, self.sums = self.sums, _Sums()
                if not math.isfinite(sums.loss):
                    raise ValueError(f"the loss is {sums.loss} at step {self.step}; lower --lr and start again")
                values = {"loss": sums.loss / sums.steps, "alpha_0": sums.agreed / max(1, sums.counted)}
                values |= {"lr": rate, "tokens_per_s": speed}
                if self.is_main:
                    self.curves.add(self.step, "train", values)
                if bar is not None:
                    bar.set_postfix_str(f"loss {values['loss']:.3f}, alpha_0 {values['alpha_0']:.3f}, {speed:,.0f} tokens/s")
            if self.held_out is not None and (self.step % settings.eval_every == 0 or self.step == self.num_steps):
                measured = self._measure(self.held_out)
                if self.is_main:
                    self.curves.add(self.step, "held_out", measured)
                    self.curves.draw()
            asked = self._asked_to_stop()
            if asked or self.step % settings.checkpoint_every == 0 or self.step == self.num_steps:
                position = {"step": self.step, "tokens": self.num_tokens, "seconds": self.seconds, "sums": asdict(self.sums)}
                checkpoint.save(self.accelerator, settings.out, position)
            if asked and self.step < self.num_steps:
                if bar is not None:
                    bar.close()
                raise StoppedError(asked, self.step)
        if bar is not None:
            bar.close()

    def _asked_to_stop(self) -> int:
        """The signal that this process or another has got, 0 if none: all must stop after the same step."""
        mine = self.signals.number or 0
        if self.accelerator.num_processes == 1:
            return mine
        total = self.accelerator.reduce(torch.tensor(float(mine), device=self.accelerator.device)).item()
        return mine or (signal.SIGTERM if total else 0)

    def _shares(self, batches: list[Batch]) -> list[float]:
        """Weight of each batch's mean loss, so that every position of the step counts alike, whatever batch it is in."""
        counts = torch.tensor([int(batch.loss_mask[:, 2:].sum()) for batch in batches], dtype=torch.float64)
        total = self.accelerator.reduce(counts.sum().to(self.accelerator.device)).item()
        parts = len(batches) * self.accelerator.num_processes  # accelerate and data parallelism average over these
        return [float(count) * parts / max(1.0, total) for count in counts]

    def _learn(self, batch: Batch, share: float) -> Outcome:
        with self.accelerator.accumulate(self.objective):
            inputs = self._inputs(batch)
            with self.autocast():
                outcome: Outcome = self.objective(*inputs)
            self.accelerator.backward(outcome.loss * share)
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.grad_clip)
                if not math.isfinite(norm):  # the same on all processes; a step would make weights of it
                    raise ValueError(f"the gradient is {float(norm)} at step {self.step + 1}; lower --lr and start again")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return outcome

    def _micro_batches(self) -> Iterator[Batch]:
        """Batches from the current step on, epoch after epoch."""
        per_epoch = self.batches.num_batches()
        epoch, start = divmod(self.step * self.settings.accumulate, per_epoch)
        while True:
            if self.cache is not None:
                self.cache.refresh()
            yield from self.batches.epoch(epoch, start=start)
            epoch, start = epoch + 1, 0

    def _inputs(self, batch: Batch, cached: bool = True) -> tuple[torch.Tensor, torch.Tensor, Features]:
        device = self.accelerator.device
        token_ids, loss_mask = batch.token_ids.to(device), batch.loss_mask.to(device)
        if self.cache is None or not cached:
            return token_ids, loss_mask, self.target.features(token_ids, self.aux)
        known = [self.cache.get(key) for key in batch.keys]
        missing = [row for row, found in enumerate(known) if found is None]
        if missing:
            computed = self.target.features(token_ids[missing], self.aux)
            for i, row in enumerate(missing):
                known[row] = one = Features(computed.last[i : i + 1], computed.fused[i : i + 1])
                self.cache.put(batch.keys[row], one, int(batch.lengths[row]))
        width = token_ids.shape[1]
        return token_ids, loss_mask, stack([Features(k.last.to(device), k.fused.to(device)) for k in known if k], width)

    @torch.no_grad()
    def _measure(self, batches: Batches) -> dict[str, float]:
        """Loss and alpha per depth on held-out text, teacher-forced, without noise."""
        objective = self.accelerator.unwrap_model(self.objective)
        trained_with = objective.weights
        trained_steps = trained_with.num_steps
        steps = objective.head.max_steps or max(ALPHA_DEPTH, trained_steps)
        objective.eval()
        objective.weights = replace(trained_with, num_steps=steps)
        sums = torch.zeros(2, steps, dtype=torch.float64)
        loss, num_batches = 0.0, 0
        for batch in batches.epoch(0):
            inputs = self._inputs(batch, cached=False)
            with self.autocast():
                outcome = objective(*inputs)
            sums += torch.stack([outcome.num_agreed, outcome.num_positions]).double().cpu()
            loss, num_batches = loss + outcome.step_losses[:trained_steps].sum().item(), num_batches + 1
        objective.weights = trained_with
        objective.train()
        totals = self.accelerator.reduce(
            torch.cat([sums.flatten(), torch.tensor([loss, num_batches]).double()]).to(self.accelerator.device)
        )
        agreed, counted = totals[:-2].view(2, steps).cpu()
        alphas = {f"alpha_{i}": (agreed[i] / counted[i].clamp(min=1)).item() for i in range(min(ALPHA_DEPTH, steps))}
        return {"loss": (totals[-2] / totals[-1].clamp(min=1)).item()} | alphas

    def _rate(self) -> float:
        done = self.step / self.num_steps
        warm = min(1.0, (self.step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        return self.settings.lr * warm * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))

    def _open_cache(self, rank: int) -> FeatureCache | None:
        settings = self.settings
        if settings.cache_dir is None:
            return None
        tokens = hashlib.sha256()
        for example in self.train_examples:  # entries go by their number here, which the held-out ones and so the processes decide
            tokens.update(example.token_ids.numpy().tobytes() + b"|")
        files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(settings.target).glob("*.safetensors"))}
        identity: dict[str, Any] = {"target": settings.target, "weights": files, "tokens": tokens.hexdigest()}
        identity |= {"dtype": settings.dtype, "aux_layers": self.aux}
        limit = int(settings.cache_gb * 2**30) // self.accelerator.num_processes
        return FeatureCache(settings.cache_dir, limit, identity, rank)

    def _bar(self) -> Any:
        if not self.progress:
            return None
        from tqdm import tqdm

        return tqdm(total=self.num_steps, initial=self.step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def _finish(self) -> dict[str, Any]:
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            return {}
        save_head(self.accelerator.unwrap_model(self.objective).head, self.settings.out, getattr(torch, self.settings.dtype))
        self.curves.close()
        held_out = [point for point in self.curves.points if point["kind"] == "held_out"]
        if held_out:
            self.card.facts["held_out"] = {k: v for k, v in held_out[-1].items() if k not in ("step", "kind")}
        return self.card.finish(self.settings.out, self.num_tokens, self.seconds)


def _split(examples: list[Example], share: float, at_least: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; every n-th is held out, so that all files and lengths take part."""
    if not share:
        return examples, []
    every = max(2, round(1 / share), math.ceil(len(examples) / MOST_HELD_OUT))
    every = max(2, min(every, len(examples) // at_least))
    held_out = examples[every - 1 :: every]
    if len(held_out) < at_least:
        raise ValueError(
            f"--holdout {share} of {len(examples)} examples is too few for {at_least} processes; give more data, or --holdout 0"
        )
    return [e for i, e in enumerate(examples) if i % every != every - 1], held_out
