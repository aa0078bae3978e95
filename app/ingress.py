"""The HTTP API and the deployment that serves it: validate, hand to TranslationService, shape the reply. No torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from ray import serve
from starlette.exceptions import HTTPException

from app.errors import ServiceError, code_of_status
from app.invalid_fields import problem
from app.json_route import json_route
from app.metric_recorders import IngressMetrics
from app.middleware import BodyLimit, Cors, RequestContext, error_response
from app.pools import RayPool, ReplicaStatus
from app.prometheus import CONTENT_TYPE, MetricsRelay
from app.schemas import (
    ErrorBody,
    HealthAnswer,
    LanguageBody,
    LanguagesAnswer,
    PoolAutoscalingBody,
    PoolLanguagesBody,
    PoolStatusBody,
    ReplicaBody,
    StatusAnswer,
    TranslateAnswer,
    TranslateBody,
)
from app.settings import ServiceSettings
from app.status import ReadPlans, autoscaling_bodies, expert_load_body, plans_of
from app.text.languages import resolve_language
from app.tracing import span
from app.translation import TranslationService
from app.version import service_version

Answers = tuple[tuple[ReplicaStatus, ...], str | None]  # of one pool: its replicas, and why none answers
_ERROR_STATUSES = (400, 408, 413, 415, 422, 500, 503, 504)
_DESCRIPTION = """Machine translation with a Mixture-of-Experts model.

Every error answer, on every route, is `{"error": {"code", "message", "details"?, "request_id"}}`.
Texts are translated line by line; blank texts and lines never reach the model and come back blank.
"""


def build_api(
    service: TranslationService,
    metrics: IngressMetrics,
    relay: MetricsRelay,
    *,
    echo_request_id: bool,
    read_plans: ReadPlans = dict,
) -> FastAPI:
    """The whole HTTP API over a service; echo_request_id as in app.middleware.RequestContext, read_plans the autoscaling
    policy's.
    """
    # FastAPI's own page at /docs loads its scripts from a public host, which a closed network has not
    api = FastAPIOffline(
        title="Babelephant",
        version=service_version(),
        description=_DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,
        static_url="/docs-files",
    )
    http = service.settings.http
    if http.cors_allow_origins:
        api.add_middleware(Cors, allow_origins=http.cors_allow_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    api.add_middleware(BodyLimit, max_bytes=http.max_body_bytes, max_s=http.max_body_s)
    api.add_middleware(RequestContext, metrics=metrics, echo_request_id=echo_request_id)  # added last = outermost
    _add_error_answers(api)
    _add_translation_routes(api, service, metrics)
    _add_operation_routes(api, service, relay, read_plans)
    return api


def _add_error_answers(api: FastAPI) -> None:
    @api.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return error_response(error, request.scope)

    @api.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> JSONResponse:
        code = code_of_status(error.status_code)
        message = str(error.detail)
        path = request.scope["path"]  # request.url would choke on a query that is not UTF-8
        if code == "not_found":
            message = f"no route {path}; texts are translated at POST /v1/translate, GET /docs shows every route"
        elif code == "method_not_allowed":
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method} is not allowed on {path}; use {allowed or 'another method'}"
        response = error_response(ServiceError(code, message), request.scope)
        response.headers.update(error.headers or {})
        return response

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_validation_error(error.errors()), request.scope)


def _validation_error(problems: Sequence[Any]) -> ServiceError:
    if any(found["type"] == "json_invalid" for found in problems):
        reason = problems[0].get("ctx", {}).get("error", "it cannot be parsed")
        return ServiceError("invalid_json", f"the body is not valid JSON: {reason}")
    fields = [{"field": _field_name(found["loc"]), "problem": problem(found)} for found in problems]
    message = "; ".join(f"{found['field']}: {found['problem']}" for found in fields[:3])
    return ServiceError("invalid_request", message, details={"fields": fields})


def _field_name(location: Sequence[Any]) -> str:
    """`texts.0` for ("body", "texts", 0); a made-up field name may hold what UTF-8 cannot."""
    name = ".".join(str(part) for part in location[1:]) or "body"
    return name.encode("utf-8", "backslashreplace").decode()


def _add_translation_routes(api: FastAPI, service: TranslationService, metrics: IngressMetrics) -> None:
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _ERROR_STATUSES}

    async def translate(body: TranslateBody, request: Request, response: Response) -> TranslateAnswer:
        started = time.perf_counter()
        with span("translate", request_id=request.state.request_id, texts=len(body.texts)) as current:
            answer = await service.translate(body, request.state.request_id)
            current.set_attributes({"pool": answer.pool, "pair": f"{answer.source_lang}-{answer.target_lang}"})
        num_characters = sum(map(len, body.texts))
        metrics.translated(answer.pool, answer.source_lang, answer.target_lang, len(body.texts), num_characters)
        response.headers["Server-Timing"] = _server_timing(answer, (time.perf_counter() - started) * 1000)
        return answer

    api.router.add_api_route(
        "/v1/translate",
        translate,
        methods=["POST"],
        responses=errors,
        summary="Translate texts",
        route_class_override=json_route(TranslateBody),
    )

    @api.get("/v1/languages", responses=errors, summary="Languages and pools")
    async def languages() -> LanguagesAnswer:
        pools = []
        served: set[str] = set()
        for name, pool in service.settings.pools.items():
            codes = await service.languages(name)
            served.update(codes)
            pools.append(
                PoolLanguagesBody(
                    name=name,
                    model=pool.model_name,
                    precision=pool.precision,
                    pairs=pool.pairs,
                    languages=sorted(resolve_language(code).bcp47 for code in codes),
                )
            )
        known = sorted((resolve_language(code) for code in served), key=lambda language: language.name)
        bodies = [LanguageBody(code=language.bcp47, flores=language.flores, name=language.name) for language in known]
        return LanguagesAnswer(languages=bodies, pools=pools)


def _server_timing(answer: TranslateAnswer, total_ms: float) -> str:
    """W3C Server-Timing: the slowest line's queue, encode and decode, and the whole call as the ingress saw it."""
    timings = [translation.timings for translation in answer.translations]
    parts = {
        "queue": max(timing.queue_ms for timing in timings),
        "encode": max(timing.encode_ms for timing in timings),
        "decode": max(timing.decode_ms for timing in timings),
        "total": total_ms,
    }
    return ", ".join(f"{name};dur={milliseconds:.1f}" for name, milliseconds in parts.items())


def _add_operation_routes(api: FastAPI, service: TranslationService, relay: MetricsRelay, read_plans: ReadPlans) -> None:
    started_at_s = time.monotonic()
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (500, 503)}

    async def replicas_of(name: str, autoscaling: Mapping[str, PoolAutoscalingBody]) -> Answers:
        try:
            return await service.replicas(name), None
        except ServiceError as error:
            if name in autoscaling and autoscaling[name].target == 0:  # asleep: the next request wakes it
                return (), None
            return (), error.message

    async def answers_by_pool(autoscaling: Mapping[str, PoolAutoscalingBody]) -> dict[str, Answers]:
        names = list(service.pools)
        return dict(zip(names, await asyncio.gather(*(replicas_of(name, autoscaling) for name in names)), strict=True))

    @api.head("/livez", include_in_schema=False)
    @api.get("/livez", summary="This process answers")
    async def livez() -> HealthAnswer:
        return HealthAnswer(status="ok")

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", responses=errors, summary="Every pool answers")
    async def readyz() -> HealthAnswer:
        answers = await answers_by_pool((await autoscaling_bodies(read_plans))[0])
        if silent := {name: error for name, (_, error) in answers.items() if error is not None}:
            raise ServiceError(
                "not_ready",
                "; ".join(silent.values()),
                details={"pools": list(silent)},
                retry_after_s=service.settings.http.retry_after_s,
            )
        return HealthAnswer(status="ok")

    @api.get("/v1/status", responses=errors, summary="Pools, replicas and their load")
    async def status() -> StatusAnswer:
        autoscaling, autoscaling_error = await autoscaling_bodies(read_plans)
        pools = [
            PoolStatusBody(
                name=name,
                model=service.settings.pools[name].model_name,
                precision=service.settings.pools[name].precision,
                pairs=service.settings.pools[name].pairs,
                replicas=[_replica_body(replica) for replica in replicas],
                autoscaling=autoscaling.get(name),
                error=error,
            )
            for name, (replicas, error) in (await answers_by_pool(autoscaling)).items()
        ]
        return StatusAnswer(
            version=service_version(),
            uptime_s=round(time.monotonic() - started_at_s, 3),
            pools=pools,
            autoscaling_error=autoscaling_error,
        )

    @api.get("/metrics", responses=errors, response_class=PlainTextResponse, summary="Prometheus metrics, all processes")
    async def metrics_page() -> Response:
        return Response(await relay.page(), media_type=CONTENT_TYPE)


def _replica_body(replica: ReplicaStatus) -> ReplicaBody:
    stats = replica.stats
    return ReplicaBody(
        replica_id=replica.replica_id,
        device=replica.device,
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_live_rows=stats.num_live_rows,
        max_rows=stats.max_rows,
        max_waiting=stats.max_waiting,
        num_encode_passes=stats.num_encode_passes,
        num_decode_steps=stats.num_decode_steps,
        expert_loads=[expert_load_body(load) for load in stats.expert_loads],
        uptime_s=round(replica.uptime_s, 3),
    )


@serve.deployment(max_ongoing_requests=4096, health_check_period_s=5, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Ingress:
    """The API over Ray Serve handles, one per pool."""

    def __init__(self, settings: ServiceSettings, pools: dict[str, Any]) -> None:
        retry_after_s = settings.http.retry_after_s
        self._metrics = IngressMetrics()
        clients = {
            name: RayPool(name, handle, retry_after_s, direct=settings.direct_calls, watcher=self._metrics)
            for name, handle in pools.items()
        }
        self._service = TranslationService(settings, clients)

    def check_health(self) -> None:
        """Serve calls this now and then. There is nothing of its own to check; its metrics need the clock."""
        self._metrics.repeat_levels()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once after `__init__`."""
        read_plans = plans_of(serve.get_replica_context().app_name)
        return build_api(self._service, self._metrics, MetricsRelay(), echo_request_id=False, read_plans=read_plans)
