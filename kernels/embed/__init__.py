"""Token embedding times its scale plus position row, in one pass."""

from kernels.embed.launcher import embed
from kernels.embed.reference import embed_reference

__all__ = ["embed", "embed_reference"]
