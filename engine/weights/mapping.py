"""HF checkpoint names -> places in a Transformer. The one home of the names.

Canonical names are those of the base class, without the `model.` prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig, QuantScheme
from engine.model.allocation import allocate_transformer
from engine.model.attention import CrossAttention, SelfAttention
from engine.model.layers import DenseFeedForward, LayerNorm, Linear
from engine.model.mixture_of_experts import MixtureOfExperts
from engine.model.transformer import DecoderLayer, EncoderLayer, Transformer
from engine.quantization.expert_stack import ExpertStack
from engine.quantization.symmetric import QuantizedTensor, num_groups
from engine.weights.checkpoint import TensorSpec

EMBEDDING_NAME = "shared.weight"
HEAD_NAME = "lm_head.weight"
CODES_SUFFIX, SCALES_SUFFIX = ".codes", ".scales"
# Copies of the shared embedding that some checkpoints store as well.
_COPY_NAMES = frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"})


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A slice of a weight tensor that one checkpoint tensor fills."""

    destination: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape the checkpoint tensor must have."""
        return tuple(self.destination.shape)

    def write(self, tensor: Tensor) -> None:
        """Copy, with a cast to the destination's dtype and device."""
        self.destination.copy_(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """True when `tensor`, cast like `write` does, is what the place holds."""
        return torch.equal(self.destination, tensor.to(self.destination))


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """One expert's matrix in a stack."""

    stack: ExpertStack
    expert: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) the checkpoint tensor must have."""
        return self.stack.out_features, self.stack.in_features

    def write(self, tensor: Tensor) -> None:
        """Store, quantizing where the stack does."""
        self.stack.set_weight(self.expert, tensor)

    def write_quantized(self, codes: Tensor, scales: Tensor) -> None:
        """Store codes and scales of a converted checkpoint."""
        scheme = self.stack.scheme
        if scheme is None:
            raise ValueError("the stack is unquantized")
        self.stack.set_quantized(self.expert, QuantizedTensor(codes, scales, scheme, self.stack.in_features))


Place = TensorPlace | ExpertPlace


def canonical_name(name: str, *, has_head: bool = False) -> str:
    """Name in the base class: without the prefix of NllbMoeForConditionalGeneration, copies of the embedding as that.

    has_head: the output projection is no such copy, but a matrix of its own.
    """
    bare = name.removeprefix("model.")
    is_copy = bare in _COPY_NAMES or (bare == HEAD_NAME and not has_head)
    return EMBEDDING_NAME if is_copy else bare


def is_expert_matrix(name: str) -> bool:
    """True for the canonical name of a matrix that quantization packs."""
    return ".ffn.experts." in name and name.endswith(".weight")


def expected_specs(config: ModelConfig, scheme: QuantScheme | None = None) -> dict[str, TensorSpec]:
    """What a checkpoint of this model must store, by canonical name.

    With a scheme: the converted form, expert matrices as `<name>.codes` and `<name>.scales`.
    """
    model = allocate_transformer(config, dtype=torch.float32, device=torch.device("meta"), scheme=scheme, max_tokens=1)
    specs = {}
    for name, place in map_places(model).items():
        if scheme is None or isinstance(place, TensorPlace):
            specs[name] = TensorSpec(place.shape, "float")
        else:
            n, k = place.shape
            code_shape, code_dtype = ((n, k), "I8") if scheme.bits == 8 else ((n, (k + 1) // 2), "U8")
            specs[name + CODES_SUFFIX] = TensorSpec(code_shape, code_dtype)
            specs[name + SCALES_SUFFIX] = TensorSpec((n, num_groups(scheme, k)), "F16")
    return specs


def map_places(transformer: Transformer) -> dict[str, Place]:
    """Every checkpoint tensor the model needs, by canonical name, and where it goes, before Transformer.pack.

    Copies of the embedding are not among them.
    """
    vocab_size = transformer.config.vocab_size
    places: dict[str, Place] = {EMBEDDING_NAME: TensorPlace(transformer.embedding[:vocab_size])}
    if not transformer.config.tie_word_embeddings:
        places[HEAD_NAME] = TensorPlace(transformer.output_projection.weight[:vocab_size])
    _place_norm(places, "encoder.layer_norm", transformer.encoder_norm)
    _place_norm(places, "decoder.layer_norm", transformer.decoder_norm)
    for index, encoder_layer in enumerate(transformer.encoder_layers):
        _place_layer(places, f"encoder.layers.{index}", encoder_layer)
    for index, decoder_layer in enumerate(transformer.decoder_layers):
        prefix = f"decoder.layers.{index}"
        _place_layer(places, prefix, decoder_layer)
        _place_norm(places, f"{prefix}.cross_attention_layer_norm", decoder_layer.cross_attention_norm)
        _place_cross_attention(places, f"{prefix}.cross_attention", decoder_layer.cross_attention)
    return places


def _place_layer(places: dict[str, Place], prefix: str, layer: EncoderLayer | DecoderLayer) -> None:
    _place_norm(places, f"{prefix}.self_attn_layer_norm", layer.self_attention_norm)
    _place_self_attention(places, f"{prefix}.self_attn", layer.self_attention)
    _place_norm(places, f"{prefix}.ff_layer_norm", layer.feed_forward_norm)
    if isinstance(layer.feed_forward, DenseFeedForward):
        _place_linear(places, f"{prefix}.ffn.fc1", layer.feed_forward.fc1)
        _place_linear(places, f"{prefix}.ffn.fc2", layer.feed_forward.fc2)
    else:
        _place_experts(places, f"{prefix}.ffn", layer.feed_forward)


def _place_experts(places: dict[str, Place], prefix: str, layer: MixtureOfExperts) -> None:
    _place_linear(places, f"{prefix}.router.classifier", layer.router.classifier)
    for expert in range(layer.fc1.num_experts):
        name = f"{prefix}.experts.expert_{expert}"
        places[f"{name}.fc1.weight"] = ExpertPlace(layer.fc1, expert)
        places[f"{name}.fc1.bias"] = TensorPlace(layer.fc1_bias[expert])
        places[f"{name}.fc2.weight"] = ExpertPlace(layer.fc2, expert)
        places[f"{name}.fc2.bias"] = TensorPlace(layer.fc2_bias[expert])


def _place_self_attention(places: dict[str, Place], prefix: str, attention: SelfAttention) -> None:
    for projection, linear in zip(("q_proj", "k_proj", "v_proj"), _split(attention.qkv, 3), strict=True):
        _place_linear(places, f"{prefix}.{projection}", linear)
    _place_linear(places, f"{prefix}.out_proj", attention.out)


def _place_cross_attention(places: dict[str, Place], prefix: str, attention: CrossAttention) -> None:
    _place_linear(places, f"{prefix}.q_proj", attention.query)
    for projection, linear in zip(("k_proj", "v_proj"), _split(attention.key_value, 2), strict=True):
        _place_linear(places, f"{prefix}.{projection}", linear)
    _place_linear(places, f"{prefix}.out_proj", attention.out)


def _split(fused: Linear, parts: int) -> list[Linear]:
    biases = [None] * parts if fused.bias is None else fused.bias.chunk(parts)
    return [Linear(weight, bias) for weight, bias in zip(fused.weight.chunk(parts), biases, strict=True)]


def _place_linear(places: dict[str, Place], prefix: str, linear: Linear) -> None:
    places[f"{prefix}.weight"] = TensorPlace(linear.weight)
    if linear.bias is not None:
        places[f"{prefix}.bias"] = TensorPlace(linear.bias)


def _place_norm(places: dict[str, Place], prefix: str, norm: LayerNorm) -> None:
    places[f"{prefix}.weight"] = TensorPlace(norm.weight)
    places[f"{prefix}.bias"] = TensorPlace(norm.bias)
