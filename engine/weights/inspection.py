"""What a checkpoint weighs at a precision, and how much quantization changes its expert matrices."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from engine.accounting import MemoryPlan, ParameterCounts, count_parameters, expert_bytes, model_bytes, plan_memory
from engine.config import EngineConfig, ModelConfig, QuantScheme
from engine.quantization.symmetric import quantize, relative_error
from engine.weights.checkpoint import read_specs, shard_paths, stream_tensors
from engine.weights.manifest import read_manifest
from engine.weights.mapping import canonical_name, expected_specs, is_expert_matrix
from engine.weights.validation import check_specs


@dataclass(frozen=True, slots=True)
class InspectionReport:
    """Sizes in bytes. Errors are ||w - w'|| / ||w|| over the expert matrices, None for an unquantized precision.

    worst_matrix: name of the matrix with the largest error. experts_per_token: of num_experts in each sparse layer.
    """

    precision: str
    parameters: ParameterCounts
    num_expert_matrices: int
    expert_fp32_bytes: int
    expert_bytes: int
    model_fp32_bytes: int
    model_bytes: int
    mean_error: float | None
    max_error: float | None
    worst_matrix: str | None
    memory: MemoryPlan
    experts_per_token: int
    num_experts: int

    @property
    def expert_ratio(self) -> float:
        """How many times smaller than fp32 the expert matrices are; 1 without experts."""
        return self.expert_fp32_bytes / self.expert_bytes if self.expert_bytes else 1.0

    @property
    def model_ratio(self) -> float:
        """How many times smaller than fp32 the whole model is."""
        return self.model_fp32_bytes / self.model_bytes

    def __str__(self) -> str:
        counts, memory = self.parameters, self.memory
        lines = [
            f"precision        {self.precision}",
            f"parameters       {counts.total:,} (expert matrices {counts.expert_matrices:,}, expert biases "
            f"{counts.expert_biases:,}, routers {counts.routers:,}, embedding {counts.embedding:,}, dense {counts.dense:,})",
            f"routing          each token to {self.experts_per_token} of {self.num_experts} experts",
            f"expert matrices  {self.num_expert_matrices}: {_mb(self.expert_fp32_bytes)} in fp32, "
            f"{_mb(self.expert_bytes)} in {self.precision}, {self.expert_ratio:.2f} times smaller",
            f"whole model      {_mb(self.model_fp32_bytes)} in fp32, {_mb(self.model_bytes)} in {self.precision}, "
            f"{self.model_ratio:.2f} times smaller",
            f"memory plan      {_mb(memory.total_bytes)}: experts {_mb(memory.experts_bytes)}, "
            f"rest {_mb(memory.rest_bytes)}, CPU layouts {_mb(memory.layout_copies_bytes)}, "
            f"KV cache {_mb(memory.kv_cache_bytes)}",
        ]
        if self.mean_error is not None:
            lines.append(f"relative error   mean {self.mean_error:.4f}, max {self.max_error:.4f} ({self.worst_matrix})")
        return "\n".join(lines)


def inspect_checkpoint(checkpoint: Path, precision: str, engine_config: EngineConfig | None = None) -> InspectionReport:
    """Count, quantize every expert matrix one at a time, and plan the memory of an engine with `engine_config`'s limits.

    A converted checkpoint reports the errors its manifest recorded and must be inspected at its own precision.
    Raises ConfigError or CheckpointError for a checkpoint that could not be loaded.
    """
    config = ModelConfig.from_checkpoint(checkpoint)
    engine_config = engine_config or EngineConfig(precision=precision)
    errors = _relative_errors(checkpoint, config, precision)
    worst = max(errors, key=lambda name: errors[name], default=None)
    return InspectionReport(
        precision=precision,
        parameters=count_parameters(config),
        num_expert_matrices=sum(map(is_expert_matrix, expected_specs(config))),
        expert_fp32_bytes=expert_bytes(config, "fp32"),
        expert_bytes=expert_bytes(config, precision),
        model_fp32_bytes=model_bytes(config, "fp32"),
        model_bytes=model_bytes(config, precision),
        mean_error=statistics.fmean(errors.values()) if errors else None,
        max_error=max(errors.values(), default=None),
        worst_matrix=worst,
        memory=plan_memory(config, engine_config),
        experts_per_token=config.num_experts_per_tok,
        num_experts=config.num_experts,
    )


def _relative_errors(checkpoint: Path, config: ModelConfig, precision: str) -> dict[str, float]:
    scheme = QuantScheme.from_name(precision)
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        manifest.check_scheme(checkpoint, scheme)
        paths = [checkpoint / name for name in manifest.shards]
        check_specs(read_specs(paths), expected_specs(config, manifest.scheme))
        return manifest.relative_errors
    paths = shard_paths(checkpoint)
    check_specs(read_specs(paths), expected_specs(config))
    if scheme is None:
        return {}
    return {
        canonical_name(name): relative_error(tensor, quantize(tensor, scheme))
        for name, tensor in stream_tensors(paths)
        if is_expert_matrix(canonical_name(name))
    }


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
