"""Residual add (with the ordered sum over top-k expert outputs) and layer norm in one pass, in 16 bits or int8; or the add
alone."""

from kernels.add_layernorm.launcher import add_layernorm, add_layernorm_int8, add_slots
from kernels.add_layernorm.reference import add_layernorm_int8_reference, add_layernorm_reference

__all__ = [
    "add_layernorm",
    "add_layernorm_int8",
    "add_layernorm_int8_reference",
    "add_layernorm_reference",
    "add_slots",
]
