"""What one replica can do: a measured profile, or a roofline estimate that says it is one.

Legend: s source tokens, t target tokens, b beam size, B sentences in a batch, R = B b live rows, T packed source tokens.

    encode        = a0 + a1 T + a2 (sum of s squared)   one packed encoder pass
    step(R, C, S) = tau0 + alpha R + beta C + gamma S   one decode step of all live rows, which read C cached target tokens
                                                        and S cached source tokens
    host          per sentence: tokenizing, starting, ending, detokenizing
    ending        per decode step in which sentences end, however many

What a step reads depends on the engine (`cells_read`): the kernels read what is cached; plain torch reads for every row as
much as for the longest. Lines are the small truth; passes and steps bend (few rows touch few experts, much that is read does
not fit a cache), so points on their curves are kept, and the seconds follow them. In closed form a replica is a batch server
(app.cost.queueing) with a fixed part a0 + t tau0 and a part per sentence: host + ending + s (a1 + a2 s) + t (b (alpha +
beta t / 2) + gamma s), without the half where rows are read alike; there each sentence is taken to end alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from app.cost.hardware import Device
from app.cost.queueing import BatchService, max_rate_within
from app.cost.traces import Floats
from engine.accounting import (
    count_parameters,
    cross_kv_flops_per_token,
    decoder_flops_per_row,
    encoder_flops_per_token,
    expert_bytes,
    model_bytes,
    num_sparse_layers,
)
from engine.config import ModelConfig

VERSION = 3
PARAMETERS = ("a0_s", "a1_s", "a2_s", "tau0_s", "alpha_s", "beta_s", "gamma_s", "host_s", "ending_s")
_NEWER = {"ending_s", "pass_points", "read_points"}  # files of this version may lack them
Points = tuple[tuple[float, float], ...]
# Shares of a peak that a tuned engine reaches, and fixed costs: assumptions of every estimate, printed with it.
_BANDWIDTH_SHARE, _FLOPS_SHARE = 0.6, 0.4
_LAUNCH_S_PER_LAYER = 25e-6
_LOAD_BYTES_PER_S, _PROCESS_START_S = 1.0e9, 25.0
_REWEIGHTINGS = 4


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the field and the fix."""


@dataclass(frozen=True, slots=True)
class Birth:
    """Where a profile comes from: date (ISO), commit, machine, and how it was obtained."""

    date: str
    commit: str
    machine: str
    method: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Parameters of the module docstring in seconds (a2_s per squared token), with standard errors (0 where not known).

    startup_s from order to serving; memory_bytes weights, cache and work space; max_batch sentences at once. estimated is
    True for a roofline that nobody has measured. step_points: (live rows, seconds of a decode step with empty caches), rows
    rising; read_points: (target tokens read, seconds more); pass_points: (source tokens, seconds of an encoder pass but for
    a2_s and host_s); beta_s, gamma_s: per target and source token read; length_step: see `cells_read`; host_s: what a
    sentence costs the engine's thread outside passes and steps; ending_s: what a step costs more when sentences end with it.
    """

    device: str
    model: str
    precision: str
    beam_size: int
    estimated: bool
    a0_s: float
    a1_s: float
    a2_s: float
    tau0_s: float
    alpha_s: float
    startup_s: float
    memory_bytes: float
    max_batch: int
    born: Birth
    errors: dict[str, float]
    step_points: Points = ()
    host_s: float = 0.0
    beta_s: float = 0.0
    gamma_s: float = 0.0
    length_step: int = 0
    ending_s: float = 0.0
    pass_points: Points = ()
    read_points: Points = ()
    version: int = VERSION

    def __post_init__(self) -> None:
        owner = f"profile of {self.model} on {self.device}"
        for name in (*PARAMETERS, "startup_s", "memory_bytes", "length_step"):
            if not getattr(self, name) >= 0:
                raise ProfileError(f"{owner}: {name} is {getattr(self, name)}; it cannot be negative")
        if self.max_batch < 1 or self.beam_size < 1:
            raise ProfileError(f"{owner}: max_batch and beam_size must be positive")

    def encode_s(self, source_tokens: Floats) -> float:
        """Seconds of one packed encoder pass over sentences of these lengths, float64[B]."""
        tokens = float(source_tokens.sum())
        packed = _along(self.pass_points, tokens) if self.pass_points else self.a0_s + self.a1_s * tokens
        return packed + self.a2_s * float((source_tokens**2).sum())

    def step_s(self, rows: float, target_cells: float = 0.0, source_cells: float = 0.0) -> float:
        """Seconds of a decode step of so many live rows that read so many cached tokens together (`cells_read`): between the
        points measured, else by the line.
        """
        reading = _along(self.read_points, target_cells) if self.read_points else self.beta_s * target_cells
        reading += self.gamma_s * source_cells
        if not self.step_points or rows > self.step_points[-1][0]:
            return self.tau0_s + self.alpha_s * rows + reading
        sizes, seconds = np.array(self.step_points).T
        return float(np.interp(rows, sizes, seconds)) + reading

    def service(self, source_tokens: float, target_tokens: float) -> BatchService:
        """The replica as a batch server for sentences of these lengths."""
        fixed = self.a0_s + target_tokens * self.tau0_s
        read = target_tokens if self.length_step else target_tokens / 2
        row_s = self.alpha_s + self.beta_s * read
        decode_s = target_tokens * (self.beam_size * row_s + self.gamma_s * source_tokens)
        encode_s = source_tokens * (self.a1_s + self.a2_s * source_tokens)
        return BatchService(fixed, self.host_s + self.ending_s + encode_s + decode_s, self.max_batch)

    def capacity_per_s(self, source_tokens: float, target_tokens: float, slo_s: float, arrival_cv2: float = 1.0) -> float:
        """Sentences per second within a p99 of slo_s; 0 when one sentence alone takes longer."""
        return max_rate_within(self.service(source_tokens, target_tokens), slo_s, arrival_cv2)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what `save` wrote. Raises ProfileError for another version, a missing or an unknown field."""
        raw: dict[str, Any] = json.loads(path.read_text())
        if raw.get("version") != VERSION:
            raise ProfileError(
                f"{path}: version {raw.get('version')!r}; this program reads version {VERSION}: measure again"
            )
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - _NEWER - raw.keys()):
            raise ProfileError(f"{path}: {', '.join(missing)} missing; measure again")
        if unknown := sorted(raw.keys() - known):
            raise ProfileError(f"{path}: unknown {', '.join(unknown)}; remove them or measure again")
        names = ("step_points", "pass_points", "read_points")
        points = {name: tuple((float(size), float(seconds)) for size, seconds in raw.get(name, ())) for name in names}
        return cls(**{**raw, "born": Birth(**raw["born"]), **points})


def _along(points: Points, size: float) -> float:
    """Seconds between two points, or in proportion beyond the last."""
    sizes, seconds = np.array(points).T
    return float(np.interp(size, sizes, seconds)) * max(1.0, size / float(sizes[-1]))


def cells_read(count: int, total: float, longest: float, length_step: int) -> float:
    """Cached tokens read for `count` rows or sentences that hold `total` together and at most `longest` each: the total with
    length_step 0, else for each of them the longest, rounded up to a multiple of length_step.
    """
    return count * -(-longest // length_step) * length_step if length_step else total


def fit_line(x: Floats, seconds: Floats) -> tuple[float, float, float, float]:
    """(intercept, slope, their standard errors) of seconds float64[N] over x float64[N], neither below 0."""
    (intercept, slope), (intercept_error, slope_error) = fit_costs(np.stack([np.ones_like(x), x], 1), seconds)
    return float(intercept), float(slope), float(intercept_error), float(slope_error)


def fit_costs(design: Floats, seconds: Floats) -> tuple[Floats, Floats]:
    """(coefficients float64[K] >= 0, standard errors) by least squares. The variance of a timing is taken to grow with the
    seconds fitted, so that their sum comes out right. (Weights from the timings themselves would favour the short ones, and
    predict too little.)

    design float64[N, K], N > K. What would come out negative is left out, the worst first, and is 0 without an error.
    """
    num_timings, num_costs = design.shape
    num_sizes = len(np.unique(design, axis=0))
    if num_timings <= num_costs or num_sizes < num_costs:
        raise ProfileError(
            f"{num_timings} timings at {num_sizes} sizes; at least {num_costs + 1} timings at {num_costs} sizes are needed"
        )
    scale = np.sqrt(seconds)
    for _ in range(_REWEIGHTINGS):
        coefficients, errors = _fit_weighted(design, seconds, scale)
        scale = np.maximum(np.sqrt(design @ coefficients), 0.3 * scale)
    return coefficients, errors


def _fit_weighted(design: Floats, seconds: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """One least-squares fit of seconds / scale."""
    num_timings, num_costs = design.shape
    weighted, aim = design / scale[:, None], seconds / scale
    size = np.sqrt((weighted**2).mean(0))
    size[size == 0] = 1.0
    weighted = weighted / size  # columns of one size: sums of squared tokens stand beside ones
    kept = np.arange(num_costs)
    while True:
        solution, *_ = np.linalg.lstsq(weighted[:, kept], aim)
        if solution.min() >= 0 or len(kept) == 1:
            break
        kept = np.delete(kept, int((solution * np.abs(weighted[:, kept]).mean(0)).argmin()))
    used = weighted[:, kept]
    noise = ((used @ solution - aim) ** 2).sum() / (num_timings - len(kept))
    coefficients, errors = np.zeros(num_costs), np.zeros(num_costs)
    coefficients[kept] = np.maximum(solution, 0.0)
    errors[kept] = np.sqrt(np.maximum(np.diag(np.linalg.pinv(used.T @ used)), 0.0) * noise)
    return coefficients / size, errors / size


def distinct_experts(num_experts: int, tokens: Floats, experts_per_token: int) -> Floats:
    """Expected experts of one layer that `tokens` tokens touch, so many each, routed evenly."""
    return np.asarray(
        num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** (experts_per_token * np.asarray(tokens, np.float64)))
    )


def roofline_profile(
    config: ModelConfig, model: str, precision: str, device: Device, beam_size: int = 4, max_batch: int = 64, date: str = ""
) -> Profile:
    """An estimate from bytes and FLOPs; raises ProfileError when the weights do not fit the device.

    A decode step reads the dense weights and the experts its rows touch, or computes, whichever takes longer; a line through
    it over the rows gives tau0 and alpha. An encoder pass reads all weights once and computes per token.
    """
    weights = float(model_bytes(config, precision))
    if weights > 0.9 * device.memory_bytes:
        raise ProfileError(
            f"{model} at {precision} weighs {weights / 1e9:.1f} GB; {device.name} has {device.memory_bytes / 1e9:.0f} GB: "
            "choose fewer bits, fewer experts or a larger device"
        )
    bandwidth, flops = _BANDWIDTH_SHARE * device.memory_bytes_per_s, _FLOPS_SHARE * device.half_flops_per_s
    rows = np.arange(beam_size, beam_size * max_batch + 1, beam_size, dtype=np.float64)
    step = _decode_step_s(config, precision, rows, bandwidth, flops)
    tau0, alpha, tau0_error, alpha_error = fit_line(rows, step)
    per_token = encoder_flops_per_token(config, 32) + cross_kv_flops_per_token(config)
    born = Birth(
        date,
        "",
        device.name,
        f"roofline: {_BANDWIDTH_SHARE:.0%} of memory bandwidth, {_FLOPS_SHARE:.0%} of half-precision peak, "
        f"{_LAUNCH_S_PER_LAYER * 1e6:.0f} us per layer, weights at {_LOAD_BYTES_PER_S / 1e9:g} GB/s"
        f" after {_PROCESS_START_S:g} s",
    )
    return Profile(
        device=device.name,
        model=model,
        precision=precision,
        beam_size=beam_size,
        estimated=True,
        a0_s=_encoder_bytes(config, precision) / bandwidth + config.encoder_layers * _LAUNCH_S_PER_LAYER,
        a1_s=per_token / flops,
        a2_s=0.0,
        tau0_s=tau0,
        alpha_s=alpha,
        startup_s=_PROCESS_START_S + weights / _LOAD_BYTES_PER_S,
        memory_bytes=weights,
        max_batch=max_batch,
        born=born,
        errors={"tau0_s": tau0_error, "alpha_s": alpha_error},
        step_points=tuple(zip(rows.tolist(), step.tolist(), strict=True)),
    )


def _expert_bytes_of(config: ModelConfig, precision: str) -> tuple[float, float]:
    """Bytes of all encoder and all decoder expert matrices; experts of both stacks are split by layers and width."""
    encoder = num_sparse_layers(config, "encoder") * config.encoder_ffn_dim
    decoder = num_sparse_layers(config, "decoder") * config.decoder_ffn_dim
    total = float(expert_bytes(config, precision))
    both = max(encoder + decoder, 1)
    return total * encoder / both, total * decoder / both


def _dense_bytes(config: ModelConfig) -> tuple[float, float]:
    """Bytes of encoder and decoder weights outside the experts, 2 per value; the output projection is the decoder's."""
    counts = count_parameters(config)
    encoder_share = config.encoder_layers / (config.encoder_layers + 2 * config.decoder_layers)
    head = config.vocab_size * config.d_model  # of an embedding of its own a step reads a few rows only
    return 2.0 * counts.dense * encoder_share, 2.0 * (counts.dense * (1 - encoder_share) + head)


def _encoder_bytes(config: ModelConfig, precision: str) -> float:
    return _expert_bytes_of(config, precision)[0] + _dense_bytes(config)[0]


def _decode_step_s(config: ModelConfig, precision: str, rows: Floats, bandwidth: float, flops: float) -> Floats:
    experts = max(config.num_experts, 1)
    touched = distinct_experts(experts, rows, config.num_experts_per_tok) / experts
    read = _dense_bytes(config)[1] + touched * _expert_bytes_of(config, precision)[1]
    computed = rows * decoder_flops_per_row(config, 32, 32)
    return np.asarray(np.maximum(read / bandwidth, computed / flops) + config.decoder_layers * _LAUNCH_S_PER_LAYER)
