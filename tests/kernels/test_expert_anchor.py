import pytest
import torch

from kernels.expert_anchor.grouped import add_bias, grouped_ffn


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("n", [1, 72, 2500])
def test_bias_of_the_rows_own_expert_is_added_in_place(n: int, relu: bool, cpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(n)
    rows, bias = torch.randn(5, n, generator=generator), torch.randn(3, n, generator=generator)
    experts = torch.tensor([0, 0, 2, 2, 1], dtype=torch.int32)
    wanted = rows + bias[experts.long()]
    assert add_bias(rows, bias, experts, relu=relu) is rows
    assert torch.equal(rows, wanted.relu() if relu else wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
def test_gpu_anchor_is_the_layer_it_stands_for(biased: bool, cuda: torch.device) -> None:
    generator = torch.Generator(cuda).manual_seed(0)
    counts = torch.tensor([40, 0, 23, 70])
    experts = torch.repeat_interleave(torch.arange(4), counts).int().to(cuda)
    shapes = ((133, 128), (4, 256, 128), (4, 128, 256), (4, 256), (4, 128))
    rows, w1, w2, b1, b2 = (torch.randn(s, device=cuda, generator=generator).bfloat16() * 0.3 for s in shapes)
    offsets = counts.cumsum(0).int().to(cuda)
    got = grouped_ffn(rows, (w1, w2), (b1, b2) if biased else None, offsets, experts)
    for e in range(4):
        mine = experts == e
        hidden = rows[mine].float() @ w1[e].float().T + (b1[e].float() if biased else 0.0)
        wanted = hidden.relu() @ w2[e].float().T + (b2[e].float() if biased else 0.0)
        assert torch.allclose(got[mine].float(), wanted, rtol=2e-2, atol=0.2)
