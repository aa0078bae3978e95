"""Child of kernels.tune: checks and times the candidates of one (shape, precision) on the GPU.

Arguments: shape precision modes programs.json out_folder limit_s sizes...; one JSON line a measurement, so a killed
child loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kernels.cases import FFN_SHAPES, PRECISIONS
from kernels.expert_bench import ExpertBed, ExpertPoint
from kernels.expert_gemm import FfnTiles
from kernels.tune_candidates import candidates, mode_of, tiles_key, variant_key


def attempt(point: ExpertPoint, tiles: FfnTiles, retried: bool = False) -> dict[str, Any]:
    """`point.measure`, or the error as a result: one failing candidate must not end the sweep.

    A cooperative launch that does not fit is tried once more with one program less on each SM.
    """
    try:
        return {"tiles": dataclasses.asdict(tiles)} | point.measure(tiles)
    except (RuntimeError, ValueError) as error:
        if mode_of(tiles) in ("static", "pipelined") and tiles.programs_per_sm > 1 and not retried:
            return attempt(point, dataclasses.replace(tiles, programs_per_sm=tiles.programs_per_sm - 1), retried=True)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    """Command line of the child."""
    shape, precision, modes = FFN_SHAPES[sys.argv[1]], PRECISIONS[sys.argv[2]], sys.argv[3].split(",")
    programs = json.loads(Path(sys.argv[4]).read_text(encoding="utf-8"))["programs_per_sm"]
    limit_s, sizes = float(sys.argv[6]), [int(s) for s in sys.argv[7:]]
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    bed = ExpertBed.build(shape, precision)
    base = {"shape": shape.name, "precision": precision.name, "device": torch.cuda.get_device_name()}
    path = Path(sys.argv[5]) / f"part_{shape.name}_{precision.name}.jsonl"
    built = time.perf_counter()  # gigabytes of weights take seconds: not at the expense of the first size
    share_s = (limit_s - (built - started)) / len(sizes)
    with path.open("a", encoding="utf-8") as file:

        def record(**values: Any) -> None:
            file.write(json.dumps(base | values) + "\n")
            file.flush()

        for number, tokens in enumerate(sizes):
            deadline = built + share_s * (number + 1)
            point = bed.point(tokens)
            if precision.bits == 16 and "plain" in modes:
                record(tokens=tokens, key="grouped_mm", ok=True, us=point.grouped_mm())
            wanted = [
                t
                for t in candidates(shape, precision, tokens)
                if mode_of(t) in modes and programs.get(variant_key(shape, precision, t))
            ]
            for tiles in wanted[:4] if "trial" in modes else wanted:
                if time.perf_counter() > deadline:
                    print(f"{shape.name} {precision.name} T={tokens}: out of time, some candidates left out", flush=True)
                    break
                full = dataclasses.replace(tiles, programs_per_sm=programs[variant_key(shape, precision, tiles)])
                record(tokens=tokens, key=tiles_key(tiles), **attempt(point, full))
    print(f"{shape.name} {precision.name} {','.join(modes)}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
