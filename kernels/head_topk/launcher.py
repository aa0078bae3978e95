"""Launcher of `head_topk`. R rows, D features, V vocabulary, V_pad stored rows of the head, k tokens a row."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kernels.head_topk.constants import (
    MAX_PROGRAMS,
    PACK,
    chunk_constants,
    chunk_options,
    merge_constants,
    start_constants,
)
from kernels.head_topk.operands import TopTokens
from kernels.head_topk.tiles import HeadTiles, select_tiles
from kernels.int8_linear import Int8Linear
from kernels.launch import check, overlap
from kernels.quantized_rows import QuantizedRows, check_quantized

_MAX_K = 17  # two tokens for each of eight beams, and one
_MERGE_WARPS = 4
_MAX_CHUNKS = 8192  # the second launch holds one number for each in registers


def head_topk(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear,
    *,
    k: int,
    vocab_size: int,
    banned: torch.Tensor | None = None,
    logits_scratch: torch.Tensor | None = None,
    out: TopTokens | None = None,
    tiles: HeadTiles | None = None,
) -> TopTokens:
    """The k best next tokens of every row, by log-probability: log_softmax(x W^T) and its top k in one pass over W.

    x fp32/bf16/fp16[R, D], already normalised; weight [V_pad, D] in x's dtype, or an `Int8Linear`. x as `QuantizedRows`
    takes an `Int8Linear`: products of codes are summed exactly, then scaled by token and by row. Rows of the weight from
    vocab_size on are padding and are not read. Logits are accumulated and compared in fp32; values are logit -
    log_sum_exp, best first; equal values: lowest token id first. banned int32[R]: one token id that a row may not choose
    (-1: none); it still counts in log_sum_exp. A row with NaN or +inf among its logits (or nothing but -inf) gets NaN
    values and log_sum_exp and token id 0; other rows do not notice. logits_scratch: fp32[>= R, >= vocab_size] for the
    logits that are read again, in an order of the kernels' own (gated tiles write a part of them only); out: result of
    an earlier call to overwrite; both are allocated when missing. tiles: default select_tiles; with fixed_tiles a row's
    bits do not depend on R or on other rows. Two launches (gated or specialized tiles: three), no host sync, same bits
    every run.
    Raises ValueError for arguments that do not belong together.
    """
    num_rows, num_features = x.shape
    _check(x, weight, k, vocab_size, banned)
    out = _empty_result(x, k) if out is None else out
    check(
        out.values.shape == (num_rows, k) and out.token_ids.shape == (num_rows, k) and out.log_sum_exp.shape == (num_rows,),
        f"out is for {tuple(out.values.shape)} values; make it [{num_rows}, {k}]",
    )
    bits = 8 if isinstance(weight, Int8Linear) else 16
    codes = x.codes if isinstance(x, QuantizedRows) else x
    tiles = tiles or select_tiles(num_rows, num_features, vocab_size, bits, x.device, codes.dtype)
    num_chunks = -(-vocab_size // tiles.chunk)
    check(num_chunks <= _MAX_CHUNKS, f"{num_chunks} chunks of the vocabulary; choose tiles with a larger block_vocab")
    check(
        not tiles.online or codes.dtype == torch.int8 or (bits == 16 and tiles.block_features <= 64),
        "online tiles take int8 rows, or 16-bit rows and weights with block_features to 64: choose tiles with online=False",
    )
    # int8 codes come through the plain kernel's descriptors wrong now and then (Triton 3.6, H100, 64 rows and more).
    check(
        not tiles.tma or bits == 16 or (tiles.specialized and codes.dtype == torch.int8),
        "tensor descriptors are for 16-bit weights, and for int8 rows with specialized tiles: choose tiles with tma=False",
    )
    check(
        not tiles.specialized or (codes.dtype != torch.float32 and codes.is_cuda and _properties(x.device).major == 9),
        "specialized tiles need bf16, fp16 or int8 rows on compute capability 9.x: choose others",
    )
    check(not tiles.tma or num_features % 16 == 0, f"{num_features} features; tensor descriptors need a multiple of 16")
    if logits_scratch is None:
        logits_scratch = torch.empty((num_rows, -(-vocab_size // 64) * 64), dtype=torch.float32, device=x.device)
    check(
        logits_scratch.dtype == torch.float32
        and logits_scratch.is_contiguous()
        and logits_scratch.shape[0] >= num_rows
        and logits_scratch.shape[1] >= vocab_size,
        f"logits_scratch must be contiguous fp32[>= {num_rows}, >= {vocab_size}]",
    )
    check(
        not tiles.online or isinstance(weight, torch.Tensor) or weight.scales.data_ptr() % 16 == 0,
        "online tiles read scales through a tensor descriptor: the head's scales must begin at a multiple of 16 bytes",
    )
    check(
        not tiles.online or logits_scratch.data_ptr() % 8 == 0,
        "online tiles store two logits at a time: logits_scratch must begin at a multiple of 8 bytes",
    )
    if num_rows:
        _launch(x, weight, k, vocab_size, banned, logits_scratch, out, tiles)
    return out


def _launch(
    x: torch.Tensor | QuantizedRows,
    weight: torch.Tensor | Int8Linear,
    k: int,
    vocab_size: int,
    banned: torch.Tensor | None,
    logits: torch.Tensor,
    out: TopTokens,
    tiles: HeadTiles,
) -> None:
    from kernels.head_topk.kernel import head_chunk_kernel, head_start_kernel
    from kernels.head_topk.merge import head_merge_kernel

    num_rows, num_features = x.shape
    matrix, scales = (weight.codes, weight.scales) if isinstance(weight, Int8Linear) else (weight, logits)
    x, row_scales = x if isinstance(x, QuantizedRows) else (x, logits)
    tile_rows = tiles.block_rows + tiles.extra_rows
    row_tiles, vocab_tiles = -(-num_rows // tile_rows), -(-vocab_size // tiles.block_vocab)
    padded_rows = row_tiles * tile_rows if tiles.online else num_rows
    # apart: a piece of one allocation might not be aligned, and Triton compiles another kernel for an unaligned pointer
    num_packs = -(-vocab_size // (tiles.chunk * PACK))
    partials = logits.new_empty((num_packs, padded_rows, PACK) if tiles.online else (num_packs, num_rows, PACK, 2))
    sums, programs = partials, 0
    if tiles.online:  # a program's tiles are of the same rows
        programs = min(vocab_tiles, MAX_PROGRAMS, max(1, _properties(x.device).multi_processor_count // row_tiles))
        sums = logits.new_empty((programs, padded_rows, 2))
    banned_logits = partials if tiles.online else logits.new_empty(num_rows)
    bits, has_banned = 8 if isinstance(weight, Int8Linear) else 16, banned is not None
    given = out.token_ids if banned is None else banned
    thresholds, flags = given, given  # for tiles that read neither
    constants = chunk_constants(num_features, vocab_size, k, bits, has_banned, tiles)
    if tiles.gated or tiles.specialized:
        num_thresholds = constants["GROUPS"] * padded_rows
        thresholds = given.new_empty(num_thresholds)
        start = start_constants(vocab_size, has_banned, tiles)
        flags = given.new_empty(vocab_tiles) if start["FLAGS"] else thresholds
        head_start_kernel[(1,)](thresholds, flags, given, num_thresholds, num_rows, vocab_size, **start, **overlap(x))
    inputs = operands(x, matrix[:vocab_size], tiles)
    num_tiles = vocab_tiles * row_tiles
    outputs = (partials, banned_logits, logits, num_rows, vocab_size)
    options = {**constants, **chunk_options(tiles), **overlap(x)}
    if tiles.online:
        from kernels.head_topk.online import head_online_kernel

        token_and_row = (token_scales(scales[:vocab_size]), row_scales) if bits == 8 else (None, None)
        written = (partials, sums, logits, *token_and_row, num_rows, vocab_size)
        head_online_kernel[(programs * row_tiles,)](*inputs[:2], given, thresholds, *written, num_tiles, **options)
    elif tiles.specialized:
        from kernels.head_topk.specialized import head_specialized_kernel

        grid = (min(num_tiles, _properties(x.device).multi_processor_count),)
        head_specialized_kernel[grid](*inputs, row_scales, scales, given, thresholds, flags, *outputs, num_tiles, **options)
    else:
        head_chunk_kernel[(num_tiles,)](*inputs, row_scales, scales, given, thresholds, *outputs, **options)
    head_merge_kernel[(num_rows,)](
        partials,
        sums,
        given,
        banned_logits,
        logits,
        row_scales,
        out.values,
        out.token_ids,
        out.log_sum_exp,
        num_rows,
        padded_rows,
        programs,
        vocab_size,
        **merge_constants(k, vocab_size, bits, has_banned, tiles),
        num_warps=_MERGE_WARPS,
        **overlap(x),
    )


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def operands(x: torch.Tensor, matrix: torch.Tensor, tiles: HeadTiles) -> tuple[Any, ...]:
    """The kernel's x, w and x_rest: tensors, or tensor descriptors, whose reads past the end give zeros."""
    if not tiles.tma:
        return x, matrix, x
    if tiles.specialized:
        return (
            _swizzled(x, 64 if tiles.online else tiles.block_rows // 2, tiles),
            _swizzled(matrix, tiles.block_vocab, tiles),
            _swizzled(x, 64, tiles),
        )
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(tensor: torch.Tensor, rows: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [rows, tiles.block_features])

    return describe(x, tiles.block_rows), describe(matrix, tiles.block_vocab), describe(x, tiles.extra_rows or 16)


def _swizzled(tensor: torch.Tensor, rows: int, tiles: HeadTiles) -> Any:
    """A descriptor that also names the layout of its blocks in shared memory, which Gluon leaves to its user."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, int8
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [rows, tiles.block_features]
    dtype = {torch.bfloat16: bfloat16, torch.float16: float16, torch.int8: int8}[tensor.dtype]
    layout = NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(tensor, block, layout)


def token_scales(scales: torch.Tensor) -> Any:
    """A descriptor of the scales fp32[V] of an int8 head's tokens, read a chunk at a time."""
    from triton.experimental.gluon.language import NVMMASharedLayout, float32
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(scales, [128], NVMMASharedLayout.get_default_for([128], float32))


def _empty_result(x: torch.Tensor | QuantizedRows, k: int) -> TopTokens:
    return TopTokens(
        torch.empty((x.shape[0], k), dtype=torch.float32, device=x.device),
        torch.empty((x.shape[0], k), dtype=torch.int32, device=x.device),
        torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
    )


def _check(
    x: torch.Tensor | QuantizedRows, weight: torch.Tensor | Int8Linear, k: int, vocab_size: int, banned: torch.Tensor | None
) -> None:
    if isinstance(x, QuantizedRows):
        check_quantized(x, x.codes.shape[-1])
        check(isinstance(weight, Int8Linear), "int8 rows need an int8 head: pass quantize_int8(weight), or float rows")
        x = x.codes
    matrix = weight.codes if isinstance(weight, Int8Linear) else weight
    check(
        matrix.dim() == 2 and matrix.shape[1] == x.shape[1],
        f"weight is {tuple(matrix.shape)}; x wants [V_pad, {x.shape[1]}]",
    )
    check(1 <= vocab_size <= matrix.shape[0], f"vocab_size is {vocab_size}; the weight has {matrix.shape[0]} rows")
    check(
        isinstance(weight, Int8Linear) or matrix.dtype == x.dtype,
        f"weight is {matrix.dtype}, x is {x.dtype}: convert one of them",
    )
    check(matrix.device == x.device, f"weight is on {matrix.device}, x on {x.device}: move one of them")
    check(x.is_contiguous() and matrix.is_contiguous(), "x and weight must be contiguous: call .contiguous()")
    check(1 <= k <= _MAX_K, f"k is {k}; choose 1 to {_MAX_K}")
    choosable = vocab_size - (banned is not None)
    check(k <= choosable, f"k is {k}, but a row can choose among {choosable} tokens only: choose a smaller k")
    if banned is not None:
        check(
            banned.dtype == torch.int32 and banned.shape == (x.shape[0],) and banned.is_contiguous(),
            f"banned must be int32[{x.shape[0]}], one token id for each row (-1: none)",
        )
