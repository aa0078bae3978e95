"""The panels of every dashboard, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster_configs.grafana.promql import Expr, PanelError, level, mean, per, quantile, rate, ratio

_OURS = "ray_babelephant_"
_POOL = {"pool": "$pool"}
_POOL_DEPLOYMENT = {"deployment": "$pool"}  # a pool's deployment has its name
_DECODE = {"stage": "decode"}
_TRANSLATE = {"route": "/v1/translate"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: `unit` is what its axis says; every series (legend -> expression) has it, or this raises PanelError."""

    title: str
    unit: str
    series: Mapping[str, Expr]
    help: str

    def __post_init__(self) -> None:
        for legend, expr in self.series.items():
            if expr.unit != self.unit:
                raise PanelError(f"panel {self.title!r} shows {self.unit}, but {legend!r} is in {expr.unit}")


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One JSON file; `pool_variable` adds the list of pools at the top."""

    uid: str
    title: str
    panels: tuple[Panel, ...]
    pool_variable: bool = False


def _quantiles(name: str, where: Mapping[str, str], by: tuple[str, ...] = ()) -> dict[str, Expr]:
    suffix = "".join(f" {{{{{label}}}}}" for label in by)
    return {f"p{q * 100:g}{suffix}": quantile(q, _OURS + name, by=by, where=where) for q in (0.5, 0.95, 0.99)}


_PAIR = ("src_lang", "tgt_lang")
SERVICE = Dashboard(
    uid="babelephant-service",
    title="Babelephant: service",
    panels=(
        Panel(
            "Requests by status",
            "requests/s",
            {"{{status}}": rate(_OURS + "http_requests_total", by=("status",))},
            "503 is a refusal that asks to come back; other 5xx are faults.",
        ),
        Panel(
            "Latency of translate requests",
            "s",
            _quantiles("http_request_seconds", _TRANSLATE),
            "From request to last byte, all pools together.",
        ),
        Panel(
            "Share of failures",
            "ratio",
            {
                "refused (503)": ratio(
                    rate(_OURS + "http_requests_total", where={"status": "503"}), rate(_OURS + "http_requests_total")
                ),
                "other 5xx": ratio(
                    rate(_OURS + "http_requests_total", where={"status": "50[0124-9]"}), rate(_OURS + "http_requests_total")
                ),
            },
            "What the alerts BabelephantRefusing and BabelephantServerErrors watch.",
        ),
        Panel(
            "Errors by code",
            "errors/s",
            {"{{code}}": rate(_OURS + "errors_total", by=("code",))},
            "Codes of the error body.",
        ),
        Panel(
            "Characters by language pair",
            "characters/s",
            {"{{src_lang}} to {{tgt_lang}}": rate(_OURS + "source_characters_total", by=_PAIR)},
            "What a bill would count; in a plan it is the demand.",
        ),
        Panel(
            "Texts in a request",
            "texts",
            {"mean {{pool}}": mean(_OURS + "request_texts", by=("pool",))},
            "Small requests pay the ingress once per text: batch at the caller.",
        ),
        Panel(
            "Cost of a million characters",
            "usd/million characters",
            {"all pools": per(rate(_OURS + "cost_usd_total"), rate(_OURS + "source_characters_total"), million=True)},
            "Replica time at usd_per_hour (user_config) over source characters: only true when every pool has its price.",
        ),
        Panel(
            "Calls whose replica was lost",
            "calls/s",
            {"{{pool}} {{reason}}": rate(_OURS + "lost_replica_calls_total", by=("pool", "reason"))},
            "Each is tried once more; only a second loss becomes a 503.",
        ),
        Panel(
            "Calls of replicas by way and result",
            "calls/s",
            {"{{pool}} {{way}} {{result}}": rate(_OURS + "replica_calls_total", by=("pool", "way", "result"))},
            "`direct` is the usual way where direct_calls is on; `handle` then means that a pool just woke or lost a link.",
        ),
        Panel(
            "Latency of direct calls",
            "s",
            _quantiles("replica_call_seconds", {"way": "direct"}, ("pool",)),
            "From ingress to replica and back: queue, steps and wire. The router's panels do not see these calls.",
        ),
        Panel(
            "Calls in flight",
            "calls",
            {"{{pool}} {{way}}": level(_OURS + "open_calls", by=("pool", "way"))},
            "Of all ingresses; a call is one request's sentences for one pool.",
        ),
        Panel(
            "Replicas linked for direct calls",
            "replicas",
            {"{{pool}}": level(_OURS + "linked_replicas", by=("pool",), aggregate="min")},
            "Of the ingress that has the fewest: below the healthy replicas for long, look for its warnings.",
        ),
    ),
)
POOLS = Dashboard(
    uid="babelephant-pools",
    title="Babelephant: pools",
    pool_variable=True,
    panels=(
        Panel(
            "Sentences by end",
            "sentences/s",
            {"{{pool}} {{finish_reason}}": rate(_OURS + "sentences_total", by=("pool", "finish_reason"), where=_POOL)},
            "`length` means cut at max_target_tokens.",
        ),
        Panel(
            "Target tokens",
            "tokens/s",
            {"{{pool}}": rate(_OURS + "target_tokens_total", by=("pool",), where=_POOL)},
            "Of best hypotheses; beams that lost are not counted.",
        ),
        Panel(
            "Wait in the queue", "s", _quantiles("queue_seconds", _POOL, ("pool",)), "Grows first when capacity is short."
        ),
        Panel("Encoder pass of a sentence", "s", _quantiles("encode_seconds", _POOL, ("pool",)), "One packed pass."),
        Panel(
            "Decode steps of a sentence", "s", _quantiles("decode_seconds", _POOL, ("pool",)), "From first step to finish."
        ),
        Panel(
            "Rows in use",
            "ratio",
            {
                "{{pool}}": ratio(
                    level(_OURS + "live_rows", by=("pool",), where=_POOL),
                    level(_OURS + "max_rows", by=("pool",), where=_POOL),
                )
            },
            "Live beams of those a decode step can hold: full is efficient, full with a queue is too small.",
        ),
        Panel(
            "Sentences waiting and accepted",
            "sentences",
            {
                "waiting {{pool}}": level(_OURS + "waiting_sentences", by=("pool",), where=_POOL),
                "accepted {{pool}}": level(_OURS + "pending_sentences", by=("pool",), where=_POOL),
            },
            "Accepted ones include those that wait.",
        ),
        Panel(
            "Accepted sentences by replica",
            "sentences",
            {"{{replica}}": level(_OURS + "pending_sentences", by=("replica",), where=_POOL)},
            "One far above the others is slow or stuck: an ingress gives a call to the replica with the fewest of its own.",
        ),
        Panel(
            "Connections refused at the port for direct calls",
            "connections/s",
            {"{{pool}} {{reason}}": rate(_OURS + "refused_connections_total", by=("pool", "reason"), where=_POOL)},
            "`late`, `crowded`, `wrong_secret`: strangers at the port; `unreadable`: ingress and replica differ in version.",
        ),
        Panel(
            "Refused calls",
            "requests/s",
            {"{{pool}} {{reason}}": rate(_OURS + "rejected_requests_total", by=("pool", "reason"), where=_POOL)},
            "`busy`: the queue is full; others: the caller's mistakes.",
        ),
        Panel(
            "Replicas",
            "replicas",
            {
                "healthy {{deployment}}": level(
                    "ray_serve_deployment_replica_healthy", by=("deployment",), where=_POOL_DEPLOYMENT
                ),
                "wanted {{deployment}}": level(
                    "ray_serve_autoscaling_target_replicas", by=("deployment",), where=_POOL_DEPLOYMENT
                ),
            },
            "Wanted above healthy for long: no GPU to be had, or a model that does not load.",
        ),
        Panel(
            "Sentences whose caller left",
            "sentences/s",
            {"{{pool}}": rate(_OURS + "cancelled_sentences_total", by=("pool",), where=_POOL)},
            "Their work is freed within one step.",
        ),
        Panel(
            "Rows in a decode step",
            "rows/steps",
            {
                "{{pool}}": per(
                    rate(_OURS + "decoded_rows_total", by=("pool",), where=_POOL),
                    rate(_OURS + "decode_steps_total", by=("pool",), where=_POOL),
                )
            },
            "The mean batch: what a step costs is spread over this many beams.",
        ),
        Panel(
            "Active experts in a decode step",
            "experts/passes",
            {
                "{{pool}} layer {{layer}}": per(
                    rate(_OURS + "sampled_active_experts_total", by=("pool", "layer"), where=_POOL | _DECODE),
                    rate(_OURS + "sampled_expert_passes_total", by=("pool", "layer"), where=_POOL | _DECODE),
                )
            },
            "Experts with at least one token: their weights are what a step reads.",
        ),
        Panel(
            "Tokens for an active expert",
            "tokens/experts",
            {
                "{{pool}} {{stage}}": per(
                    rate(_OURS + "sampled_expert_tokens_total", by=("pool", "stage"), where=_POOL),
                    rate(_OURS + "sampled_active_experts_total", by=("pool", "stage"), where=_POOL),
                )
            },
            "What one reading of an expert's weights is shared by: larger batches and fewer languages raise it.",
        ),
        Panel(
            "Expert load skew",
            "ratio",
            {
                "{{pool}} {{stage}} {{layer}}": level(
                    _OURS + "expert_load_skew_ratio", by=("pool", "stage", "layer"), aggregate="max", where=_POOL
                )
            },
            "Tokens of the busiest expert over those of the mean one, of the most uneven replica; 100 % is even.",
        ),
        Panel(
            "Encoder passes",
            "passes/s",
            {"{{pool}}": rate(_OURS + "encode_passes_total", by=("pool",), where=_POOL)},
            "Passes; a pass takes in several sentences under load.",
        ),
        Panel(
            "Sentences that started over",
            "sentences/s",
            {"{{pool}}": rate(_OURS + "retried_sentences_total", by=("pool",), where=_POOL)},
            "After a fault in work they shared; the one that caused it ends as `error`.",
        ),
        Panel(
            "Memory by part",
            "bytes",
            {"{{part}} {{pool}}": level(_OURS + "memory_bytes", by=("part", "pool"), where=_POOL)},
            "Of all replicas: experts (quantized where the precision says so), other weights, copies for the CPU, caches.",
        ),
    ),
)
_CARD = ("ip", "GpuIndex")
CLUSTER = Dashboard(
    uid="babelephant-cluster",
    title="Babelephant: Ray and GPUs",
    panels=(
        Panel(
            "GPU utilisation",
            "percent",
            {"{{ip}} GPU {{GpuIndex}}": level("ray_node_gpus_utilization", by=_CARD, aggregate="max")},
            "Share of time in which any kernel ran: 100 % is not yet full use.",
        ),
        Panel(
            "GPU memory",
            "MiB",
            {
                "used {{ip}} GPU {{GpuIndex}}": level("ray_node_gram_used", by=_CARD, aggregate="max"),
                "free {{ip}} GPU {{GpuIndex}}": level("ray_node_gram_available", by=_CARD, aggregate="min"),
            },
            "Weights and caches are taken at start; only activations move.",
        ),
        Panel(
            "Requests that wait in Serve's router",
            "requests",
            {"{{deployment}}": level("ray_serve_num_scheduling_tasks_in_backoff", by=("deployment",))},
            "Should be 0: the queue belongs in the engine, where it is bounded and counted.",
        ),
        Panel(
            "Time to find a replica",
            "ms",
            {"p99 {{deployment}}": quantile(0.99, "ray_serve_request_router_fulfillment_time_ms", by=("deployment",))},
            "Over a few milliseconds means that replicas are at max_ongoing_requests.",
        ),
        Panel(
            "Calls being served",
            "requests",
            {"{{deployment}}": level("ray_serve_replica_processing_queries", by=("deployment",))},
            "Calls with many sentences count once: not a measure of load.",
        ),
        Panel(
            "Failed health checks",
            "failures/s",
            {"{{deployment}}": rate("ray_serve_health_check_failures_total", by=("deployment",))},
            "Three in a row replace the replica.",
        ),
        Panel(
            "Start of a replica",
            "ms",
            {"p95 {{deployment}}": quantile(0.95, "ray_serve_replica_startup_latency_ms", by=("deployment",))},
            "With the model's load; downscale_delay_s should be several times as long.",
        ),
        Panel(
            "CPU of a machine",
            "percent",
            {"{{ip}}": level("ray_node_cpu_utilization", by=("ip",), aggregate="max")},
            "An engine thread that waits for its core starves its GPU.",
        ),
        Panel(
            "Memory of a machine",
            "bytes",
            {"{{ip}}": level("ray_node_mem_used", by=("ip",), aggregate="max")},
            "Loading a checkpoint needs its largest shard besides.",
        ),
    ),
)
DASHBOARDS = (SERVICE, POOLS, CLUSTER)
