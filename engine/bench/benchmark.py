"""One benchmark run: oracle and peers first, then our engine in each precision, each checked before it is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from engine.accounting import count_parameters, model_bytes, plan_memory
from engine.bench import report as reporting
from engine.bench.ablation import ablate_step, require_ablation
from engine.bench.check import CHECK_CELLS, CheckResult, check_engine, token_agreement
from engine.bench.engine_run import EngineRun
from engine.bench.floor import decode_step_bytes
from engine.bench.inputs import CellInputs
from engine.bench.measure import MemoryMeter, profile_decode, read_bandwidth
from engine.bench.options import BenchOptions
from engine.bench.ours import OurEngine, engine_config, make_runner
from engine.bench.peers import Peer, PeerError, transformers_version
from engine.bench.random_model import RandomWeights, random_transformer
from engine.bench.report import CellReport, EngineRow, Report
from engine.bench.serving_mix import draw_mix, mix_config, run_mix
from engine.bench.shapes import PAPER_RATIOS, SHAPES, SOURCE_TOKENS, TARGET_TOKENS, Cell, Variant, with_gating
from engine.config import EngineConfig, ModelConfig
from engine.model.transformer import Transformer
from engine.step_clock import StepClock
from engine.tokenizer import Tokenizer
from engine.weights.loading import load_transformer
from engine.weights.memory import available_bytes

_PARITY_CELLS = (Cell(8, 1), Cell(4, 4))
_WORKSPACE_BYTES = 6 << 30  # activations of the peers, generously


@dataclass(slots=True)
class _Cell:
    """A cell with its inputs and transformers' own output."""

    inputs: CellInputs
    reference: EngineRun
    report: CellReport


@dataclass(slots=True)
class Benchmark:
    """State of one run; `run` does everything and returns the report, complete or not."""

    options: BenchOptions
    say: Callable[[str], None] = print
    started_s: float = field(default_factory=time.monotonic)

    def run(self) -> Report:
        """Raises ValueError for what cannot be run at all (PeerError without transformers among them)."""
        options = self.options
        torch.set_num_threads(options.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        config = options.model_config
        if options.ablate is not None:
            require_ablation(config, self.device)
        version = transformers_version(config)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        counts = count_parameters(config)
        num_parameters = counts.experts + counts.routers + counts.embedding + counts.dense
        model = {
            "name": options.shape if options.checkpoint is None else options.checkpoint.name,
            "parameters": num_parameters,
            "expert_parameters": counts.experts,
            "experts_per_token": config.num_experts_per_tok,
            "source_tokens": SOURCE_TOKENS,
            "target_tokens": TARGET_TOKENS,
        }
        result = Report(reporting.birth_certificate(options.command, name, version), model, read_bandwidth(self.device))
        self.say(
            f"{model['name']}: {num_parameters / 1e6:,.1f} M parameters, {counts.experts / 1e6:,.1f} M in experts; "
            f"{name}, reads {result.bytes_per_s / 1e12:.3f} TB/s; {reporting.gating_line(result)}"
        )
        is_parity_itself = options.checkpoint is None and options.shape == "tiny" and Variant("fp32") in options.variants
        if not is_parity_itself:
            self._check_parity(result)
        if not result.refusals:
            self._run_engines(result)
        result.is_complete = not result.notes and not result.refusals
        result.write(options.out)
        return result

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device(self.options.device)

    @property
    def config(self) -> ModelConfig:
        """Of the model under test."""
        return self.options.model_config

    def _check_parity(self, result: Report) -> None:
        """Token for token in fp32 on the tiny shape: search, cache and routing without any rounding to hide behind."""
        tiny = with_gating(SHAPES["tiny"], self.config.num_experts_per_tok)
        weights = RandomWeights(tiny, self.device, self.options.seed)
        peer = Peer.random(weights, torch.float32, resident=True)
        config = self._engine_config(Variant("fp32"), _PARITY_CELLS)
        engine = OurEngine(make_runner(random_transformer(weights, config), config), config)
        inputs = [CellInputs.draw(weights.config, cell, seed=self.options.seed) for cell in _PARITY_CELLS]
        checks = check_engine(engine, peer, [(one, peer.run(one)) for one in inputs], exact=True)
        self._judge("tiny fp32", checks, result)

    def _run_engines(self, result: Report) -> None:
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        cells, checks = self._run_peers(dtype, result)
        _free_memory()
        oracle = self._oracle(dtype, resident=False)
        judge = oracle if dtype == torch.float32 else self._oracle(torch.float32, resident=False)
        for variant in self.options.variants:
            self._run_ours(variant, (oracle, judge), cells, checks, result)
            _free_memory()

    def _oracle(self, dtype: torch.dtype, *, resident: bool) -> Peer:
        if self.options.checkpoint is not None:
            return Peer.checkpoint(self.options.checkpoint, dtype, self.device)
        return Peer.random(RandomWeights(self.config, self.device, self.options.seed), dtype, resident=resident)

    def _run_peers(self, dtype: torch.dtype, result: Report) -> tuple[list[_Cell], list[tuple[CellInputs, EngineRun]]]:
        """Time the peers; keep transformers' tokens of every cell and of the check batches."""
        meter = MemoryMeter(self.device)
        meter.start()
        start = time.monotonic()
        oracle = self._oracle(dtype, resident=self._peers_fit(dtype, result))
        result.build_s["peers"] = time.monotonic() - start
        checks = [(inputs, oracle.run(inputs)) for inputs in (self._inputs(cell) for cell in CHECK_CELLS)]
        cells: list[_Cell] = []
        for cell in self.options.cells:
            if self._is_late(f"cell {cell}", result):
                break
            inputs = self._inputs(cell)
            with oracle.recording_experts() as experts:
                reference = oracle.run(inputs)  # the warm-up as well
            decoder = experts.touched("decoder", cell.rows)
            encoder = experts.touched("encoder", inputs.source_token_ids.size)
            one = CellReport(cell, *decoder, *encoder, self._paper_ratio(cell))
            if one.has_collapsed and self.options.checkpoint is None:
                one.refusal = "routing has collapsed: a loop over experts would look faster than it is"
            result.cells[str(cell)] = one
            if one.refusal:
                result.refusals.append(f"{cell}: {one.refusal}")
                self.say(f"{cell}: REFUSED: {one.refusal}")
                continue
            cells.append(_Cell(inputs, reference, one))
            self.say(f"{cell}: {reporting.experts_line(one)}")
            if oracle.is_resident:
                self._time_peers(oracle, cells[-1], meter, result)
        return cells, checks

    def _time_peers(self, oracle: Peer, cell: _Cell, meter: MemoryMeter, result: Report) -> None:
        for name in self.options.peers:
            try:
                warm = cell.reference if name == "transformers" else oracle.run(cell.inputs, name)
                runs = [oracle.run(cell.inputs, name) for _ in range(self.options.repeats)]
            except PeerError as error:
                result.note(f"{name} left out: {error}")
                continue
            agreement = token_agreement(warm.token_ids, cell.reference.token_ids)
            row = replace(EngineRow.of(name, runs), token_agreement=agreement, peak_bytes=meter.peak_bytes())
            self._report_row(cell, row, result)

    def _run_ours(
        self,
        variant: Variant,
        judges: tuple[Peer, Peer],
        cells: Sequence[_Cell],
        checks: list[tuple[CellInputs, EngineRun]],
        result: Report,
    ) -> None:
        name = str(variant)
        if self._is_late(name, result):
            return
        config = self._engine_config(variant, (*self.options.cells, *CHECK_CELLS))
        meter = MemoryMeter(self.device)
        meter.start()
        start = time.monotonic()
        transformer = self._transformer(config)
        meter.settle()  # else the runner's buffers are cut out of what drawing has left, and that cannot be given back
        engine = OurEngine(make_runner(transformer, config), config)
        result.build_s[name] = time.monotonic() - start
        meter.settle()
        result.planned_bytes[name] = planned = plan_memory(transformer.config, config).total_bytes
        held = meter.peak_bytes()
        beside = "" if held is None else f", {held / 1e9:.2f} GB held ({held / planned - 1:+.1%})"
        self.say(f"{name}: built in {result.build_s[name]:.1f} s; {planned / 1e9:.2f} GB planned{beside}")
        oracle, judge = judges
        exact = variant.precision == "fp32" and oracle.dtype == torch.float32
        checked = check_engine(engine, oracle, checks, exact=exact, judge=judge)
        is_lossy = self.options.checkpoint is not None and (config.quant_scheme is not None or variant.int8_dense)
        if not self._judge(name, checked, result, may_differ=is_lossy):
            return
        for cell in cells:
            if self._is_late(f"{name} {cell.inputs.cell}", result):
                return
            self._time_ours(name, engine, cell, meter, result)
        for inputs in (cell.inputs for cell in cells if cell.inputs.cell == self.options.ablate):
            if not self._is_late(f"{name} ablation", result):
                result.ablations[name] = ablate_step(engine, inputs, self.config, result.bytes_per_s)
                self.say(f"{name}: {result.ablations[name].table()}")
                result.write(self.options.out)
        del engine, transformer
        _free_memory()
        if self.options.mix_sentences and not self._is_late(f"{name} serving mix", result):
            self._run_mix(name, config, result)

    def _time_ours(self, name: str, engine: OurEngine, cell: _Cell, meter: MemoryMeter, result: Report) -> None:
        inputs = cell.inputs
        warm = engine.run(inputs)
        runs = [engine.run(inputs) for _ in range(self.options.repeats)]
        row = EngineRow.of(name, runs)
        touched = decode_step_bytes(
            self.config,
            engine.config,
            inputs.cell,
            experts_touched=cell.report.decoder_experts,
            source_tokens=inputs.source_token_ids.shape[1],
            target_tokens=inputs.target_tokens,
        )
        row = replace(
            row,
            token_agreement=token_agreement(warm.token_ids, cell.reference.token_ids),
            bytes_per_step=touched,
            floor_share=touched / result.bytes_per_s / (row.step_ms / 1e3),
            peak_bytes=meter.peak_bytes(),
            profile=profile_decode(engine, inputs),
        )
        self._report_row(cell, row, result)

    def _run_mix(self, name: str, base: EngineConfig, result: Report) -> None:
        """With a model of its own: a device runner takes the one it is given apart."""
        options = self.options
        beam = options.mix_beam
        rows = max(options.mix_rows // beam, 1) * beam
        config = mix_config(base, rows=rows, beam=beam, num_sentences=options.mix_sentences)
        clock = StepClock(self.device) if self.device.type == "cuda" else None
        runner = make_runner(self._transformer(config), config, clock)
        sentences = draw_mix(self.config, options.mix_sentences, beam, seed=options.seed)
        mix = run_mix(runner, self.config, config, sentences, beam, clock)
        result.serving_mix[name] = mix
        self.say(reporting.mix_lines(mix))
        result.write(options.out)

    def _transformer(self, config: EngineConfig) -> Transformer:
        if self.options.checkpoint is not None:
            return load_transformer(self.options.checkpoint, config)
        return random_transformer(RandomWeights(self.config, self.device, self.options.seed), config)

    def _engine_config(self, variant: Variant, cells: Sequence[Cell]) -> EngineConfig:
        return engine_config(
            cells,
            device=self.options.device,
            variant=variant,
            source_tokens=SOURCE_TOKENS,
            target_tokens=TARGET_TOKENS,
            num_threads=self.options.num_threads,
        )

    def _inputs(self, cell: Cell) -> CellInputs:
        forced: tuple[int, ...] = ()
        if self.options.checkpoint is not None:
            tokenizer = Tokenizer.from_checkpoint(self.options.checkpoint)
            forced = tuple(tokenizer.language_id(code) for code in tokenizer.languages)
        return CellInputs.draw(self.config, cell, forced_choices=forced, seed=self.options.seed)

    def _peers_fit(self, dtype: torch.dtype, result: Report) -> bool:
        wanted = model_bytes(self.config, "fp32" if dtype == torch.float32 else "bf16") + _WORKSPACE_BYTES
        available = available_bytes(self.device)
        if self.device.type == "cpu" or available is None or wanted <= available:
            return True
        result.note(
            f"peers left out: they need {wanted / 1e9:.0f} GB in {dtype}, {available / 1e9:.0f} GB are free; transformers "
            "runs for the checks only, its experts drawn on use",
        )
        self.say(result.notes[-1])
        return False

    def _paper_ratio(self, cell: Cell) -> float | None:
        is_papers_model = self.options.checkpoint is None and self.options.shape == "paper"
        return PAPER_RATIOS.get(cell) if is_papers_model else None

    def _judge(self, name: str, checks: Sequence[CheckResult], result: Report, *, may_differ: bool = False) -> bool:
        """Record and print checks; False, and a refusal, when one failed that must not."""
        result.checks[name] = list(checks)
        for check in checks:
            best = "" if check.best_share is None else f", best tokens {check.best_share:.1%} ({check.peer_best_share:.1%})"
            self.say(
                f"check {name} {check.cell}: {check.token_agreement:.1%} of tokens equal transformers'; against fp32: score "
                f"error {check.score_error:.4f} (transformers' own {check.peer_score_error:.4f}){best}"
            )
        failures = [] if may_differ else [check.failure for check in checks if check.failure]
        result.refusals += [f"{name}: {failure}" for failure in failures]
        for failure in failures:
            self.say(f"{name}: REFUSED: {failure}")
        result.write(self.options.out)
        return not failures

    def _report_row(self, cell: _Cell, row: EngineRow, result: Report) -> None:
        cell.report.rows[row.engine] = row
        ratio = cell.report.ratio(row.engine, "transformers")
        beside = f", {ratio:.1f} x transformers" if ratio and row.engine != "transformers" else ""
        self.say(
            f"{cell.inputs.cell} {row.engine}: {row.tokens_per_s:.0f} tokens/s, {row.step_ms:.3f} ms/step, encode "
            f"{row.encode_ms:.2f} ms{beside}"
        )
        result.write(self.options.out)

    def _is_late(self, what: str, result: Report) -> bool:
        if time.monotonic() - self.started_s < self.options.limit_s:
            return False
        result.note(f"out of time before {what}")
        return True


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
