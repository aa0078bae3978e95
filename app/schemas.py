"""Bodies of the HTTP API. Field names are the API: changing one is a breaking change."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from engine.types import EarlyStopping


def _encodable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains half of a surrogate pair, which is not text")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
_EXAMPLE: dict[str, JsonValue] = {"source_lang": "en", "target_lang": "de", "texts": ["Your changes have been saved."]}


class TranslateBody(BaseModel):
    """What to translate. Every text is translated line by line; blank lines come back as they are, a blank text as ""."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={"examples": [_EXAMPLE]})

    source_lang: Text = Field(description="BCP-47 (`en`, `pt-BR`, `zh-Hans`) or FLORES-200 (`eng_Latn`)", max_length=64)
    target_lang: Text = Field(description="as source_lang", max_length=64)
    texts: list[Text] = Field(min_length=1, description="texts in source_lang; translations come back in this order")
    beam_size: Annotated[int, Field(ge=1, le=8)] | None = Field(None, description="1 is greedy; default: the service's")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(None, description="default 1.0; higher: longer")
    max_target_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="per line; default: the model's limit")
    early_stopping: EarlyStopping | None = Field(None, description='false (default), true or "never", as in transformers')
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=16)] | None = Field(None, description="default 0: repeats allowed")
    num_hypotheses: Annotated[int, Field(ge=1, le=8)] | None = Field(None, description="candidates, at most beam_size")
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(None, description="time budget in seconds; 504 after it")


class TimingsBody(BaseModel):
    """Milliseconds of the slowest line of a text: waiting, encoder, decoder."""

    queue_ms: float
    encode_ms: float
    decode_ms: float


class HypothesisBody(BaseModel):
    """One candidate: text and score (mean over lines)."""

    text: str
    score: float


class TranslationBody(BaseModel):
    """One translated text.

    score: log-probability of the tokens / tokens ** length_penalty (0 for greedy search), averaged over lines by tokens;
    null for a blank text. finish_reason: `length` when some line was cut at max_target_tokens,
    `empty` for a blank text, else `eos`.
    """

    text: str
    score: float | None
    source_tokens: int
    target_tokens: int
    finish_reason: Literal["eos", "length", "empty"]
    timings: TimingsBody
    hypotheses: list[HypothesisBody] | None = None


class TranslateAnswer(BaseModel):
    """Translations in the order of `texts`; languages as FLORES-200 codes."""

    translations: list[TranslationBody]
    source_lang: str
    target_lang: str
    pool: str
    model: str
    request_id: str


class LanguageBody(BaseModel):
    """A language some pool serves."""

    code: str = Field(description="BCP-47")
    flores: str = Field(description="FLORES-200")
    name: str = Field(description="English name")


class PoolLanguagesBody(BaseModel):
    """What one pool translates: pairs as configured, over the languages of its model (BCP-47)."""

    name: str
    model: str
    precision: str
    pairs: list[str]
    languages: list[str]


class LanguagesAnswer(BaseModel):
    """Languages served, and by which pool."""

    languages: list[LanguageBody]
    pools: list[PoolLanguagesBody]


class ExpertLoadBody(BaseModel):
    """How one stage's tokens spread over the experts; lists have an entry for each sparse layer."""

    stage: str = Field(description="encode or decode")
    num_passes: int = Field(description="passes looked at since the start; on a GPU one decode step of 17")
    layers: list[int] = Field(description="places of the sparse layers")
    active_experts: list[float] = Field(description="experts with at least one token, mean of a pass")
    skew: list[float] = Field(description="recent tokens of the busiest expert over those of the mean one")


class ReplicaBody(BaseModel):
    """One replica's engine right now."""

    replica_id: str
    device: str
    num_waiting: int
    num_running: int
    num_live_rows: int
    max_rows: int
    max_waiting: int
    num_encode_passes: int
    num_decode_steps: int
    expert_loads: list[ExpertLoadBody]
    uptime_s: float


class PoolAutoscalingBody(BaseModel):
    """The newest decision about one pool's replicas."""

    current: int = Field(description="replicas that served at the decision")
    target: int = Field(description="replicas decided, those still starting included")
    pending: int = Field(description="replicas decided that do not serve yet")
    reason: str = Field(description="why; the words are listed in app/cost/guards.py")
    forecast_per_s: float = Field(description="forecast of the coming peak, sentences per second")
    offered_per_s: float = Field(description="sentences per second offered in the interval before")
    backlog: float = Field(description="sentences that wait")
    decided_at: str = Field(description="ISO 8601, UTC")
    state: str = Field(description="waiting (for metrics), warming_up (removes nothing yet) or deciding")


class PoolStatusBody(BaseModel):
    """One pool and its replicas; autoscaling is null where no policy decides, error unless no replica answers."""

    name: str
    model: str
    precision: str
    pairs: list[str]
    replicas: list[ReplicaBody]
    autoscaling: PoolAutoscalingBody | None = None
    error: str | None = None


class StatusAnswer(BaseModel):
    """State of the service; autoscaling_error says why the autoscaling policy decides nothing."""

    version: str
    uptime_s: float
    pools: list[PoolStatusBody]
    autoscaling_error: str | None = None


class HealthAnswer(BaseModel):
    """`ok` when the process (livez) or every pool (readyz) answers."""

    status: Literal["ok"]


class ErrorDetail(BaseModel):
    """What went wrong; codes are listed in app/errors.py."""

    code: str
    message: str
    details: dict[str, Any] | None = None
    request_id: str


class ErrorBody(BaseModel):
    """The one shape of every error answer."""

    error: ErrorDetail
