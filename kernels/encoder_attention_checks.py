"""Attention of an encoder pass: cases, operands, and one run of either side.

Operands are NaN (indices far out of range) wherever nothing may be read, and so is the output before the call.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.encoder_attention import encoder_attention, encoder_attention_reference

_NAN = float("nan")


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderCase:
    """Sentences by their length; a negative length is a gap of so many padding tokens."""

    num_heads: int
    head_dim: int
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Readable id."""
        return f"h{self.num_heads}x{self.head_dim}-s{'.'.join(map(str, self.lengths))}"


def encoder_cases(*, large: bool) -> list[EncoderCase]:
    """Awkward sizes for every head_dim; `large` (GPU) adds sizes that an interpreter is too slow for."""
    cases = [
        EncoderCase(1, 16, (1,)),
        EncoderCase(2, 32, (24, 7, 1, 50, -5)),
        EncoderCase(1, 64, (3, -2, 70, 1, -3, 2, -1)),
        EncoderCase(1, 128, (33, 40)),
        EncoderCase(2, 16, (-9,)),
    ]
    if large:
        cases += [
            EncoderCase(16, 64, (*(1 + 11 * i % 61 for i in range(60)), -37)),
            EncoderCase(16, 128, (512, 3, 700)),
            EncoderCase(4, 64, (1024, -8, 1024, 1)),
            EncoderCase(16, 32, (5,) * 100),
        ]
    return cases


@dataclasses.dataclass(frozen=True, slots=True)
class EncoderInputs:
    """Operands of one case of encoder_attention."""

    qkv: torch.Tensor
    token_starts: torch.Tensor
    token_ends: torch.Tensor
    num_heads: int

    def run(self) -> torch.Tensor:
        """The op over a poisoned output."""
        out = self.qkv.new_full((len(self.qkv), self.qkv.shape[1] // 3), _NAN)
        return encoder_attention(self.qkv, self.token_starts, self.token_ends, num_heads=self.num_heads, out=out)

    def truth(self) -> torch.Tensor:
        """The slow twin."""
        return encoder_attention_reference(self.qkv, self.token_starts, self.token_ends, num_heads=self.num_heads)


def encoder_inputs(case: EncoderCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> EncoderInputs:
    """Random operands; a padding token has an empty range: at the next sentence's start or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, width = sum(map(abs, case.lengths)), 3 * case.num_heads * case.head_dim
    qkv = torch.full((num_tokens, width), _NAN)
    starts = torch.randint(0, num_tokens, (num_tokens,), generator=generator, dtype=torch.int32)
    ends = starts.clone()
    at = 0
    for length in case.lengths:
        if length > 0:
            qkv[at : at + length] = torch.randn(length, width, generator=generator) * 1.5
            starts[at : at + length], ends[at : at + length] = at, at + length
        else:
            every_other = slice(at + (1 - length) % 2, at - length, 2)  # the last one among them
            starts[every_other] = ends[every_other] = at - length
        at += abs(length)
    return EncoderInputs(qkv.to(device, dtype), starts.to(device), ends.to(device), case.num_heads)
