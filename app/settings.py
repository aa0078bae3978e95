"""What the Serve YAML's `args:` may say, and the one reader of the environment.

Replica counts, GPUs and autoscaling are not here: they live in the YAML's `deployments:`.

Environment variables (all optional):

| variable | default | meaning |
|---|---|---|
| `BABELEPHANT_CHECKPOINT` | the shipped demonstration model | checkpoint directory of every pool that names none |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

import engine
from app.routing import Router
from engine.config import PRECISIONS, ActivationDtype, EngineConfig

Positive = Annotated[int, Field(ge=1)]
_PACKAGE_ROOT = Path(engine.__file__).resolve().parent.parent
_DEMO_CHECKPOINT = "engine/demo/checkpoint"
_ENGINE = EngineConfig()  # its defaults are ours
INGRESS_NAME = "ingress"  # the deployment in front of the pools
ENVIRONMENT_VARIABLES = ("BABELEPHANT_CHECKPOINT",)


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables of the table above, read."""

    checkpoint: Path

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read `environ` (default: the process's). A relative checkpoint is relative to the installed package's folder."""
        variables = os.environ if environ is None else environ
        return cls(checkpoint=resolve_checkpoint(variables.get("BABELEPHANT_CHECKPOINT") or _DEMO_CHECKPOINT))


def resolve_checkpoint(path: str | Path) -> Path:
    """Absolute path of a checkpoint: relative ones are relative to the folder that holds the `engine` package."""
    return (_PACKAGE_ROOT / Path(path).expanduser()).resolve()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineLimits(_Strict):
    """Limits of one engine; names, meaning and defaults are those of engine.config.EngineConfig."""

    max_rows: Positive = _ENGINE.max_rows
    max_source_slots: Positive = _ENGINE.max_source_slots
    max_source_tokens: Positive = _ENGINE.max_source_tokens
    max_target_tokens: Positive = _ENGINE.max_target_tokens
    encode_token_budget: Positive = _ENGINE.encode_token_budget
    max_waiting: Positive = _ENGINE.max_waiting
    num_threads: Positive = _ENGINE.num_threads
    batch_invariant: bool = _ENGINE.batch_invariant
    int8_dense: bool = _ENGINE.int8_dense


class PoolSettings(_Strict):
    """One pool: which pairs it translates, with which model, on what device.

    pairs: patterns of app.routing. checkpoint: directory in the NLLB-MoE format; None means BABELEPHANT_CHECKPOINT or the
    demonstration model. device: `cpu`, or `cuda` = the GPU that Ray gives the replica (`num_gpus` under `deployments:`).
    """

    pairs: Annotated[list[str], Field(min_length=1)] = ["*-*"]
    checkpoint: Path | None = None
    precision: str = _ENGINE.precision
    activation_dtype: ActivationDtype | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    engine: EngineLimits = EngineLimits()

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, precision: str) -> str:
        if precision not in PRECISIONS:
            raise ValueError(f"{precision!r} is unknown; choose {', '.join(PRECISIONS)}")
        return precision

    @model_validator(mode="after")
    def _engine_accepts(self) -> Self:
        self.engine_config()
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's own configuration. Raises engine.config.ConfigError for limits that contradict each other."""
        return EngineConfig(
            device=self.device,
            precision=self.precision,
            activation_dtype=self.activation_dtype,
            **self.engine.model_dump(),
        )

    @property
    def model_name(self) -> str:
        """What answers call the model: the checkpoint's directory, `demo` for the shipped one."""
        path = self.checkpoint_path()
        return "demo" if path == resolve_checkpoint(_DEMO_CHECKPOINT) else path.name

    def checkpoint_path(self, environment: Environment | None = None) -> Path:
        """Absolute checkpoint directory of this pool."""
        return resolve_checkpoint(self.checkpoint) if self.checkpoint else (environment or Environment.read()).checkpoint


class HttpLimits(_Strict):
    """What one HTTP request may ask for.

    max_body_bytes: larger bodies get 413 before they are read. max_body_s: slower ones get 408. max_sentences: lines of all
    texts together.
    default_timeout_s / max_timeout_s: time budget without and with `timeout_s` in the body. retry_after_s: sent with a 503.
    cors_allow_origins: origins whose web pages may call the API; none by default.
    """

    max_body_bytes: Positive = 1_000_000
    max_body_s: Annotated[float, Field(gt=0)] = 30.0
    max_texts: Positive = 128
    max_chars_per_text: Positive = 10_000
    max_sentences: Positive = 512
    default_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    retry_after_s: Positive = 1
    cors_allow_origins: list[str] = []

    @model_validator(mode="after")
    def _default_within_maximum(self) -> Self:
        if self.default_timeout_s > self.max_timeout_s:
            raise ValueError(f"default_timeout_s {self.default_timeout_s} exceeds max_timeout_s {self.max_timeout_s}")
        return self


class ServiceSettings(_Strict):
    """Everything under `args:` of the application in the Serve YAML; unknown keys are errors.

    direct_calls: the ingress calls replicas on connections of its own (app.wire), about ten times cheaper for the replica's
    process than Serve's handles. Serve's own autoscaling, which counts calls that its handles make, then sees an idle pool;
    app.autoscaling.open_calls counts both kinds.
    """

    pools: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")], PoolSettings], Field(min_length=1)]
    http: HttpLimits = HttpLimits()
    direct_calls: bool = False
    default_beam_size: Annotated[int, Field(ge=1, le=8)] = 4

    @model_validator(mode="after")
    def _pairs_and_queues_fit(self) -> Self:
        self.router()
        if INGRESS_NAME in self.pools:
            raise ValueError(f"{INGRESS_NAME!r} is the name of the ingress deployment; call the pool something else")
        for name, pool in self.pools.items():
            if pool.engine.max_waiting < self.http.max_sentences:
                raise ValueError(
                    f"pool {name!r}: max_waiting {pool.engine.max_waiting} is less than http.max_sentences "
                    f"{self.http.max_sentences}: a full request could never be accepted; raise the first or lower the second"
                )
            if pool.engine.max_rows < self.default_beam_size:
                raise ValueError(
                    f"pool {name!r}: max_rows {pool.engine.max_rows} is less than default_beam_size {self.default_beam_size}"
                )
        return self

    def router(self) -> Router:
        """The routing table of these pools. Raises RoutingError."""
        return Router({name: pool.pairs for name, pool in self.pools.items()})


class PoolTuning(_Strict):
    """What a pool's `user_config:` may say; changes apply to running replicas without a restart.

    stuck_after_s: an engine step that takes longer makes the replica unhealthy. max_pending: sentences a replica
    holds, running ones included, before it answers busy; None means the engine's max_waiting + max_source_slots.
    usd_per_hour: price of one replica, for the metric of what a million characters costs; None: no such metric.
    hello_timeout_s, max_strangers: of connections to the port for direct calls that have not told the secret: how long one
    may last, and how many there may be before the oldest is closed.
    """

    stuck_after_s: Annotated[float, Field(gt=0)] = 120.0
    max_pending: Positive | None = None
    usd_per_hour: Annotated[float, Field(ge=0)] | None = None
    hello_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    max_strangers: Positive = 64
