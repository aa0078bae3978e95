"""Compile jobs of the search kernels, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.beam_search.launcher import advance_options
from kernels.beam_search.tables import MAX_BEAMS, SENTENCE_FIELDS
from kernels.compile_ahead import Job


def search_jobs() -> list[Job]:
    """Entries of a step, and one token for every sentence: greedy, beam 4 and beam 8."""
    i32, f32, u8 = torch.int32, torch.float32, torch.uint8
    inputs = (i32, i32, i32, i32, i32, i32, i32, i32, i32, u8, i32, 320, 2, 2)
    options = {"NB": MAX_BEAMS, "FIELDS": SENTENCE_FIELDS, "BLOCK": 128, "num_warps": 4}
    jobs: list[Job] = [("kernels.beam_search.kernel", "step_inputs_kernel", inputs, options)]
    tables = (i32, i32, i32, i32, f32, i32, i32, i32, i32, i32, f32, f32, f32, i32, i32, i32, 40, 2)
    return jobs + [("kernels.beam_search.kernel", "advance_kernel", tables, advance_options(k)) for k in (1, 8, 16)]
