"""`GET /metrics`: one Prometheus page for all processes, relayed from the exporter that Ray runs on every node."""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from app.errors import ServiceError

log = logging.getLogger("ray.serve")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMEOUT_S = 3.0


def ray_exporter_urls() -> list[str]:
    """Exporter addresses of the nodes that are alive."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes if n["Alive"]]


class MetricsRelay:
    """Fetches every exporter and joins the pages."""

    def __init__(self, exporter_urls: Callable[[], list[str]] = ray_exporter_urls) -> None:
        self._exporter_urls = exporter_urls

    async def page(self) -> str:
        """The joined page. Raises ServiceError metrics_unavailable when no exporter answers."""
        urls = await asyncio.to_thread(self._exporter_urls)
        fetched = await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls), return_exceptions=True)
        pages = []
        for url, page in zip(urls, fetched, strict=True):
            if isinstance(page, BaseException):
                log.warning("metrics exporter %s does not answer: %r", url, page)
            else:
                pages.append(page)
        if not pages:
            raise ServiceError("metrics_unavailable", f"none of {len(urls)} metrics exporters answers")
        return pages[0] if len(pages) == 1 else merge_pages(pages)


def merge_pages(pages: Sequence[str]) -> str:
    """Join text expositions: the format wants all samples of one metric together under one HELP and TYPE."""
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, keyword, family, *_ = line.split(" ", 3)
                heads.setdefault(family, {}).setdefault(keyword, line)
                samples.setdefault(family, [])
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(line)
    lines = [line for family, rows in samples.items() for line in (*heads.get(family, {}).values(), *rows)]
    return "\n".join(lines) + "\n"


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        return str(response.read().decode())
