from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import app.settings
from app.settings import ENVIRONMENT_VARIABLES, EngineLimits, Environment, PoolSettings, PoolTuning, ServiceSettings
from engine.config import EngineConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def test_defaults_are_the_engines_own() -> None:
    assert PoolSettings().engine_config() == EngineConfig()


def test_every_engine_setting_can_be_configured() -> None:
    ours = set(EngineLimits.model_fields) | {"device", "precision", "activation_dtype"}
    assert ours == {field.name for field in dataclasses.fields(EngineConfig)}
    assert {"device", "precision", "activation_dtype"} <= set(PoolSettings.model_fields)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({}, "pools"),
        ({"pools": {}}, "at least 1"),
        ({"pools": {"a": {"pairs": []}}}, "at least 1"),
        ({"pools": {"a": {"pair": ["en-de"]}}}, "Extra inputs"),
        ({"pools": {"a": {}}, "replicas": 2}, "Extra inputs"),
        ({"pools": {"A b": {}}}, "match pattern"),
        ({"pools": {"ingress": {}}}, "call the pool something else"),
        ({"pools": {"a": {"precision": "int4"}}}, "choose fp32"),
        ({"pools": {"a": {"device": "auto"}}}, "'cpu' or 'cuda'"),
        ({"pools": {"a": {"engine": {"max_rows": 0}}}}, "greater than or equal to 1"),
        ({"pools": {"a": {"engine": {"encode_token_budget": 10}}}}, "would never be encoded"),
        ({"pools": {"a": {"engine": {"max_rows": 2}}}, "default_beam_size": 4}, "max_rows 2 is less"),
        ({"pools": {"a": {"engine": {"max_waiting": 100}}}}, "max_waiting 100 is less than http.max_sentences 512"),
        ({"pools": {"a": {"pairs": ["en-*"]}, "b": {"pairs": ["*-de"]}}}, "both claim eng_Latn-deu_Latn"),
        ({"pools": {"a": {"pairs": ["en-xx"]}}}, "names no known language pair"),
        ({"pools": {"a": {}}, "http": {"default_timeout_s": 400}}, "exceeds max_timeout_s"),
    ],
)
def test_bad_settings_are_refused_with_the_reason(args: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as error:
        ServiceSettings.model_validate(args)
    assert problem in str(error.value)


def test_relative_checkpoints_start_at_the_package_and_the_environment_gives_the_default() -> None:
    assert Environment.read({}).checkpoint == REPOSITORY / "engine/demo/checkpoint"
    environment = Environment.read({"BABELEPHANT_CHECKPOINT": "/models/big"})
    assert PoolSettings().checkpoint_path(environment) == Path("/models/big")
    assert PoolSettings(checkpoint=Path("engine/demo")).checkpoint_path(environment) == REPOSITORY / "engine/demo"


def test_model_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BABELEPHANT_CHECKPOINT", raising=False)
    assert PoolSettings().model_name == "demo"
    assert PoolSettings(checkpoint=Path("/models/big")).model_name == "big"


def test_tuning_refuses_typos() -> None:
    with pytest.raises(ValidationError):
        PoolTuning.model_validate({"stuck_after": 3})


def test_environment_table_lists_exactly_what_is_read() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", app.settings.__doc__ or "", flags=re.MULTILINE)
    assert documented == list(ENVIRONMENT_VARIABLES)

    read: list[str] = []

    class Recording(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            read.append(key)
            return super().get(key, default)

    Environment.read(Recording())
    assert read == list(ENVIRONMENT_VARIABLES)


def test_nothing_else_in_the_service_reads_the_environment() -> None:
    """local_cluster writes Ray's variables, settings reads ours; no other module touches os.environ."""
    pattern = re.compile(r"os\.(environ|getenv)")
    app = REPOSITORY / "app"
    sources = {str(path.relative_to(app)): path.read_text() for path in app.rglob("*.py")}
    users = {name for name, source in sources.items() if pattern.search(source)}
    assert users == {"settings.py", "local_cluster.py"}
    assert "environ.get" not in sources["local_cluster.py"]
