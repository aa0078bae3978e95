"""What the search knows about live sentences and rows, at fixed addresses, so that a captured step can read and write it.

P source slots (a sentence is named by its slot), N cache rows, T decoder positions, R entries of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_BEAMS = 8
SENTENCE_FIELDS = 8  # num_beams, max_tokens, min_tokens, flags, num_tokens, ngram size, two unused (a record is 32 bytes)
RECORD_FIELDS = (
    16  # `begin_sentences` reads: slot, num_beams, max_tokens, min_tokens, flags, forced token, ngram size, 0, rows
)
NUM_TOKENS, NGRAM_SIZE = 4, 5  # fields of a sentence that are read outside the kernels
STOPS_WHEN_FULL, BOUNDS_BY_MAX = 1, 2  # flags: early_stopping True; early_stopping "never" with a positive length penalty
FIRST_TOKEN = 2  # of a result: before it come length and score
LIVE, CLOSED, BROKEN = 0, 1, 2  # status: still searching; finished; the logits were not finite


@dataclass(frozen=True, slots=True)
class BeamTables:
    """By slot: sentences int32[P, 8] (fields above), status int32[P], rows int32[P, 8] (cache rows of its beams), token_ids
    int32[P, 8] fed next, cum_logprob fp32[P, 8] best first, normalizers fp32[P, T + 2] (n ** length_penalty), and the
    finished list, best first: hypothesis_score fp32[P, 8], hypotheses int32[P, 8, 4] (done, beam, last token, length).

    For the host, which reads them without asking the device, so in pinned memory where the tables are on a GPU: results
    int32[8, P, T + 2] by place in that list and slot, written when a sentence closes (length, 0 where there is no
    hypothesis; the bits of the fp32 score; the tokens from the forced one on; the best of all sentences lie together), and
    reported int32[P], the status that a sentence ended with, written once its results are there, LIVE until then.

    By row: ancestry int32[N, T + 1], the cache row that holds position t of the beam living in row n; history int32
    [N, T + 1, 2], the token that row n was fed at position t and the beam number it continued there.
    """

    sentences: torch.Tensor
    status: torch.Tensor
    rows: torch.Tensor
    token_ids: torch.Tensor
    cum_logprob: torch.Tensor
    normalizers: torch.Tensor
    hypothesis_score: torch.Tensor
    hypotheses: torch.Tensor
    ancestry: torch.Tensor
    history: torch.Tensor
    results: torch.Tensor
    reported: torch.Tensor

    @classmethod
    def allocate(cls, *, num_slots: int, num_rows: int, max_target_tokens: int, device: torch.device) -> BeamTables:
        """Zeros for P slots, N rows and T = max_target_tokens positions."""

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def host_ints(*shape: int) -> torch.Tensor:
            on_gpu = device.type == "cuda"
            return torch.zeros(shape, dtype=torch.int32, device="cpu" if on_gpu else device, pin_memory=on_gpu)

        return cls(
            sentences=ints(num_slots, SENTENCE_FIELDS),
            status=ints(num_slots),
            rows=ints(num_slots, MAX_BEAMS),
            token_ids=ints(num_slots, MAX_BEAMS),
            cum_logprob=floats(num_slots, MAX_BEAMS),
            normalizers=floats(num_slots, max_target_tokens + 2),
            hypothesis_score=floats(num_slots, MAX_BEAMS),
            hypotheses=ints(num_slots, MAX_BEAMS, 4),
            ancestry=ints(num_rows, max_target_tokens + 1),
            history=ints(num_rows, max_target_tokens + 1, 2),
            results=host_ints(MAX_BEAMS, num_slots, FIRST_TOKEN + max_target_tokens),
            reported=host_ints(num_slots),
        )

    @property
    def num_slots(self) -> int:
        """P."""
        return self.status.shape[0]

    @property
    def num_positions(self) -> int:
        """T + 1: columns of ancestry and history."""
        return self.ancestry.shape[1]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the decoder reads in one step, one value an entry, all [R].

    token_ids, positions, rows int32 (row -1: the entry is idle); active bool; banned int32: a token that may not be chosen
    now (-1: none).
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    active: torch.Tensor
    banned: torch.Tensor

    @classmethod
    def allocate(cls, num_entries: int, device: torch.device) -> StepInputs:
        """Unfilled buffers for R entries."""
        ids, positions, rows, banned = (torch.empty(num_entries, dtype=torch.int32, device=device) for _ in range(4))
        return cls(ids, positions, rows, torch.empty(num_entries, dtype=torch.bool, device=device), banned)
