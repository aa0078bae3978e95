"""Which tiles `head_topk` runs with: from shape alone, so that a step can be captured.

R rows, D features, V vocabulary. Measured choices live in kernels/configs/<device>/head_topk.json (written by
kernels.head_tune); a device without that file gets `default_tiles`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from kernels.launch import check
from kernels.tile_configs import measured_choice

_FIXED_ROWS = 64


@dataclass(frozen=True, slots=True)
class HeadTiles:
    """block_vocab: logits a chunk. block_rows + extra_rows (0: none): rows a program; both parts share one read of the
    weights (128 + 32 cuts 320 rows without waste). block_features: inputs a step. slice_rows: rows whose maxima and sums are
    taken at a time: fewer need fewer registers, more need fewer barriers. gated: skip storing logits of chunks that cannot
    hold a result (meant for a few dozen rows and more). tma: load through tensor descriptors (D a multiple of 16).
    specialized: Hopper's own kernel for 16-bit weights, and for int8 rows (`kernels.head_topk.specialized`): block_rows are
    cut in two halves for its two groups of 4 warps, extra_rows are shared; slice_rows has no meaning there. online, with
    specialized: another one, for 16 bits or int8 rows (`kernels.head_topk.online`): 4 warps for each 64 of its rows.
    """

    block_vocab: int
    block_rows: int
    extra_rows: int = 0
    block_features: int = 64
    warps: int = 4
    stages: int = 3
    slice_rows: int = 32
    gated: bool = False
    tma: bool = False
    specialized: bool = False
    online: bool = False

    def __post_init__(self) -> None:
        check(self.block_vocab in (16, 32, 64, 128, 256), f"block_vocab is {self.block_vocab}; choose 16 to 256")
        check(self.block_rows in (16, 32, 64, 128, 256), f"block_rows is {self.block_rows}; choose 16 to 256")
        check(self.extra_rows in (0, 16, 32, 64, 128), f"extra_rows is {self.extra_rows}; choose 0 or 16 to 128")
        check(self.slice_rows in (16, 32, 64, 128), f"slice_rows is {self.slice_rows}; choose 16 to 128")
        check(self.block_features in (16, 32, 64, 128), f"block_features is {self.block_features}; choose 16 to 128")
        if self.specialized:
            check(
                self.block_vocab in (128, 256)
                and self.block_rows in (128, 256)
                and self.extra_rows in (0, 64)
                and (self.warps, self.tma) == (4, True),
                "specialized tiles: block_vocab and block_rows 128 or 256, extra_rows 0 or 64, warps=4, tma=True",
            )
            check(self.stages >= 2, f"stages is {self.stages}; specialized tiles fill one beside the one in use: 2 or more")
        check(
            not self.online or (self.specialized and self.block_vocab == 128 and self.block_features >= 32),
            "online tiles: specialized=True, block_vocab 128, block_features 32 to 128 (int8 rows; 16 bits: to 64)",
        )

    @property
    def chunk(self) -> int:
        """Logits that share one maximum and one sum of exponentials."""
        return self.block_vocab // 2 if self.specialized and not self.online else self.block_vocab

    @property
    def laned(self) -> bool:
        """Logits of a whole chunk are stored in the order of the lanes that hold them (`specialized`), not of tokens."""
        return self.specialized and not self.online


def default_tiles(num_rows: int, dtype: torch.dtype) -> HeadTiles:
    """Safe on any device: no more than 64 KB of shared memory."""
    if num_rows <= 32:
        return HeadTiles(64, 16 if num_rows <= 16 else 32, stages=2 if dtype == torch.float32 else 3)
    return HeadTiles(128, 64, block_features=32, warps=8, stages=2 if dtype == torch.float32 else 3, gated=True)


def select_tiles(
    num_rows: int, num_features: int, vocab_size: int, bits: int, device: torch.device, dtype: torch.dtype
) -> HeadTiles:
    """Tiles for R rows of a head of these sizes; bits 8 for an `Int8Linear`, else 16; dtype of the rows, int8 for those of
    `QuantizedRows`. fp32 has no measured choice."""
    found = None
    if dtype != torch.float32:
        shape = {"bits": bits, "d": num_features, "v": vocab_size} | ({"row_bits": 8} if dtype == torch.int8 else {})
        found = measured_choice("head_topk", device, shape=shape, size=num_rows)
    return default_tiles(num_rows, dtype) if found is None else HeadTiles(**found)  # type: ignore[arg-type]


def fixed_tiles(num_features: int, vocab_size: int, bits: int, device: torch.device, dtype: torch.dtype) -> HeadTiles:
    """The same tiles for every number of rows: a row's bits then do not depend on how many rows run with it.

    It is the choice for 64 rows, without extra rows: those lie in a dot of another width than the first ones. And not
    online: how many programs share a row's sum depends on the number of rows.
    """
    found = select_tiles(_FIXED_ROWS, num_features, vocab_size, bits, device, dtype)
    return dataclasses.replace(found, extra_rows=0, online=False)
