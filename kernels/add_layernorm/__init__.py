"""Residual add (with the ordered sum over top-k expert outputs) and layer norm in one pass, or the add alone."""

from kernels.add_layernorm.launcher import add_layernorm, add_slots
from kernels.add_layernorm.reference import add_layernorm_reference

__all__ = ["add_layernorm", "add_layernorm_reference", "add_slots"]
