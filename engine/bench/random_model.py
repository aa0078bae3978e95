"""Random models for the benchmark: drawn on the device in seconds, the same numbers in every precision, and well mixed.

Legend: V vocabulary, D d_model, F feed-forward width, E experts, N output features, K input features.

*One model, all precisions.* An expert matrix is integer codes in [-7, 7] times a power of two per output feature. int4,
int8, bf16, fp16 and fp32 all hold it exactly, so an int4 engine and a bf16 peer compute the same function and their tokens
can be compared. The other matrices are int8 codes times powers of two, for engines that keep those in int8. Every tensor is
drawn from a seed made of its name: nothing has to be kept to draw it again.

*No collapse.* A plain random model soon repeats one token, whose rows then share two experts a layer: a loop over experts
looks fast there. Here the output projection is never tied: it is the sum of several permuted copies of the embedding,
so that after token i the tokens pi_1(i), pi_2(i), ... are likely and the network (source, position, experts) decides among
them. Rows walk through the vocabulary on paths of their own, and a wrong expert shows as other tokens.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig, QuantScheme
from engine.model.allocation import allocate_transformer
from engine.model.transformer import Transformer
from engine.quantization.symmetric import QuantizedTensor, num_groups, pack_int4
from engine.weights.mapping import EMBEDDING_NAME, HEAD_NAME, ExpertPlace, TensorPlace, map_places

NUM_SPECIAL_TOKENS = 4  # ids 0 to 3 are never generated: their output rows are zero
_MAX_CODE = 7
_CODE_STD = math.sqrt(sum(code * code for code in range(-_MAX_CODE, _MAX_CODE + 1)) / (2 * _MAX_CODE + 1))
_INT8_FACTOR = 16  # code 7 of int4 is code 112 of int8 with a scale 16 times finer
_EMBEDDING_STD = 4.0  # of one embedded value, after the factor sqrt(D); positions, which rows share, have 0.7
_BIAS_STD = 0.02
_SUCCESSOR_LOGIT = 8.0  # of a likely next token; the others have standard deviation 1
# Standard deviation of an output value for inputs of unit variance, by part of the name. Attention and dense layers speak
# softly, for much of what they say is the same for all rows and would draw them to the same experts. Experts speak loudly
# (gates and ReLU take three quarters away again), so that a wrong one shows; louder still, and the rounding of bf16 would
# change tokens as often as they do.
_GAINS = (("router", 1.5), ("q_proj", 1.5), ("k_proj", 1.5), ("v_proj", 1.0), ("out_proj", 0.5), ("fc1", 1.0), ("fc2", 0.5))
# By experts a token. One expert's gate is its probability, about 0.2 of 32 experts, while two gates sum to 1.
_EXPERT_FC2_GAINS = {1: 8.0, 2: 4.0}


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """codes int8 [N, K] in [-7, 7]; steps float32 [N, 1], powers of two. The matrix is codes * steps, exact in bf16."""

    codes: Tensor
    steps: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K]."""
        return self.codes.to(dtype).mul_(self.steps.to(dtype))

    def quantized(self, scheme: QuantScheme) -> QuantizedTensor:
        """The same matrix in the canonical form of `scheme`, without rounding."""
        factor = 1 if scheme.bits == 4 else _INT8_FACTOR
        codes = pack_int4(self.codes) if scheme.bits == 4 else self.codes * factor
        groups = num_groups(scheme, self.codes.shape[1])
        scales = (self.steps / factor).to(torch.float16).expand(-1, groups).contiguous()
        return QuantizedTensor(codes, scales, scheme, self.codes.shape[1])


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Draws the tensors of one random model by their canonical checkpoint names, on `device`."""

    config: ModelConfig
    device: torch.device
    seed: int = 0

    @property
    def untied(self) -> ModelConfig:
        """The architecture that is drawn: with an output projection of its own, whatever `config` says."""
        return dataclasses.replace(self.config, tie_word_embeddings=False)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Any tensor but an expert matrix, float32, rounded to bf16 (so that all precisions hold the same)."""
        if name == HEAD_NAME:
            return self._output_projection(self.tensor(EMBEDDING_NAME, shape))
        noise = torch.randn(shape, generator=self._generator(name), device=self.device)
        if name == EMBEDDING_NAME:
            drawn = noise.mul_(_EMBEDDING_STD / math.sqrt(self.config.d_model))
        elif name.endswith("bias"):
            drawn = noise.mul_(_BIAS_STD)
        elif "layer_norm" in name:
            drawn = noise.mul_(0.05).add_(1.0)
        else:
            drawn = _int8_exact(noise.mul_(self._gain(name) / math.sqrt(shape[1])))
            if ".fc2." in name:
                _balance(drawn)
        return drawn.to(torch.bfloat16).float()

    def expert_matrix(self, name: str, shape: tuple[int, int]) -> ExpertMatrix:
        """[N, K] of one expert."""
        generator = self._generator(name)
        codes = torch.randint(-_MAX_CODE, _MAX_CODE + 1, shape, generator=generator, device=self.device, dtype=torch.int8)
        exponent = round(math.log2(self._gain(name) / (math.sqrt(shape[1]) * _CODE_STD)))
        spread = torch.randint(-1, 1, (shape[0], 1), generator=generator, device=self.device)
        if ".fc2." in name:
            _balance(codes)
        else:  # both halves of the hidden layer get the same steps, so that fc2's balance holds
            half = shape[0] // 2
            spread[half : 2 * half] = spread[:half]
        return ExpertMatrix(codes, torch.exp2((spread + exponent).float()))

    def _output_projection(self, embedding: Tensor) -> Tensor:
        """float32 [V, D] for embedding [V, D], exact in 16 bits: zero rows for the special tokens."""
        ordinary = embedding[NUM_SPECIAL_TOKENS:]
        ordinary = ordinary / ordinary.norm(dim=1, keepdim=True)
        head = torch.zeros_like(embedding)
        generator = self._generator("successors")
        num_successors = max(2, round(self.config.d_model / _SUCCESSOR_LOGIT**2))
        for _ in range(num_successors):
            successors = torch.randperm(len(ordinary), generator=generator, device=self.device)
            head.index_add_(0, successors + NUM_SPECIAL_TOKENS, ordinary)
        return _int8_exact(head.mul_(num_successors**-0.5))

    def _gain(self, name: str) -> float:
        if ".experts." in name and ".fc2." in name:
            return _EXPERT_FC2_GAINS[self.config.num_experts_per_tok]
        return next(gain for part, gain in _GAINS if part in name)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))


@torch.inference_mode()
def random_transformer(weights: RandomWeights, engine_config: EngineConfig) -> Transformer:
    """Our model with these weights, in the precision and dtype of `engine_config`.

    Experts are filled one at a time, quantized ones straight from their codes: no other precision of them ever exists.
    """
    transformer = allocate_transformer(
        weights.untied,
        dtype=getattr(torch, engine_config.compute_dtype),
        device=weights.device,
        scheme=engine_config.quant_scheme,
        max_tokens=max(engine_config.max_source_tokens, engine_config.max_target_tokens + 1),
    )
    for name, place in map_places(transformer).items():
        if isinstance(place, TensorPlace):
            place.write(weights.tensor(name, place.shape))
        else:
            _fill_expert(place, weights.expert_matrix(name, (place.shape[0], place.shape[1])), transformer.dtype)
    transformer.pack()
    return transformer


def _fill_expert(place: ExpertPlace, matrix: ExpertMatrix, dtype: torch.dtype) -> None:
    scheme = place.stack.scheme
    if scheme is None:
        place.stack.set_weight(place.expert, matrix.dense(dtype))
    else:
        place.stack.set_quantized(place.expert, matrix.quantized(scheme))


def _int8_exact(matrix: Tensor) -> Tensor:
    """Round rows to int8 codes times a power of two, the largest code being 127: int8 by largest value loses nothing.

    float32 [N, K], overwritten. bf16 holds the result exactly. Rows of zeros stay.
    """
    largest, place = matrix.abs().max(dim=1, keepdim=True)
    step = torch.exp2((largest.clamp(min=1e-30) / 127).log2().ceil())
    codes = matrix.div_(step).round_()
    sign = codes.gather(1, place).sign()
    return codes.scatter_(1, place, 127 * sign).mul_(step)


def _balance(matrix: Tensor) -> None:
    """Make the columns of the second half the negatives of the first, in place.

    ReLU outputs have a mean, the same for every token; a random fc2 turns it into one vector that all tokens share and that
    draws them to the same experts further up. With rows that sum to zero it vanishes.
    """
    half = matrix.shape[1] // 2
    matrix[:, half : 2 * half] = -matrix[:, :half]
