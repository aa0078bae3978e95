"""What the entries of a step are: facts that search and attention kernels rest on (Gluon may call these too)."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def entries_of(slot, count, MOST: tl.constexpr):
    """How many entries of a group are worked off: 0 for an unused group (slot -1 or count 0)."""
    return tl.where(slot >= 0, tl.minimum(count, MOST), 0)


@triton.jit
def ends_at_once(count):
    """Whether the program of this group (axis 1 of the grid) has nothing to do. Those of the first group stay even so: a
    launch must not be over before the one before it, or what waits for this one would not have waited for that."""
    return (count <= 0) & (tl.program_id(1) > 0)


@triton.jit
def follows_start_token(last):
    """Whether entries at position `last` attend to a cell, besides their own, that this very step may write: in the first
    step of a sentence its start token (position 0) is fed as an entry of its own beside its beams (position 1)."""
    return last == 1
