"""Compare what a checkpoint stores with what the model needs: names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping

from engine.weights.checkpoint import CheckpointError, TensorSpec
from engine.weights.mapping import EMBEDDING_NAME, HEAD_NAME, canonical_name

FLOAT_DTYPES = frozenset({"F32", "BF16", "F16", "F64"})
_NAMES_SHOWN = 5


def check_specs(stored: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError naming every kind of disagreement; `expected` is by canonical name.

    An expected dtype "float" accepts any float. Copies of the shared embedding under other names count as the embedding.
    """
    problems = []
    by_name: dict[str, list[str]] = {}
    for name in stored:
        by_name.setdefault(canonical_name(name, has_head=HEAD_NAME in expected), []).append(name)
    problems += _problem("missing", sorted(expected.keys() - by_name.keys()))
    problems += _problem("unknown", sorted(n for name in by_name.keys() - expected.keys() for n in by_name[name]))
    problems += _problem(
        "stored twice", sorted(name for name, names in by_name.items() if len(names) > 1 and name != EMBEDDING_NAME)
    )
    common = [(n, stored[n], expected[name]) for name, names in by_name.items() if name in expected for n in names]
    shapes = [f"{name} is {spec.shape}, not {want.shape}" for name, spec, want in common if spec.shape != want.shape]
    problems += _problem("wrong shape", sorted(shapes))
    dtypes = [f"{name} is {spec.dtype}, not {want.dtype}" for name, spec, want in common if not _dtype_fits(spec, want)]
    problems += _problem("wrong dtype", sorted(dtypes))
    if problems:
        raise CheckpointError("the weights do not match config.json: " + "; ".join(problems))


def differing_copies(first: str, second: str) -> CheckpointError:
    """The error for two tensors, by their stored names, that should both be the shared embedding and are not equal."""
    advice = "this engine computes only models whose encoder and decoder share one embedding"
    if HEAD_NAME in (first.removeprefix("model."), second.removeprefix("model.")):
        advice = 'an output projection of its own needs "tie_word_embeddings": false in config.json'
    return CheckpointError(f"{first} differs from {second}, but both are the shared embedding; {advice}")


def _dtype_fits(stored: TensorSpec, expected: TensorSpec) -> bool:
    return stored.dtype in FLOAT_DTYPES if expected.dtype == "float" else stored.dtype == expected.dtype


def _problem(kind: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = f", and {len(items) - _NAMES_SHOWN} more" if len(items) > _NAMES_SHOWN else ""
    return [f"{kind}: {', '.join(items[:_NAMES_SHOWN])}{more}"]
