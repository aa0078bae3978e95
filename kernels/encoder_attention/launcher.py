"""Launcher of `encoder_attention`. S_total packed tokens, H heads, Dh head_dim, D = H * Dh."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kernels.launch import check, overlap

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """Query tokens a program, key tokens a step of its loop, and how."""

    queries: int
    keys: int
    num_warps: int
    stages: int


# By head_dim and type alone, never by S_total: a sentence's bits do not depend on its batch.
HALF_TILES = {16: Tiles(64, 64, 4, 2), 32: Tiles(64, 64, 4, 2), 64: Tiles(64, 32, 4, 3), 128: Tiles(64, 32, 4, 3)}
FLOAT_TILES = {16: Tiles(32, 32, 4, 2), 32: Tiles(32, 32, 4, 2), 64: Tiles(32, 32, 4, 2), 128: Tiles(16, 32, 4, 2)}


def encoder_attention(
    qkv: torch.Tensor,
    token_starts: torch.Tensor,
    token_ends: torch.Tensor,
    *,
    num_heads: int,
    out: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(Dh)) v of every token over its own sentence -> out [S_total, D].

    qkv fp32/fp16/bf16[S_total, 3D] (queries, keys, values), any row stride; token_starts, token_ends int32[S_total]: the
    range [start, end) of the pack that holds the token's sentence, increasing along the pack. start == end marks a padding
    token: nothing of it is read, zeros are written. Ranges within bounds are the caller's duty. Softmax and sums in fp32.
    One launch. Same bits wherever a sentence lies in the pack and whatever lies beside it, NaN included.
    Raises ValueError for shapes, types or strides that do not fit.
    """
    head_dim = _check_qkv(qkv, num_heads)
    num_tokens = qkv.shape[0]
    for name, index in (("token_starts", token_starts), ("token_ends", token_ends)):
        check(tuple(index.shape) == (num_tokens,), f"{name} is {tuple(index.shape)}; want [{num_tokens}]")
        check(index.dtype == torch.int32, f"{name} is {index.dtype}; convert it to int32")
        check(index.is_contiguous(), f"{name} must be contiguous: call .contiguous()")
    shape = (num_tokens, qkv.shape[1] // 3)
    if out is None:
        out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    check(
        tuple(out.shape) == shape and out.dtype == qkv.dtype and out.is_contiguous(),
        f"out is {out.dtype}{tuple(out.shape)}; want contiguous {qkv.dtype}{shape}",
    )
    if num_tokens == 0:
        return out
    from kernels.encoder_attention.kernel import encoder_attention_kernel

    tiles = tiles or select_tiles(head_dim, qkv.dtype)
    encoder_attention_kernel[(num_heads, -(-num_tokens // tiles.queries))](
        qkv,
        token_starts,
        token_ends,
        out,
        num_tokens,
        qkv.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        **constants(num_heads, head_dim, tiles),
        **overlap(qkv),
    )
    return out


def select_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles that fit the registers and shared memory of every GPU from compute capability 7.5 on."""
    return (FLOAT_TILES if dtype == torch.float32 else HALF_TILES)[head_dim]


def constants(num_heads: int, head_dim: int, tiles: Tiles) -> dict[str, int]:
    """Compile-time arguments of encoder_attention_kernel."""
    return {
        "H": num_heads,
        "DH": head_dim,
        "BM": tiles.queries,
        "BN": tiles.keys,
        "STAGES": tiles.stages,
        "num_warps": tiles.num_warps,
    }


def _check_qkv(qkv: torch.Tensor, num_heads: int) -> int:
    """Dh of well-formed queries, keys and values."""
    check(qkv.dim() == 2, f"qkv is {tuple(qkv.shape)}; want [S_total, 3D]")
    check(qkv.dtype in _DTYPES, f"qkv is {qkv.dtype}; want float32, float16 or bfloat16")
    check(qkv.stride(1) == 1, "qkv must have contiguous rows: call .contiguous()")
    check(
        num_heads > 0 and qkv.shape[1] % (3 * num_heads) == 0,
        f"3D = {qkv.shape[1]} does not divide into 3 x {num_heads} heads",
    )
    head_dim = qkv.shape[1] // (3 * num_heads)
    check(head_dim in HALF_TILES, f"head_dim is {head_dim}; choose num_heads so that it is one of {list(HALF_TILES)}")
    return head_dim
