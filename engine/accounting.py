"""Parameters, bytes and FLOPs of an NLLB-MoE, counted by hand from ModelConfig. Torch-free.

Legend: d d_model, f feed-forward width, E experts, V vocabulary, S source tokens, T target tokens, A = 4 (d*d + d).

    one feed-forward = one expert   2 d f + f + d
    encoder layer                   A + 2 * 2d + (feed-forward | E experts + router E d)
    decoder layer                  2A + 3 * 2d + (feed-forward | E experts + router E d)

A FLOP is one multiplication or addition: a matrix product [T, K] x [K, N] costs 2 T K N. GB is 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import PRECISIONS, EngineConfig, ModelConfig, QuantScheme

Stack = Literal["encoder", "decoder"]
_SCALE_BYTES = 2
_FP32_BYTES = 4
_VOCABULARY_ALIGNMENT = 64  # rows of the output projection
_ROUTER_PARTS = 16  # the most parts of d that the router's products are cut into; their sums are float32
_CHUNK = 64  # features of a part of the products that the map before a router leaves
_NGRAM_LOGITS = 2  # a step with n-gram rules holds logits by row, too, and while it makes those a reordered copy
_LIBRARY_WORKSPACE_BYTES = 64 << 20  # cuBLAS keeps 32 MiB a stream on Hopper: one captures passes, one sets up
_DRIVER_BYTES = 1550 << 20  # H100, CUDA 13: 606 MiB of context, the rest code and 64 captured passes
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNQUANTIZED_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters by group. `dense` is attention, dense feed-forwards and all norms; `embedding` has the output projection in
    it where that is a matrix of its own."""

    expert_matrices: int
    expert_biases: int
    routers: int
    embedding: int
    dense: int

    @property
    def experts(self) -> int:
        """Matrices and biases of all experts."""
        return self.expert_matrices + self.expert_biases

    @property
    def rest(self) -> int:
        """Everything that is never quantized: all but the expert matrices."""
        return self.expert_biases + self.routers + self.embedding + self.dense

    @property
    def total(self) -> int:
        """All parameters, the shared embedding once."""
        return self.expert_matrices + self.rest


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes one engine will hold.

    experts_bytes: expert matrices in canonical form. rest_bytes: all other weights. layout_copies_bytes: second copies
    that CPU kernels want (decoder's int4 codes, a tied output projection). kv_cache_bytes: self- and cross-attention cache.
    workspace_bytes: on a GPU, what the largest captured pass needs beside them, and library workspaces. driver_bytes: what
    the driver takes there for its context, the code of kernels and captured graphs; measured, and not torch's. ngram_bytes:
    what the first step with an n-gram rule takes there on top, if one is ever asked for.
    """

    experts_bytes: int
    rest_bytes: int
    layout_copies_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int = 0
    driver_bytes: int = 0
    ngram_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What the engine holds through torch; beside it activations on a CPU, `driver_bytes` and `ngram_bytes` on a GPU."""
        weights = self.experts_bytes + self.rest_bytes + self.layout_copies_bytes
        return weights + self.kv_cache_bytes + self.workspace_bytes


def num_sparse_layers(config: ModelConfig, stack: Stack) -> int:
    """Layers of the stack that hold experts."""
    layers = config.encoder_layers if stack == "encoder" else config.decoder_layers
    return sum(config.is_sparse(stack, layer) for layer in range(layers))


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Closed forms of the header."""
    d, experts = config.d_model, config.num_experts
    attention = 4 * (d * d + d)
    matrices = biases = routers = dense_ffn = 0
    for layers, sparse, f in _stacks(config):
        matrices += sparse * experts * 2 * d * f
        biases += sparse * experts * (f + d)
        routers += sparse * experts * (d + config.router_bias)
        dense_ffn += (layers - sparse) * (2 * d * f + f + d)
    attentions = config.encoder_layers + 2 * config.decoder_layers
    norms = 2 * config.encoder_layers + 3 * config.decoder_layers + 2
    return ParameterCounts(
        expert_matrices=matrices,
        expert_biases=biases,
        routers=routers,
        embedding=config.vocab_size * d * (1 if config.tie_word_embeddings else 2),
        dense=attentions * attention + norms * 2 * d + dense_ffn,
    )


def matrix_bytes(out_features: int, in_features: int, precision: str) -> int:
    """Bytes of one expert matrix [N, K]: codes and one 2-byte scale per output feature and group."""
    scheme = QuantScheme.from_name(precision)
    if scheme is None:
        return out_features * in_features * _UNQUANTIZED_BYTES[precision]
    code_bytes = in_features if scheme.bits == 8 else (in_features + 1) // 2
    groups = 1 if scheme.group_size is None else -(-in_features // scheme.group_size)
    return out_features * (code_bytes + _SCALE_BYTES * groups)


def expert_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of all expert matrices at `precision` (one of PRECISIONS); biases are not among them."""
    d = config.d_model
    return sum(
        sparse * config.num_experts * (matrix_bytes(f, d, precision) + matrix_bytes(d, f, precision))
        for _, sparse, f in _stacks(config)
    )


def rest_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Bytes of everything but the expert matrices at `item_bytes` per value; routers always compute in fp32."""
    counts = count_parameters(config)
    return (counts.rest - counts.routers) * item_bytes + counts.routers * 4


def model_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of the whole model at `precision`; quantized precisions keep the rest in 2 bytes per value."""
    return expert_bytes(config, precision) + rest_bytes(config, 4 if precision == "fp32" else 2)


def kv_bytes_per_row(config: ModelConfig, max_target_tokens: int, item_bytes: int) -> int:
    """Self-attention cache of one live row: a key and a value per decoder layer and position."""
    return 2 * config.d_model * config.decoder_layers * max_target_tokens * item_bytes


def kv_bytes_per_slot(config: ModelConfig, max_source_tokens: int, item_bytes: int) -> int:
    """Cross-attention cache of one sentence: a key and a value per decoder layer and source token."""
    return 2 * config.d_model * config.decoder_layers * max_source_tokens * item_bytes


def encoder_flops_per_token(config: ModelConfig, source_tokens: int) -> int:
    """FLOPs of the encoder for one token of a source of S tokens, softmax and norms left out."""
    d = config.d_model
    attention = config.encoder_layers * (8 * d * d + 4 * source_tokens * d)
    return attention + _feed_forward_flops(config, "encoder")


def cross_kv_flops_per_token(config: ModelConfig) -> int:
    """FLOPs to project one source token to the keys and values of all decoder layers, once per sentence."""
    return config.decoder_layers * 4 * config.d_model * config.d_model


def decoder_flops_per_row(config: ModelConfig, source_tokens: int, target_tokens: int) -> int:
    """FLOPs of one decode step for one row that attends to S source and T target tokens, output projection included."""
    d = config.d_model
    attention = config.decoder_layers * (12 * d * d + 4 * (source_tokens + target_tokens) * d)
    return attention + _feed_forward_flops(config, "decoder") + 2 * d * config.vocab_size


def plan_memory(config: ModelConfig, engine_config: EngineConfig) -> MemoryPlan:
    """Bytes that an engine with these limits will hold on its device."""
    item_bytes = _ITEM_BYTES[engine_config.compute_dtype]
    scheme = engine_config.quant_scheme
    if scheme is None:
        experts = count_parameters(config).expert_matrices * item_bytes
    else:
        experts = expert_bytes(config, engine_config.precision)
    copies = 0
    if engine_config.device == "cpu" and engine_config.compute_dtype != "float16":
        copies = config.vocab_size * config.d_model * item_bytes if config.tie_word_embeddings else 0
        if engine_config.compute_dtype == "bfloat16" and scheme is not None and scheme.bits == 4:
            copies += _decoder_share(config, experts)
    rows = engine_config.max_rows * kv_bytes_per_row(config, engine_config.max_target_tokens + 1, item_bytes)
    slots = engine_config.max_source_slots * kv_bytes_per_slot(config, engine_config.max_source_tokens, item_bytes)
    rest, cache = rest_bytes(config, item_bytes), rows + slots
    if not engine_config.device.startswith("cuda"):
        return MemoryPlan(experts, rest, copies, cache)
    rest += _folded_router_bytes(config, engine_config)
    if engine_config.int8_dense:
        rest += _int8_change(config, item_bytes)
    workspace = _workspace_bytes(config, engine_config, item_bytes)
    ngram = _NGRAM_LOGITS * _entries(engine_config) * _logit_bytes(config)
    return MemoryPlan(experts, rest, copies, cache, workspace, _DRIVER_BYTES, ngram)


def fitting_precisions(config: ModelConfig, available_bytes: int) -> tuple[str, ...]:
    """Precisions whose whole model, without cache and activations, is at most `available_bytes`; best quality first."""
    return tuple(name for name in PRECISIONS if model_bytes(config, name) <= available_bytes)


def _workspace_bytes(config: ModelConfig, engine_config: EngineConfig, item_bytes: int) -> int:
    """Captured passes run one at a time and share one pool, so the largest decode step or encoder pass counts; then the
    router's partial sums (given back when its layer is done, but as a block of a size of its own), the products that linear
    maps split, one buffer a stack, the lists of histories, and the workspaces of the GEMM library.

    A step holds the logits in float32 (each entry may be a live row or the start token of a new sentence), an encoder pass
    the outputs of its experts or the keys and values of all decoder layers.
    """
    d, active = config.d_model, config.num_experts_per_tok
    entries, tokens = _entries(engine_config), engine_config.encode_token_budget
    step = entries * (_logit_bytes(config) + item_bytes * (active * (config.decoder_ffn_dim + d) + 4 * d))
    # 20,800 values a token measured on an H100 (d 1,024, feed-forward 4,096, pass of 8,192 tokens)
    experts = active * (config.encoder_ffn_dim + d) + 10 * d
    encoder = tokens * item_bytes * max(experts, 2 * d * config.decoder_layers + 2 * d)
    widest = max(3 * d, config.encoder_ffn_dim, config.decoder_ffn_dim)
    maps = item_bytes * widest * (tokens + entries)
    lists = _history_list_bytes(entries, engine_config.max_target_tokens)
    return max(step, encoder) + _router_bytes(config, engine_config) + maps + lists + _LIBRARY_WORKSPACE_BYTES


def _entries(engine_config: EngineConfig) -> int:
    """Most entries of a step: live rows, and the start tokens of new sentences."""
    return engine_config.max_rows + engine_config.max_source_slots


def _logit_bytes(config: ModelConfig) -> int:
    """One entry's logits in float32, padded as the head writes them."""
    return _FP32_BYTES * _round_up(config.vocab_size, _VOCABULARY_ALIGNMENT)


def _history_list_bytes(entries: int, max_target_tokens: int) -> int:
    """Where a step lists the cells that its sentences attend to: a list for each entry of the largest step, each for eight
    beams that share no position. Held on Hopper and unless `batch_invariant`, planned everywhere: it is little."""
    words = _round_up(8 * max_target_tokens, 16) + 32
    return 4 * (1 + _round_up(entries, 16) * (words + 4))


def _router_bytes(config: ModelConfig, engine_config: EngineConfig) -> int:
    """Partial sums of the router in the larger of the passes that route: a value for each part of d, token and expert,
    experts rounded up to a power of two from 16 on. In a decoder step the map before may leave them, by chunks of d."""
    parts = max(_ROUTER_PARTS, config.d_model // _CHUNK) if _folds_routers(config, engine_config) else _ROUTER_PARTS
    sizes = (engine_config.encode_token_budget * _ROUTER_PARTS, _entries(engine_config) * parts)
    routed = [size for size, (_, sparse, _) in zip(sizes, _stacks(config), strict=True) if sparse]
    experts = max(16, 1 << (config.num_experts - 1).bit_length())
    return _FP32_BYTES * experts * max(routed, default=0)


def _folds_routers(config: ModelConfig, engine_config: EngineConfig) -> bool:
    """Whether the decoder holds its routers a second time, multiplied by the norm before them (`kernels.route.folded`)."""
    d = config.d_model
    return (
        engine_config.compute_dtype == "bfloat16" and config.num_experts in (16, 32, 64) and d >= _CHUNK and d & (d - 1) == 0
    )


def _folded_router_bytes(config: ModelConfig, engine_config: EngineConfig) -> int:
    """Three bf16 parts of every router of the decoder, and two float32 sums an expert."""
    if not _folds_routers(config, engine_config):
        return 0
    return num_sparse_layers(config, "decoder") * config.num_experts * (3 * 2 * config.d_model + 2 * _FP32_BYTES)


def _int8_change(config: ModelConfig, item_bytes: int) -> int:
    """Bytes that `int8_dense` adds (negative: saves): maps of the decoder to queries, keys and values and to dense
    feed-forward layers take the place of the plain ones, and so does an output projection of its own; one that is tied
    stands beside the embedding, whose rows are looked up as they are. Every output channel has a float32 scale."""
    d = config.d_model
    dense = config.decoder_layers - num_sparse_layers(config, "decoder")
    channels = config.decoder_layers * 3 * d + dense * config.decoder_ffn_dim
    head = _round_up(config.vocab_size, _VOCABULARY_ALIGNMENT) * (d + _FP32_BYTES)
    head -= 0 if config.tie_word_embeddings else config.vocab_size * d * item_bytes
    return head - channels * (d * (item_bytes - 1) - _FP32_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _stacks(config: ModelConfig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(layers, sparse layers, feed-forward width) of the encoder and the decoder."""
    return (
        (config.encoder_layers, num_sparse_layers(config, "encoder"), config.encoder_ffn_dim),
        (config.decoder_layers, num_sparse_layers(config, "decoder"), config.decoder_ffn_dim),
    )


def _decoder_share(config: ModelConfig, experts_bytes: int) -> int:
    """Bytes of the decoder's experts: the int4 kernel for few tokens wants its own copy of them."""
    weights = [sparse * f for _, sparse, f in _stacks(config)]
    return experts_bytes * weights[1] // sum(weights) if sum(weights) else 0


def _feed_forward_flops(config: ModelConfig, stack: Stack) -> int:
    layers, sparse, f = _stacks(config)[stack == "decoder"]
    one = 4 * config.d_model * f
    router = 2 * config.d_model * config.num_experts
    return (layers - sparse) * one + sparse * (config.num_experts_per_tok * one + router)
