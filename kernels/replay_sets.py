"""The sets of inputs that take turns in kernels.replay_check, each run once against the slow twins."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from kernels.replay_memory import tables_of
from kernels.replay_search import Sentence, bring_to_age, draw_sentences, search_indices
from kernels.replay_step import Step


@dataclass(frozen=True, slots=True)
class RecordedSet:
    """One set of inputs: the step's whole memory before it (outputs poisoned) and after it, uint8 each."""

    before: torch.Tensor
    after: torch.Tensor


def draw_set(step: Step, seed: int) -> list[Sentence]:
    """Fill the step's memory with set number `seed`: poison, then what may be read."""
    z, v = step.sizes, step.arena.views
    step.arena.poison()
    sentences = draw_sentences(z.entries, z.slots, z.rows, z.target_positions, seed)
    indices = search_indices(sentences, z.entries, z.groups, seed)
    bring_to_age(sentences, indices, tables_of(v), v["values"].shape[1], z.vocab, seed)
    for name in ("entry_slots", "entry_beams", "group_slots", "group_starts", "group_counts"):
        v[name].copy_(getattr(indices, name))
    generator = torch.Generator(step.device).manual_seed(seed)
    held = torch.zeros(v["cells"].shape[:2], dtype=torch.bool)
    ancestry, rng = v["ancestry"].cpu().long(), random.Random(seed)
    lengths = v["source_lengths"].cpu()
    for s in sentences:
        lengths[s.slot] = rng.choice((0, 1, z.source_positions, *(rng.randint(1, z.source_positions) for _ in range(9))))
        past = 0 if s.age < 0 else len(s.state.prefixes[0]) - 1
        for row in s.rows if s.live else ():
            held[ancestry[row, :past], torch.arange(past)] = True
    v["source_lengths"].copy_(lengths)
    _fill(v["cells"], held.to(step.device), generator)
    known = torch.where(lengths <= z.source_positions, lengths, 0)
    read = torch.arange(z.source_positions)[None, :] < known[:, None]
    _fill(v["cross_cells"], read.to(step.device), generator)
    _draw_source(step, rng)
    return sentences


def _fill(cells: torch.Tensor, held: torch.Tensor, generator: torch.Generator) -> None:
    """Random numbers in the cells that somebody holds."""
    drawn = torch.randn(cells.shape, generator=generator, device=cells.device)
    cells.copy_(torch.where(held[:, :, None, None, None], drawn, float("nan")))


def _draw_source(step: Step, rng: random.Random) -> None:
    """Sentences of the encoder's pack with gaps of padding (token 0, an empty range) between them."""
    z, v = step.sizes, step.arena.views
    ids: list[int] = []
    places: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    while len(ids) < z.source_tokens:
        at, padding = len(ids), rng.random() < 0.3
        length = min(z.source_tokens - at, rng.randint(1, 5 if padding else z.source_positions))
        ids += [0] * length if padding else [rng.randrange(3, z.vocab) for _ in range(length)]
        places += range(2, 2 + length)
        starts += [at + length if padding else at] * length
        ends += [at + length] * length
    for name, values in (("source_ids", ids), ("source_positions", places), ("token_starts", starts), ("token_ends", ends)):
        v[name].copy_(torch.tensor(values, dtype=torch.int32))


def record_sets(step: Step, num_sets: int) -> tuple[list[RecordedSet], list[str]]:
    """Draw the sets, run each once against the slow twins; what failed, one line each."""
    sets, failures = [], []
    for seed in range(num_sets):
        sentences = draw_set(step, seed)
        before = step.arena.memory.clone()
        failures += [f"set {seed}: {line}" for line in step.run_checked(sentences)]
        sets.append(RecordedSet(before, step.arena.memory.clone()))
    return sets, failures
