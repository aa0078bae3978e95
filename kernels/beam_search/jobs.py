"""Compile jobs of the search kernels, for `kernels.compile_ahead`."""

from __future__ import annotations

import torch

from kernels.beam_search.launcher import advance_options, input_options
from kernels.compile_ahead import Job


def search_jobs() -> list[Job]:
    """Entries of a step, and one token for every sentence: greedy, beam 4 and beam 8."""
    i32, f32, u8 = torch.int32, torch.float32, torch.uint8
    inputs = (*(i32,) * 13, u8, *(i32,) * 4, 320, 320, 41, 40)
    jobs: list[Job] = [
        ("kernels.beam_search.inputs", "step_inputs_kernel", (*inputs, width, 2, 2), input_options(width > 0))
        for width in (0, 352)
    ]
    tables = (i32, i32, i32, i32, f32, i32, i32, i32, i32, i32, f32, f32, f32, i32, i32, i32, i32, i32, 40, 80, 2)
    return jobs + [
        ("kernels.beam_search.kernel", "advance_kernel", tables, advance_options(k, on_gpu=True)) for k in (1, 8, 16)
    ]
