"""A stream of packed weights that is only read: the bench's ceiling of memory beside `torch.sum`."""

from kernels.read_strips.launcher import read_strips
from kernels.read_strips.reference import STRIP_WORDS, read_strips_reference

__all__ = ["STRIP_WORDS", "read_strips", "read_strips_reference"]
