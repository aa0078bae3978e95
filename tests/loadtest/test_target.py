"""Which services may be loaded."""

from __future__ import annotations

import pytest

from loadtest.errors import LoadTestError
from loadtest.target import parse_target, wait_until_ready
from tests.loadtest.stub import StubService
from tests.loadtest.virtual_time import run_virtually


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://localhost", "http://localhost"),
        ("http://127.9.9.9:1/prefix/", "http://127.9.9.9:1/prefix"),
        ("https://[::1]:8443", "https://[::1]:8443"),
    ],
)
def test_this_machine_may_be_loaded(url, base_url):
    assert parse_target(url).translate_url == f"{base_url}/v1/translate"


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.5:8000",
        "http://example.com",
        "http://0.0.0.0:8000",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://[2001:db8::1]",
        "http://2130706433",  # 127.0.0.1 to some resolvers
        "http://LOCALHOST.",
    ],
)
def test_other_machines_need_a_flag(url):
    with pytest.raises(LoadTestError, match="--allow-remote"):
        parse_target(url)
    assert parse_target(url, allow_remote=True).base_url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:99999",
        "http://127.0.0.1?x=1",
        "http://me@127.0.0.1",
    ],
)
def test_what_is_no_base_url_is_refused_with_an_example(url):
    with pytest.raises(LoadTestError, match=r"http://127\.0\.0\.1:8000"):
        parse_target(url, allow_remote=True)


def test_waiting_ends_when_ready_and_otherwise_says_what_to_do():
    async def ready_one() -> None:
        async with StubService().serving() as url:
            await wait_until_ready(parse_target(url), 5)

    run_virtually(ready_one())
    with pytest.raises(LoadTestError, match=r"not ready after 3 s .*make run"):
        run_virtually(wait_until_ready(parse_target("http://127.0.0.1:1"), 3))
