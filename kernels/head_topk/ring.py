"""Rings of shared memory that the head's kernels for Hopper fill and empty: what is the same for both."""
# mypy: ignore-errors

from triton.experimental import gluon


@gluon.jit
def stage_after(stage, phase, ring):
    """The next of ring.STAGES stages, and the parity of its barriers."""
    stage += 1
    if stage == ring.STAGES:
        stage = 0
        phase ^= 1
    return stage, phase
