"""Frozen configuration, checked on creation. Torch-free: planning and scheduling tests start in milliseconds.

`ModelConfig` is what a checkpoint's config.json says, `QuantScheme` how expert weights are stored,
`EngineConfig` how one Translator is run on one device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

ActivationDtype = Literal["float32", "bfloat16", "float16"]

# config.json fields whose other values would make a result depend on batch mates or on random numbers.
_ACCEPTED_ONLY: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("nllb-moe", "nllb_moe"),
    "second_expert_policy": ("all",),
    "activation_function": ("relu",),
    "tie_word_embeddings": (True, False),
    "moe_eval_capacity_token_fraction": (1.0,),
    "router_dtype": ("float32",),
    "normalize_router_prob_before_dropping": (False, True),
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field and the accepted values."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of an NLLB-MoE checkpoint; field names are those of its config.json.

    num_experts_per_tok: 2, NLLB's gating (two experts, gates renormalised to sum 1), which also holds where config.json does
    not name it; 1: Switch's, each token to its first expert, gate = softmax probability. The name is that of other sparse
    models in transformers, whose NLLB-MoE knows two only. tie_word_embeddings: the output projection is the embedding; else
    it is a matrix of its own, `lm_head.weight`.
    """

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    encoder_sparse_step: int
    decoder_sparse_step: int
    num_experts: int
    num_experts_per_tok: int = 2
    moe_token_dropout: float = 0.2
    router_bias: bool = False
    tie_word_embeddings: bool = True
    scale_embedding: bool = True
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5  # not in config.json: the class uses torch's default

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if heads < 1 or self.d_model % heads:
                raise ConfigError(f"d_model {self.d_model} is not divisible by {heads} attention heads")
        if self.num_experts_per_tok not in (1, 2) or not isinstance(self.num_experts_per_tok, int):
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok!r}; this engine computes only 1 (Switch) and 2 (NLLB)"
            )
        if self.has_sparse_layers and self.num_experts < 2:
            raise ConfigError(f"num_experts is {self.num_experts}; routing needs at least 2")
        if not 0.0 <= self.moe_token_dropout < 1.0:
            raise ConfigError(f"moe_token_dropout is {self.moe_token_dropout}; it must be in [0, 1)")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a parsed config.json. Raises ConfigError for a model this engine cannot compute exactly."""
        for name, accepted in _ACCEPTED_ONLY.items():
            if name in raw and raw[name] not in accepted:
                raise ConfigError(f"config.json: {name} is {raw[name]!r}; this engine computes only {accepted}")
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: raw[name] for name in known if raw.get(name) is not None})
        except TypeError as error:
            missing = sorted(f.name for f in fields(cls) if f.default is f.default_factory and f.name not in raw)
            problem = f"lacks {', '.join(missing)}" if missing else f"has a value of the wrong type: {error}"
            raise ConfigError(f"config.json {problem}") from error

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> Self:
        """Read `checkpoint/config.json`. Raises ConfigError when it is absent or not JSON."""
        path = checkpoint / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; give a directory in the NLLB-MoE checkpoint format") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        return cls.from_dict(raw)

    def is_sparse(self, stack: Literal["encoder", "decoder"], layer: int) -> bool:
        """True where layer `layer` (from 0) of the stack holds experts: NLLB's rule (layer + 1) % step == 0."""
        step = self.encoder_sparse_step if stack == "encoder" else self.decoder_sparse_step
        return step > 0 and (layer + 1) % step == 0

    @property
    def has_sparse_layers(self) -> bool:
        """True when at least one layer of either stack holds experts."""
        return any(self.is_sparse("encoder", i) for i in range(self.encoder_layers)) or any(
            self.is_sparse("decoder", i) for i in range(self.decoder_layers)
        )

    @property
    def expert_output_scale(self) -> float:
        """Factor on every expert output at inference: 1 - moe_token_dropout."""
        return 1.0 - self.moe_token_dropout


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Symmetric weight-only quantization of expert matrices.

    `group_size` None means one scale per output channel (the paper's scheme), else one per `group_size` input features.
    """

    bits: Literal[4, 8]
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"bits is {self.bits}; choose 4 or 8")
        if self.group_size not in (None, 64, 128):
            raise ConfigError(f"group_size is {self.group_size}; choose 64, 128 or none (per output channel)")

    @property
    def name(self) -> str:
        """The field's name for it: `w4a16`, `w8a16`, `w4a16-g128`, ..."""
        return f"w{self.bits}a16" + (f"-g{self.group_size}" if self.group_size else "")

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """Parse `w4a16`, `w8a16-g64`, ...; `bf16`, `fp16` and `fp32` mean unquantized and give None."""
        if name in ("bf16", "fp16", "fp32"):
            return None
        head, _, group = name.partition("-g")
        if head not in ("w4a16", "w8a16") or (group and not group.isdigit()):
            raise ConfigError(f"precision {name!r} is unknown; choose {', '.join(PRECISIONS)}")
        return cls(bits=4 if head == "w4a16" else 8, group_size=int(group) if group else None)


PRECISIONS = ("fp32", "bf16", "fp16", "w8a16", "w8a16-g128", "w8a16-g64", "w4a16", "w4a16-g128", "w4a16-g64")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one Translator runs on one device. Counts are limits; memory is planned from them at start.

    precision: one of PRECISIONS. `fp32` is the parity mode; w4a16/w8a16 run bf16 activations (fp16 where
    `activation_dtype` says so).
    max_rows: live beams of all sentences together. max_source_slots: sentences in flight.
    max_source_tokens / max_target_tokens: longest accepted source (with tag and eos) / longest output.
    encode_token_budget: packed source tokens of one encoder pass. max_waiting: sentences queued before submit refuses.
    On a GPU only: batch_invariant: a sentence's result does not depend, to the last bit, on what runs beside it (slower).
    int8_dense: in the decoder, the maps to queries, keys and values, the first of dense feed-forward layers and the output
    projection have int8 weights, and take int8 activations where a step has many rows (beyond the paper).
    """

    device: str = "cpu"
    precision: str = "w4a16"
    activation_dtype: ActivationDtype | None = None
    max_rows: int = 128
    max_source_slots: int = 64
    max_source_tokens: int = 512
    max_target_tokens: int = 256
    encode_token_budget: int = 2048
    max_waiting: int = 1024
    num_threads: int = 1
    batch_invariant: bool = False
    int8_dense: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown; choose {', '.join(PRECISIONS)}")
        for name in (
            "max_rows",
            "max_source_slots",
            "max_source_tokens",
            "max_target_tokens",
            "encode_token_budget",
            "max_waiting",
            "num_threads",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.encode_token_budget < self.max_source_tokens:
            raise ConfigError(
                f"encode_token_budget {self.encode_token_budget} is less than max_source_tokens "
                f"{self.max_source_tokens}: the longest sentence would never be encoded"
            )

    @property
    def quant_scheme(self) -> QuantScheme | None:
        """How expert matrices are stored; None keeps them in the activation dtype."""
        return QuantScheme.from_name(self.precision)

    @property
    def compute_dtype(self) -> ActivationDtype:
        """Dtype of activations and unquantized weights."""
        if self.activation_dtype is not None:
            return self.activation_dtype
        return {"fp32": "float32", "fp16": "float16"}.get(self.precision, "bfloat16")  # type: ignore[return-value]
