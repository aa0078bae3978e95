"""One decoder step out of every op, and a piece of an encoder, over buffers that never move. See kernels.replay_check."""

from __future__ import annotations

import math

import torch

from kernels.add_layernorm import add_layernorm, add_layernorm_reference
from kernels.beam_search import advance_sentences
from kernels.expert_gemm import FfnTiles, PackedExperts, expert_ffn, expert_ffn_reference
from kernels.head_checks import HEAD_LIMIT, head_error
from kernels.head_topk import TopTokens, head_topk
from kernels.replay_attention import attention_ops, encoder_ops
from kernels.replay_memory import (
    ADVANCED,
    CANDIDATES,
    EXPERT_TILES,
    INPUTS,
    ROUTING,
    ROUTING_WHOLE,
    Arena,
    StepSizes,
    Views,
    tables_of,
)
from kernels.replay_parts import Op, Parts, error_of_finite_rows
from kernels.replay_search import EOS, Sentence, tables_differ
from kernels.route import route, route_reference
from kernels.route.launcher import semaphores
from kernels.routing import Routing, max_tiles, sync_size
from kernels.small_linear import quantize_int8
from kernels.testing import random_experts, relative_error

Experts = tuple[PackedExperts, torch.Tensor, PackedExperts, torch.Tensor]


class Step:
    """The ops in the order of a decoder step, then those of an encoder. Weights are drawn once and never change."""

    def __init__(self, sizes: StepSizes, dtype: torch.dtype, device: torch.device, limit: float) -> None:
        self.sizes, self.device = sizes, device
        parts = Parts(sizes, dtype, device, limit)
        self.arena: Arena = parts.arena
        self.ops = [
            *attention_ops(parts),
            *_dense_ops(parts),
            *_expert_ops(parts),
            *_search_ops(parts),
            *encoder_ops(parts),
        ]
        missing = set(self.arena.views) - INPUTS - {name for op in self.ops for name in op.writes}
        assert not missing, f"nothing writes {missing}"

    def run(self) -> None:
        """Launch every op once."""
        for op in self.ops:
            op.launch()

    def run_checked(self, sentences: list[Sentence]) -> list[str]:
        """Launch every op once and hold each against its twin on what it really read; one line for each that is wrong."""
        failures, arena = [], self.arena
        for op in self.ops:
            memory = arena.memory.clone()
            before = arena.views_of(memory)
            op.launch()
            error = op.twin(before, arena.views, sentences)
            if not error <= op.limit:
                failures.append(f"{op.name}: error {error:.2e} against its slow twin")
            touched = [
                n for n, s in arena.spans.items() if n not in op.writes and not torch.equal(memory[s], arena.memory[s])
            ]
            if touched:
                failures.append(f"{op.name}: wrote to {', '.join(touched)}")
        return failures


def _dense_ops(p: Parts) -> list[Op]:
    d, f = p.sizes.d_model, p.sizes.d_ff
    down, bias = p.linear(d, f)
    return [
        p.small_linear("small_linear norm relu", "x", p.folded(f, d), None, "dense_hidden", relu=True),
        p.small_linear("small_linear residual int8 wide", "dense_hidden", quantize_int8(down), bias, "x", add=True),
    ]


def _expert_ops(p: Parts) -> list[Op]:
    """Norm, route and experts once for each kind of tiles; the next norm adds the experts' outputs."""
    z = p.sizes
    up = random_experts(z.experts, z.d_ff, z.d_model, 4, 0, p.dtype, p.generator)
    down = random_experts(z.experts, z.d_model, z.d_ff, 4, 0, p.dtype, p.generator)
    biases = p.draw(z.experts, z.d_ff, scale=0.1), p.draw(z.experts, z.d_model, scale=0.1)
    counters = semaphores(z.entries, p.device)
    ops = []
    for i, tiles in enumerate(EXPERT_TILES):
        ops += [_norm_op(p, i), *_routed_ops(p, i, tiles, counters, (up, biases[0], down, biases[1]))]
    return [*ops, _norm_op(p, len(EXPERT_TILES))]


def _norm_op(p: Parts, i: int) -> Op:
    """Norm number i; it adds what experts i - 1 gave."""
    v, d = p.arena.views, p.sizes.d_model
    weight, bias = 1 + p.draw(d, scale=0.1), p.draw(d, scale=0.1)

    def operands(views: Views) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (views[f"expert_out{i - 1}"], views[f"expert_ids{i - 1}"]) if i else (None, None)

    def launch() -> None:
        delta, ids = operands(v)
        add_layernorm(v["x"], delta, weight, bias, expert_ids=ids, out=v[f"normed{i}"])

    def twin(was: Views, now: Views, _: list[Sentence]) -> float:
        delta, ids = operands(was)
        x, normed = add_layernorm_reference(was["x"], delta, weight, bias, expert_ids=ids)
        return max(error_of_finite_rows(now["x"], x, was["x"]), error_of_finite_rows(now[f"normed{i}"], normed, was["x"]))

    return Op(f"add_layernorm {i}", launch, ("x", f"normed{i}"), twin, p.limit)


def _routed_ops(p: Parts, i: int, tiles: FfnTiles, counters: torch.Tensor, experts: Experts) -> list[Op]:
    v, z = p.arena.views, p.sizes
    router = torch.randn(z.experts, z.d_model, generator=p.generator, device=p.device) * 0.3
    # the counters of the fused launch are left as its programs' timing has it: not a result
    num_tiles = max_tiles(z.entries * z.top_k, z.experts, tiles.block_tokens)
    sync = torch.zeros(sync_size(num_tiles, z.d_model), dtype=torch.int32, device=p.device)
    options = {"top_k": z.top_k, "block_tokens": tiles.block_tokens, "gate_scale": 0.8}

    def routing(views: Views) -> Routing:
        return Routing(**{n: views[f"{n}{i}"] for n in ROUTING}, sync=sync, block_tokens=tiles.block_tokens)

    live = routing(v)

    def route_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        truth = route_reference(was[f"normed{i}"], router, active=was["active"], **options)  # type: ignore[arg-type]
        found = routing(now)
        used, cut = int(truth.expert_offsets[-1]), int(truth.num_tiles)
        same = all(torch.equal(getattr(found, n), getattr(truth, n)) for n in ROUTING_WHOLE)
        same &= torch.equal(found.gather_index[:used], truth.gather_index[:used])
        same &= torch.equal(found.tiles[:cut], truth.tiles[:cut]) and not counters.any() and not sync.any()
        gates = relative_error(found.gate_weights, truth.gate_weights)
        return 0.0 if same and gates <= max(1e-6, torch.finfo(p.dtype).eps) else math.inf

    def ffn_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        active = was[f"expert_ids{i}"] >= 0
        out = now[f"expert_out{i}"]
        if not out[~active].isnan().all():
            return math.inf
        truth = expert_ffn_reference(was[f"normed{i}"], *experts, routing(was), dtype=torch.float64)
        return relative_error(out[active], truth[active])

    return [
        Op(
            f"route {i}",
            lambda: route(
                v[f"normed{i}"],
                router,
                semaphores=counters,
                active=v["active"],
                out=live,
                **options,  # type: ignore[arg-type]
            ),
            tuple(f"{n}{i}" for n in ROUTING),
            route_twin,
            0.0,
        ),
        Op(
            f"expert_ffn {i} ({'fused' if tiles.fused else 'plain'})",
            lambda: expert_ffn(
                v[f"normed{i}"], *experts, live, tiles=tiles, hidden=v[f"expert_hidden{i}"], out=v[f"expert_out{i}"]
            ),
            (f"expert_hidden{i}", f"expert_out{i}"),
            ffn_twin,
            p.limit,
        ),
    ]


def _search_ops(p: Parts) -> list[Op]:
    z, v = p.sizes, p.arena.views
    head = p.draw(-(-z.vocab // 64) * 64, z.d_model, scale=3 * z.d_model**-0.5)
    head[z.vocab :] = float("nan")
    final = f"normed{len(EXPERT_TILES)}"
    # which logits gated tiles write depends on timing: not a result
    logits = torch.full((z.entries, head.shape[0]), float("nan"), device=p.device)
    out = TopTokens(v["values"], v["top_ids"], v["log_sum_exp"])

    def head_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        idle = was[final].isnan().any(1)
        if not now["values"][idle].isnan().all() or now["top_ids"][idle].any() or not now["log_sum_exp"][idle].isnan().all():
            return math.inf
        found = TopTokens(*(now[n][~idle] for n in ("values", "top_ids", "log_sum_exp")))
        return head_error(found, was[final][~idle], head, z.vocab, was["banned"][~idle]) if (~idle).any() else 0.0

    def search_twin(was: Views, now: Views, sentences: list[Sentence]) -> float:
        differ = tables_differ(sentences, tables_of(was), tables_of(now), was["values"], was["top_ids"])
        return math.inf if differ else 0.0

    return [
        Op(
            "head_topk",
            lambda: head_topk(
                v[final], head, k=CANDIDATES, vocab_size=z.vocab, banned=v["banned"], logits_scratch=logits, out=out
            ),
            ("values", "top_ids", "log_sum_exp"),
            head_twin,
            HEAD_LIMIT,
        ),
        Op(
            "advance_sentences",
            lambda: advance_sentences(
                v["values"],
                v["top_ids"],
                v["group_slots"],
                v["group_starts"],
                v["group_counts"],
                v["entry_beams"],
                p.tables,
                eos_token_id=EOS,
            ),
            ADVANCED,
            search_twin,
            0.0,
        ),
    ]
