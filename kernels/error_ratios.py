"""Our error against fp64 over that of torch's own kernels on the same operands: python -m kernels.error_ratios (GPU).

Truth: fp64 over the exactly dequantized weights. Library: torch's GEMM or attention in the activations' dtype, over weights
dequantized and rounded to it, with a rounding wherever ours rounds. A ratio of at most 1.05 is what kernels/README.md
promises.

T tokens, k active experts, E experts, D d_model, F d_ff, R rows, V vocabulary, H heads, Dh features a head, S positions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from kernels.cases import PRECISIONS
from kernels.checks import DTYPES
from kernels.compile_ahead import Job, compile_ahead
from kernels.decode_attention import decode_cross_attention, decode_self_attention
from kernels.encoder_attention import encoder_attention
from kernels.expert_checks import ExpertCase, ExpertInputs, expert_inputs
from kernels.expert_gemm import FfnTiles, dequantize_reference, expert_ffn_reference, expert_gemm
from kernels.expert_gemm.jobs import ffn_jobs
from kernels.expert_gemm.reference import expert_gemm_reference
from kernels.head_topk import head_topk
from kernels.int8_linear import Int8Linear, quantize_int8
from kernels.route import GateTiles, semaphores
from kernels.route.launcher import launch_gate
from kernels.route.tiles import select_tiles as select_gate_tiles
from kernels.routing import empty_routing
from kernels.testing import relative_error

LIMIT = 1.05
ROUTER_LIMIT = 1e-6  # error of the router's logits itself: it computes in fp32, and a few times 2^-24 is what fp32 gives
ROUTER_SIZES = tuple((t, *shape) for t in (1, 17, 320) for shape in ((1024, 32), (2048, 128), (1000, 33)))
_PLAIN, _FUSED = FfnTiles(16, join=2), FfnTiles(16, bn1=128, join=2, fused=True, split=2, programs_per_sm=1)
_MANY = FfnTiles(64, 128, 128, join=2, warps=8, stages=2)
_PIPELINED = {
    "w4a16": (
        FfnTiles(32, 128, 64, stages=2, programs_per_sm=1, pipelined=True),
        FfnTiles(128, 256, 128, 1, 8, 2, programs_per_sm=1, pipelined=True),
    ),
    "w8a16": (
        FfnTiles(64, 128, 64, stages=3, programs_per_sm=1, pipelined=True),
        FfnTiles(128, 128, 256, 1, 8, 3, programs_per_sm=1, pipelined=True, x_stages=3),
    ),
}


class Ratio(NamedTuple):
    """Our error over the library's; name says of what."""

    name: str
    ours: float
    library: float

    @property
    def ratio(self) -> float:
        """1 where both are exact; NaN where either is NaN, which passes no comparison."""
        return 1.0 if self.ours == self.library == 0.0 else self.ours / max(self.library, 1e-300)


def expert_ratio_cases(*, pipelined: bool) -> list[ExpertCase]:
    """1, 17, 320 and 4,096 tokens in every precision and launch that serves such a size."""
    sizes = (1, 17, 320, 4096)
    found = []
    for name, precision in PRECISIONS.items():
        for tokens in sizes:
            tiles = [_MANY] if tokens > 512 else [_PLAIN, _FUSED]
            few, many = _PIPELINED.get(name, (None, None))
            launch = many if tokens > 64 else few
            if pipelined and launch is not None:
                tiles.append(launch)
            found += [ExpertCase(tokens, 1024, 2048, 4, 2, precision, t) for t in tiles]
    return found


def expert_ratio_jobs(cases: list[ExpertCase], dtype: torch.dtype) -> list[Job]:
    """Compile jobs of these cases, each once."""
    jobs: list[Job] = []
    for c in cases:
        for job in ffn_jobs(c.d_model, c.d_ff, c.top_k, c.precision.bits, c.precision.group_size, c.tiles, dtype):
            if job not in jobs:
                jobs.append(job)
    return jobs


def expert_ratios(case: ExpertCase, device: torch.device, dtype: torch.dtype) -> Iterator[Ratio]:
    """The whole FFN, and for two plain launches each GEMM on its own; gates of 1, so that both round equally often."""
    inputs = expert_inputs(case, device, dtype)
    inputs.routing.gate_weights.fill_(1.0)
    active = inputs.routing.expert_ids >= 0
    operands = (inputs.x, inputs.fc1, inputs.bias1, inputs.fc2, inputs.bias2, inputs.routing)
    truth = expert_ffn_reference(*operands, dtype=torch.float64)[active]
    hidden = _library_gemm(inputs, inputs.x, first=True)
    library = _library_gemm(inputs, hidden, first=False).view(*active.shape, -1)
    name = f"{case.name} {dtype}"
    yield Ratio(f"ffn {name}", *_errors(inputs.run(case.tiles)[active], library[active], truth))
    if case.tiles.fused or case.tiles.pipelined:
        return
    used, pairs = int(inputs.routing.expert_offsets[-1]), active.flatten()
    options = {"routing": inputs.routing, "tiles": case.tiles}
    up = expert_gemm(inputs.x, inputs.fc1, inputs.bias1, first=True, **options)  # type: ignore[arg-type]
    exact = expert_gemm_reference(inputs.x, inputs.fc1, inputs.bias1, inputs.routing, first=True, dtype=torch.float64)
    yield Ratio(f"first {name}", *_errors(up[:used], hidden[:used], exact[:used]))
    down = expert_gemm(hidden, inputs.fc2, inputs.bias2, first=False, **options)  # type: ignore[arg-type]
    exact = expert_gemm_reference(hidden, inputs.fc2, inputs.bias2, inputs.routing, first=False, dtype=torch.float64)
    yield Ratio(f"second {name}", *_errors(down[pairs], library[active], exact[pairs]))


def _library_gemm(inputs: ExpertInputs, x: torch.Tensor, *, first: bool) -> torch.Tensor:
    """torch's GEMM expert by expert over weights rounded to x's dtype: what `expert_gemm` returns, with gates of 1."""
    routing = inputs.routing
    weight, bias = (inputs.fc1, inputs.bias1) if first else (inputs.fc2, inputs.bias2)
    out = x.new_zeros(routing.gather_index.numel(), weight.num_features)
    offsets = routing.expert_offsets.tolist()
    for e, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start == end:
            continue
        matrix = dequantize_reference(weight.expert(e))[0].to(x.dtype)
        pairs = routing.gather_index[start:end].long()
        if first:
            out[start:end] = functional.linear(x[pairs // routing.top_k], matrix, bias[e]).relu()
        else:
            out[pairs] = functional.linear(x[start:end], matrix, bias[e])
    return out


def _errors(ours: torch.Tensor, library: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    return relative_error(ours, truth), relative_error(library, truth)


def head_ratios(
    rows: int, features: int, vocab: int, bits: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Ratio]:
    """Log-sum-exp and the best log-probabilities, absolute, beside torch's GEMM with the softmax in fp32."""
    generator = torch.Generator(device).manual_seed(rows)
    x = torch.randn(rows, features, generator=generator, device=device).to(dtype)
    matrix = torch.randn(vocab, features, generator=generator, device=device) * 2.0 * features**-0.5
    weight: torch.Tensor | Int8Linear = matrix.to(dtype)
    exact, rounded = matrix.to(dtype).double(), matrix.to(dtype)
    if bits == 8:
        weight = quantize_int8(matrix)
        exact, rounded = weight.dequantized(torch.float64), weight.dequantized(torch.float32).to(dtype)
    out = head_topk(x, weight, k=8, vocab_size=vocab)
    truth = torch.log_softmax(x.double() @ exact.T, 1)
    theirs = torch.log_softmax(functional.linear(x, rounded).float(), 1)
    ids = out.token_ids.long()
    name = f"{rows}x{features}x{vocab} int8 {dtype}" if bits == 8 else f"{rows}x{features}x{vocab} {dtype}"
    own, wanted = theirs.gather(1, ids), truth.gather(1, ids)
    yield Ratio(f"head values {name}", _rms(out.values, wanted), _rms(own, wanted))
    lse, theirs_lse = torch.logsumexp(x.double() @ exact.T, 1), functional.linear(x, rounded).float().logsumexp(1)
    yield Ratio(f"head log-sum-exp {name}", _rms(out.log_sum_exp, lse), _rms(theirs_lse, lse))


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).square().mean().sqrt())


def router_ratio(
    num_tokens: int, d_model: int, num_experts: int, device: torch.device, dtype: torch.dtype, tiles: GateTiles | None = None
) -> Ratio:
    """Logits before the softmax, beside torch's fp32 GEMM."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    x = torch.randn(num_tokens, d_model, generator=generator, device=device).to(dtype)
    weight = torch.randn(num_experts, d_model, generator=generator, device=device) * d_model**-0.5
    routing = empty_routing(num_tokens, 1, num_experts, d_model, 16, device)
    tiles = tiles or select_gate_tiles(d_model, num_experts, device)
    parts = launch_gate(x, weight, None, None, semaphores(num_tokens, device), routing, 1.0, tiles)
    logits = parts[0].clone()
    for part in parts[1:]:  # in the kernel's order
        logits += part
    truth = x.double() @ weight.double().T
    name = f"router logits T{num_tokens}-D{d_model}-E{num_experts} {dtype}"
    return Ratio(name, *_errors(logits[:, :num_experts], x.float() @ weight.T, truth))


def attention_ratios(length: int, heads: int, features: int, device: torch.device, dtype: torch.dtype) -> Iterator[Ratio]:
    """Every attention kernel over sequences of one length, beside `scaled_dot_product_attention` on the same tensors."""
    generator = torch.Generator(device).manual_seed(length)
    batch, width = 4, heads * features

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * 1.5).to(dtype)

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, torch.int32)

    qkv = draw(batch, length, 3, heads, features)
    starts = torch.arange(batch).repeat_interleave(length) * length
    out = encoder_attention(qkv.view(batch * length, 3 * width), ints(starts), ints(starts + length), num_heads=heads)
    name = f"S{length} h{heads}x{features} {dtype}"
    yield _attention_ratio(f"encoder attention {name}", out.view(batch, length, heads, features), *qkv.unbind(2))
    q, cells = draw(batch, width), draw(batch, length, 2, heads, features)
    rows = torch.arange(batch)
    ancestry = ints(rows[:, None].expand(batch, length).contiguous())
    out = decode_self_attention(q, cells, ancestry, ints(rows), ints(torch.full((batch,), length - 1)), num_heads=heads)
    operands = (q.view(batch, 1, heads, features), *cells.unbind(2))
    yield _attention_ratio(f"self-attention {name}", out.view(batch, 1, heads, features), *operands)
    lengths, ones = torch.full((batch,), length), torch.ones(batch)
    out = decode_cross_attention(q, cells, ints(lengths), ints(rows), ints(rows), ints(ones), num_heads=heads)
    yield _attention_ratio(f"cross-attention {name}", out.view(batch, 1, heads, features), *operands)


def _attention_ratio(name: str, ours: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Ratio:
    """All [B, S, H, Dh]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    library = functional.scaled_dot_product_attention(q, k, v)
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return Ratio(name, *_errors(ours.transpose(1, 2), library, torch.softmax(scores, -1) @ v.double()))


def all_ratios(device: torch.device, dtype: torch.dtype) -> Iterator[Ratio]:
    """Every ratio of one dtype."""
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    for case in expert_ratio_cases(pipelined=hopper):
        yield from expert_ratios(case, device, dtype)
    for bits in (16, 8):
        for rows in (1, 17, 320):
            yield from head_ratios(rows, 1024, 32001, bits, device, dtype)
    for length in (1, 17, 64, 500):
        for features in (64, 128):
            yield from attention_ratios(length, 16, features, device, dtype)


def main(arguments: list[str] | None = None) -> int:
    """Print the worst ratio of each kind and every one beyond the limit; exit 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    dtypes = [DTYPES[name] for name in options.dtype]
    compile_ahead([job for dtype in dtypes for job in expert_ratio_jobs(expert_ratio_cases(pipelined=True), dtype)], 90)
    beyond = 0
    kind: Callable[[Ratio], str] = lambda ratio: ratio.name.split(" ")[0]  # noqa: E731
    for dtype in dtypes:
        ratios = list(all_ratios(torch.device("cuda"), dtype))
        for name in dict.fromkeys(map(kind, ratios)):
            worst = max((r for r in ratios if kind(r) == name), key=lambda r: r.ratio)
            print(f"{dtype} worst of {name}: {worst.ratio:.3f} ({worst.ours:.2e} / {worst.library:.2e}) {worst.name}")
        for ratio in ratios:
            if not ratio.ratio <= LIMIT:
                beyond += 1
                print(f"BEYOND {ratio.ratio:.3f} ({ratio.ours:.2e} / {ratio.library:.2e}) {ratio.name}", flush=True)
        routers = [router_ratio(*sizes, torch.device("cuda"), dtype) for sizes in ROUTER_SIZES]
        worst = max(routers, key=lambda r: r.ours)
        beyond += sum(not r.ours <= ROUTER_LIMIT for r in routers)
        print(f"{dtype} worst router: {worst.ours:.2e} (torch fp32 {worst.library:.2e}) {worst.name}", flush=True)
    print(f"error ratios: {beyond} beyond {LIMIT}", flush=True)
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
