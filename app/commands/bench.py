"""Measure the whole engine beside transformers on the same weights: tokens/s, ms per step, and how far from the floor.

Builds a random model of a published shape on the device (or takes a checkpoint), checks our tokens against transformers,
and only then times: transformers' generate(), the same model with torch's grouped GEMM in place of the loop over experts
(`grouped`), and our engine in each precision. Every sentence has 24 source tokens and exactly 32 target tokens.

Read the table like this. x transf., x grouped: our tokens/s over theirs. paper: what arXiv 2211.10017 reports for its int4
engine over PyTorch in the same cell. floor: the time that reading the step's bytes takes at the bandwidth measured in this
run, over the time the step took. GiB: peak memory. kernels, idle us: per decode step, from the profiler. agree: share of
tokens equal to transformers' (free-running: after one near tie the rest of a sentence differs).

A wrong engine gets no figures: in fp32 every token must be equal; in bf16, int8 and int4 transformers, reading our outputs,
must give them our scores. A random model that routes to less than 90 % of the experts that uniform routing would reach is
refused too, for a loop over experts looks fast there. The exit status is 1 when anything was refused.

NLLB-MoE routes each token to two experts, the paper's model to one (Switch gating: the expert's output times its softmax
probability). Two is the default, for that is what transformers runs; --experts-per-token 1 measures the paper's gating, with
transformers' router replaced by one that keeps the first choice, and the grouped baseline likewise.

--ablate CELL adds a table of where the middle decode step of that cell goes, for each precision: the captured step without
the launches of one kind beside the whole step, taking turns, at one position that is held. us added: the difference, median
of 40; launches overlap, so the rows need not add up to the step. bytes alone: reading the part's bytes at the bandwidth
measured. empty launches: as many that do nothing. It needs a GPU and a model that the kernels run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from app.devices import require_device
from engine.bench.shapes import GRID, PEERS, QUICK_GRID, SHAPES, Cell, Variant, parse_cells, with_gating
from engine.config import PRECISIONS, QuantScheme

EXAMPLES = """  babelephant bench --shape tiny --device cpu --cells 1x1,2x2       does it work here? half a minute
  babelephant bench --shape paper --device cuda --out paper.json    the paper's model, the whole grid, all precisions
  babelephant bench --shape nllb54b --device cuda --cells 1x4,64x4 --precisions w4a16 --out 54b.json
  babelephant bench --shape paper --device cuda --quick --mix 512   two cells and the serving mix
  babelephant bench --shape paper --device cuda --ablate 80x4 --peers none --precisions w4a16   where a step goes
  babelephant bench --shape paper --device cuda --experts-per-token 1 --out top1.json      with the paper's own gating
  babelephant bench --checkpoint DIR --device cpu --precisions fp32,w4a16 --cells 1x1,8x4
  babelephant bench --shape nllb54b --device cuda --precisions w4a16 --write DIR    no measuring: the model as a checkpoint

A cell is BATCHxBEAM. --out is rewritten as each cell ends, so that a run cut short keeps what it has. Peers whose weights
do not fit are left out with a note; the checks then draw one expert at a time. Each engine is sized for the largest cell
asked for: for the memory of one cell, ask for that cell alone. Needs transformers (pip install transformers==4.57.6; 5.x
computes this model wrongly and gets its loop over experts replaced)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="random model of this shape (%(default)s)")
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="a trained model instead")
    parser.add_argument(
        "--experts-per-token",
        type=int,
        choices=(1, 2),
        metavar="1|2",
        help="gating of the random model: 2 NLLB's, 1 the paper's (default: 2; a checkpoint's config.json says its own)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--cells", metavar="LIST", help=f"default: {','.join(map(str, GRID))}")
    parser.add_argument("--peers", metavar="LIST", help=f"{','.join(PEERS)} or none (all); checks use transformers anyway")
    parser.add_argument(
        "--precisions",
        metavar="LIST",
        help=f"of {','.join(PRECISIONS)}; +d8 behind one: int8 dense layers, +inv: batch-invariant (default: "
        "bf16,w8a16,w4a16 on cuda, fp32 on the CPU)",
    )
    parser.add_argument("--quick", action="store_true", help=f"cells {','.join(map(str, QUICK_GRID))}, one repeat")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed runs per cell, the median counts (3)")
    parser.add_argument("--limit-s", type=float, default=float("inf"), metavar="S", help="start nothing new after S seconds")
    parser.add_argument(
        "--ablate",
        metavar="CELL",
        help="also where a decode step of this cell goes, by kind of launch (added to --cells; without these, the only one)",
    )
    parser.add_argument("--mix", type=int, default=0, metavar="N", help="also the serving mix, with N sentences (0: none)")
    parser.add_argument("--mix-rows", type=int, default=256, metavar="N", help="live hypotheses in the mix (%(default)s)")
    parser.add_argument("--mix-beam", type=int, default=4, metavar="N", help="beam size in the mix (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs (%(default)s)")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="write the random model into the new directory DIR and stop: an HF checkpoint with --precisions fp16 or none, "
        "a converted one with a quantized precision; with a stand-in tokenizer, so that it can be served",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, rewritten as each cell ends")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars of tokens/s as an image (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Check, measure, print; 1 when a check refused something."""
    if args.write is not None:
        return _write(args)
    from engine.bench.benchmark import Benchmark
    from engine.bench.options import BenchOptions
    from engine.bench.report import plot, table

    on_cuda = args.device.startswith("cuda")
    default = "bf16,w8a16,w4a16" if on_cuda else "fp32"
    ablate = Cell.parse(args.ablate) if args.ablate else None
    options = BenchOptions(
        shape=args.shape,
        checkpoint=args.checkpoint,
        experts_per_token=args.experts_per_token,
        device=require_device(args.device),
        cells=_cells(args, ablate),
        peers=_peers(args.peers),
        variants=tuple(dict.fromkeys(Variant.parse(part) for part in (args.precisions or default).split(","))),
        repeats=_at_least_1("--repeats", args.repeats if args.repeats is not None else 1 if args.quick else 3),
        limit_s=args.limit_s,
        ablate=ablate,
        mix_sentences=args.mix,
        mix_rows=_at_least_1("--mix-rows", args.mix_rows),
        mix_beam=_at_least_1("--mix-beam", args.mix_beam),
        num_threads=_at_least_1("--threads", args.threads),
        seed=args.seed,
        out=args.out,
        command=" ".join(["babelephant", *sys.argv[1:]]),
    )
    result = Benchmark(options, say=lambda text: print(text, flush=True)).run()
    print(f"\n{table(result)}")
    for note in result.notes:
        print(f"note: {note}")
    if args.plot:
        plot(result, args.plot)
    for refusal in result.refusals:
        print(f"babelephant: refused: {refusal}", file=sys.stderr)
    return 1 if result.refusals else 0


def _cells(args: argparse.Namespace, ablate: Cell | None) -> tuple[Cell, ...]:
    ablated = () if ablate is None else (ablate,)
    if args.cells:
        return tuple(dict.fromkeys((*parse_cells(args.cells), *ablated)))
    if args.quick:
        return tuple(dict.fromkeys((*QUICK_GRID, *ablated)))
    return ablated or GRID


def _write(args: argparse.Namespace) -> int:
    import torch

    from engine.bench.checkpoint_files import write_checkpoint
    from engine.bench.random_model import RandomWeights
    from engine.bench.stand_in_tokenizer import write_stand_in_tokenizer

    if args.write.exists():
        raise ValueError(f"--write {args.write}: it exists; choose another directory or remove it")
    if args.checkpoint is not None:
        raise ValueError(
            "--write draws a random model: give --shape, not --checkpoint (babelephant convert quantizes those)"
        )
    scheme = QuantScheme.from_name(args.precisions or "fp16")
    if scheme is None and args.precisions not in (None, "fp16"):
        raise ValueError(f"--write --precisions {args.precisions}: choose fp16 or one quantized precision, such as w4a16")
    torch.set_num_threads(_at_least_1("--threads", args.threads))
    started = time.monotonic()
    config = with_gating(SHAPES[args.shape], args.experts_per_token)
    weights = RandomWeights(config, torch.device(require_device(args.device)), args.seed)
    num_bytes = write_checkpoint(weights, args.write, scheme, progress=sys.stderr.isatty())
    print(f"{args.write}: {args.shape}, {num_bytes / 1e9:.2f} GB written in {time.monotonic() - started:.1f} s")
    if write_stand_in_tokenizer(args.write, config.vocab_size):
        print(f"with a stand-in tokenizer, so that it can be served: BABELEPHANT_CHECKPOINT={args.write} babelephant serve")
    else:
        print("without a tokenizer: the stand-in, the demonstration model's, has more ids than this model")
    return 0


def _peers(text: str | None) -> tuple[str, ...]:
    if text is None:
        return PEERS
    chosen = () if text == "none" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [part for part in chosen if part not in PEERS]
    if unknown:
        raise ValueError(f"--peers {', '.join(unknown)}: unknown; choose from {', '.join(PEERS)}, or none")
    return chosen


def _at_least_1(option: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{option} is {value}; it must be at least 1")
    return value
