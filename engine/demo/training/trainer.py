"""The training loop: one captured step on a GPU, the same step uncaptured on a CPU; resumable, logged, seeded."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import ModelConfig
from engine.demo.training.batches import PairPool, Sampling
from engine.demo.training.checkpoint import read_checkpoint, write_checkpoint
from engine.demo.training.encoding import TextGroups, TokenBuffers, encode_groups
from engine.demo.training.network import TrainingNetwork
from engine.demo.training.optimizer import MuonAdamW
from engine.demo.training.options import TrainingOptions
from engine.tokenizer import Tokenizer

_LOG_EVERY_S = 5.0
_METRICS = ("loss", "nll", "accuracy", "balance")


def demo_model_config(vocab_size: int) -> ModelConfig:
    """Architecture of the demonstration model: deep encoder, shallow decoder, 8 experts; at most 16.0 M parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=256,
        encoder_layers=8,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        encoder_sparse_step=4,
        decoder_sparse_step=3,
        num_experts=8,
        max_position_embeddings=512,
    )


class Trainer:
    """Owns the network, the optimizer, the pools and the log of one run."""

    def __init__(self, options: TrainingOptions, config: ModelConfig | None = None) -> None:
        self.options = options
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        tokenizer = Tokenizer.from_checkpoint(options.tokenizer)
        train, valid = self._buffers(tokenizer.languages)
        self.config = config or demo_model_config(math.ceil(tokenizer.num_ids / 64) * 64)
        ids = torch.tensor([tokenizer.language_id(code) for code in train.languages], device=self.device)
        self.network = TrainingNetwork(
            self.config,
            dropout=options.dropout,
            label_smoothing=options.label_smoothing,
            balance_weight=options.balance_weight,
        ).to(self.device)
        if options.device.startswith("cuda") and options.compile:
            self.network.compile_regions()
        dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
        self.optimizer = MuonAdamW(self.network, compute_dtype=dtype, weight_decay=options.weight_decay)
        self.elapsed_s, self.num_steps = 0.0, 0
        self._resume()
        # a resumed run must draw other pairs than the run before it
        self._generator = torch.Generator(self.device).manual_seed(options.seed + self.num_steps)
        common = {"pad_id": self.config.pad_token_id, "eos_id": self.config.eos_token_id}
        self.train_pool = PairPool(
            train,
            ids,
            Sampling(options.cldr_share, pivot_weight=options.pivot_weight),
            num_pairs=options.pool_pairs,
            generator=self._generator,
            **common,
        )
        # nearly always English on one side: the directions that the quality table leads with
        self.valid_pools = {
            name: PairPool(
                valid,
                ids,
                Sampling(share, pivot_weight=1e3),
                num_pairs=1 << 14,
                generator=torch.Generator(self.device).manual_seed(options.seed),
                **common,
            )
            for name, share in (("interface", 0.0), ("cldr", 1.0))
        }
        self._learning_rate = torch.zeros((), device=self.device)
        self._cursor = torch.zeros((), dtype=torch.int64, device=self.device)
        self._arange = torch.arange(options.rows, device=self.device)
        self._sums = {name: torch.zeros((), device=self.device) for name in _METRICS}
        self._load: Tensor | None = None

    def _buffers(self, languages: tuple[str, ...]) -> tuple[TokenBuffers, TokenBuffers]:
        """Train and validation buffers; encoded once per output directory, since BPE dropout costs a minute of one core."""
        cache = self.options.out / "token_buffers.pt"
        if cache.exists():
            stored = torch.load(cache, weights_only=True)
        else:
            file = self.options.tokenizer / "tokenizer.json"
            train = encode_groups(
                TextGroups.read(self.options.corpus, "train"),
                file,
                languages,
                num_variants=self.options.num_variants,
                bpe_dropout=self.options.bpe_dropout,
            )
            valid = encode_groups(TextGroups.read(self.options.corpus, "valid"), file, languages)
            names = ("tokens", "start", "length", "is_interface")
            stored = [{name: getattr(buffers, name) for name in names} for buffers in (train, valid)]
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save(stored, cache)
        loaded = [TokenBuffers(**tensors, languages=languages).to(self.device) for tensors in stored]
        return loaded[0], loaded[1]

    def run(self) -> dict[str, Any]:
        """Train until this run's time is over; writes the state, the checkpoint and the log. Returns the last record."""
        options = self.options
        end = (
            options.total_seconds
            if options.run_seconds is None
            else min(options.total_seconds, self.elapsed_s + options.run_seconds)
        )
        self.network.train()
        step = self._captured_step() if self.device.type == "cuda" else self._step
        record: dict[str, Any] = {}
        base, started = self.elapsed_s, time.monotonic()
        next_log, next_valid, since = started + _LOG_EVERY_S, started + options.validate_every_s, 0
        options.out.mkdir(parents=True, exist_ok=True)
        with (
            (options.out / "training_log.jsonl").open("a", encoding="utf-8") as log,
            tqdm(total=round(end), initial=round(base), unit="s", dynamic_ncols=True, mininterval=5.0) as bar,
        ):
            cursor = 0
            while self.elapsed_s < end:
                if cursor + options.rows > self.train_pool.num_rows:
                    self.train_pool.refill()
                    self._cursor.zero_()
                    cursor = 0
                self._learning_rate.fill_(self._scheduled_rate())
                step()
                cursor += options.rows
                self.num_steps += 1
                since += 1
                now = time.monotonic()
                self.elapsed_s = base + now - started
                if now >= next_log or self.elapsed_s >= end:
                    record = self._record(since)
                    since, next_log = 0, time.monotonic() + _LOG_EVERY_S
                    if now >= next_valid or self.elapsed_s >= end:
                        record |= self.validate()
                        self.save()  # a lost machine then costs a minute, not the run
                        next_valid = time.monotonic() + options.validate_every_s
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    bar.n = round(min(self.elapsed_s, end))
                    bar.set_postfix_str(f"step {self.num_steps} nll {record['nll']:.3f} acc {record['accuracy']:.3f}")
        return record

    def _scheduled_rate(self) -> float:
        options = self.options
        progress = self.elapsed_s / options.total_seconds
        warm = min(1.0, (self.num_steps + 1) / options.warmup_steps)
        return options.learning_rate * warm * min(1.0, max(0.0, (1.0 - progress) / (1.0 - options.decay_from)))

    def _step(self) -> None:
        """One optimisation step; device work only (also what the CUDA graph captures)."""
        # a tiny pool can hold fewer rows than a batch: wrap
        rows = (self._cursor + self._arange) % self.train_pool.num_rows
        self._cursor += self.options.rows
        self.optimizer.zero_grad()
        losses = self.network(self.train_pool.batch(rows))
        losses["loss"].backward()
        self.optimizer.step(self._learning_rate)
        for name in _METRICS:
            self._sums[name] += losses[name].detach()
        if self._load is None:
            self._load = torch.zeros_like(losses["load"])
        self._load.copy_(losses["load"])

    def _captured_step(self) -> Any:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile and warm up with a zero learning rate
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        # moments of the warm-up are those of real gradients and the weights did not move: nothing to undo
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._cursor.zero_()
        for total in self._sums.values():
            total.zero_()
        return graph.replay

    def _record(self, steps: int) -> dict[str, Any]:
        means = {name: float(self._sums[name]) / max(steps, 1) for name in _METRICS}
        for total in self._sums.values():
            total.zero_()
        load = self._load if self._load is not None and self._load.numel() else torch.zeros(1, 1)
        return {
            "step": self.num_steps,
            "elapsed_s": round(self.elapsed_s, 2),
            "learning_rate": float(self._learning_rate),
            **means,
            "expert_load_min": float(load.min()),
            "expert_load_max": float(load.max()),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean negative log-likelihood and token accuracy on held-out groups, directions with English."""
        self.network.eval()
        result: dict[str, float] = {}
        for name, pool in self.valid_pools.items():
            width = min(self.options.rows, 128)
            num = max(1, min(8, pool.num_rows // width))
            totals = torch.zeros(2, device=self.device)
            for index in range(num):
                rows = torch.arange(index * width, (index + 1) * width, device=self.device) % pool.num_rows
                losses = self.network(pool.batch(rows))
                totals += torch.stack([losses["nll"], losses["accuracy"]])
            nll, accuracy = (totals / num).tolist()
            result |= {f"valid_{name}_nll": nll, f"valid_{name}_accuracy": accuracy}
        self.network.train()
        return result

    def save(self) -> None:
        """Write the full state (local continuation) and the checkpoint (portable), each file replaced whole."""
        out = self.options.out
        state = {"optimizer": self.optimizer.state_dict(), "elapsed_s": self.elapsed_s, "num_steps": self.num_steps}
        torch.save(state, out / "state.tmp")
        (out / "state.tmp").replace(out / "state.pt")
        num = write_checkpoint(self.network, out / "checkpoint")
        options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.options).items()}
        (out / "options.json").write_text(json.dumps(options | {"num_parameters": num}, indent=2) + "\n", encoding="utf-8")

    def _resume(self) -> None:
        """Continue from `out/state.pt`, else from the weights in `out/checkpoint` (schedule and moments start anew)."""
        out = self.options.out
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.elapsed_s, self.num_steps = float(state["elapsed_s"]), int(state["num_steps"])
        elif (out / "checkpoint" / "model.safetensors").exists():
            read_checkpoint(self.network, out / "checkpoint")
            self.optimizer.adopt_weights()
