"""The other implementations: transformers' generate(), and the same model with its experts in torch's grouped GEMM.
Both peers are one transformers model: its expert matrices are views into one stack per layer, which the grouped peer reads.
transformers 4.57.6 runs unchanged. 5.x reads its router mask as expert numbers and computes two experts only; there
the loop over experts is replaced by `run_every_hit_expert` and the report says so. transformers knows NLLB's top-2 gating
only: for a model of one expert a token its router is replaced by `first_choice_only`, and the report says that, too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from engine.bench.engine_run import EngineRun, synchronize
from engine.bench.inputs import CellInputs
from engine.bench.peer_experts import (
    ExpertCounts,
    ExpertDraw,
    draw_on_use,
    first_choice_only,
    grouped_layer,
    run_every_hit_expert,
    stack_experts,
)
from engine.bench.random_model import RandomWeights
from engine.config import ModelConfig
from engine.types import Int32Array
from engine.weights.mapping import EMBEDDING_NAME, HEAD_NAME

_JUDGED_AT_ONCE = 16


class PeerError(ValueError):
    """A peer cannot run here; the message says why and what to do."""


def transformers_version(config: ModelConfig) -> str:
    """Version of the installed transformers, with what is done to it for this model. Raises PeerError when there is none."""
    version = str(_import_transformers().__version__)
    loop = "" if version.startswith("4.") else ", expert loop patched"
    return version + loop + (", router patched to top-1" if config.num_experts_per_tok == 1 else "")


@dataclass(slots=True)
class Peer:
    """One transformers model and how to run it. `is_resident` False: experts are drawn for every use (right, but slow)."""

    config: ModelConfig
    model: Any
    device: torch.device
    dtype: torch.dtype
    is_resident: bool

    @classmethod
    def random(cls, weights: RandomWeights, dtype: torch.dtype, *, resident: bool) -> Peer:
        """The random model. resident False keeps no expert matrix in memory."""
        transformers = _import_transformers()
        with torch.device("meta"):
            model = transformers.NllbMoeForConditionalGeneration(_hf_config(weights.untied))
        peer = cls(weights.config, model.eval(), weights.device, dtype, resident)
        peer._materialize(weights)
        peer._patch()
        return peer

    @classmethod
    def checkpoint(cls, path: Path, dtype: torch.dtype, device: torch.device) -> Peer:
        """A checkpoint in the NLLB-MoE format, unquantized."""
        transformers = _import_transformers()
        model = transformers.NllbMoeForConditionalGeneration.from_pretrained(path, dtype=dtype).to(device).eval()
        # transformers 4.57.6 neither stores these copies nor ties them where the head is untied: it draws them at random
        model.model.encoder.embed_tokens.weight = model.model.decoder.embed_tokens.weight = model.model.shared.weight
        peer = cls(ModelConfig.from_checkpoint(path), model, device, dtype, is_resident=True)
        for _, ffn in peer._sparse_layers():
            stack_experts(ffn)
        peer._patch()
        return peer

    def run(self, inputs: CellInputs, name: str = "transformers") -> EngineRun:
        """Generate, timed as a whole; the encoder pass is timed by itself. Raises PeerError where this peer cannot run."""
        if name == "grouped" and not self.is_resident:
            raise PeerError("the grouped GEMM needs all experts in memory, and they do not fit this device")
        if name == "grouped" and self.device.type == "cuda" and self.dtype == torch.float32:
            raise PeerError("torch's grouped GEMM wants bf16 on the GPU")
        with self._grouped() if name == "grouped" else nullcontext():
            return self._generate(inputs)

    @torch.inference_mode()
    def _generate(self, inputs: CellInputs) -> EngineRun:
        transformers = _import_transformers()
        sources = torch.from_numpy(inputs.source_token_ids).to(self.device, torch.int64)
        mask = torch.ones_like(sources)
        forced = torch.from_numpy(inputs.forced_token_ids).to(self.device, torch.int64)
        # generate() forces one language for a whole batch. A prompt of two tokens per sentence lets each have its own; with
        # all lengths fixed the length penalty divides all hypotheses alike.
        prompt = torch.stack([torch.full_like(forced, self.config.decoder_start_token_id), forced], dim=1)
        new_tokens = inputs.target_tokens - 1
        options = transformers.GenerationConfig(
            num_beams=inputs.cell.beam,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=self.config.pad_token_id,
            bos_token_id=self.config.bos_token_id,
            eos_token_id=self.config.eos_token_id,
            decoder_start_token_id=self.config.decoder_start_token_id,
        )
        synchronize(self.device)
        start = time.perf_counter()
        output = self.model.generate(
            input_ids=sources, attention_mask=mask, decoder_input_ids=prompt, generation_config=options
        )
        synchronize(self.device)
        total_s = time.perf_counter() - start
        self.model.get_encoder()(input_ids=sources, attention_mask=mask)
        synchronize(self.device)
        encode_s = time.perf_counter() - start - total_s
        tokens: Int32Array = output[:, 1:].cpu().numpy().astype(np.int32)
        if tokens.shape != (inputs.cell.batch, inputs.target_tokens):
            raise PeerError(f"transformers generated {tokens.shape} tokens, not {inputs.target_tokens} a sentence")
        return EngineRun(tokens, total_s, encode_s, inputs.num_steps)

    @torch.inference_mode()
    def judge(self, inputs: CellInputs, token_ids: Int32Array) -> Judgement:
        """Read hypotheses int32[B, target tokens] of another engine with this model, all positions at once, no cache."""
        logprobs, is_best = [], []
        for start in range(0, len(token_ids), _JUDGED_AT_ONCE):
            part = slice(start, start + _JUDGED_AT_ONCE)
            targets = torch.from_numpy(token_ids[part]).to(self.device, torch.int64)
            sources = torch.from_numpy(inputs.source_token_ids[part]).to(self.device, torch.int64)
            starts = torch.full_like(targets[:, :1], self.config.decoder_start_token_id)
            hidden = self.model.model(
                input_ids=sources,
                attention_mask=torch.ones_like(sources),
                decoder_input_ids=torch.cat([starts, targets[:, :-1]], dim=1),
            ).last_hidden_state[:, 1:]  # what follows the forced token
            # The model's own projection rounds logits to its dtype: at 8 to 16 a step of bf16 is 0.06, more than the limit.
            logits = torch.nn.functional.linear(hidden.float(), self.model.lm_head.weight.float())
            chosen = targets[:, 1:, None]
            logprobs.append(logits.log_softmax(dim=-1).gather(2, chosen)[:, :, 0].sum(dim=1).cpu())
            logits[:, :, self.config.eos_token_id] = float("-inf")  # the length is fixed
            is_best.append((logits.argmax(dim=-1) == targets[:, 1:]).float().mean(dim=1).cpu())
        scores = torch.cat(logprobs) / inputs.target_tokens
        return Judgement(tuple(scores.tolist()), float(torch.cat(is_best).mean()))

    @contextmanager
    def recording_experts(self) -> Iterator[ExpertCounts]:
        """Count the distinct experts of every router call inside the block; works with the transformers peer."""
        counts = ExpertCounts(self.config.num_experts, self.config.num_experts_per_tok)
        hooks = []
        for name, ffn in self._sparse_layers():
            stack: Literal["encoder", "decoder"] = "encoder" if ".encoder." in name else "decoder"
            hooks.append(ffn.router.register_forward_hook(counts.hook(stack)))
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()

    def _sparse_layers(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if hasattr(module, "router")]

    @torch.inference_mode()
    def _materialize(self, weights: RandomWeights) -> None:
        """Give every parameter its weights. Experts become views of stacks, or stay empty and are drawn on use."""
        for name, module in self.model.named_modules():
            if hasattr(module, "make_weights"):  # the position table is no parameter: make it again, off the meta device
                num_rows, width = module.weights.shape
                del module.weights
                module.make_weights(num_rows, width, module.padding_idx)
                module.weights = module.weights.to(self.device, self.dtype)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                full_name = f"{name}.{parameter_name}".removeprefix("model.")
                if ".experts." not in full_name and parameter.is_meta and not _is_embedding_or_head(full_name):
                    drawn = weights.tensor(full_name, tuple(parameter.shape)).to(self.dtype)
                    setattr(module, parameter_name, nn.Parameter(drawn, requires_grad=False))
        model = self.model.model
        model.shared.weight = nn.Parameter(
            weights.tensor(EMBEDDING_NAME, tuple(model.shared.weight.shape)).to(self.dtype), requires_grad=False
        )
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
        head = weights.tensor(HEAD_NAME, tuple(model.shared.weight.shape)).to(self.dtype)
        self.model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        for name, ffn in self._sparse_layers():
            draw = ExpertDraw(weights, name.removeprefix("model."), self.dtype)
            if self.is_resident:
                stack_experts(ffn, draw)
            else:
                draw_on_use(ffn, draw)

    def _patch(self) -> None:
        if self.config.num_experts_per_tok == 1:
            for _, ffn in self._sparse_layers():
                ffn.router.route_tokens = first_choice_only(ffn.router)
        if not str(_import_transformers().__version__).startswith("4."):
            for _, ffn in self._sparse_layers():
                ffn.experts.forward = run_every_hit_expert(ffn.experts)

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        layers = [ffn for _, ffn in self._sparse_layers()]
        returns_pair = str(_import_transformers().__version__).startswith("4.")
        for ffn in layers:
            ffn.forward = grouped_layer(ffn, returns_pair, self.config.expert_output_scale, self.config.num_experts_per_tok)
        try:
            yield
        finally:
            for ffn in layers:
                del ffn.forward


@dataclass(frozen=True, slots=True)
class Judgement:
    """scores: mean log-probability per generated token of each hypothesis, the forced token counting 0.

    best_share: share of steps at which the hypothesis takes the model's best token (near 1 for a right greedy search).
    """

    scores: tuple[float, ...]
    best_share: float


def _hf_config(config: ModelConfig) -> Any:
    raw = dataclasses.asdict(config)
    raw.pop("layer_norm_eps")
    return _import_transformers().NllbMoeConfig(**raw, dropout=0.0)


def _is_embedding_or_head(name: str) -> bool:
    return name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight"))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PeerError(
            "the benchmark compares with transformers, which is not installed: pip install transformers==4.57.6"
        ) from error
    return transformers
