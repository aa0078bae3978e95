from __future__ import annotations

import asyncio
import threading

import pytest

from app.engine_thread import MAX_FAULTS_IN_A_ROW, EngineDeadError, EngineFailedError, EngineThread, RefusedError
from engine.types import EngineFullError, Translation, TranslationRequest
from tests.app.fakes import FakeTranslator


def requests(*texts: str, prefix: str = "r") -> list[TranslationRequest]:
    return [TranslationRequest(f"{prefix}{i}", text, "eng_Latn", "deu_Latn") for i, text in enumerate(texts)]


async def eventually(condition: object, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)


def run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))  # type: ignore[operator]


def test_results_keep_the_order_of_requests_and_only_one_thread_touches_the_engine() -> None:
    async def scenario() -> None:
        engine = FakeTranslator(max_rows=2, max_waiting=100)
        thread = EngineThread(engine, max_pending=100)
        jobs = [thread.translate(requests("a b c d", "a", "a b", prefix=f"{j}-")) for j in range(5)]
        for j, translations in enumerate(await asyncio.gather(*jobs)):
            assert [t.request_id for t in translations] == [f"{j}-{i}" for i in range(3)]
            assert [t.text for t in translations] == ["A B C D", "A", "A B"]
        assert engine.threads == {"engine"}
        assert thread.num_pending == 0
        assert await thread.translate([]) == ()
        assert thread.stop(60)

    run(scenario)


def test_what_ends_in_one_step_wakes_the_loop_once() -> None:
    async def scenario() -> None:
        engine = FakeTranslator(max_rows=50, max_waiting=50)
        engine.gate.clear()
        thread = EngineThread(engine, max_pending=50)
        first = asyncio.create_task(thread.translate(requests("a b")))
        await eventually(lambda: engine.is_held)  # the thread is inside the first step
        jobs = [asyncio.create_task(thread.translate(requests("a", prefix=f"{j}-"))) for j in range(20)]
        await eventually(lambda: thread.num_pending == 21)
        loop = asyncio.get_running_loop()
        wake_ups = []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (wake_ups.append(args), wake(*args))  # type: ignore[method-assign,assignment,misc,return-value]
        engine.gate.set()
        assert [t[0].text for t in await asyncio.gather(first, *jobs)] == ["A B"] + ["A"] * 20
        assert len(wake_ups) == 1
        thread.stop(5)

    run(scenario)


def test_event_loop_stays_free_while_the_engine_is_in_a_step() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        engine.gate.clear()
        thread = EngineThread(engine, max_pending=8)
        task = asyncio.create_task(thread.translate(requests("a")))
        for _ in range(50):
            await asyncio.sleep(0)  # would hang here if translate blocked the loop
        assert not task.done()
        engine.gate.set()
        assert (await task)[0].text == "A"
        thread.stop(5)

    run(scenario)


def test_cancelling_the_caller_frees_its_rows_and_nobody_elses() -> None:
    async def scenario() -> None:
        engine = FakeTranslator(max_rows=2)
        thread = EngineThread(engine, max_pending=8)
        hung_up = asyncio.create_task(thread.translate(requests("forever", "forever", "forever", prefix="x")))
        other = asyncio.create_task(thread.translate(requests("a b")))
        await eventually(lambda: len(engine.running) == 2)
        assert not other.done()  # both rows are taken
        hung_up.cancel()
        assert [t.text for t in await other] == ["A B"]
        assert sorted(engine.cancelled) == ["x0", "x1", "x2"]
        assert not engine.has_work
        assert thread.num_pending == 0
        with pytest.raises(asyncio.CancelledError):
            await hung_up
        thread.stop(5)

    run(scenario)


def test_cancel_takes_effect_within_one_step() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        thread = EngineThread(engine, max_pending=8)
        task = asyncio.create_task(thread.translate(requests("forever")))
        await eventually(lambda: engine.running)
        engine.gate.clear()
        await eventually(lambda: engine.is_held)
        task.cancel()
        await asyncio.wait([task])
        steps = engine.num_steps
        engine.gate.set()
        await eventually(lambda: thread.num_pending == 0)
        assert engine.num_steps <= steps + 1
        thread.stop(5)

    run(scenario)


def test_cancelled_before_admission_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        thread = EngineThread(engine, max_pending=8)
        engine.gate.clear()
        first = asyncio.create_task(thread.translate(requests("a", prefix="first")))
        await eventually(lambda: engine.is_held)  # it admits nobody before the next step
        second = asyncio.create_task(thread.translate(requests("b", prefix="second")))
        await eventually(lambda: thread.num_pending == 2)
        second.cancel()
        await asyncio.wait([second])
        engine.gate.set()
        await first
        await eventually(lambda: thread.num_pending == 0)
        assert engine.submitted == ["first0"]
        thread.stop(5)

    run(scenario)


def test_full_queue_is_refused_at_once_and_a_burst_over_the_engines_queue_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        engine = FakeTranslator(max_rows=1, max_waiting=3)
        thread = EngineThread(engine, max_pending=6)
        engine.gate.clear()
        running = asyncio.create_task(thread.translate(requests("a", prefix="a")))
        await eventually(lambda: engine.is_held)
        with pytest.raises(EngineFullError):  # by the thread's own count, while the engine is stuck in a step
            await thread.translate(requests(*"abcdef", prefix="b"))
        burst = asyncio.create_task(thread.translate(requests(*"abcde", prefix="c")))  # by the engine: 3 fit
        await eventually(lambda: thread.num_pending == 6)
        engine.gate.set()
        with pytest.raises(EngineFullError):
            await burst
        await running
        assert not engine.has_work
        assert thread.num_pending == 0
        assert [t.text for t in await thread.translate(requests("ok", prefix="d"))] == ["OK"]
        thread.stop(5)

    run(scenario)


def test_bad_request_is_named_and_its_job_mates_are_withdrawn() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        thread = EngineThread(engine, max_pending=8)
        with pytest.raises(RefusedError) as refused:
            await thread.translate(requests("forever", "word " * 21, "c"))
        assert (refused.value.index, refused.value.error.code) == (1, "source_too_long")
        assert engine.cancelled == ["r0"]
        assert not engine.has_work
        assert thread.num_pending == 0
        thread.stop(5)

    run(scenario)


def test_engine_fault_fails_everybody_and_the_health_check() -> None:
    async def scenario() -> None:
        died = threading.Event()
        engine = FakeTranslator(max_rows=8)
        thread = EngineThread(engine, max_pending=8, on_death=died.set)
        thread.check(stuck_after_s=60)
        mate = asyncio.create_task(thread.translate(requests("forever", prefix="mate")))
        await eventually(lambda: engine.running)
        with pytest.raises(EngineFailedError, match="device lost"):
            await thread.translate(requests("boom"))
        with pytest.raises(EngineFailedError, match="device lost"):
            await mate
        with pytest.raises(EngineDeadError):
            await thread.translate(requests("late comer"))
        with pytest.raises(EngineDeadError, match="device lost"):
            thread.check(stuck_after_s=60)
        await eventually(died.is_set)

    run(scenario)


def test_fault_inside_submit_stays_with_its_job() -> None:
    class Broken(FakeTranslator):
        def submit(self, request: TranslationRequest) -> None:
            if request.source_text == "bad":
                raise MemoryError("no room")
            super().submit(request)

    async def scenario() -> None:
        engine = Broken()
        thread = EngineThread(engine, max_pending=8)
        mate = asyncio.create_task(thread.translate(requests("a b c", prefix="mate")))
        with pytest.raises(EngineFailedError, match="no room"):
            await thread.translate(requests("good", "bad"))
        assert [t.text for t in await mate] == ["A B C"]
        assert [t.text for t in await thread.translate(requests("later"))] == ["LATER"]
        assert thread.num_pending == 0
        assert not engine.has_work
        thread.stop(5)

    run(scenario)


def test_a_fault_that_is_no_exception_hangs_nobody() -> None:
    class Panic(BaseException):
        """What a native library's panic derives from."""

    class Panicking(FakeTranslator):
        def step(self) -> list[Translation]:
            raise Panic("native code gave up")

    async def scenario() -> None:
        died = threading.Event()
        thread = EngineThread(Panicking(), max_pending=8, on_death=died.set)
        with pytest.raises(EngineFailedError, match="native code gave up"):
            await thread.translate(requests("a"))
        with pytest.raises(EngineDeadError):
            await thread.translate(requests("b"))
        assert await asyncio.to_thread(died.wait, 60)

    run(scenario)


def test_stuck_engine_fails_the_health_check_until_it_moves_again() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        thread = EngineThread(engine, max_pending=8)
        engine.gate.clear()
        task = asyncio.create_task(thread.translate(requests("a")))
        await eventually(lambda: engine.is_held)
        await asyncio.sleep(0.1)
        thread.check(stuck_after_s=600)
        with pytest.raises(EngineDeadError, match="in one step"):
            thread.check(stuck_after_s=0.01)
        engine.gate.set()
        await task
        await eventually(lambda: is_healthy(thread))
        thread.stop(5)

    run(scenario)


def is_healthy(thread: EngineThread) -> bool:
    try:
        thread.check(stuck_after_s=0.01)
    except EngineDeadError:
        return False
    return True


def test_sentence_after_sentence_failing_fails_the_health_check_one_poison_does_not() -> None:
    async def scenario() -> None:
        thread = EngineThread(FakeTranslator(), max_pending=8)
        for text, stays_healthy in (("error", True), ("a", True), ("error", False), ("a", True)):
            for i in range(1 if stays_healthy else MAX_FAULTS_IN_A_ROW):
                await thread.translate(requests(text, prefix=f"{i}-"))
            if stays_healthy:
                thread.check(stuck_after_s=600)
            else:
                with pytest.raises(EngineDeadError, match=f"the last {MAX_FAULTS_IN_A_ROW} sentences all failed"):
                    thread.check(stuck_after_s=600)
        thread.stop(5)

    run(scenario)


def test_stop_drains_what_was_accepted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        engine = FakeTranslator()
        engine.gate.clear()
        thread = EngineThread(engine, max_pending=8)
        accepted = asyncio.create_task(thread.translate(requests("a b c d e")))
        await eventually(lambda: engine.is_held)
        stopping = asyncio.create_task(asyncio.to_thread(thread.stop, 60))
        await eventually(lambda: thread._stopping)
        with pytest.raises(EngineDeadError, match="is stopping"):
            await thread.translate(requests("x", prefix="x"))
        engine.gate.set()
        assert (await accepted)[0].text == "A B C D E"
        assert await stopping is True

    run(scenario)


def test_stop_gives_up_what_does_not_finish_in_time() -> None:
    async def scenario() -> None:
        engine = FakeTranslator(step_s=0.001)
        thread = EngineThread(engine, max_pending=8)
        task = asyncio.create_task(thread.translate(requests("forever")))
        await eventually(lambda: engine.running)
        assert await asyncio.to_thread(thread.stop, 0.05) is False
        with pytest.raises(EngineFailedError, match="stopped"):
            await task

    run(scenario)
