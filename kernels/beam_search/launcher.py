"""Launchers of the search kernels. R entries, G groups (runs of entries of one sentence), K candidates an entry."""

from __future__ import annotations

import torch

from kernels.beam_search.tables import MAX_BEAMS, RECORD_FIELDS, SENTENCE_FIELDS, BeamTables, StepInputs
from kernels.history_lists import HistoryLists
from kernels.launch import check, next_power_of_two, overlap

_BLOCK = 64  # positions of ancestry moved at once


def begin_sentences(records: torch.Tensor, normalizers: torch.Tensor, tables: BeamTables, *, start_token_id: int) -> None:
    """Write the records of new sentences into the tables: their start token is to be fed at position 0, their forced token
    at position 1.

    records int32[B, 16]: slot, beams (1 to 8), max_tokens, min_tokens, flags, forced token, ngram size, 0, 8 cache rows.
    normalizers fp32[B, T + 2]: n ** length_penalty for n = 0, 1, ... One launch.
    """
    count = records.shape[0]
    check(tuple(records.shape) == (count, RECORD_FIELDS), f"records are {tuple(records.shape)}; give [B, {RECORD_FIELDS}]")
    wanted = (count, tables.num_positions + 1)
    check(tuple(normalizers.shape) == wanted, f"normalizers are {tuple(normalizers.shape)}; give {wanted}")
    if count == 0:
        return
    from kernels.beam_search.kernel import begin_kernel

    begin_kernel[(count,)](
        records,
        normalizers,
        tables.sentences,
        tables.status,
        tables.rows,
        tables.token_ids,
        tables.cum_logprob,
        tables.normalizers,
        tables.hypothesis_score,
        tables.hypotheses,
        tables.ancestry,
        tables.history,
        tables.reported,
        tables.num_positions,
        start_token_id,
        NB=MAX_BEAMS,
        FIELDS=SENTENCE_FIELDS,
        RECORD=RECORD_FIELDS,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def step_inputs(
    entry_slots: torch.Tensor,
    entry_beams: torch.Tensor,
    tables: BeamTables,
    *,
    start_token_id: int,
    eos_token_id: int,
    out: StepInputs,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    lists: HistoryLists | None = None,
) -> StepInputs:
    """What each entry feeds the decoder now. entry_slots int32[R] (-1: idle), entry_beams int32[R] (-1: the start token of a
    sentence that begins). Entries of sentences that have finished are idle too. One launch.

    lists: filled with the cells of the histories of `groups` (slots, first entries, counts int32[G], as of
    `advance_sentences`, counts up to 8), for `decode_self_attention`; its max_positions is that of the cells. Nothing is
    written before all launches before this one are over, and the next may start only then.
    """
    count = entry_slots.shape[0]
    check(entry_beams.shape == entry_slots.shape, "entry_slots and entry_beams must be of one length")
    check(out.rows.shape == entry_slots.shape, f"out holds {out.rows.shape[0]} entries; give {count}")
    check((lists is None) == (groups is None), "lists are of groups: give both or neither")
    num_groups = 0
    if lists is not None and groups is not None:
        num_groups = groups[0].shape[0]
        held = lists.max_positions + 1
        check(lists.groups.shape[0] == num_groups, f"lists are of {lists.groups.shape[0]} groups; give {num_groups}")
        check(held >= tables.num_positions, f"lists are of {held} positions; tables of {tables.num_positions}")
    from kernels.beam_search.inputs import step_inputs_kernel

    options = input_options(lists is not None)
    programs = -(-count // options["BLOCK"])
    if lists is not None:
        programs += num_groups + 1
    step_inputs_kernel[(programs,)](
        entry_slots,
        entry_beams,
        *(groups or (entry_slots,) * 3),
        tables.sentences,
        tables.status,
        tables.rows,
        tables.token_ids,
        tables.ancestry,
        out.token_ids,
        out.positions,
        out.rows,
        out.active.view(torch.uint8),
        out.banned,
        *((lists.groups, lists.words, lists.in_use) if lists is not None else (entry_slots,) * 3),
        count,
        num_groups,
        tables.num_positions,
        0 if lists is None else lists.max_positions,
        0 if lists is None else lists.words.shape[1],
        start_token_id,
        eos_token_id,
        **options,
        **overlap(entry_slots),
    )
    return out


def input_options(lists: bool) -> dict[str, int]:
    """Constants and warps of `step_inputs`, with lists of the cells of each group or without."""
    return {
        "NB": MAX_BEAMS,
        "FIELDS": SENTENCE_FIELDS,
        "BLOCK": 128,
        "SPAN": _BLOCK,
        "LISTS": lists,
        "num_warps": 4,
    }


def advance_sentences(
    values: torch.Tensor,
    top_token_ids: torch.Tensor,
    group_slots: torch.Tensor,
    group_starts: torch.Tensor,
    group_counts: torch.Tensor,
    entry_beams: torch.Tensor,
    tables: BeamTables,
    *,
    eos_token_id: int,
) -> None:
    """One search step for every sentence: greedy where it has one beam, else beam search as transformers does it.

    values fp32[R, K], top_token_ids int32[R, K]: log-probabilities of each entry's best tokens, best first, K >= 2 * beams
    (or 1 where all are greedy); NaN marks logits that are not finite. group_slots, group_starts, group_counts int32[G]: runs
    of entries (count 0: unused), one a beam; in a sentence's first step one for its first beam, for all are alike then and
    only that may branch. A run that starts with beam -1 is a start token and does not advance. Sentences that close leave
    their hypotheses in `results`, for the host to read once `reported` says so. One launch.
    """
    entries, candidates = values.shape
    check(top_token_ids.shape == values.shape, "values and top_token_ids must be of one shape")
    check(values.is_contiguous() and top_token_ids.is_contiguous(), "values and top_token_ids must be contiguous")
    check(entry_beams.shape[0] == entries, f"entry_beams holds {entry_beams.shape[0]} entries; values {entries}")
    from kernels.beam_search.kernel import advance_kernel

    advance_kernel[(group_slots.shape[0],)](
        group_slots,
        group_starts,
        group_counts,
        entry_beams,
        values,
        top_token_ids,
        tables.sentences,
        tables.status,
        tables.rows,
        tables.token_ids,
        tables.cum_logprob,
        tables.normalizers,
        tables.hypothesis_score,
        tables.hypotheses,
        tables.ancestry,
        tables.history,
        tables.results,
        tables.reported,
        tables.num_positions,
        tables.num_slots,
        eos_token_id,
        **advance_options(candidates, on_gpu=values.is_cuda),
        **overlap(values),
    )


def advance_options(num_candidates: int, *, on_gpu: bool) -> dict[str, int]:
    """Constants and warps of the search step, which compares every candidate of a sentence with every other."""
    padded = next_power_of_two(num_candidates)
    return {
        "NB": MAX_BEAMS,
        "K": num_candidates,
        "K_PAD": padded,
        "FIELDS": SENTENCE_FIELDS,
        "BLOCK": _BLOCK,
        "ON_GPU": on_gpu,
        "num_warps": 1 if padded <= 8 else 4,
    }
