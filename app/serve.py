"""Where deployments are wired, and nowhere else. Serve YAML: `import_path: app.serve:build_app`.

No `from __future__ import annotations` here: Serve reads the class in build_app's annotation to validate `args:`.
"""

from typing import Any

from ray.serve import Application

from app.ingress import Ingress
from app.replica import Replica
from app.settings import INGRESS_NAME, ServiceSettings


def build_app(args: ServiceSettings) -> Application:
    """One deployment per pool, named as the pool, and the ingress in front. Replica counts: the YAML's `deployments:`."""
    replica: Any = Replica  # serve.deployment's annotation hides that it makes a Deployment
    ingress: Any = Ingress
    pools = {name: replica.options(name=name).bind(name, pool) for name, pool in args.pools.items()}
    application: Application = ingress.options(name=INGRESS_NAME).bind(args, pools)
    return application
