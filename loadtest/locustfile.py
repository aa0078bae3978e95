"""Load by hand for operators: `locust -f loadtest/locustfile.py --host http://127.0.0.1:8000`, then http://127.0.0.1:8089.

Web page, several load machines (`--master`, `--worker`) and shapes that a person changes while looking. Each user waits for
its answer before it sends again (a closed loop): a stalled service slows the test down, so take SLO figures and knees from
`python -m loadtest`, which does not. Needs `pip install "babelephant[locust]"`.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 20 -r 5 -t 2m --load-shape day
"""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

from locust import FastHttpUser, LoadTestShape, events, task
from locust.exception import StopUser

from loadtest.errors import LoadTestError
from loadtest.outcomes import Outcome, classify
from loadtest.target import Target, parse_target
from loadtest.workload import LoadedWorkload, PlannedRequest, load_workload, shipped_workloads

log = logging.getLogger(__name__)
_BATCH = 500  # requests drawn at a time
_SEEDS = itertools.count(1)
_SHAPES = ("flat", "steps", "day")
_NUM_STEPS = 5
_TROUGH = 1 / 3  # of the peak, as in the day profiles of translation traffic


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    parser.add_argument("--workload", default="interface", help=f"{', '.join(shipped_workloads())}, or a YAML file")
    parser.add_argument("--seconds-between-requests", type=float, default=1.0, help="of one user, from send to send")
    parser.add_argument("--load-shape", choices=_SHAPES, default="flat", help="from 0 to --users over --run-time")
    parser.add_argument("--allow-remote", action="store_true", help="permit a service on another machine")


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _check(environment: Any, **_: Any) -> None:
    """Quit before anything is sent when the target or the workload cannot be used."""
    try:
        _target(environment)
        load_workload(environment.parsed_options.workload)
    except LoadTestError as error:
        log.critical("%s", error)
        environment.process_exit_code = 2
        environment.runner.quit()


def _target(environment: Any, host: str | None = None) -> Target:
    return parse_target(host or environment.host or "", allow_remote=environment.parsed_options.allow_remote)


class TranslationUser(FastHttpUser):  # type: ignore[misc]  # locust is not installed where types are checked
    """Sends requests of the workload, at most one every --seconds-between-requests."""

    def wait_time(self) -> float:
        """Seconds until this user's next request."""
        return float(self.environment.parsed_options.seconds_between_requests)

    def on_start(self) -> None:
        """Check again who is loaded: a user may carry another host than the one that was checked at the start."""
        try:
            self._url = _target(self.environment, self.host).translate_url
            self._workload: LoadedWorkload = load_workload(self.environment.parsed_options.workload)
        except LoadTestError as error:
            log.critical("%s", error)
            raise StopUser from error
        self._planned: list[PlannedRequest] = []

    @task  # type: ignore[untyped-decorator]
    def translate(self) -> None:
        """One request, recorded under its language pair."""
        if not self._planned:
            self._planned = self._workload.draw(_BATCH, next(_SEEDS))
        planned = self._planned.pop()
        pair = self._workload.workload.pairs[planned.pair_index].name
        headers = {"Content-Type": "application/json"}
        with self.client.post(
            self._url, data=planned.body, headers=headers, name=pair, catch_response=True, allow_redirects=False
        ) as response:
            if response.status_code == 0:
                response.failure(Outcome.CONNECTION.meaning)
                return
            outcome, _ = classify(response.status_code, response.headers, response.content, planned.num_texts)
            if outcome is Outcome.OK:
                response.success()
            else:
                response.failure(outcome.meaning)


class Shape(LoadTestShape):  # type: ignore[misc]
    """Users over time: --users at most, over --run-time (60 s without one)."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """(users, users started per second) now; None at the end."""
        chosen = self.runner.environment.parsed_options
        length_s = float(chosen.run_time or 60)
        share = self.get_run_time() / length_s
        if share >= 1:
            return None
        peak, spawn_rate = int(chosen.num_users or 1), float(chosen.spawn_rate or 1)
        return max(1, round(peak * level(chosen.load_shape, share))), spawn_rate


def level(shape: str, share: float) -> float:
    """Part of the peak at a share (0 to 1) of the run: steps go up in equal stairs, day is one day from trough to trough."""
    if shape == "steps":
        return min(1.0, (math.floor(share * _NUM_STEPS) + 1) / _NUM_STEPS)
    if shape == "day":
        return _TROUGH + (1 - _TROUGH) * (1 - math.cos(2 * math.pi * share)) / 2
    return 1.0
