"""Bytes that one decode step must read, by kind of launch: what memory bandwidth alone would allow. Torch-free.

Legend: d d_model, f decoder feed-forward width, L decoder layers, V vocabulary, S source tokens, T target tokens.

    dense layer part   self-attention 4 (d d + d), cross-attention 2 (d d + d) (keys and values were projected once),
                       three norms, each with the map or router behind it, and a feed-forward 2 d f + f + d where the layer
                       is dense
    sparse layer       router, and the matrices and biases of the experts that the step's rows go to
    once               final norm, output projection V d
    int8_dense         1 byte for a weight of 3 d d of self-attention, d f of a dense feed-forward, and V d
    cache              per row the keys and values of T / 2 positions on average, per sentence those of S tokens
"""

from __future__ import annotations

from enum import StrEnum

from engine.accounting import matrix_bytes, num_sparse_layers
from engine.bench.shapes import Cell
from engine.config import EngineConfig, ModelConfig

_ROUTER_BYTES = 4


class StepPart(StrEnum):
    """Kinds of launches of a decode step, in the order of tables."""

    EXPERTS = "experts"
    QKV = "QKV map"
    SELF_OUT = "self out map"
    QUERY = "query map"
    CROSS_OUT = "cross out map"
    FIRST_DENSE = "first dense map"
    SECOND_DENSE = "second dense map"
    HEAD = "head and merge"
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"
    ROUTER = "router"
    SUMS = "sums and norms"
    SEARCH = "search and embedding"


def step_bytes_by_part(
    config: ModelConfig,
    engine: EngineConfig,
    cell: Cell,
    *,
    experts_touched: float,
    source_tokens: int,
    target_tokens: int,
) -> dict[StepPart, float]:
    """Mean over the steps, every part named. experts_touched: distinct experts per sparse layer."""
    item_bytes = 4 if engine.compute_dtype == "float32" else 2
    weight_bytes = 1 if engine.int8_dense else item_bytes  # of the maps that int8_dense is about
    d, f, layers = config.d_model, config.decoder_ffn_dim, config.decoder_layers
    sparse = num_sparse_layers(config, "decoder")
    dense = layers - sparse
    norm = 2 * d * item_bytes
    out_map = (d * d + d) * item_bytes
    expert = matrix_bytes(f, d, engine.precision) + matrix_bytes(d, f, engine.precision) + (f + d) * item_bytes
    cached = 2 * d * layers * item_bytes
    return {
        StepPart.EXPERTS: sparse * experts_touched * expert,
        StepPart.QKV: layers * (3 * d * d * weight_bytes + 3 * d * item_bytes + norm),
        StepPart.SELF_OUT: layers * out_map,
        StepPart.QUERY: layers * (out_map + norm),
        StepPart.CROSS_OUT: layers * out_map,
        StepPart.FIRST_DENSE: dense * (d * f * weight_bytes + f * item_bytes + norm),
        StepPart.SECOND_DENSE: dense * (d * f + d) * item_bytes,
        StepPart.HEAD: config.vocab_size * d * weight_bytes,
        StepPart.SELF_ATTENTION: cached * cell.rows * target_tokens / 2,
        StepPart.CROSS_ATTENTION: cached * cell.batch * source_tokens,
        StepPart.ROUTER: sparse * (config.num_experts * d * _ROUTER_BYTES + norm),
        StepPart.SUMS: norm,
        StepPart.SEARCH: 0,
    }


def decode_step_bytes(
    config: ModelConfig,
    engine: EngineConfig,
    cell: Cell,
    *,
    experts_touched: float,
    source_tokens: int,
    target_tokens: int,
) -> int:
    """Sum of `step_bytes_by_part`."""
    parts = step_bytes_by_part(
        config,
        engine,
        cell,
        experts_touched=experts_touched,
        source_tokens=source_tokens,
        target_tokens=target_tokens,
    )
    return round(sum(parts.values()))
