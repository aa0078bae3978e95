"""Bytes that one decode step must read: what memory bandwidth alone would allow. Torch-free.

Legend: d d_model, f decoder feed-forward width, L decoder layers, V vocabulary, S source tokens, T target tokens.

    dense layer part   self-attention 4 (d d + d), cross-attention 2 (d d + d) (keys and values were projected once),
                       three norms, and a feed-forward 2 d f + f + d where the layer is dense
    sparse layer       router, and the matrices and biases of the experts that the step's rows go to
    once               final norm, output projection V d
    int8_dense         1 byte for a weight of 3 d d of self-attention, d f of a dense feed-forward, and V d
    cache              per row the keys and values of T / 2 positions on average, per sentence those of S tokens
"""

from __future__ import annotations

from engine.accounting import matrix_bytes, num_sparse_layers
from engine.bench.shapes import Cell
from engine.config import EngineConfig, ModelConfig

_ROUTER_BYTES = 4


def decode_step_bytes(
    config: ModelConfig,
    engine: EngineConfig,
    cell: Cell,
    *,
    experts_touched: float,
    source_tokens: int,
    target_tokens: int,
) -> int:
    """Mean over the steps. experts_touched: distinct experts per sparse layer."""
    item_bytes = 4 if engine.compute_dtype == "float32" else 2
    d, f, layers = config.d_model, config.decoder_ffn_dim, config.decoder_layers
    sparse = num_sparse_layers(config, "decoder")
    attention = layers * (6 * (d * d + d) + 6 * d)
    dense = attention + (layers - sparse) * (2 * d * f + f + d) + 2 * d + config.vocab_size * d
    in_int8 = layers * 3 * d * d + (layers - sparse) * d * f + config.vocab_size * d if engine.int8_dense else 0
    expert = matrix_bytes(f, d, engine.precision) + matrix_bytes(d, f, engine.precision) + (f + d) * item_bytes
    experts = sparse * (experts_touched * expert + config.num_experts * d * _ROUTER_BYTES)
    cache = 2 * d * layers * (cell.rows * target_tokens / 2 + cell.batch * source_tokens)
    return round(dense * item_bytes - in_int8 * (item_bytes - 1) + experts + cache * item_bytes)
