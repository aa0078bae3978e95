"""Beam and greedy search on the device: sentences begin, hand the decoder its inputs, and advance by one token."""

from kernels.beam_search.launcher import advance_sentences, begin_sentences, step_inputs
from kernels.beam_search.reference import advance_sentence_reference
from kernels.beam_search.tables import MAX_BEAMS, BeamTables, StepInputs

__all__ = [
    "MAX_BEAMS",
    "BeamTables",
    "StepInputs",
    "advance_sentence_reference",
    "advance_sentences",
    "begin_sentences",
    "step_inputs",
]
