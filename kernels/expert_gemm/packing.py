"""One packed layout of expert weights for every token count.

E experts, N output features, K input features. A *strip* is 64 output features; a *block* is 32 words of 32 bits a row,
which hold KB = 1024 / bits input features. Packed data: int32[E, ceil(N/64), ceil(K/KB), 64, 32], so a step of a strip is
8 KB in one piece, and a strip of one expert is one unbroken run.

Order inside a block: input feature j * 32 + 2 * t + side sits in words 2t, 2t + 1 (plane j, pair t, side 0 or 1). Word 2t
holds planes j < planes/2, word 2t + 1 the others; side 0 lies in the low 16 bits, side 1 in the high 16, plane p of a word
at bit bits * p of its half. So a plane is 32 neighbouring features, and one mask of a word gives both halves of a
tensor-core register. Codes are stored plus 8 (int4) or plus 128 (int8). Padding rows and features hold code 0.

Scales: one per output channel, fp[E, N]; or one per group of 64 or 128 input features, fp[E, ceil(N/64), groups, 64]
(groups of the padded K), so that a step reads its scales in one piece. The float dtype given is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check

LAYOUT_VERSION = 1
STRIP = 64
WORDS = 32


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Expert matrices as the kernels read them.

    bits 4 or 8: data int32 (layout above), scales as above. bits 16: data bf16/fp16/fp32[E, N, K] as it is, scales None.
    group_size 0 means one scale per output channel.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    group_size: int
    num_features: int  # N
    num_inputs: int  # K
    layout_version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        check(
            self.layout_version == LAYOUT_VERSION,
            f"packed weights have layout version {self.layout_version}, this build reads {LAYOUT_VERSION}: convert again",
        )
        check(self.bits in (4, 8, 16), f"bits is {self.bits}; choose 4, 8 or 16 (unquantized)")
        check(self.group_size in (0, 64, 128), f"group_size is {self.group_size}; choose 0 (per channel), 64 or 128")
        check((self.scales is None) == (self.bits == 16), "quantized weights need scales, unquantized ones have none")
        check(self.data.is_contiguous(), "packed data must be contiguous")
        wanted = packed_shape(self.num_experts, self.num_features, self.num_inputs, self.bits)
        check(tuple(self.data.shape) == wanted, f"packed data is {tuple(self.data.shape)}; N, K and bits say {wanted}")
        if self.scales is not None:
            wanted = scale_shape(self.num_experts, self.num_features, self.num_inputs, self.bits, self.group_size)
            check(
                tuple(self.scales.shape) == wanted,
                f"packed scales are {tuple(self.scales.shape)}; N, K and group say {wanted}",
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.data.shape[0]

    @property
    def bytes_per_expert(self) -> int:
        """Bytes one expert's matrix and scales occupy: what a step that hits it must read."""
        total = self.data.numel() * self.data.element_size()
        if self.scales is not None:
            total += self.scales.numel() * self.scales.element_size()
        return total // self.num_experts

    def expert(self, e: int) -> PackedExperts:
        """Expert e alone, sharing memory."""
        scales = None if self.scales is None else self.scales[e : e + 1]
        return PackedExperts(self.data[e : e + 1], scales, self.bits, self.group_size, self.num_features, self.num_inputs)

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same weights on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        return PackedExperts(self.data.to(device), scales, self.bits, self.group_size, self.num_features, self.num_inputs)


def packed_shape(num_experts: int, num_features: int, num_inputs: int, bits: int) -> tuple[int, ...]:
    """Shape of `PackedExperts.data`."""
    if bits == 16:
        return num_experts, num_features, num_inputs
    block = WORDS * 32 // bits
    return num_experts, -(-num_features // STRIP), -(-num_inputs // block), STRIP, WORDS


def scale_shape(num_experts: int, num_features: int, num_inputs: int, bits: int, group_size: int) -> tuple[int, ...]:
    """Shape of `PackedExperts.scales`."""
    if group_size == 0:
        return num_experts, num_features
    block = WORDS * 32 // bits
    return num_experts, -(-num_features // STRIP), -(-num_inputs // block) * (block // group_size), STRIP


def pack(codes: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int = 0) -> PackedExperts:
    """Canonical form -> packed. One expert at a time, so peak extra memory is a few times one expert.

    codes int8[E, N, K] in [-8, 7] (bits 4) or [-128, 127] (bits 8); scales fp[E, N], or fp[E, N, ceil(K / group_size)].
    """
    check(bits in (4, 8), f"bits is {bits}; choose 4 or 8")
    check(codes.dtype == torch.int8 and codes.dim() == 3, f"codes are {codes.dtype}{list(codes.shape)}; give int8[E, N, K]")
    num_experts, n, k = codes.shape
    groups = -(-k // group_size) if group_size else 0
    wanted = (num_experts, n, groups) if group_size else (num_experts, n)
    check(tuple(scales.shape) == wanted, f"scales are {tuple(scales.shape)}; codes and group_size want {wanted}")
    data = torch.empty(packed_shape(num_experts, n, k, bits), dtype=torch.int32, device=codes.device)
    for e in range(num_experts):
        data[e] = _pack_expert(codes[e], bits)
    packed_scales = scales.contiguous()
    if group_size:
        packed_scales = scales.new_zeros(scale_shape(num_experts, n, k, bits, group_size))
        padded = scales.new_zeros(num_experts, packed_scales.shape[1] * STRIP, packed_scales.shape[2])
        padded[:, :n, :groups] = scales
        packed_scales.copy_(padded.view(num_experts, -1, STRIP, packed_scales.shape[2]).transpose(2, 3))
    return PackedExperts(data, packed_scales, bits, group_size, n, k)


def unpack(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed -> canonical (codes int8[E, N, K], scales); the exact inverse of `pack`."""
    check(packed.bits in (4, 8), "unquantized weights have no codes")
    assert packed.scales is not None
    n, k, num_experts = packed.num_features, packed.num_inputs, packed.num_experts
    codes = torch.stack([_unpack_expert(packed.data[e], packed.bits)[:n, :k] for e in range(num_experts)])
    if packed.group_size == 0:
        return codes, packed.scales.clone()
    groups = -(-k // packed.group_size)
    return codes, packed.scales.transpose(2, 3).reshape(num_experts, -1, packed.scales.shape[2])[:, :n, :groups].contiguous()


def unquantized(weight: torch.Tensor) -> PackedExperts:
    """Wrap float matrices [E, N, K] (bf16, fp16 or fp32) for the same launchers."""
    check(
        weight.is_floating_point() and weight.dim() == 3,
        f"weight is {weight.dtype}{list(weight.shape)}; give floats [E, N, K]",
    )
    return PackedExperts(weight.contiguous(), None, 16, 0, weight.shape[1], weight.shape[2])


def _pack_expert(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8[N, K] -> int32[strips, blocks, 64, 32]."""
    n, k = codes.shape
    block, offset = WORDS * 32 // bits, 1 << (bits - 1)
    strips, blocks = -(-n // STRIP), -(-k // block)
    padded = codes.new_zeros(strips * STRIP, blocks * block, dtype=torch.uint8)
    padded += offset
    padded[:n, :k] = (codes.to(torch.int16) + offset).to(torch.uint8)
    if bits == 4:  # planes j = (word, byte of a half, nibble)
        c = padded.view(strips, STRIP, blocks, 2, 2, 2, 16, 2)
        c = c[:, :, :, :, :, 0] | (c[:, :, :, :, :, 1] << 4)
    else:
        c = padded.view(strips, STRIP, blocks, 2, 2, 16, 2)
    # [strip, row, block, word, byte, t, side] -> [strip, block, row, t, word, side, byte]
    return c.permute(0, 2, 1, 5, 3, 6, 4).reshape(strips, blocks, STRIP, WORDS * 4).view(torch.int32)


def _unpack_expert(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32[strips, blocks, 64, 32] -> int8[strips * 64, blocks * KB]."""
    strips, blocks = words.shape[:2]
    b = words.contiguous().view(torch.uint8).view(strips, blocks, STRIP, 16, 2, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
    if bits == 4:
        b = torch.stack((b & 15, b >> 4), dim=5)
    codes = b.reshape(strips * STRIP, -1)
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
