"""Three kernels: sentences begin, entries of a step, one search step. One program of the first and last is one sentence.

N beams of the sentence (at most NB = 8), K candidates a row, T + 1 = POSITIONS columns of ancestry and history.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e9)  # score of what must never win, finite as in transformers


@triton.jit(do_not_specialize=["num_positions"])
def begin_kernel(
    records_ptr,
    new_normalizers_ptr,
    sentences_ptr,
    status_ptr,
    rows_ptr,
    token_ids_ptr,
    cum_ptr,
    normalizers_ptr,
    score_ptr,
    hypotheses_ptr,
    ancestry_ptr,
    history_ptr,
    num_positions,
    start_token,
    NB: tl.constexpr,
    FIELDS: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set up one sentence from its record: the forced token is chosen (log-probability 0), all beams alike, only the first
    may branch. History holds the start token at position 0 and the forced token at position 1."""
    record = records_ptr + tl.program_id(0) * RECORD
    slot = tl.load(record).to(tl.int64)
    num_beams = tl.load(record + 1)
    forced = tl.load(record + 5)
    j = tl.arange(0, NB)
    beams = j < num_beams
    rows = tl.load(record + 8 + j, mask=beams, other=0)
    first_row = tl.load(record + 8)
    sentence = sentences_ptr + slot * FIELDS
    for field in tl.static_range(4):
        tl.store(sentence + field, tl.load(record + 1 + field))
    tl.store(sentence + 4, 1)
    tl.store(sentence + 5, tl.load(record + 6))
    tl.store(status_ptr + slot, 0)
    tl.store(rows_ptr + slot * NB + j, tl.where(beams, rows, -1))
    tl.store(token_ids_ptr + slot * NB + j, tl.where(beams, forced, 0))
    tl.store(cum_ptr + slot * NB + j, tl.where(j == 0, 0.0, NEVER))
    tl.store(score_ptr + slot * NB + j, tl.where(beams, NEVER, 0.0))
    for field in tl.static_range(4):
        tl.store(hypotheses_ptr + (slot * NB + j) * 4 + field, tl.zeros((NB,), tl.int32))
    for start in range(0, num_positions + 1, BLOCK):
        t = start + tl.arange(0, BLOCK)
        value = tl.load(new_normalizers_ptr + tl.program_id(0) * (num_positions + 1) + t, mask=t <= num_positions, other=0.0)
        tl.store(normalizers_ptr + slot * (num_positions + 1) + t, value, mask=t <= num_positions)
        at = rows.to(tl.int64)[:, None] * num_positions + t[None, :]
        inside = beams[:, None] & (t < num_positions)[None, :]
        tl.store(ancestry_ptr + at, tl.where((t == 0)[None, :], first_row, rows[:, None]), mask=inside)
        tl.store(history_ptr + at * 2, tl.where((t == 0)[None, :], start_token, forced), mask=inside & (t < 2)[None, :])
        tl.store(history_ptr + at * 2 + 1, tl.zeros((NB, BLOCK), tl.int32), mask=inside & (t < 2)[None, :])


@triton.jit(do_not_specialize=["R"])
def step_inputs_kernel(
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
    R,
    start_token,
    eos_token,
    NB: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Beam -1 is a start token at position 0, fed through the sentence's first row. Slot -1, or a sentence that has
    finished: an idle entry."""
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
def _best(values, offsets, BIG: tl.constexpr):
    """Largest value and the lowest offset that has it. NaN must have been replaced before."""
    top = tl.max(values, 0)
    return top, tl.min(tl.where(values == top, offsets, BIG), 0)


@triton.jit
def _at(values, offsets, index):
    """values[index] of a register vector."""
    return tl.sum(tl.where(offsets == index, values, 0), 0)


@triton.jit(do_not_specialize=["num_positions"])
def advance_kernel(
    group_slots_ptr,
    group_starts_ptr,
    group_counts_ptr,
    entry_beams_ptr,
    values_ptr,
    top_ids_ptr,
    sentences_ptr,
    status_ptr,
    rows_ptr,
    token_ids_ptr,
    cum_ptr,
    normalizers_ptr,
    score_ptr,
    hypotheses_ptr,
    ancestry_ptr,
    history_ptr,
    num_positions,
    eos_token,
    NB: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token for one sentence, transformers' beam search rule for rule: 2N candidates; one that stops counts only among
    the N best; the N best others run on; the sentence closes when no running beam can beat its worst finished one.

    values, top_ids [R, K]: the K best log-probabilities of each entry and their tokens, best first.
    """
    if OVERLAP:  # inputs may still be being written, and outputs read, by the kernels before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0)
    count = tl.load(group_counts_ptr + group)
    if count > 0:
        entry = tl.load(group_starts_ptr + group).to(tl.int64)
        slot = tl.load(group_slots_ptr + group).to(tl.int64)
        if (tl.load(entry_beams_ptr + entry) >= 0) & (tl.load(status_ptr + slot) == 0):
            sentence = sentences_ptr + slot * FIELDS
            n = tl.load(sentence)
            max_tokens = tl.load(sentence + 1)
            flags = tl.load(sentence + 3)
            position = tl.load(sentence + 4) + 1  # of the token chosen now
            norms = normalizers_ptr + slot * (num_positions + 1)

            j = tl.arange(0, NB)
            beams = j < n
            c = tl.arange(0, 2 * NB)
            f = tl.arange(0, NB * K_PAD)
            from_beam = f // K_PAD
            usable = (from_beam < n) & (f % K_PAD < K)
            flat = (entry + from_beam) * K + f % K_PAD
            logprob = tl.load(values_ptr + flat, mask=usable, other=float("-inf"))
            tokens = tl.load(top_ids_ptr + flat, mask=usable, other=0)
            is_nan = logprob != logprob  # noqa: PLR0124
            broken = tl.max(is_nan.to(tl.int32), 0)
            cum_of = tl.load(cum_ptr + slot * NB + from_beam, mask=usable, other=0.0)
            sums = tl.where(usable & ~is_nan, cum_of + logprob, float("-inf"))

            # 2N candidates, best first
            cand_sum = tl.full((2 * NB,), float("-inf"), tl.float32)
            cand_beam = tl.zeros((2 * NB,), tl.int32)
            cand_token = tl.zeros((2 * NB,), tl.int32)
            taken = ~usable
            for i in range(2 * n):
                top, index = _best(tl.where(taken, float("-inf"), sums), tl.where(taken, NB * K_PAD, f), NB * K_PAD)
                cand_sum = tl.where(c == i, top, cand_sum)
                cand_beam = tl.where(c == i, index // K_PAD, cand_beam)
                cand_token = tl.where(c == i, _at(tokens, f, index), cand_token)
                taken |= f == index
            valid = c < 2 * n
            stops = valid & ((cand_token == eos_token) | (position >= max_tokens))
            length_norm = tl.load(norms + position)

            # running beams: the N best that do not stop
            run = tl.where(valid, cand_sum + tl.where(stops, NEVER, 0.0), float("-inf"))
            new_cum = tl.zeros((NB,), tl.float32)
            new_token = tl.zeros((NB,), tl.int32)
            parent = tl.zeros((NB,), tl.int32)
            gone = ~valid
            if n == 1:  # greedy: the best token, whether it stops or not
                new_cum = tl.where(j == 0, _at(tl.where(c == 0, cand_sum, 0.0), c, 0), new_cum)
                new_token = tl.where(j == 0, _at(cand_token, c, 0), new_token)
            else:
                for i in range(n):
                    top, index = _best(tl.where(gone, float("-inf"), run), tl.where(gone, 2 * NB, c), 2 * NB)
                    new_cum = tl.where(j == i, top, new_cum)
                    new_token = tl.where(j == i, _at(cand_token, c, index), new_token)
                    parent = tl.where(j == i, _at(cand_beam, c, index), parent)
                    gone |= c == index

            # finished list
            hyp = hypotheses_ptr + (slot * NB + j) * 4
            new_score = tl.zeros((NB,), tl.float32)
            new_done = tl.zeros((NB,), tl.int32)
            new_beam = tl.zeros((NB,), tl.int32)
            new_last = tl.zeros((NB,), tl.int32)
            new_length = tl.zeros((NB,), tl.int32)
            if n == 1:  # read only when the sentence closes: until then it holds the running hypothesis
                ends = (tl.sum(tl.where(j == 0, new_token, 0), 0) == eos_token) | (position >= max_tokens)
                new_score = tl.where(j == 0, new_cum / length_norm, new_score)
                new_done = tl.where((j == 0) & ends & (new_cum > float("-inf")), 1, new_done)
                new_last = new_token
                new_length = tl.where(j == 0, position, new_length)
            else:
                # candidates in 0..2NB-1, the old list in 2NB..3NB-1 of one vector; the old list wins ties
                m = tl.arange(0, 4 * NB)
                is_new = m < 2 * NB
                is_old = (m >= 2 * NB) & (m < 2 * NB + n)
                in_range = tl.where(is_new, m < 2 * n, is_old)
                order = tl.where(is_old, m - 2 * NB, m + NB)
                pool_done = tl.zeros((4 * NB,), tl.int32)
                pool_score = tl.full((4 * NB,), float("-inf"), tl.float32)
                pool_beam = tl.zeros((4 * NB,), tl.int32)
                pool_last = tl.zeros((4 * NB,), tl.int32)
                pool_length = tl.zeros((4 * NB,), tl.int32) + position
                old = hypotheses_ptr + (slot * NB + m - 2 * NB) * 4
                pool_done = tl.load(old, mask=is_old, other=0)
                pool_beam = tl.load(old + 1, mask=is_old, other=0)
                pool_last = tl.load(old + 2, mask=is_old, other=0)
                pool_length = tl.load(old + 3, mask=is_old, other=0)
                pool_score = tl.load(score_ptr + slot * NB + m - 2 * NB, mask=is_old, other=float("-inf"))
                cand_done = (stops & (c < n)).to(tl.int32)
                cand_score = cand_sum / length_norm + tl.where(cand_done == 1, 0.0, NEVER)
                for i in range(2 * n):
                    here = m == i
                    pool_score = tl.where(here, tl.max(tl.where(c == i, cand_score, float("-inf")), 0), pool_score)
                    pool_done = tl.where(here, _at(cand_done, c, i), pool_done)
                    pool_beam = tl.where(here, _at(cand_beam, c, i), pool_beam)
                    pool_last = tl.where(here, _at(cand_token, c, i), pool_last)
                    pool_length = tl.where(here, position, pool_length)
                used = ~in_range
                for i in range(n):
                    score = tl.where(used, float("-inf"), pool_score)
                    top = tl.max(score, 0)
                    rank = tl.min(tl.where((score == top) & ~used, order, 4 * NB), 0)
                    here = order == rank
                    here &= ~used
                    new_score = tl.where(j == i, top, new_score)
                    new_done = tl.where(j == i, tl.sum(tl.where(here, pool_done, 0), 0), new_done)
                    new_beam = tl.where(j == i, tl.sum(tl.where(here, pool_beam, 0), 0), new_beam)
                    new_last = tl.where(j == i, tl.sum(tl.where(here, pool_last, 0), 0), new_last)
                    new_length = tl.where(j == i, tl.sum(tl.where(here, pool_length, 0), 0), new_length)
                    used |= here

            # ancestry follows the parent; all reads of a block come before its writes
            rows = tl.load(rows_ptr + slot * NB + j, mask=beams, other=0).to(tl.int64)
            if n > 1:
                parent_rows = tl.load(rows_ptr + slot * NB + parent, mask=beams, other=0).to(tl.int64)
                for start in range(0, position + 1, BLOCK):
                    t = start + tl.arange(0, BLOCK)
                    inside = beams[:, None] & ((t <= position) & (t < num_positions))[None, :]
                    lines = tl.load(ancestry_ptr + parent_rows[:, None] * num_positions + t[None, :], mask=inside, other=0)
                    lines = tl.where((t == position)[None, :], rows.to(tl.int32)[:, None], lines)
                    tl.debug_barrier()
                    tl.store(ancestry_ptr + rows[:, None] * num_positions + t[None, :], lines, mask=inside)
            record = history_ptr + (rows * num_positions + position) * 2
            recorded = beams & (position < num_positions)
            tl.store(record, new_token, mask=recorded)
            tl.store(record + 1, parent, mask=recorded)

            # closed?
            bound = tl.where((flags & 2) != 0, max_tokens, position)
            best_running = tl.sum(tl.where(j == 0, new_cum, 0.0), 0) / tl.load(norms + bound)
            worst = tl.min(tl.where(beams, new_score, float("inf")), 0)
            improves = tl.max((beams & (best_running > tl.where(new_done == 1, worst, NEVER))).to(tl.int32), 0)
            full = ((flags & 1) != 0) & (tl.min(tl.where(beams, new_done, 1), 0) == 1)
            closed = (improves == 0) | full | (position >= max_tokens)
            if n == 1:
                closed = (tl.sum(tl.where(j == 0, new_token, 0), 0) == eos_token) | (position >= max_tokens)
            tl.debug_barrier()  # every load of the old lists comes before their stores
            tl.store(score_ptr + slot * NB + j, new_score, mask=beams)
            tl.store(hyp, new_done, mask=beams)
            tl.store(hyp + 1, new_beam, mask=beams)
            tl.store(hyp + 2, new_last, mask=beams)
            tl.store(hyp + 3, new_length, mask=beams)
            tl.store(cum_ptr + slot * NB + j, new_cum, mask=beams)
            tl.store(token_ids_ptr + slot * NB + j, new_token, mask=beams)
            tl.store(sentence + 4, position)
            tl.store(status_ptr + slot, tl.where(broken != 0, 2, closed.to(tl.int32)))
