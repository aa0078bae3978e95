"""Bidirectional attention inside each sentence of a pack."""

from kernels.encoder_attention.launcher import encoder_attention
from kernels.encoder_attention.reference import encoder_attention_reference

__all__ = ["encoder_attention", "encoder_attention_reference"]
