"""Search states for kernels.replay_check: sentences of every age in the beam tables, and the same ones as plain lists.

R entries, G groups, P slots, N cache rows, T target positions, K candidates an entry.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch

from kernels.beam_search import BeamTables, StepInputs, advance_sentence_reference, advance_sentences, begin_sentences
from kernels.beam_search.reference import Hypothesis, SentenceState
from kernels.beam_search.tables import BOUNDS_BY_MAX, NUM_TOKENS, RECORD_FIELDS, STOPS_WHEN_FULL

START, EOS = 2, 2
MAX_BEAM = 4
_WORDS = 64  # tokens that past steps chose among


@dataclass(slots=True)
class Sentence:
    """A sentence and its place in the step. age: tokens it has chosen since it began; -1: it is fed its start token now."""

    slot: int
    rows: list[int]
    first_entry: int
    age: int
    min_tokens: int
    flags: int
    forced: int
    state: SentenceState

    @property
    def num_entries(self) -> int:
        """Entries it takes in the step."""
        return 1 if self.age < 0 else len(self.rows)

    @property
    def live(self) -> bool:
        """Whether its entries are not idle."""
        return not self.state.closed


@dataclass(frozen=True, slots=True)
class SearchIndices:
    """entry_slots, entry_beams int32[R]; group_slots, group_starts, group_counts int32[G]: what the host hands a step."""

    entry_slots: torch.Tensor
    entry_beams: torch.Tensor
    group_slots: torch.Tensor
    group_starts: torch.Tensor
    group_counts: torch.Tensor


def draw_sentences(num_entries: int, num_slots: int, num_rows: int, max_target_tokens: int, seed: int) -> list[Sentence]:
    """Sentences of 1 to 4 beams that fill the entries but for a random number of idle ones between and behind them."""
    rng = random.Random(seed)
    slots, rows = rng.sample(range(num_slots), num_slots), rng.sample(range(num_rows), num_rows)
    used, sentences = 0, list[Sentence]()
    while slots and used + MAX_BEAM <= num_entries - 1:  # the last entry stays idle
        beams = rng.randint(1, MAX_BEAM)
        max_tokens = rng.randint(2, max_target_tokens)
        age = -1 if len(sentences) == 1 else 0 if len(sentences) == 2 else rng.randint(0, max_tokens - 1)
        penalty = rng.choice((0.0, 0.6, 1.0, 1.3))
        forced = rng.randint(3, 9)
        flags = rng.choice((0, STOPS_WHEN_FULL, BOUNDS_BY_MAX))
        norms = torch.arange(max_target_tokens + 2, dtype=torch.float32).clamp_min(1).pow(penalty).tolist()
        state = SentenceState(
            num_beams=beams,
            max_tokens=max_tokens,
            stops_when_full=bool(flags & STOPS_WHEN_FULL),
            bounds_by_max=bool(flags & BOUNDS_BY_MAX),
            normalizers=norms,
            prefixes=[[START, forced] for _ in range(beams)],
            cum_logprob=[0.0] + [-1e9] * (beams - 1),
            finished=[Hypothesis() for _ in range(beams)],
        )
        taken = [rows.pop() for _ in range(beams)]
        sentences.append(Sentence(slots.pop(), taken, used, age, rng.randint(0, max_target_tokens), flags, forced, state))
        used += sentences[-1].num_entries + (rng.random() < 0.2)
    return sentences


def search_indices(sentences: list[Sentence], num_entries: int, num_groups: int, seed: int) -> SearchIndices:
    """Groups in random order with unused ones among them; whatever belongs to no sentence is idle. On the CPU."""
    entry_slots, entry_beams = torch.full((num_entries,), -1), torch.zeros(num_entries, dtype=torch.int64)
    groups = torch.zeros(num_groups, 3, dtype=torch.int64)
    groups[:, 0] = -1
    order = random.Random(seed).sample(range(num_groups), len(sentences))
    for at, s in zip(order, sentences, strict=True):
        span = slice(s.first_entry, s.first_entry + s.num_entries)
        entry_slots[span] = s.slot
        entry_beams[span] = torch.tensor([-1]) if s.age < 0 else torch.arange(s.num_entries)
        groups[at] = torch.tensor([s.slot, s.first_entry, s.num_entries])
    slots, starts, counts = (column.int().contiguous() for column in groups.unbind(1))
    return SearchIndices(entry_slots.int(), entry_beams.int(), slots, starts, counts)


def bring_to_age(
    sentences: list[Sentence], indices: SearchIndices, tables: BeamTables, num_candidates: int, vocab_size: int, seed: int
) -> None:
    """Begin the sentences in the tables and take each through as many steps of search as its age, lists alongside."""
    device, generator = tables.status.device, torch.Generator().manual_seed(seed)
    begin_sentences(
        torch.tensor([_record(s) for s in sentences], dtype=torch.int32, device=device),
        torch.tensor([s.state.normalizers for s in sentences], device=device),
        tables,
        start_token_id=START,
    )
    num_entries, age_of_slot = indices.entry_slots.shape[0], {s.slot: s.age for s in sentences}
    ages = torch.tensor([age_of_slot.get(slot, -1) for slot in indices.group_slots.tolist()])
    for left in range(max(s.age for s in sentences), 0, -1):
        logits = torch.randn(num_entries, min(_WORDS, vocab_size - 2), generator=generator)
        top = logits.log_softmax(1).topk(num_candidates)
        values, token_ids = top.values, top.indices.int() + 2
        advance_sentences(
            values.to(device),
            token_ids.to(device),
            indices.group_slots.to(device),
            indices.group_starts.to(device),
            torch.where(ages >= left, indices.group_counts, 0).int().to(device),
            indices.entry_beams.to(device),
            tables,
            eos_token_id=EOS,
        )
        for s in sentences:
            if s.age >= left and s.live:
                advance_lists(s, values, token_ids)


def _record(s: Sentence) -> list[int]:
    head = [s.slot, s.state.num_beams, s.state.max_tokens, s.min_tokens, s.flags, s.forced, 0, 0]
    return head + s.rows + [0] * (RECORD_FIELDS - len(head) - len(s.rows))


def advance_lists(s: Sentence, values: torch.Tensor, token_ids: torch.Tensor) -> None:
    """The slow twin's step on the entries of the sentence; values fp32[R, K] and token_ids int32[R, K] on the CPU.

    The kernel adds in fp32 and the twin in fp64, which could order near-equal sums differently: the twin is handed values
    whose exact sums are the fp32 ones.
    """
    span = slice(s.first_entry, s.first_entry + s.state.num_beams)
    cum = torch.tensor(s.state.cum_logprob, dtype=torch.float64)[:, None]
    exact = (cum.float() + values[span]).double() - cum
    keep = 1 if s.state.num_beams == 1 else values.shape[1]
    advance_sentence_reference(s.state, exact[:, :keep].tolist(), token_ids[span, :keep].tolist(), EOS)


def inputs_differ(sentences: list[Sentence], inputs: StepInputs) -> bool:
    """Whether what `step_inputs` gave differs from what the lists say; of idle entries only that they are idle counts."""
    tokens, positions, rows, active, banned = (
        getattr(inputs, name).tolist() for name in ("token_ids", "positions", "rows", "active", "banned")
    )
    wanted = {}
    for s in sentences:
        for j in range(s.num_entries if s.live else 0):
            position = 0 if s.age < 0 else len(s.state.prefixes[j]) - 1
            token = START if s.age < 0 else s.state.prefixes[j][-1]
            # a start token's candidates are not used, so what is banned then follows the sentence's first chosen token
            ban = EOS if max(position, 1) < s.min_tokens else -1
            wanted[s.first_entry + j] = token, position, s.rows[j], True, ban
    for entry, found in enumerate(zip(tokens, positions, rows, active, banned, strict=True)):
        if found != wanted.get(entry, (found[0], found[1], -1, False, -1)):
            return True
    return False


def tables_differ(
    sentences: list[Sentence], was: BeamTables, now: BeamTables, values: torch.Tensor, token_ids: torch.Tensor
) -> bool:
    """Whether one step of search took the tables from `was` elsewhere than it takes the lists (which stay as they are)."""
    values, token_ids = values.cpu(), token_ids.cpu()
    was, now = (BeamTables(**{n: getattr(t, n).cpu() for n in BeamTables.__slots__}) for t in (was, now))
    still = torch.ones(now.num_slots, dtype=torch.bool)
    still_rows = torch.ones(now.ancestry.shape[0], dtype=torch.bool)
    for s in sentences:
        if s.live and s.age >= 0:
            still[s.slot] = False
            still_rows[s.rows] = False
            moved = copy.deepcopy(s)
            advance_lists(moved, values, token_ids)
            if _sentence_differs(moved, now):
                return True
    by_slot = ("sentences", "status", "reported", "token_ids", "cum_logprob", "hypotheses", "hypothesis_score")
    kept = [(n, still) for n in by_slot]
    kept += [(n, still_rows) for n in ("ancestry", "history")]
    if not torch.equal(was.results[:, still], now.results[:, still]):
        return True
    return not all(torch.equal(_bits(getattr(was, n)[rows]), _bits(getattr(now, n)[rows])) for n, rows in kept)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def _sentence_differs(s: Sentence, tables: BeamTables) -> bool:
    state, n = s.state, s.state.num_beams
    counted = int(tables.status[s.slot]), int(tables.reported[s.slot]), int(tables.sentences[s.slot, NUM_TOKENS])
    if counted != (int(state.closed), int(state.closed), len(state.prefixes[0]) - 1):
        return True
    if tables.token_ids[s.slot, :n].tolist() != [prefix[-1] for prefix in state.prefixes]:
        return True
    cum = torch.tensor(state.cum_logprob)
    return (
        not torch.allclose(tables.cum_logprob[s.slot, :n], cum, rtol=1e-6, atol=1e-5)
        or any(_prefix_differs(row, prefix, tables) for row, prefix in zip(s.rows, state.prefixes, strict=True))
        or any(_hypothesis_differs(s.slot, place, found, tables) for place, found in enumerate(state.finished))
        or (state.closed and any(_result_differs(s.slot, at, found, tables) for at, found in enumerate(state.finished)))
    )


def _prefix_differs(row: int, prefix: list[int], tables: BeamTables) -> bool:
    """Whether ancestry and history give other tokens for the beam of a cache row."""
    holders = tables.ancestry[row, : len(prefix)].long()
    if ((holders < 0) | (holders >= tables.history.shape[0])).any():
        return True
    held: list[int] = tables.history[holders, torch.arange(len(prefix)), 0].tolist()
    return held != prefix


def _hypothesis_differs(slot: int, place: int, wanted: Hypothesis, tables: BeamTables) -> bool:
    done, _, last, length = tables.hypotheses[slot, place].tolist()
    if bool(done) != wanted.done or not wanted.done:
        return bool(done) != wanted.done
    score = float(tables.hypothesis_score[slot, place])
    same_score = abs(score - wanted.score) <= 1e-5 * max(1.0, abs(wanted.score))
    return (last, length) != (wanted.last_token, wanted.length) or not same_score


def _result_differs(slot: int, place: int, wanted: Hypothesis, tables: BeamTables) -> bool:
    length, score, *tokens = tables.results[place, slot].tolist()
    if not wanted.done:
        return bool(length)
    same_score = score == int(tables.hypothesis_score[slot, place].view(torch.int32))
    return tokens[:length] != list(wanted.tokens) or not same_score
