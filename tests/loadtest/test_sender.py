"""The sender against a stub of known behaviour, in virtual time: what it reports is what happened."""

from __future__ import annotations

import asyncio

import aiohttp
import numpy as np
import pytest

from loadtest.execution import Execution, VerdictDetector
from loadtest.sender import SenderOptions
from loadtest.slo import ServiceLevel
from loadtest.workload import load_workload
from tests.loadtest.runs import SINGLE, at_times, context, measure, poisson
from tests.loadtest.stub import StubService
from tests.loadtest.virtual_time import run_virtually


def lognormal_delays(count: int) -> list[float]:
    return np.random.default_rng(9).lognormal(np.log(0.15), 0.6, size=count).tolist()


def test_percentiles_and_goodput_are_those_of_the_stub():
    schedule = poisson(60, 20)
    delays = lognormal_delays(len(schedule.times_s))
    result = measure(StubService(delays.__getitem__), schedule)
    assert result.valid, result.invalid_because
    assert result.counts.sent == result.counts.ok == len(schedule.times_s)
    for percentile, measured in ((50, result.latency.p50_s), (95, result.latency.p95_s), (99, result.latency.p99_s)):
        assert measured == pytest.approx(np.percentile(delays, percentile, method="inverted_cdf"), rel=0.05)
    good = np.mean(np.array(delays) <= 0.5)
    assert 0.9 < good < 0.99
    assert result.rates.goodput_per_s == pytest.approx(good * len(delays) / 20, rel=0.02)
    assert result.rates.offered_per_s == len(delays) / 20
    num_in_time = np.sum(schedule.times_s + delays <= 20)
    assert num_in_time < len(delays)
    assert result.rates.completed_per_s == pytest.approx(num_in_time / 20, rel=0.005)
    assert result.client.send_lag.p99_s < 0.002
    assert result.server_timing["total"].p50_s == pytest.approx(np.median(delays), rel=0.05)
    assert result.overhead.p99_s < 0.02


def test_what_is_sent_is_what_was_planned_in_order_and_on_time():
    schedule = poisson(40, 5)
    stub = StubService()
    measure(stub, schedule)
    arrived = np.array(stub.arrived_s) - stub.arrived_s[0]
    assert np.abs(arrived - (schedule.times_s - schedule.times_s[0])).max() < 0.003
    bodies = [planned.body.decode() for planned in SINGLE.draw(len(schedule.times_s), 1)]
    assert [body["texts"][0] in sent for body, sent in zip(stub.bodies, bodies, strict=True)] == [True] * len(bodies)
    assert {tuple(sorted(body)) for body in stub.bodies} == {("source_lang", "target_lang", "texts")}


def test_every_kind_of_ending_is_counted_apart():
    kinds = {0: "refused", 2: "500", 3: "422", 4: "hang", 5: "drop", 6: "html", 7: "short", 9: "503", 10: "504", 11: "empty"}
    result = measure(
        StubService(lambda _: 0.05, kinds=kinds),
        at_times([0.1 * k for k in range(20)]),
        options=SenderOptions(timeout_s=2.0),
    )
    counts = result.counts
    assert (counts.sent, counts.ok, counts.refused, counts.client_error) == (20, 10, 1, 1)
    assert (counts.server_error, counts.timeout, counts.connection, counts.malformed) == (3, 1, 1, 3)
    assert (counts.pending, counts.retried, counts.lost) == (0, 0, 8)
    assert result.statuses == {"none": 2, "200": 13, "422": 1, "500": 1, "503": 2, "504": 1}
    assert result.rates.good_fraction == 0.5
    assert result.slo_verdict == "missed"
    assert result.latency.count == 10
    assert sum(window.failed for window in result.windows) == 9
    assert sum(window.refused for window in result.windows) == 1


def closed_loop_p99(stub: StubService, count: int) -> float:
    """What a client that waits for each answer before it sends again would report."""

    async def run() -> float:
        latencies = []
        loop = asyncio.get_running_loop()
        async with stub.serving() as url, aiohttp.ClientSession() as session:
            for planned in SINGLE.draw(count, 1):
                started = loop.time()
                async with session.post(f"{url}/v1/translate", data=planned.body) as response:
                    await response.read()
                latencies.append(loop.time() - started)
        return float(np.percentile(latencies, 99))

    return run_virtually(run())


def test_a_freeze_of_one_second_shows_in_p99():
    """Coordinated omission: 10 s at 40/s, frozen from 4 s to 5 s. A tenth of the requests fall into it, waiting 0 to 1 s."""
    delay, frozen = 0.02, (4.0, 5.0)
    schedule = poisson(40, 10)
    result = measure(StubService(lambda _: delay, frozen=frozen), schedule)
    since_first = schedule.times_s - schedule.times_s[0]
    caught = (since_first >= frozen[0]) & (since_first < frozen[1])
    expected = np.where(caught, frozen[1] - since_first + delay, delay)
    assert result.latency.p99_s == pytest.approx(np.percentile(expected, 99), rel=0.05)
    assert result.latency.p99_s > 0.8
    assert result.valid
    closed = closed_loop_p99(StubService(lambda _: delay, frozen=frozen), 400)
    assert closed < 0.05  # one slow answer in 400: the stall is invisible there


def test_the_bound_on_requests_in_flight_does_not_hide_the_wait():
    """Capacity 4 / 0.5 s = 8/s, offered 16/s: requests wait for their turn, that counts, and the run is not valid."""
    schedule = at_times([k / 16 for k in range(64)])
    options = SenderOptions(timeout_s=30, max_in_flight=4)
    result = measure(StubService(lambda _: 0.5), schedule, options=options)
    last = 15 * 0.5 + 0.5 - 63 / 16  # 16 rounds of 4
    assert result.latency.max_s == pytest.approx(last, rel=0.05)
    assert result.client.num_held > 30
    assert not result.valid
    assert "raise --max-in-flight" in result.invalid_because[0]


def test_a_request_that_never_got_its_turn_times_out_from_its_intended_send():
    result = measure(
        StubService(kinds={0: "hang"}),
        at_times([0.0, 0.5, 1.0]),
        options=SenderOptions(timeout_s=1.5, max_in_flight=1),
    )
    # request 0 holds the one slot until 1.5 s; the others then go at once and have waited 1.0 and 0.5 s
    assert (result.counts.timeout, result.counts.ok) == (1, 2)
    assert result.latency.max_s == pytest.approx(1.0, rel=0.05)
    result = measure(
        StubService(kinds={0: "hang", 1: "hang"}),
        at_times([0.0, 0.5, 1.0]),
        options=SenderOptions(timeout_s=0.4, max_in_flight=2),
    )
    assert (result.counts.timeout, result.counts.ok) == (2, 1)


def test_a_slow_client_makes_the_run_invalid():
    def stall(recording, now_s):
        asyncio.get_running_loop().lose(0.05)  # a quarter of each tick
        return False

    result = measure(StubService(), poisson(50, 4), (stall,))
    assert not result.valid
    assert "send lag p99" in result.invalid_because[0]
    assert 0.02 < result.client.send_lag.p99_s < 0.06
    assert measure(StubService(), poisson(50, 4), (stall,), max_lag_s=0.1).valid


def test_the_warmup_is_sent_but_not_measured():
    stub = StubService([2.0, 2.0, 0.1, 0.1, 0.1].__getitem__)
    result = measure(stub, at_times([0.0, 0.5, 3.0, 3.5, 4.0], warmup_s=2.5))
    assert len(stub.bodies) == 5
    assert result.counts.sent == 3
    assert result.latency.max_s < 0.15
    assert result.rates.offered_per_s == pytest.approx(3 / 2.5)
    assert result.windows[0].start_s == 2.5


def test_one_retry_after_a_connection_error_is_counted_and_keeps_the_intended_time():
    options = SenderOptions(timeout_s=5, retry_connection=True)
    result = measure(StubService([0.3, 0.3, 0.1].__getitem__, kinds={0: "drop"}), at_times([0.0, 0.1]), options=options)
    assert (result.counts.ok, result.counts.retried, result.counts.connection) == (2, 1, 0)
    assert result.latency.max_s == pytest.approx(0.4, rel=0.1)


def test_a_stopped_run_says_so_and_counts_only_what_was_sent():
    async def run():
        async with StubService(lambda _: 0.3).serving() as url:
            execution = Execution(context(url, at_times([0.1 * k for k in range(100)])))
            asyncio.get_running_loop().call_later(3.05, execution.stop)
            return await execution.run()

    result = run_virtually(run())
    assert 25 <= result.counts.sent == result.counts.ok <= 32
    assert not result.valid
    assert "stopped after" in result.invalid_because[0]
    assert result.rates.offered_per_s == pytest.approx(10, rel=0.05)


def run_with_detector(delay_s: float, looks_s: list[float]):
    async def run():
        slo = ServiceLevel(latency_s=0.2, percentile=95)
        detector = VerdictDetector(slo, 0.95, 0.0, looks_s)
        async with StubService(lambda _: delay_s).serving() as url:
            execution = Execution(context(url, poisson(50, 60), slo=slo), detector=detector)
            return await execution.run(), execution.decided_early

    return run_virtually(run())


def test_a_hopeless_run_ends_early_even_before_any_answer_comes():
    result, early = run_with_detector(4.0, [30.0])
    assert early
    assert result.slo_verdict == "missed"
    assert result.counts.sent < 60
    assert result.valid


def test_a_good_run_ends_at_a_look_and_not_before():
    result, early = run_with_detector(0.05, [10.0, 20.0])
    assert early
    assert result.slo_verdict == "met"
    assert 400 < result.counts.sent < 620  # 10 s of 50/s
    assert result.valid


def test_pairs_are_accounted_apart():
    workload = load_workload("interface")
    result = measure(StubService(lambda _: 0.01), poisson(50, 10), workload=workload)
    planned = workload.draw(len(poisson(50, 10).times_s), 1)
    for index, record in enumerate(result.by_pair):
        mine = [request for request in planned if request.pair_index == index]
        assert record.pair == workload.workload.pairs[index].name
        assert (record.sent, record.ok, record.good) == (len(mine),) * 3
        assert record.source_chars == sum(request.source_chars for request in mine)
    assert sum(bin_.count for bin_ in result.source_lengths) == result.counts.sent
    total = sum(request.source_chars for request in planned)
    assert result.rates.good_source_chars_per_s == pytest.approx(total / 10)
