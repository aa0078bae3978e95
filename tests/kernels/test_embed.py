import math
from collections.abc import Callable

import pytest
import torch

from engine.model.transformer import Transformer
from kernels.embed import embed
from kernels.linear_checks import EMBED_SIZES, check_embed


@pytest.mark.parametrize("sizes", EMBED_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreter_gives_torchs_bits(sizes: tuple[int, int], dtype: torch.dtype, cpu: torch.device) -> None:
    assert check_embed(*sizes, cpu, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", (*EMBED_SIZES, (320, 2048)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_gives_torchs_bits(sizes: tuple[int, int], dtype: torch.dtype, cuda: torch.device) -> None:
    assert check_embed(*sizes, cuda, dtype)


def model_embedding(ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """What the transformer's own code gives, called on a stand-in that has its two tables and settings."""

    class Model:
        class config:  # noqa: N801
            scale_embedding, d_model, pad_token_id = True, table.shape[1], 1

        embedding, positions = table, sines

    rows = Transformer._target_positions(Model, ids, positions)  # type: ignore[arg-type]
    return Transformer._embed(Model, ids, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_as_the_transformer(dtype: torch.dtype, cpu: torch.device) -> None:
    table, sines = torch.randn(40, 96).to(dtype), torch.randn(30, 96).to(dtype)
    ids, positions = torch.randint(0, 40, (23,)), torch.randint(0, 28, (23,))
    ids[4] = 1
    out = embed(ids.int(), positions.int(), table, sines, scale=math.sqrt(96), pad_token_id=1)
    assert torch.equal(out, model_embedding(ids, positions, table, sines))


def test_no_tokens(cpu: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int32)
    assert embed(none, none, torch.ones(4, 8), torch.ones(4, 8), scale=1.0, pad_token_id=1).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": None}, "one of the two"),
        ({"position_rows": torch.zeros(3, dtype=torch.int32)}, "one of the two"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, r"positions is .*want contiguous int32 or int64\[3\]"),
        ({"position_table": torch.zeros(5, 7)}, r"want contiguous \[P, 8\]"),
        ({"position_table": torch.zeros(5, 8).half()}, "convert one of them"),
        ({"out": torch.zeros(3, 7)}, r"out is .*\[3, 8\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    good = {
        "token_ids": torch.zeros(3, dtype=torch.int32),
        "positions": torch.zeros(3, dtype=torch.int32),
        "table": torch.zeros(4, 8),
        "position_table": torch.zeros(5, 8),
    }
    call: Callable[..., torch.Tensor] = embed
    with pytest.raises(ValueError, match=message):
        call(scale=1.0, pad_token_id=1, **(good | change))
