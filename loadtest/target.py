"""The service under test: where it is, whether it may be loaded, whether it is ready."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from loadtest.errors import LoadTestError


@dataclass(frozen=True, slots=True)
class Target:
    """Base URL without a trailing slash, such as `http://127.0.0.1:8000`."""

    base_url: str

    @property
    def translate_url(self) -> str:
        """Where translations are posted."""
        return f"{self.base_url}/v1/translate"

    @property
    def ready_url(self) -> str:
        """200 once every pool answers."""
        return f"{self.base_url}/readyz"


def parse_target(url: str, *, allow_remote: bool = False) -> Target:
    """Check the address of the service; LoadTestError for anything but http(s), or for another machine unless allow_remote.

    Only `localhost` and literal loopback addresses count as this machine: what another name resolves to can change
    between this check and the run.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LoadTestError(f"{url!r} is not a URL: {error}; try http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadTestError(f"{url!r} is not an http(s) URL; try http://127.0.0.1:8000")
    if parts.query or parts.fragment or parts.username:
        raise LoadTestError(f"{url!r}: give the base URL only (scheme, host, port), such as http://127.0.0.1:8000")
    if not allow_remote and not _is_loopback(parts.hostname):
        raise LoadTestError(
            f"{parts.hostname} is not this machine. A load test can take a service down and cost money: use 127.0.0.1, "
            "or add --allow-remote if the service is yours"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    netloc = host if port is None else f"{host}:{port}"
    return Target(f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def wait_until_ready(target: Target, timeout_s: float) -> None:
    """Return once GET /readyz answers 200; LoadTestError after timeout_s seconds with the last thing seen."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    timeout = aiohttp.ClientTimeout(total=max(1.0, min(10.0, timeout_s)))
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        while True:
            try:
                async with session.get(target.ready_url, allow_redirects=False) as response:
                    if response.status == 200:
                        return
                    seen = f"status {response.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                seen = str(error) or type(error).__name__
            if loop.time() >= deadline:
                raise LoadTestError(
                    f"{target.ready_url} is not ready after {timeout_s:g} s ({seen}); start the service "
                    "(`make run`) or give its address with --url"
                )
            await asyncio.sleep(0.5)
