"""Decoders over all 65,536 halves of a word: in a launch of their own (plain ones in the interpreter, assembly on a GPU),
and assembly instruction by instruction."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.cases import PRECISIONS
from kernels.expert_checks import ExpertCase, expert_inputs
from kernels.expert_gemm import FfnTiles, launcher, pack
from kernels.expert_gemm.decode import decode4, decode8
from kernels.expert_gemm.dequant import BF16_PRODUCTS, dequantize_ptx


@triton.jit
def decode_kernel(words_ptr, out_ptr, BITS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Words [64, 32] of a step -> planes of one half, [planes, 64, 32]."""
    place = tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    words = tl.load(words_ptr + tl.program_id(0) * 2048 + place)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    outs = out_ptr + tl.program_id(0) * (16 // BITS * 2048) + place
    if BITS == 4:
        a, b, c, d = decode4(words, HALF, 64, ASM, dtype)
        tl.store(outs + 2 * 2048, c)
        tl.store(outs + 3 * 2048, d)
    else:
        a, b = decode8(words, HALF, 64, ASM, dtype)
    tl.store(outs, a)
    tl.store(outs + 2048, b)


def all_halves(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [1, 64, K] with every half of a word on both sides of even and odd words, and the words packed from
    them [steps, 64, 32]."""
    generator = torch.Generator().manual_seed(bits)
    halves = torch.cat([torch.arange(65536), torch.randperm(65536, generator=generator)])
    halves = torch.stack([halves, halves.roll(7)], dim=1)  # [words, side]; neighbours are an even and an odd word
    halves = torch.cat([halves, halves.roll(1, dims=0)]).view(-1, 64, 16, 2, 2)  # [step, row, pair, word, side]
    shifts = torch.arange(0, 16, bits)
    codes = (halves[..., None] >> shifts & ((1 << bits) - 1)) - (1 << bits - 1)  # [step, row, pair, word, side, plane]
    matrix = codes.permute(1, 0, 3, 5, 2, 4).reshape(1, 64, -1).to(torch.int8)
    return matrix, pack(matrix, torch.ones(1, 64), bits).data.view(-1, 64, 32)


def decoded(bits: int, words: torch.Tensor, dtype: torch.dtype, *, asm: bool) -> torch.Tensor:
    """float64 [1, 64, K] as `all_halves` has the codes."""
    steps, planes = len(words), 16 // bits
    out = torch.full((2, steps, planes, 64, 32), float("nan"), dtype=dtype, device=words.device)
    for half in (0, 1):
        decode_kernel[(steps,)](words, out[half], bits, half, asm)
    factor = BF16_PRODUCTS if asm and dtype == torch.bfloat16 else 1.0
    return out.double().cpu().permute(3, 1, 0, 2, 4).reshape(1, 64, -1) * factor


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_decoder_gives_every_code(bits: int, cpu: torch.device) -> None:
    codes, words = all_halves(bits)
    assert torch.equal(decoded(bits, words.to(cpu), torch.float32, asm=False), codes.double())


def permuted_bytes(a: torch.Tensor, b: torch.Tensor, selector: int) -> torch.Tensor:
    """prmt.b32: nibble i of the selector says which of the eight bytes of a (0 to 3) and b (4 to 7) becomes byte i."""
    both, taken = a | b << 32, torch.zeros_like(a)
    for i in range(4):
        taken |= (both >> 8 * (selector >> 4 * i & 0x7) & 0xFF) << 8 * i
    return taken


def run_ptx(assembly: str, words: torch.Tensor, outputs: int, float_dtype: torch.dtype) -> list[torch.Tensor]:
    """Interpret the few instructions that the decoders use on every pair of words; each result as two floats [n, 2]."""
    names = {f"${outputs + i}": words[:, i].long() & 0xFFFFFFFF for i in range(2)}

    def value(name: str) -> torch.Tensor:
        return torch.tensor(int(name, 0)) if name[0].isdigit() else names[name]

    def floats(name: str) -> torch.Tensor:
        bits = torch.stack((value(name) & 0xFFFF, value(name) >> 16), dim=-1)
        return bits.to(torch.uint16).view(float_dtype).double()

    for line in assembly.splitlines()[2:-1]:  # without braces and declarations
        operation, rest = line.rstrip(";").split(" ", 1)
        out, *arguments = (part.strip() for part in rest.split(","))
        if operation == "mov.b32":
            names[out] = value(arguments[0])
        elif operation == "shr.u32":
            names[out] = value(arguments[0]) >> int(arguments[1])
        elif operation == "and.b32":
            names[out] = value(arguments[0]) & value(arguments[1])
        elif operation == "lop3.b32":
            assert int(arguments[3], 0) == 0xEA
            names[out] = (value(arguments[0]) & value(arguments[1])) | value(arguments[2])
        elif operation == "prmt.b32":
            names[out] = permuted_bytes(*map(value, arguments[:2]), int(arguments[2], 0))
        else:
            a, b = floats(arguments[0]), floats(arguments[1])
            exact = a + b if operation.startswith("add") else a * b + floats(arguments[2])
            rounded = exact.to(float_dtype).view(torch.uint16).long()
            names[out] = rounded[..., 0] | rounded[..., 1] << 16
    return [floats(f"${i}") for i in range(outputs)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("half", [0, 1])
def test_assembly_decodes_every_half_of_a_word(bits: int, dtype: str, half: int) -> None:
    matrix, words = all_halves(bits)
    pairs, per_half = words.reshape(-1, 2), 16 // bits
    codes = matrix.view(64, -1, 2 * per_half, 16, 2).permute(1, 0, 3, 2, 4).reshape(len(pairs), -1, 2)  # [pair, plane, side]
    float_dtype, factor = (torch.bfloat16, BF16_PRODUCTS) if dtype == "bf16" else (torch.float16, 1.0)
    for first in range(0, per_half, 2):
        assembly, constraints = dequantize_ptx(bits, dtype, half, first, 2)
        assert constraints == "=&r,=&r,r,r"
        for i, plane in enumerate(run_ptx(assembly, pairs, 2, float_dtype)):
            assert torch.equal(plane * factor, codes[:, half * per_half + first + i].double())
    assembly, _ = dequantize_ptx(bits, dtype, half)
    for p, plane in enumerate(run_ptx(assembly, pairs, per_half, float_dtype)):
        assert torch.equal(plane * factor, codes[:, half * per_half + p].double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_gpu_assembly_gives_what_the_plain_decoder_gives(bits: int, dtype: torch.dtype, cuda: torch.device) -> None:
    codes, words = all_halves(bits)
    words = words.to(cuda)
    plain = decoded(bits, words, dtype, asm=False)
    assert torch.equal(plain, codes.double())
    assert torch.equal(decoded(bits, words, dtype, asm=True), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["w4a16", "w8a16", "w4a16-g64"])
def test_gpu_layer_has_the_bits_of_the_plain_decoder(
    precision: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 comes out of the assembly over a power of two, so no bit of the sums may change."""
    case = ExpertCase(33, 512, 1024, 3, 2, PRECISIONS[precision], FfnTiles(16, join=2))
    inputs = expert_inputs(case, cuda, torch.bfloat16)
    active = inputs.routing.expert_ids >= 0
    assert bool(active.any())
    by_assembly = inputs.run(case.tiles)
    monkeypatch.setattr(launcher, "_has_asm", lambda *_: False)
    assert torch.equal(by_assembly[active], inputs.run(case.tiles)[active])
