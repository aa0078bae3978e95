"""Attention of one decode step: over a hypothesis's own history (beam ancestry) and over its source sentence."""

from kernels.decode_attention.launcher import decode_cross_attention, decode_self_attention, lists_from
from kernels.decode_attention.reference import decode_cross_attention_reference, decode_self_attention_reference

__all__ = [
    "decode_cross_attention",
    "decode_cross_attention_reference",
    "decode_self_attention",
    "decode_self_attention_reference",
    "lists_from",
]
