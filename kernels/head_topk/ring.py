"""Rings of shared memory that the head's kernels for Hopper fill and empty: what is the same for both."""
# mypy: ignore-errors

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def stage_after(stage, phase, STAGES: gl.constexpr):
    """The next of STAGES stages, and the parity of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    """The stage before this one of STAGES."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)
