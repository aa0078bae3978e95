"""Serve YAML files: read, checked more strictly than Serve does, and the address they ask for."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from app.autoscaling.open_calls import POLICY_PATH as OPEN_CALLS_POLICY
from app.autoscaling.settings import POLICY_PATH, AutoscalingSettings
from app.invalid_fields import invalid_fields
from app.settings import INGRESS_NAME, PoolTuning, ServiceSettings

OUR_IMPORT_PATH = "app.serve:build_app"


class ServeConfigError(ValueError):
    """A Serve YAML that cannot be deployed; the message names file, place and problem."""


def load_serve_config(path: Path, *, host: str | None = None, port: int | None = None) -> ServeDeploySchema:
    """Read and check a Serve YAML; `host` and `port` replace those of its http_options. Raises ServeConfigError."""
    config = check_serve_config(read_yaml(path), str(path))
    options = config.http_options.model_copy(
        update={key: value for key, value in (("host", host), ("port", port)) if value is not None}
    )
    if not 1 <= options.port <= 65_535:
        raise ServeConfigError(f"port {options.port} is none; choose 1024 to 65535")
    return config.model_copy(update={"http_options": options})


def read_yaml(path: Path) -> Any:
    """The parsed file. Raises ServeConfigError when it is absent or not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ServeConfigError(f"{path} does not exist; cluster_configs/serve/ holds examples") from None
    except OSError as error:
        raise ServeConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServeConfigError(f"{path} is not valid YAML: {error}") from error


def check_serve_config(raw: Any, name: str) -> ServeDeploySchema:
    """Check a parsed Serve YAML, unknown keys included; errors call it `name`. Raises ServeConfigError."""
    try:
        config = ServeDeploySchema.model_validate(raw)
        if problems := [*unknown_keys(ServeDeploySchema, raw), *_deployment_problems(config)]:
            raise ServeConfigError(f"{name}: {'; '.join(problems)}")
    except ValidationError as error:
        raise ServeConfigError(f"{name}: {invalid_fields(error)}") from error
    except (ImportError, AttributeError) as error:  # Serve's schema imports it then and there
        raise ServeConfigError(f"{name}: a policy_function is not there: {error}") from error
    return config


def unknown_keys(model: type[BaseModel], data: Any, path: str = "") -> list[str]:
    """Keys of `data` that `model` does not know, at any depth: Serve itself ignores misspelt ones."""
    problems: list[str] = []
    for key, value in data.items() if isinstance(data, dict) else ():
        where = f"{path}.{key}" if path else str(key)
        if key not in model.model_fields:
            problems.append(f"{where} is not a Serve setting")
        elif (inner := _inner_model(model.model_fields[key].annotation)) is not None:
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                problems += unknown_keys(inner, item, f"{where}[{index}]" if isinstance(value, list) else where)
    return problems


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _inner_model(part))), None)


def _counts_handle_calls(autoscaling: Any) -> bool:
    """True where Serve's own rule moves the number of replicas."""
    if not isinstance(autoscaling, dict) or autoscaling.get("min_replicas", 1) == autoscaling.get("max_replicas", 1):
        return False
    return (autoscaling.get("policy") or {}).get("policy_function") != OPEN_CALLS_POLICY


def _deployment_problems(config: ServeDeploySchema) -> list[str]:
    """What Serve would notice late or never: autoscaling values, our own args, deployments that the app does not have."""
    problems = []
    for application in config.applications:
        for deployment in application.deployments:
            if isinstance(deployment.autoscaling_config, dict):
                AutoscalingConfig.model_validate(deployment.autoscaling_config)
        policy = application.autoscaling_policy or {}
        if policy.get("policy_function") == POLICY_PATH:
            planned = AutoscalingSettings.model_validate(policy.get("policy_kwargs", {})).pools
            scaled = {d.name for d in application.deployments if d.autoscaling_config is not None}
            problems += [
                f"the policy plans {name!r}, which has no autoscaling_config" for name in planned if name not in scaled
            ]
        if application.import_path == OUR_IMPORT_PATH:
            settings = ServiceSettings.model_validate(application.args)
            pools = settings.pools
            if settings.direct_calls and not policy:
                problems += [
                    f"pool {deployment.name!r} is scaled by Serve's own count of calls, which args.direct_calls: true hides "
                    f"from it; set direct_calls: false, min_replicas = max_replicas, autoscaling_config.policy "
                    f"{OPEN_CALLS_POLICY}, or autoscaling_policy {POLICY_PATH}"
                    for deployment in application.deployments
                    if deployment.name in pools and _counts_handle_calls(deployment.autoscaling_config)
                ]
            problems += [
                f"deployment {deployment.name!r} is neither the ingress nor a pool ({', '.join(pools)})"
                for deployment in application.deployments
                if deployment.name not in (*pools, INGRESS_NAME)
            ]
            for deployment in application.deployments:
                if isinstance(deployment.user_config, dict):
                    PoolTuning.model_validate(deployment.user_config)
    return problems
