"""The second launch of the router: the order of pairs by expert, and the lists made of it.

E experts (E_PAD the next power of two), P = T * TOP_K pairs of T tokens.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.route.choice import store_lists, zero


@triton.jit
def _experts_from(ids_ptr, c, lane, P):
    """Experts of the pairs from c on; -1 where inactive, or past the last pair."""
    return tl.load(ids_ptr + c + lane, mask=c + lane < P, other=-1)


@triton.jit
def _smaller(ids, expert):
    """How many of these pairs belong to smaller experts."""
    return tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), 0)


@triton.jit
def _place(ids, pair, expert, before, gather_ptr, scatter_ptr):
    """Store where the pairs of one expert stand in expert order, from position `before` on; returns the next position."""
    mine = ids == expert
    position = before + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(gather_ptr + position, pair, mask=mine)
    tl.store(scatter_ptr + pair, position, mask=mine)
    return before + tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["P", "sync_words", "semaphore_words"])
def expert_order_kernel(
    ids_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tiles_ptr,
    num_tiles_ptr,
    sync_ptr,
    semaphore_ptr,
    P,
    sync_words,
    semaphore_words,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program e < E places the pairs of expert e: it counts those of smaller experts itself, so nobody waits for anybody.
    It zeroes a share of `sync` too. Program E does the rest: counts, offsets, tiles, inactive pairs, the gate's semaphores.
    ONE_CHUNK: all pairs are in the first CHUNK."""
    wait_for_inputs(OVERLAP)
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    if expert < E:
        zero(sync_ptr, sync_words, expert * 256, E * 256)
        if ONE_CHUNK:
            ids = _experts_from(ids_ptr, 0, lane, P)
            _place(ids, lane, expert, _smaller(ids, expert), gather_ptr, scatter_ptr)
        else:
            before = expert * 0
            for c in range(0, P, CHUNK):
                before += _smaller(_experts_from(ids_ptr, c, lane, P), expert)
            for c in range(0, P, CHUNK):
                ids = _experts_from(ids_ptr, c, lane, P)
                before = _place(ids, c + lane, expert, before, gather_ptr, scatter_ptr)
    else:
        zero(semaphore_ptr, semaphore_words, 0, 256)
        e = tl.arange(0, E_PAD)
        counts = tl.zeros((E_PAD,), dtype=tl.int32)
        for c in range(0, P, CHUNK):
            ids = _experts_from(ids_ptr, c, lane, P)
            tl.store(scatter_ptr + c + lane, tl.zeros((CHUNK,), tl.int32) - 1, mask=(ids < 0) & (c + lane < P))
            counts += tl.histogram(tl.maximum(ids, 0), E_PAD, mask=ids >= 0)
        store_lists(counts, e, counts_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, E, E_PAD, BLOCK_TOKENS)
