"""Statistics that whoever writes rows leaves for a layer norm behind: no launch of its own has to sum the rows up.

R rows, D features. In chunks of 64 features, since that is what one program of a linear map holds of a row; a reader joins
them. `row_statistics_kernel.py` has the part that kernels share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.launch import check

CHUNK = 64


@dataclass(slots=True)
class RowStatistics:
    """chunks fp32[R, 2, D / 64]: of every 64 features the mean, and the sum of squared distances from it.

    valid: whether, once the launches so far have run, they are of the rows as these then are. An op that writes the rows and
    is given this object sets it; whoever writes them by other means must clear it.
    """

    chunks: torch.Tensor
    valid: bool = False

    @classmethod
    def allocate(cls, max_rows: int, num_features: int, device: torch.device) -> RowStatistics:
        """Not valid yet; D that is no multiple of 64 gets what never becomes valid."""
        return cls(torch.empty((max_rows, 2, num_features // CHUNK), dtype=torch.float32, device=device))

    def serves(self, num_rows: int, num_features: int) -> bool:
        """Whether kernels can leave and read statistics of rows [R, D]. Raises ValueError for chunks of another shape."""
        chunks = num_features // CHUNK
        check(
            self.chunks.shape[0] >= num_rows and tuple(self.chunks.shape[1:]) == (2, chunks) and self.chunks.is_contiguous(),
            f"statistics are {list(self.chunks.shape)}; want contiguous [at least {num_rows}, 2, {chunks}]",
        )
        return num_features % CHUNK == 0 and 4 <= chunks <= 128 and chunks & (chunks - 1) == 0


def chunk_statistics(rows: torch.Tensor) -> torch.Tensor:
    """fp32[R, 2, D / 64] of rows [R, D], in fp64 until the end: the truth that kernels are checked against."""
    parts = rows.double().view(len(rows), -1, CHUNK)
    mean = parts.mean(2)
    return torch.stack([mean, (parts - mean[:, :, None]).square().sum(2)], 1).float()
