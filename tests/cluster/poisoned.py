"""The application with engines that break on marked texts: `import_path: tests.cluster.poisoned:build_app`.

The faults come where a real one could: in the decode step that all running sentences share, or in `submit`.
No `from __future__ import annotations`: Serve reads the class in build_app's annotation.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from app.ingress import Ingress
from app.replica import Replica
from app.settings import INGRESS_NAME, ServiceSettings
from engine.config import EngineConfig
from engine.types import TranslationRequest
from tests.cluster.fleet import STEP_POISON, THREAD_POISON


class PoisonedReplica(Replica.func_or_class):  # type: ignore[misc, name-defined]  # the class inside the Deployment
    def _load(self, checkpoint: Path, config: EngineConfig) -> Any:
        translator = super()._load(checkpoint, config)
        submit, decode, scheduler = translator.submit, translator._runner.decode, translator._scheduler

        def poisoned_submit(request: TranslationRequest) -> None:
            if request.source_text.startswith(THREAD_POISON):
                raise RuntimeError("poisoned thread")
            submit(request)

        def poisoned_decode() -> Any:
            if any(state.request.source_text.startswith(STEP_POISON) for state in scheduler.running()):
                raise RuntimeError("poisoned step")
            return decode()

        translator.submit, translator._runner.decode = poisoned_submit, poisoned_decode
        return translator


def build_app(args: ServiceSettings) -> Application:
    poisoned = serve.deployment(ray_actor_options={"num_cpus": 0})(PoisonedReplica)
    pools = {name: poisoned.options(name=name).bind(name, pool) for name, pool in args.pools.items()}
    ingress: Any = Ingress
    application: Application = ingress.options(name=INGRESS_NAME).bind(args, pools)
    return application
