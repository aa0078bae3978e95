"""RayPool against a scripted handle: retries, deadlines, hang-ups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray import exceptions as ray_exceptions
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from app.errors import ServiceError
from app.pools import LOST_REPLICA_ERRORS, RayPool, ReplicaStatus
from app.wire import Busy, Failed, Translated
from engine.types import TranslationRequest
from tests.app.fakes import LANGUAGES, FakeTranslator, Watcher

REQUESTS = [TranslationRequest("r0", "a", "eng_Latn", "deu_Latn")]


class Response:
    """Awaitable like Serve's DeploymentResponse; remembers cancel()."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._result().__await__()

    async def _result(self) -> Any:
        if self.outcome == "hang":
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Handle:
    """A handle whose calls have the given outcomes, in order."""

    def __init__(self, *outcomes: Any, broadcast: Any = ()) -> None:
        self.responses = [Response(outcome) for outcome in outcomes]
        self.num_calls = 0
        self.translate = self
        self._broadcast = broadcast

    def remote(self, requests: list[TranslationRequest]) -> Response:
        assert requests == REQUESTS
        self.num_calls += 1
        return self.responses[self.num_calls - 1]

    def broadcast(self, method: str) -> Handle:
        assert method == "status"
        return self

    async def results_async(self, *, return_exceptions: bool) -> Any:
        assert return_exceptions
        return await Response(self._broadcast)


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 120))


def test_dead_replica_is_retried_once() -> None:
    handle = Handle(ActorDiedError(), Translated(()))
    assert run(lambda: RayPool("p", handle).translate(REQUESTS, 60)) == Translated(())
    assert handle.num_calls == 2


@pytest.mark.parametrize(
    "error",
    [
        ray_exceptions.ActorUnavailableError("no connection", b"\0" * 16),
        ray_exceptions.OwnerDiedError("ab" * 14, owner_address="", call_site=""),
        ray_exceptions.ObjectLostError("ab" * 14, owner_address="", call_site=""),
        ray_exceptions.ObjectFetchTimedOutError("ab" * 14, owner_address="", call_site=""),
        ray_exceptions.WorkerCrashedError(),
        ray_exceptions.NodeDiedError("node"),
        ray_exceptions.OutOfMemoryError("the memory monitor killed it"),
        ReplicaUnavailableError("replica"),
    ],
)
def test_however_ray_reports_a_lost_replica_it_is_retried_and_counted(error: Exception) -> None:
    handle = Handle(error, Translated(()))
    watcher = Watcher()
    pool = RayPool("p", handle, watcher=watcher)
    assert run(lambda: pool.translate(REQUESTS, 60)) == Translated(())
    assert watcher.lost == [("p", type(error).__name__)]
    assert watcher.ended == [("p", "handle", "lost"), ("p", "handle", "translated")]
    assert watcher.num_open == 0
    again = Handle(error, error)
    with pytest.raises(ServiceError) as caught:
        run(lambda: RayPool("p", again).translate(REQUESTS, 60))
    assert (caught.value.code, caught.value.status, again.num_calls) == ("pool_unavailable", 503, 2)


def test_every_error_of_ray_has_been_thought_of() -> None:
    """A new Ray may bring an error that means a lost replica: it has to be put on one of the two sides."""
    answers_of_the_call = {
        "ActorAlreadyExistsError",
        "ActorHandleNotFoundError",
        "ActorUnschedulableError",
        "AsyncioActorExit",
        "AuthenticationError",
        "CrossLanguageError",
        "GetTimeoutError",
        "ObjectRefStreamEndOfStreamError",
        "ObjectStoreFullError",
        "OufOfBandObjectRefSerializationException",
        "OutOfDiskError",
        "PendingCallsLimitExceeded",
        "PlasmaObjectNotAvailable",
        "RayCgraphCapacityExceeded",
        "RayChannelError",
        "RayChannelTimeoutError",
        "RayDirectTransportError",
        "RayError",
        "RaySystemError",
        "RayTaskError",
        "RuntimeEnvSetupError",
        "StreamingGeneratorReplayInconsistentError",
        "TaskCancelledError",
        "TaskPlacementGroupRemoved",
        "TaskUnschedulableError",
        "UnserializableException",
        "UserCodeException",
    }
    errors = [error for error in vars(ray_exceptions).values() if isinstance(error, type) and issubclass(error, Exception)]
    named = {error.__name__ for error in errors if error.__module__ == "ray.exceptions"}
    lost = {error.__name__ for error in errors if issubclass(error, LOST_REPLICA_ERRORS)}
    assert named - lost == answers_of_the_call


def test_failed_engine_is_not_tried_again() -> None:
    handle = Handle(Failed("first"), Translated(()))
    assert run(lambda: RayPool("p", handle).translate(REQUESTS, 60)) == Failed("first")
    assert handle.num_calls == 1


def test_two_dead_replicas_make_the_pool_unavailable() -> None:
    with pytest.raises(ServiceError) as error:
        run(lambda: RayPool("p", Handle(ActorDiedError(), ActorDiedError()), retry_after_s=3).translate(REQUESTS, 60))
    assert (error.value.code, error.value.retry_after_s) == ("pool_unavailable", 3)


def test_busy_is_not_retried() -> None:
    handle = Handle(Busy(), Translated(()))
    assert run(lambda: RayPool("p", handle).translate(REQUESTS, 60)) == Busy()
    assert handle.num_calls == 1
    assert run(lambda: RayPool("p", Handle(BackPressureError(1, 1))).translate(REQUESTS, 60)) == Busy()


def test_deadline_cancels_the_replicas_work() -> None:
    handle, watcher = Handle("hang"), Watcher()
    with pytest.raises(ServiceError) as error:
        run(lambda: RayPool("p", handle, watcher=watcher).translate(REQUESTS, 0.05))
    assert error.value.code == "deadline_exceeded"
    assert handle.responses[0].cancelled
    assert (watcher.ended, watcher.num_open) == ([("p", "handle", "late")], 0)


def test_deadline_spans_both_attempts() -> None:
    handle = Handle(ActorDiedError(), "hang")
    with pytest.raises(ServiceError) as error:
        run(lambda: RayPool("p", handle).translate(REQUESTS, 0.05))
    assert error.value.code == "deadline_exceeded"
    assert handle.responses[1].cancelled


def test_client_that_hangs_up_cancels_the_replicas_work() -> None:
    handle, watcher = Handle("hang"), Watcher()

    async def scenario() -> None:
        task = asyncio.create_task(RayPool("p", handle, watcher=watcher).translate(REQUESTS, 60))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario)
    assert handle.responses[0].cancelled
    assert (watcher.ended, watcher.num_open) == ([("p", "handle", "given_up")], 0)


def test_status_leaves_out_replicas_that_cannot_answer() -> None:
    healthy = ReplicaStatus("a", "cpu", LANGUAGES, FakeTranslator().stats(), 1.0)
    handle = Handle(broadcast=[RuntimeError("stuck"), healthy])
    assert run(RayPool("p", handle).status) == (healthy,)
    for nobody in ([], [RuntimeError("stuck")]):
        with pytest.raises(ServiceError, match="p does not answer"):
            run(RayPool("p", Handle(broadcast=nobody)).status)
