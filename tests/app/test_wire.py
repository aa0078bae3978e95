"""The JSON form of calls and replies: whatever goes in comes out equal, and what nobody packed is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.wire import (
    Busy,
    Failed,
    Refused,
    Translated,
    TranslateReply,
    from_line,
    pack_reply,
    pack_requests,
    to_line,
    unpack_reply,
    unpack_requests,
)
from engine.types import FinishReason, Hypothesis, RequestError, SearchOptions, Timings, Translation, TranslationRequest

texts = st.text(st.characters(), max_size=20)  # half surrogate pairs and line breaks included
numbers = st.floats(allow_nan=False)
searches = st.builds(
    SearchOptions,
    beam_size=st.just(8),
    length_penalty=st.floats(-10, 10),
    early_stopping=st.sampled_from([True, False, "never"]),
    max_target_tokens=st.none() | st.integers(1, 500),
    no_repeat_ngram_size=st.integers(0, 16),
    num_hypotheses=st.integers(1, 8),
)
requests = st.lists(
    st.builds(
        TranslationRequest,
        request_id=texts,
        source_text=texts,
        src_lang=texts,
        tgt_lang=texts,
        search=searches,
        arrived_at_s=numbers,
        time_budget_s=st.none() | numbers,
    ),
    max_size=4,
)
translations = st.builds(
    Translation,
    request_id=st.just(""),
    hypotheses=st.lists(
        st.builds(Hypothesis, text=texts, target_token_ids=st.lists(st.integers(0, 300_000)).map(tuple), score=numbers),
        max_size=3,
    ).map(tuple),
    num_source_tokens=st.integers(0, 1000),
    finish_reason=st.sampled_from(FinishReason),
    timings=st.builds(Timings, numbers, numbers, numbers),
    error=st.none() | texts,
)


def there_and_back(value: Any) -> Any:
    line = to_line("x", value)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    kind, received = from_line(line[:-1])
    assert kind == "x"
    return received


@given(requests)
def test_calls_survive(calls: list[TranslationRequest]) -> None:
    assert unpack_requests(there_and_back(pack_requests(calls))) == calls


@given(st.lists(translations, max_size=3))
def test_translations_survive_and_get_the_ids_of_their_requests(results: list[Translation]) -> None:
    calls = [TranslationRequest(f"r{i}", "", "", "") for i in range(len(results))]
    reply = unpack_reply(there_and_back(pack_reply(Translated(tuple(results)))), calls)
    assert isinstance(reply, Translated)
    assert [t.request_id for t in reply.translations] == [call.request_id for call in calls]
    for received, sent in zip(reply.translations, results, strict=True):
        assert (received.hypotheses, received.timings, received.error) == (sent.hypotheses, sent.timings, sent.error)
        assert (received.num_source_tokens, received.finish_reason) == (sent.num_source_tokens, sent.finish_reason)


@pytest.mark.parametrize("reply", [Busy(), Refused(3, "empty_text", 'line "3"\n'), Failed("it broke")])
def test_other_replies_survive(reply: TranslateReply) -> None:
    assert unpack_reply(there_and_back(pack_reply(reply)), []) == reply


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"3", b"\xff", b"[1"])
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # JSONDecodeError and UnicodeDecodeError are such
        from_line(line)


@pytest.mark.parametrize("packed", [["hello"], ["translated", []], ["busy", 1], ["refused", 1], []])
def test_a_reply_that_nobody_packed_is_refused(packed: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        unpack_reply(packed, [TranslationRequest("r", "", "", "")])


def test_a_call_with_options_out_of_range_is_refused() -> None:
    (packed,) = pack_requests([TranslationRequest("r", "a", "b", "c")])
    with pytest.raises(RequestError):
        unpack_requests([(*packed[:-1], (9, *packed[-1][1:]))])
    with pytest.raises(ValueError, match="unpack"):
        unpack_requests([packed[:-1]])
