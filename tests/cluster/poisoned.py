"""The application with engines that break on marked texts: `import_path: tests.cluster.poisoned:build_app`.

The faults come where a real one could: in the decode step that all running sentences share, in `submit`, in an encoder
pass.
No `from __future__ import annotations`: Serve reads the class in build_app's annotation.
"""

import time
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve import Application

from app.ingress import Ingress
from app.replica import Replica
from app.settings import INGRESS_NAME, ServiceSettings
from engine.config import EngineConfig
from engine.types import EncodedBatch, TranslationRequest
from tests.cluster.fleet import MEMORY_POISON, SLOW_POISON, SLOW_S, SLOW_STEP_S, STEP_POISON, THREAD_POISON


class PoisonedReplica(Replica.func_or_class):  # type: ignore[misc, name-defined]  # the class inside the Deployment
    def _load(self, checkpoint: Path, config: EngineConfig) -> Any:
        translator = super()._load(checkpoint, config)
        submit, runner, scheduler = translator.submit, translator._runner, translator._scheduler
        encode, decode = runner.encode, runner.decode
        slow_until_s = 0.0

        def runs(mark: str) -> bool:
            return any(state.request.source_text.startswith(mark) for state in scheduler.running())

        def poisoned_submit(request: TranslationRequest) -> None:
            nonlocal slow_until_s
            if request.source_text.startswith(THREAD_POISON):
                raise RuntimeError("poisoned thread")
            if request.source_text.startswith(SLOW_POISON):
                slow_until_s = time.monotonic() + SLOW_S
            submit(request)

        def poisoned_encode(batch: EncodedBatch) -> None:
            if len(batch.source_slots) > 1 and runs(MEMORY_POISON):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            encode(batch)

        def poisoned_decode() -> Any:
            if runs(STEP_POISON):
                raise RuntimeError("poisoned step")
            if time.monotonic() < slow_until_s:
                time.sleep(SLOW_STEP_S)
            return decode()

        translator.submit, runner.encode, runner.decode = poisoned_submit, poisoned_encode, poisoned_decode
        return translator


def build_app(args: ServiceSettings) -> Application:
    poisoned = serve.deployment(ray_actor_options={"num_cpus": 0})(PoisonedReplica)
    pools = {name: poisoned.options(name=name).bind(name, pool) for name, pool in args.pools.items()}
    ingress: Any = Ingress
    application: Application = ingress.options(name=INGRESS_NAME).bind(args, pools)
    return application
