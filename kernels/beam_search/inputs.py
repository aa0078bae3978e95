"""The launch that a step begins with: what its entries feed the decoder, and which cells the histories of its groups hold.

R entries, G groups, T_max positions of a cache row; at most NB = 8 beams. `kernels.history_lists` says what a list is.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from kernels.dependency import wait_for_inputs
from kernels.entries import entries_of, follows_start_token
from kernels.history_lists import GROUP_FIELDS, PLACES, SEEN_BY

_PLACES, _SEEN_BY, _GROUP_FIELDS = tl.constexpr(PLACES), tl.constexpr(SEEN_BY), tl.constexpr(GROUP_FIELDS)


@triton.jit(do_not_specialize=["R", "G", "num_positions", "max_positions"])
def step_inputs_kernel(
    entry_slots_ptr,
    entry_beams_ptr,
    group_slots_ptr,
    group_starts_ptr,
    group_counts_ptr,
    sentences_ptr,
    status_ptr,
    rows_ptr,
    token_ids_ptr,
    ancestry_ptr,
    out_tokens_ptr,
    out_positions_ptr,
    out_rows_ptr,
    out_active_ptr,
    out_banned_ptr,
    groups_ptr,
    words_ptr,
    in_use_ptr,
    R,
    G,
    num_positions,
    max_positions,
    width,
    start_token,
    eos_token,
    NB: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LISTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first programs take BLOCK entries each. With LISTS one lists the cells of each group, and the last counts the
    groups in use. Nothing is written before the wait, and the next kernel may start only after it: `KernelDecoder.hidden`
    builds on that."""
    wait_for_inputs(OVERLAP)
    program = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK)
    if not LISTS or program < blocks:
        _inputs(
            program * BLOCK + tl.arange(0, BLOCK),
            R,
            entry_slots_ptr,
            entry_beams_ptr,
            sentences_ptr,
            status_ptr,
            rows_ptr,
            token_ids_ptr,
            out_tokens_ptr,
            out_positions_ptr,
            out_rows_ptr,
            out_active_ptr,
            out_banned_ptr,
            start_token,
            eos_token,
            NB,
            FIELDS,
        )
    elif program < blocks + G:
        _list(
            program - blocks,
            group_slots_ptr,
            group_starts_ptr,
            group_counts_ptr,
            entry_beams_ptr,
            sentences_ptr,
            status_ptr,
            rows_ptr,
            ancestry_ptr,
            groups_ptr,
            words_ptr,
            num_positions,
            max_positions,
            width,
            NB,
            FIELDS,
            SPAN,
        )
    else:
        _count(group_slots_ptr, group_counts_ptr, in_use_ptr, G, 512)


@triton.jit
def _inputs(
    e,
    R,
    entry_slots_ptr,
    entry_beams_ptr,
    sentences_ptr,
    status_ptr,
    rows_ptr,
    token_ids_ptr,
    out_tokens_ptr,
    out_positions_ptr,
    out_rows_ptr,
    out_active_ptr,
    out_banned_ptr,
    start_token,
    eos_token,
    NB: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Beam -1 is a start token at position 0, fed through the sentence's first row. Slot -1, or a sentence that has
    finished: an idle entry."""
    inside = e < R
    slot = tl.load(entry_slots_ptr + e, mask=inside, other=-1).to(tl.int64)
    beam = tl.load(entry_beams_ptr + e, mask=inside, other=0)
    live = inside & (slot >= 0)
    live &= tl.load(status_ptr + slot, mask=live, other=1) == 0
    is_start = beam < 0
    at = slot * NB + tl.maximum(beam, 0)
    row = tl.load(rows_ptr + at, mask=live, other=-1)
    token = tl.load(token_ids_ptr + at, mask=live, other=0)
    num_tokens = tl.load(sentences_ptr + slot * FIELDS + 4, mask=live, other=0)
    min_tokens = tl.load(sentences_ptr + slot * FIELDS + 2, mask=live, other=0)
    tl.store(out_tokens_ptr + e, tl.where(is_start, start_token, token), mask=inside)
    tl.store(out_positions_ptr + e, tl.where(is_start, 0, num_tokens), mask=inside)
    tl.store(out_rows_ptr + e, tl.where(live, row, -1), mask=inside)
    tl.store(out_active_ptr + e, live.to(tl.uint8), mask=inside)
    tl.store(out_banned_ptr + e, tl.where(live & (num_tokens < min_tokens), eos_token, -1), mask=inside)


@triton.jit
def _list(
    group,
    group_slots_ptr,
    group_starts_ptr,
    group_counts_ptr,
    entry_beams_ptr,
    sentences_ptr,
    status_ptr,
    rows_ptr,
    ancestry_ptr,
    groups_ptr,
    words_ptr,
    num_positions,
    max_positions,
    width,
    NB: tl.constexpr,
    FIELDS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The places of one group, SPAN positions at a time; none where it is unused or its sentence has finished."""
    slot = tl.load(group_slots_ptr + group).to(tl.int64)
    start = tl.load(group_starts_ptr + group)
    count = entries_of(slot, tl.load(group_counts_ptr + group), NB)
    words = words_ptr + group.to(tl.int64) * width
    size = count * 0
    known = count * 0
    there = count > 0
    live = there & (tl.load(status_ptr + slot, mask=there, other=1) == 0)
    j = tl.arange(0, NB)
    mine = (j < count) & live
    beam = tl.load(entry_beams_ptr + start + j, mask=mine, other=0)
    row = tl.load(rows_ptr + slot * NB + tl.maximum(beam, 0), mask=mine, other=0)
    num_tokens = tl.load(sentences_ptr + slot * FIELDS + 4, mask=live, other=0)
    if live:
        last = tl.where(tl.sum(tl.where(j == 0, beam, 0), 0) < 0, 0, num_tokens)
        first_row = tl.sum(tl.where(j == 0, row, 0), 0)
        lines = ancestry_ptr + row.to(tl.int64)[:, None] * num_positions
        shared = last
        for t0 in range(0, last, SPAN):
            t = t0 + tl.arange(0, SPAN)
            earlier = (t < last)[None, :] & mine[:, None]
            held = tl.load(lines + t[None, :], mask=earlier, other=-1)
            common = tl.sum(tl.where((j == 0)[:, None], held, 0), 0)
            differs = tl.max((earlier & (held != common[None, :])).to(tl.int32), 0)
            shared = tl.minimum(shared, tl.min(tl.where(differs > 0, t, last), 0))
        log_width = (count > 1).to(tl.int32) + (count > 2).to(tl.int32) + (count > 4).to(tl.int32)
        size = shared + ((last + 1 - shared) << log_width)
        known = tl.where(follows_start_token(last), 0, shared + ((last - shared) << log_width))
        oldest = tl.load(ancestry_ptr + first_row.to(tl.int64) * num_positions, mask=last > 0, other=0)
        filler = tl.where(last > 0, oldest * max_positions, first_row * max_positions)
        everyone = ((1 << count) - 1) << _SEEN_BY
        for t0 in range(0, last + 1, SPAN):
            t = t0 + tl.arange(0, SPAN)
            earlier = (t < last)[None, :] & mine[:, None]
            held = tl.load(lines + t[None, :], mask=earlier, other=0)
            held = tl.where((t == last)[None, :], row[:, None], held)
            word = held * max_positions + t[None, :]
            is_shared = (t < shared)[None, :]
            word |= tl.where(is_shared, everyone, (1 << (j + _SEEN_BY))[:, None])
            word = tl.where((j < count)[:, None], word, filler)
            place = tl.where(is_shared, t[None, :], shared + ((t - shared) << log_width)[None, :] + j[:, None])
            writes = (t <= last)[None, :] & (j[:, None] < tl.where(is_shared, 1, 1 << log_width))
            tl.store(words + place, word, mask=writes)
        rest = size + tl.arange(0, _PLACES)
        tl.store(words + rest, tl.zeros((_PLACES,), tl.int32) + filler, mask=rest < tl.cdiv(size, _PLACES) * _PLACES)
    else:
        tl.store(words, 0)  # a cell that may be asked for
    fields = groups_ptr + group * _GROUP_FIELDS
    tl.store(fields, start)
    tl.store(fields + 1, count)
    tl.store(fields + 2, size)
    tl.store(fields + 3, known)


@triton.jit
def _count(group_slots_ptr, group_counts_ptr, in_use_ptr, G, BLOCK: tl.constexpr):
    in_use = 0
    for g0 in range(0, G, BLOCK):
        g = g0 + tl.arange(0, BLOCK)
        count = tl.load(group_counts_ptr + g, mask=g < G, other=0)
        slot = tl.load(group_slots_ptr + g, mask=g < G, other=-1)
        in_use = tl.maximum(in_use, tl.max(tl.where((count > 0) & (slot >= 0), g + 1, 0), 0))
    tl.store(in_use_ptr, in_use)
