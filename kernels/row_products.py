"""Products of rows with a few vectors, which whoever writes the rows leaves for a router behind the next layer norm: no
launch of its own has to read the rows for them. R rows, D features, E vectors.

In chunks of 64 features, since that is what one program of a linear map holds of a row; a reader adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check
from kernels.row_statistics import CHUNK

COUNTS = (16, 32, 64)  # vectors that can be served


@dataclass(slots=True)
class RowProducts:
    """thirds bf16[3 E, D]: high, middle and low parts, whose sum is the fp32 vectors (`split_in_thirds`).

    parts fp32[D / 64, R, E]: the products by chunks of the rows as they are stored. An op that writes the rows and is given
    this object sets it; None: it could not, or has not run yet.
    """

    thirds: torch.Tensor
    parts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, features = self.thirds.shape
        check(
            self.thirds.dtype == torch.bfloat16 and self.thirds.is_contiguous() and rows in [3 * n for n in COUNTS],
            f"thirds are {self.thirds.dtype}{list(self.thirds.shape)}; want contiguous bf16[3 E, D], E one of {COUNTS}",
        )
        check(features % CHUNK == 0, f"thirds have {features} features; want a multiple of {CHUNK}")

    @property
    def count(self) -> int:
        """E."""
        return self.thirds.shape[0] // 3

    def allocate(self, num_rows: int) -> torch.Tensor:
        """New parts for R rows."""
        chunks = self.thirds.shape[1] // CHUNK
        self.parts = torch.empty((chunks, num_rows, self.count), dtype=torch.float32, device=self.thirds.device)
        return self.parts


def split_in_thirds(vectors: torch.Tensor) -> torch.Tensor:
    """fp32[E, D] as three bf16 parts [3 E, D], the largest first; their sum is exact unless it leaves bf16's range."""
    rest, parts = vectors.float(), []
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.cat(parts).contiguous()


def chunk_products(rows: torch.Tensor, thirds: torch.Tensor) -> torch.Tensor:
    """parts of rows [R, D], in fp64 until the end: the truth that kernels are checked against."""
    vectors = thirds.double().view(3, -1, thirds.shape[1]).sum(0)
    count = len(vectors)
    return torch.einsum("rcd,ecd->cre", rows.double().view(len(rows), -1, CHUNK), vectors.view(count, -1, CHUNK)).float()
