"""Launch choices of `small_linear` and the rule that picks them from shape alone.

R rows, N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check, next_power_of_two
from kernels.tile_configs import measured_choice

_PROGRAMS = 128  # about one for each multiprocessor of a large GPU


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """One program computes bn output features of br rows, bk input features a step, over one of `split` parts of K.

    fuse_norm: with a folded layer norm every program sums up its rows itself, in the loop of the product; else a launch of
    its own before finds their mean and standard deviation. Neither happens where specialized tiles are given the rows'
    statistics. prefetch: a program asks
    for its whole strip of weights in L2 at once; overlap: programs may start, and prefetch, while the kernel before them in
    the stream still runs (programmatic dependent launch); both need compute capability 9.0 and are ignored below. library:
    torch's GEMM before our epilogue kernel; nothing else holds then. br below 16: no tensor cores, the program holds its
    strip of weights whole (gemv.py); only bn, warps and overlap hold then. gram: with fuse_norm, sums and squares of the
    rows come from tensor cores too, at a loss of digits where |mean| is hundreds of standard deviations; 16 bits, br 64 on.
    specialized: Hopper's own kernel for 16-bit weights (specialized.py); bn divides N (of a fused QKV: N / 3), bk divides K.
    """

    bn: int = 32
    bk: int = 128
    br: int = 16
    split: int = 1
    warps: int = 4
    stages: int = 4
    fuse_norm: bool = True
    prefetch: bool = False
    overlap: bool = False
    library: bool = False
    gram: bool = False
    specialized: bool = False

    def __post_init__(self) -> None:
        widths = (1, 2, 4, 8, 16) if self.no_dot else (64, 128, 256) if self.specialized else (16, 32, 64, 128)
        check(self.bn in widths, f"bn is {self.bn} for br = {self.br}; choose one of {widths}")
        check(self.bk in (16, 32, 64, 128, 256, 512), f"bk is {self.bk}; choose a power of two from 16 to 512")
        check(self.br in (1, 2, 4, 16, 32, 64, 128), f"br is {self.br}; choose 1, 2, 4, 16, 32, 64 or 128")
        check(1 <= self.split <= 16, f"split is {self.split}; choose 1 to 16")
        check(not self.gram or (self.fuse_norm and self.br >= 64), "gram goes with fuse_norm and br = 64 or 128")
        check(not (self.no_dot and self.split > 1), "br below 16 takes whole rows of weights: it cannot go with split")
        check(not (self.prefetch and self.split > 1), "prefetch asks for whole rows of weights: it cannot go with split")
        plain = self.split > 1 or self.no_dot or self.gram or self.library
        check(
            not self.specialized
            or not (plain or self.bk < 64 or self.bk > 256 or self.warps not in (4, 8) or self.stages < 2),
            "specialized tiles: bk 64, 128 or 256, br 16 on, warps 4 or 8, stages 2 on; no split, gram or library",
        )

    @property
    def no_dot(self) -> bool:
        """Whether products and sums are taken without tensor cores: fewer rows than those take."""
        return self.br < 16

    @property
    def sums_rows(self) -> bool:
        """Whether the product's own loop finds mean and standard deviation of its rows. Never with 128 rows: there the sums
        came out wrong in 15 of 4,320 variants timed (Triton 3.6, H100), and in no variant of fewer rows."""
        return self.no_dot or self.gram or (self.fuse_norm and self.br < 128)


def default_tiles(num_features: int, num_inputs: int, rows: int, bits: int, *, fixed: bool) -> LinearTiles:
    """Safe on any device. bits of a weight: 8, 16 or 32. fixed: the choice does not look at the number of rows."""
    if bits != 8 and not fixed and rows > 64:
        return LinearTiles(library=True)
    br = 32 if fixed else min(64, max(16, next_power_of_two(rows)))
    row_blocks = 1 if fixed else -(-rows // br)
    bn = 64
    while bn > 16 and -(-num_features // bn) * row_blocks < _PROGRAMS:
        bn //= 2
    bk = min(32 if bits == 32 else 128 if br == 16 else 64, max(16, next_power_of_two(num_inputs)))
    return LinearTiles(bn, bk, br, warps=4, stages=3)


def select_tiles(
    num_features: int, num_inputs: int, rows: int, bits: int, device: torch.device, *, norm: bool, fixed: bool
) -> LinearTiles:
    """The measured choice of this device (configs/<device>/small_linear.json), else `default_tiles`."""
    shape = {"n": num_features, "k": num_inputs, "bits": bits, "norm": int(norm), "fixed": int(fixed)}
    found = measured_choice("small_linear", device, shape=shape, size=0 if fixed else rows)
    if found is not None:
        return LinearTiles(**found)  # type: ignore[arg-type]
    return default_tiles(num_features, num_inputs, rows, bits, fixed=fixed)


def select_tiles_int8_rows(num_features: int, num_inputs: int, rows: int, device: torch.device) -> LinearTiles:
    """As `select_tiles` for int8 rows and weights. A folded norm makes no difference there, nor does the fixed-order mode:
    sums in int32 are exact, so that a row's bits depend on no tiles."""
    found = measured_choice("small_linear", device, shape={"n": num_features, "k": num_inputs, "int8_rows": 1}, size=rows)
    if found is not None:
        return LinearTiles(**found)  # type: ignore[arg-type]
    br = min(64, max(16, next_power_of_two(rows)))
    bn = 64
    while bn > 16 and -(-num_features // bn) * -(-rows // br) < _PROGRAMS:
        bn //= 2
    return LinearTiles(bn, min(128, max(32, next_power_of_two(num_inputs))), br, warps=4, stages=3)
