"""The attention half of kernels.replay_check's step: from what the host hands over to cross attention, and the encoder's."""

from __future__ import annotations

import math

import torch

from kernels.beam_search import StepInputs, step_inputs
from kernels.decode_attention import (
    decode_cross_attention,
    decode_cross_attention_reference,
    decode_self_attention,
    decode_self_attention_reference,
)
from kernels.embed import embed, embed_reference
from kernels.encoder_attention import encoder_attention, encoder_attention_reference
from kernels.replay_memory import Views, inputs_of
from kernels.replay_parts import PAD, Op, Parts, error_of_finite_rows, same
from kernels.replay_search import EOS, START, Sentence, inputs_differ
from kernels.small_linear import qkv_linear, qkv_linear_reference, quantize_int8
from kernels.testing import relative_error


def attention_ops(p: Parts) -> list[Op]:
    """From what the host hands over to the end of cross attention."""
    z, v, d = p.sizes, p.arena.views, p.sizes.d_model
    table, places, qkv = p.table, p.places, p.folded(3 * d, d)
    self_out, query, cross_out = p.linear(d, d), p.folded(d, d, int8=True), p.linear(d, d)

    def qkv_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        truth_q, truth_cells = qkv_linear_reference(was["x"], qkv, None, was["cells"], was["rows"], was["positions"])
        live = was["rows"] >= 0
        at = was["rows"][live].long(), was["positions"][live].long()
        kept = now["cells"].clone()
        kept[at] = was["cells"][at]
        if not same(kept, was["cells"]):
            return math.inf
        return max(error_of_finite_rows(now["q"], truth_q, was["x"]), relative_error(now["cells"][at], truth_cells[at]))

    def self_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        operands = (was[n] for n in ("q", "cells", "ancestry", "rows", "positions"))
        idle = was["rows"] < 0
        if not now["attended"][idle].eq(0).all():
            return math.inf
        return relative_error(now["attended"], decode_self_attention_reference(*operands, num_heads=z.heads))

    cross = ("cross_cells", "source_lengths", "group_slots", "group_starts", "group_counts")

    def cross_twin(was: Views, now: Views, sentences: list[Sentence]) -> float:
        truth = decode_cross_attention_reference(was["q_cross"], *(was[n] for n in cross), num_heads=z.heads)
        outside = torch.ones(z.entries, dtype=torch.bool, device=p.device)
        for s in sentences:
            outside[s.first_entry : s.first_entry + s.num_entries] = False
        if not now["attended_cross"][outside].isnan().all():
            return math.inf
        return error_of_finite_rows(now["attended_cross"], truth, truth)

    def embed_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        truth = embed_reference(was["token_ids"], was["positions"], table, places, scale=d**0.5, pad_token_id=PAD)
        return 0.0 if same(now["x"], truth) else math.inf

    return [
        Op(
            "step_inputs",
            lambda: step_inputs(
                v["entry_slots"],
                v["entry_beams"],
                p.tables,
                start_token_id=START,
                eos_token_id=EOS,
                out=p.inputs,
            ),
            tuple(StepInputs.__slots__),
            lambda was, now, sentences: math.inf if inputs_differ(sentences, inputs_of(now)) else 0.0,
            0.0,
        ),
        Op(
            "embed",
            lambda: embed(
                v["token_ids"],
                v["positions"],
                table,
                places,
                scale=d**0.5,
                pad_token_id=PAD,
                out=v["x"],
                statistics=p.statistics,
            ),
            ("x",),
            embed_twin,
            0.0,
        ),
        Op(
            "qkv_linear norm",
            lambda: qkv_linear(
                v["x"],
                qkv,
                None,
                v["cells"],
                v["rows"],
                v["positions"],
                q_out=v["q"],
                scratch=p.scratch,
                statistics=p.statistics,
            ),
            ("q", "cells"),
            qkv_twin,
            p.limit,
        ),
        Op(
            "decode_self_attention",
            lambda: decode_self_attention(
                *(v[n] for n in ("q", "cells", "ancestry", "rows", "positions")), num_heads=z.heads, out=v["attended"]
            ),
            ("attended",),
            self_twin,
            p.limit,
        ),
        p.small_linear("small_linear residual", "attended", *self_out, "x", add=True),
        p.small_linear("small_linear norm int8", "x", query, None, "q_cross"),
        Op(
            "decode_cross_attention",
            lambda: decode_cross_attention(v["q_cross"], *(v[n] for n in cross), num_heads=z.heads, out=v["attended_cross"]),
            ("attended_cross",),
            cross_twin,
            p.limit,
        ),
        p.small_linear(
            "small_linear residual int8", "attended_cross", quantize_int8(cross_out[0]), cross_out[1], "x", add=True
        ),
    ]


def encoder_ops(p: Parts) -> list[Op]:
    """A pack of source sentences through embedding and attention."""
    z, v, d = p.sizes, p.arena.views, p.sizes.d_model
    table, places = p.table, p.places
    out = p.linear(d, d)
    ranges = ("token_starts", "token_ends")

    def embed_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        options = {"scale": d**0.5, "pad_token_id": PAD, "position_rows": was["source_positions"]}
        truth = embed_reference(was["source_ids"], None, table, places, **options)
        return 0.0 if same(now["source_x"], truth) else math.inf

    def attention_twin(was: Views, now: Views, _: list[Sentence]) -> float:
        padding = was["token_starts"] == was["token_ends"]
        if not now["source_attended"][padding].eq(0).all():
            return math.inf
        truth = encoder_attention_reference(was["source_qkv"], *(was[n] for n in ranges), num_heads=z.heads)
        return relative_error(now["source_attended"], truth)

    return [
        Op(
            "embed source",
            lambda: embed(
                v["source_ids"],
                None,
                table,
                places,
                scale=d**0.5,
                pad_token_id=PAD,
                position_rows=v["source_positions"],
                out=v["source_x"],
            ),
            ("source_x",),
            embed_twin,
            0.0,
        ),
        p.small_linear("small_linear norm source", "source_x", p.folded(3 * d, d), None, "source_qkv"),
        Op(
            "encoder_attention",
            lambda: encoder_attention(v["source_qkv"], *(v[n] for n in ranges), num_heads=z.heads, out=v["source_attended"]),
            ("source_attended",),
            attention_twin,
            p.limit,
        ),
        p.small_linear("small_linear residual source", "source_attended", *out, "source_x", add=True),
    ]
