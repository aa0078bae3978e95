"""The application with engines that only keep time: `import_path: tests.cluster.autoscaling_stand_in:build_app`.

Ingress, replica, engine thread and drain are the real ones; loading takes START_UP_S[pool] seconds in all and a replica
serves CAPACITY_PER_S sentences a second. While the file STAND_IN_OUTAGE names exists, replicas report no numbers.
No `from __future__ import annotations`: Serve reads the class in build_app's annotation.
"""

import os
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from app.autoscaling.feed import OFFERED, UPTIME
from app.ingress import Ingress
from app.replica import Replica
from app.settings import INGRESS_NAME, PoolSettings, ServiceSettings
from app.wire import TranslateReply
from engine.config import EngineConfig
from engine.types import TranslationRequest
from tests.app.fakes import FakeTranslator
from tests.cluster.autoscaling_service import OUTAGE_VARIABLE

CAPACITY_PER_S = 60.0
LOAD_S = {"slow": 8.0}  # on top of the process's own start
_ROWS = 3


class StandIn(Replica.func_or_class):  # type: ignore[misc, name-defined]  # the class inside the Deployment
    def __init__(self, pool: str, settings: PoolSettings) -> None:
        time.sleep(LOAD_S.get(pool, 0.0))
        self._offered = 0
        super().__init__(pool, settings)

    def _load(self, checkpoint: Path, config: EngineConfig) -> Any:
        return FakeTranslator(max_rows=_ROWS, max_waiting=config.max_waiting, step_s=_ROWS / CAPACITY_PER_S)

    async def translate(self, requests: list[TranslationRequest]) -> TranslateReply:
        self._offered += len(requests)
        reply: TranslateReply = await super().translate(requests)
        return reply

    def record_autoscaling_stats(self) -> dict[str, float]:
        if Path(os.environ[OUTAGE_VARIABLE]).exists():
            raise RuntimeError("no numbers today")
        uptime_s = time.monotonic() - self._ready_at_s
        return {**super().record_autoscaling_stats(), OFFERED: float(self._offered), UPTIME: uptime_s}


def build_app(args: ServiceSettings) -> Application:
    replica: Any = serve.deployment(
        max_ongoing_requests=1024,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=60,
        request_router_config={"initial_backoff_s": 0.005, "backoff_multiplier": 1, "max_backoff_s": 0.01},
    )(StandIn)
    ingress: Any = Ingress
    pools = {name: replica.options(name=name).bind(name, pool) for name, pool in args.pools.items()}
    application: Application = ingress.options(name=INGRESS_NAME).bind(args, pools)
    return application
