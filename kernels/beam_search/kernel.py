"""Sentences begin; one search step. A program is one sentence. Between the two: `inputs.py`.

N beams of the sentence (at most NB = 8), K candidates a row, T + 1 = POSITIONS columns of ancestry and history.
"""

import triton
import triton.language as tl

from kernels.dependency import tell_host, wait_for_inputs

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
    reported_ptr,
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
    tl.store(reported_ptr + slot, 0)
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


@triton.jit
def _ranks(values, order, counted):
    """Place of each counted element among them, best first: larger values, then lower `order`. All others: past the end.

    All places come out of one comparison of everything with everything, so that no chain of maxima has to be waited for.
    """
    ahead = (values[:, None] > values[None, :]) | ((values[:, None] == values[None, :]) & (order[:, None] < order[None, :]))
    return tl.where(counted, tl.sum((ahead & counted[:, None]).to(tl.int32), 0), values.shape[0])


@triton.jit
def _placed(values, ranks, places):
    """The value of each rank in `places`; 0 where nothing has it."""
    return tl.sum(tl.where(ranks[:, None] == places[None, :], values[:, None], 0), 0)


@triton.jit
def _write_results(
    score,
    done,
    beam,
    last,
    length,
    rows_ptr,
    history_ptr,
    results_ptr,
    position,
    num_positions,
    num_slots,
    slot,
    NB: tl.constexpr,
):
    """The finished list of a sentence as tokens, followed back through their parents, all hypotheses at a time; positions
    below `position` were written by earlier launches. Each step back waits for two loads, mostly out of L1."""
    j = tl.arange(0, NB)
    out = results_ptr + (j * num_slots + slot) * (num_positions + 1)
    tl.store(out, tl.where(done, length, 0))
    tl.store(out + 1, score.to(tl.int32, bitcast=True))
    tl.store(out + 1 + length, last, mask=done)
    for back in range(1, position):
        t = position - back
        walks = done & (t < length)
        row = tl.load(rows_ptr + slot * NB + beam, mask=walks, other=0).to(tl.int64)
        cell = history_ptr + (row * num_positions + t) * 2
        token = tl.load(cell, mask=walks, other=0)
        parent = tl.load(cell + 1, mask=walks, other=0)  # before the store, which waits for the token
        tl.store(out + 1 + t, token, mask=walks)
        beam = tl.where(walks, parent, beam)


@triton.jit(do_not_specialize=["num_positions", "num_slots"])
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
    results_ptr,
    reported_ptr,
    num_positions,
    num_slots,
    eos_token,
    NB: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token for one sentence, transformers' beam search rule for rule: 2N candidates; one that stops counts only among
    the N best; the N best others run on; the sentence closes when no running beam can beat its worst finished one.

    values, top_ids [R, K]: the K best log-probabilities of each entry and their tokens, best first. A group has an entry for
    each beam, or in a sentence's first step only one, for its first: until that has branched the others may not win.
    """
    wait_for_inputs(OVERLAP)
    group = tl.program_id(0)
    count = tl.load(group_counts_ptr + group)
    if count > 0:
        # All loads that hang on nothing but the slot come first: their waits overlap.
        entry = tl.load(group_starts_ptr + group).to(tl.int64)
        slot = tl.load(group_slots_ptr + group).to(tl.int64)
        first_beam = tl.load(entry_beams_ptr + entry)
        status = tl.load(status_ptr + slot)
        sentence = sentences_ptr + slot * FIELDS
        n = tl.load(sentence)
        max_tokens = tl.load(sentence + 1)
        flags = tl.load(sentence + 3)
        position = tl.load(sentence + 4) + 1  # of the token chosen now
        j = tl.arange(0, NB)
        rows = tl.load(rows_ptr + slot * NB + j).to(tl.int64)
        hyp = hypotheses_ptr + (slot * NB + j) * 4
        old_done = tl.load(hyp)
        old_beam = tl.load(hyp + 1)
        old_last = tl.load(hyp + 2)
        old_length = tl.load(hyp + 3)
        old_score = tl.load(score_ptr + slot * NB + j)
        f = tl.arange(0, NB * K_PAD)
        from_beam = f // K_PAD
        usable = (from_beam < count) & (f % K_PAD < K)
        flat = (entry + from_beam) * K + f % K_PAD
        logprob = tl.load(values_ptr + flat, mask=usable, other=float("-inf"))
        tokens = tl.load(top_ids_ptr + flat, mask=usable, other=0)
        cum_of = tl.load(cum_ptr + slot * NB + from_beam, mask=usable, other=0.0)
        if (first_beam >= 0) & (status == 0):
            norms = normalizers_ptr + slot * (num_positions + 1)
            length_norm = tl.load(norms + position)
            bound_norm = tl.load(norms + tl.where((flags & 2) != 0, max_tokens, position))
            beams = j < n
            is_nan = logprob != logprob  # noqa: PLR0124
            broken = tl.max(is_nan.to(tl.int32), 0)
            sums = tl.where(usable & ~is_nan, cum_of + logprob, float("-inf"))

            # 2N candidates, best first
            c = tl.arange(0, 2 * NB)
            rank = _ranks(sums, f, usable)
            valid = c < tl.minimum(2 * n, count * K)  # one candidate is enough where all sentences are greedy
            cand_sum = tl.where(valid, _placed(sums, rank, c), float("-inf"))
            cand_beam = _placed(from_beam, rank, c)
            cand_token = _placed(tokens, rank, c)
            stops = valid & ((cand_token == eos_token) | (position >= max_tokens))

            # running beams: the N best that do not stop; greedy: the best token, whether it stops or not
            run = tl.where(valid, cand_sum + tl.where(stops & (n > 1), NEVER, 0.0), float("-inf"))
            rank = _ranks(run, c, valid)
            new_cum = tl.where(beams, _placed(run, rank, j), 0.0)
            new_token = _placed(cand_token, rank, j)
            parent = _placed(cand_beam, rank, j)

            # finished list
            if n == 1:  # read only when the sentence closes: until then it holds the running hypothesis
                ends = (new_token == eos_token) | (position >= max_tokens)
                new_score = new_cum / length_norm
                new_done = (ends & (new_cum > float("-inf"))).to(tl.int32)
                new_beam = tl.zeros((NB,), tl.int32)
                new_last = new_token
                new_length = tl.zeros((NB,), tl.int32) + position
                closed = tl.max((beams & ends).to(tl.int32), 0) == 1
            else:
                # the N best of the candidates and the old list, which wins ties
                cand_done = (stops & (c < n)).to(tl.int32)
                cand_score = cand_sum / length_norm + tl.where(cand_done == 1, 0.0, NEVER)
                old_ahead = beams[:, None] & (old_score[:, None] >= cand_score[None, :])
                cand_ahead = valid[:, None] & (cand_score[:, None] > old_score[None, :])
                cand_rank = _ranks(cand_score, c, valid) + tl.sum(old_ahead.to(tl.int32), 0)
                old_rank = _ranks(old_score, j, beams) + tl.sum(cand_ahead.to(tl.int32), 0)
                new_score = _placed(cand_score, cand_rank, j) + _placed(old_score, old_rank, j)
                new_done = _placed(cand_done, cand_rank, j) + _placed(old_done, old_rank, j)
                new_beam = _placed(cand_beam, cand_rank, j) + _placed(old_beam, old_rank, j)
                new_last = _placed(cand_token, cand_rank, j) + _placed(old_last, old_rank, j)
                cand_length = tl.zeros((2 * NB,), tl.int32) + position
                new_length = _placed(cand_length, cand_rank, j) + _placed(old_length, old_rank, j)
                best_running = tl.sum(tl.where(j == 0, new_cum, 0.0), 0) / bound_norm
                worst = tl.min(tl.where(beams, new_score, float("inf")), 0)
                improves = tl.max((beams & (best_running > tl.where(new_done == 1, worst, NEVER))).to(tl.int32), 0)
                full = ((flags & 1) != 0) & (tl.min(tl.where(beams, new_done, 1), 0) == 1)
                closed = (improves == 0) | full | (position >= max_tokens)

                # ancestry follows the parent; all reads of a block come before its writes
                parent_rows = _placed(rows, j, parent)
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

            tl.debug_barrier()  # every load of the old lists comes before their stores
            tl.store(score_ptr + slot * NB + j, new_score, mask=beams)
            tl.store(hyp, new_done, mask=beams)
            tl.store(hyp + 1, new_beam, mask=beams)
            tl.store(hyp + 2, new_last, mask=beams)
            tl.store(hyp + 3, new_length, mask=beams)
            tl.store(cum_ptr + slot * NB + j, new_cum, mask=beams)
            tl.store(token_ids_ptr + slot * NB + j, new_token, mask=beams)
            tl.store(sentence + 4, position)
            ended_as = tl.where(broken != 0, 2, closed.to(tl.int32))
            tl.store(status_ptr + slot, ended_as)
            if closed:
                _write_results(
                    new_score,
                    beams & (new_done == 1),
                    new_beam,
                    new_last,
                    new_length,
                    rows_ptr,
                    history_ptr,
                    results_ptr,
                    position,
                    num_positions,
                    num_slots,
                    slot,
                    NB,
                )
            if ended_as != 0:
                tell_host(reported_ptr + slot, ended_as, ON_GPU)
