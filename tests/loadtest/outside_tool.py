"""One fixed schedule, our sender and NVIDIA AIPerf by turns, against one stub: do they report the same?

Run by hand; AIPerf wants an environment of its own (it pins other versions of what the service uses):

    python -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf==0.13.0
    python -m tests.loadtest.outside_tool --aiperf /tmp/aiperf/bin/aiperf

AIPerf divides by its own benchmark duration, which ends with the last answer: here both divide by the schedule's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer, models

from loadtest.arrivals import draw_schedule, flat
from loadtest.target import parse_target, wait_until_ready
from loadtest.workload import load_workload
from tests.loadtest.stub import StubService

PORT, RATE, DURATION_S, SEED, SLO_MS = 18971, 20.0, 20.0, 3, 500
URL = f"http://127.0.0.1:{PORT}"
TEMPLATE = '{"source_lang":"eng_Latn","target_lang":"deu_Latn","texts":{{ texts|tojson }}}'


def delay_s(number: int) -> float:
    """0.9 s for about every twentieth request, else 0.1 to 0.3 s; the same for both tools."""
    rng = random.Random(number)
    return 0.9 if rng.random() < 0.05 else rng.uniform(0.1, 0.3)


def serve() -> None:
    async def main() -> None:
        async with StubService(delay_s).serving(PORT):
            await asyncio.sleep(3600)

    asyncio.run(main())


def write_inputs(folder: Path) -> None:
    """The schedule for both tools, and a tokenizer for AIPerf, which counts tokens whether one wants it or not."""
    times = draw_schedule(flat(RATE, DURATION_S), dispersion=1.0, seed=SEED).times_s.tolist()
    planned = load_workload("single").draw(len(times), SEED)
    (folder / "times.csv").write_text("timestamp_s\n" + "".join(f"{time:.6f}\n" for time in times))
    rows = [
        {"timestamp": round(time * 1000, 3), "text": json.loads(request.body)["texts"][0]}
        for time, request in zip(times, planned, strict=True)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "template.json").write_text(TEMPLATE)
    (folder / "tokenizer").mkdir()
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))


def reset() -> None:
    urllib.request.urlopen(urllib.request.Request(f"{URL}/reset", method="POST"), timeout=10).close()


def ours(folder: Path, number: int) -> dict[str, float]:
    output = folder / f"ours-{number}.json"
    command = [sys.executable, "-m", "loadtest", "run", "--url", URL, "--workload", "single", "--no-progress"]
    command += ["--trace", str(folder / "times.csv"), "--seed", str(SEED), "--slo-ms", str(SLO_MS), "--output", str(output)]
    subprocess.run([*command, "--max-lag-ms", "100"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = json.loads(output.read_text())
    good = round(run["rates"]["good_fraction"] * run["counts"]["sent"])
    latency, lag = run["latency"], run["client"]["send_lag"]
    return row(run["counts"]["sent"], latency["p50_s"] * 1e3, latency["p99_s"] * 1e3, good, lag["p99_s"] * 1e3)


def aiperf(folder: Path, number: int, program: str) -> dict[str, float]:
    artifacts = folder / f"aiperf-{number}"
    command = [
        program,
        "profile",
        "--model",
        "stub",
        "--tokenizer",
        "./tokenizer",
        "--url",
        URL,
        "--endpoint",
        "/v1/translate",
    ]
    command += ["--endpoint-type", "template", "--extra-inputs", f"payload_template:{folder / 'template.json'}"]
    command += ["--extra-inputs", "response_field:translations[0].text", "--input-file", str(folder / "trace.jsonl")]
    command += ["--custom-dataset-type", "single_turn", "--fixed-schedule", "--goodput", f"request_latency:{SLO_MS}"]
    command += ["--ui", "none", "--artifact-dir", str(artifacts), "--workers-max", "1", "--record-processors", "1"]
    subprocess.run(
        command, check=True, cwd=folder, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    records = [json.loads(line) for line in (artifacts / "profile_export.jsonl").read_text().splitlines()]
    summary = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    good = sum(record["metrics"]["request_latency"]["value"] <= SLO_MS for record in records)
    latency = summary["request_latency"]
    return row(len(records), latency["p50"], latency["p99"], good, float("nan"))


def row(sent: int, p50_ms: float, p99_ms: float, good: int, lag_ms: float) -> dict[str, float]:
    return {"sent": sent, "p50 ms": p50_ms, "p99 ms": p99_ms, "goodput/s": good / DURATION_S, "send lag p99 ms": lag_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", required=True, help="the program")
    parser.add_argument("--runs", type=int, default=5, help="of each tool, by turns (default: 5)")
    args = parser.parse_args()
    stub = multiprocessing.get_context("spawn").Process(target=serve, daemon=True)
    stub.start()
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "aiperf": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        try:
            asyncio.run(wait_until_ready(parse_target(URL), 60))
            for number in range(args.runs):
                for tool in ("ours", "aiperf"):
                    reset()
                    rows[tool].append(ours(folder, number) if tool == "ours" else aiperf(folder, number, args.aiperf))
                    print(f"{tool:8}", {name: round(value, 2) for name, value in rows[tool][-1].items()}, flush=True)
        finally:
            stub.terminate()
    for figure in ("sent", "p50 ms", "p99 ms", "goodput/s"):
        medians = {tool: statistics.median(run[figure] for run in runs) for tool, runs in rows.items()}
        change = medians["ours"] / medians["aiperf"] - 1
        print(f"median {figure:10} ours {medians['ours']:9.3f}  AIPerf {medians['aiperf']:9.3f}  difference {change:+.2%}")


if __name__ == "__main__":
    main()
