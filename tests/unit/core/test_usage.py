"""Asking for token counts, and hiding them from a client that had not asked: all other bytes are kept."""

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core import usage
from torpor.core.usage import UsageHider, asks_for_usage, hidden_alike, refuses_usage, usage_edit

COUNTS = {"prompt_tokens": 7, "completion_tokens": 2}
"""What is masked in the last tests is one of: words, a number, a key, JSON's own marks, ends of lines."""


def event(
    *, ending: str = "\n\n", field: str = "data: ", separators: tuple[str, str] = (",", ":"), **fields: Any
) -> bytes:
    said = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": 'say "usage":null, {"usage": null}'}}]}
    return (field + json.dumps({**said, **fields}, separators=separators) + ending).encode()


def hidden(*pieces: bytes) -> bytes:
    hider = UsageHider()
    return b"".join([hider.feed(piece) for piece in pieces]) + hider.rest()


DONE = b"data: [DONE]\n\n"
ASKED = event(usage=None) + event(usage=None, obfuscation="x") + event(choices=[], usage=COUNTS) + DONE
UNASKED = event() + event(obfuscation="x") + DONE


def test_what_a_stream_has_only_because_it_was_asked_for_is_taken_out() -> None:
    assert hidden(ASKED) == UNASKED


@given(st.lists(st.integers(0, len(ASKED)), max_size=12))
def test_what_is_shown_does_not_depend_on_how_the_bytes_were_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(ASKED)]
    assert hidden(*(ASKED[start:end] for start, end in itertools.pairwise(places))) == UNASKED


@given(st.data())
def test_the_quick_look_sees_what_the_thorough_one_sees(data: st.DataObject) -> None:
    blank = st.sampled_from(["", " ", "  "])
    value = st.sampled_from(
        ["1", "-1.5e+3", "null", "true", '"x"', '"\\""', '"}"', '"usage\\""', "{}", '{"usage":null}', '[{"a":1}]']
    )
    members = data.draw(st.lists(st.tuples(st.sampled_from(["a", "b\\n", "}", "id"]), value), max_size=4))
    members.insert(data.draw(st.integers(0, len(members))), ("usage", data.draw(st.sampled_from(["null", "{}", "1"]))))
    spelled = [
        f'{data.draw(blank)}"{key}"{data.draw(blank)}:{data.draw(blank)}{what}{data.draw(blank)}'
        for key, what in members
    ]
    line = f"data:{data.draw(blank)}{{{','.join(spelled)}}}{data.draw(blank)}\n".encode()
    thorough = re.compile(rb"(?!)")
    quick = hidden(line)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(usage, "_CLEAR_NULL", thorough)
        assert hidden(line) == quick


@pytest.mark.parametrize("ending", ["\n", "\r\n\r\n", "\n\n"])
@pytest.mark.parametrize("field", ["data:", "data: "])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
def test_every_spelling_of_a_stream_is_understood(ending: str, field: str, separators: tuple[str, str]) -> None:
    spelled: dict[str, Any] = {"ending": ending, "field": field, "separators": separators}
    stream = event(**spelled, usage=None) + event(**spelled, choices=[], usage=COUNTS) + event(**spelled, model="m")
    assert hidden(stream) == event(**spelled) + event(**spelled, model="m")


def test_a_null_is_taken_out_wherever_it_stands() -> None:
    assert hidden(b'data: {"usage": null, "id": 1}\n\n') == b'data: {"id": 1}\n\n'
    assert (
        hidden(b'data: {"id": 1, "usage": null, "m": {"usage": null}}\n\n')
        == b'data: {"id": 1, "m": {"usage": null}}\n\n'
    )
    assert hidden(b'data: {"usage": null}\n\n') == b"data: {}\n\n"
    assert hidden(b'data: { "id": 1 , "usage": null }\n\n') == b'data: { "id": 1 }\n\n'


@pytest.mark.parametrize(
    "stream",
    [
        event(usage=COUNTS),  # Providers that count with the last words do so unasked.
        event(choices=[], prompt_filter_results=[]),
        b'data: {"usage":null,"usage":null}\n\n',
        b'data: {"choices":[],"usage":{}\n\n',
        b': "usage":null\n\nevent: usage\n\n',
        b'data: "usage"\n\ndata: ["usage"]\n\n',
        b"\n\n\n",
        b'data: {"choices":[{"usage":null}]}',
        b'data:"usage":null}\n\n',
    ],
)
def test_everything_else_is_shown_as_it_is(stream: bytes) -> None:
    assert hidden(stream) == stream
    assert hidden(*(stream[at : at + 1] for at in range(len(stream)))) == stream


def test_a_line_is_shown_when_it_is_whole_and_one_without_an_end_is_not_kept_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(usage, "LINE_BYTES_MAX", 100)
    hider = UsageHider()
    assert hider.feed(b'data: {"usage"') == b""
    assert hider.feed(b":null}\n") == b"data: {}\n"
    long = b'data: {"usage":null,"x":"' + b"x" * 100
    assert hider.feed(long) == long
    assert hider.feed(b'"}\ndata: {"usage":null}\n') == b'"}\ndata: {}\n'
    assert hidden(long + b'"}\n') == long + b'"}\n'


BODY = b' {"model": "m", "stream" :true, "n": 1.0, "messages": [{"stream_options": null}]%s}'


@pytest.mark.parametrize(
    ("said", "asking"),
    [
        (b"", BODY.replace(b"{", b'{"stream_options":{"include_usage":true},', 1) % b""),
        (b', "stream_options" : null', BODY % b', "stream_options" : {"include_usage": true}'),
        (
            b', "stream_options": {"include_obfuscation": false}, "x": 1',
            BODY % b', "stream_options": {"include_obfuscation": false, "include_usage": true}, "x": 1',
        ),
        (b', "stream_options": {"include_usage":false}', BODY % b', "stream_options": {"include_usage": true}'),
        (b', "stream_options": "all"', None),
        (b', "stream_options": {}, "stream_options": {}', None),
    ],
)
def test_asking_changes_nothing_else_in_a_request(said: bytes, asking: bytes | None) -> None:
    body = BODY % said
    value = json.loads(body)
    edit = usage_edit(body, value.get("stream_options"), said="stream_options" in value)
    assert (None if edit is None else edit.of(body)) == asking
    if asking is not None:
        assert asks_for_usage(json.loads(asking)["stream_options"])
        assert not asks_for_usage(value.get("stream_options"))


def test_only_a_refusal_that_names_the_option_is_one_of_it() -> None:
    assert refuses_usage(400, b'{"error": {"message": "Unrecognized request argument: stream_options"}}')
    assert refuses_usage(422, b'{"detail": [{"loc": ["body", "stream_options"]}]}')
    assert not refuses_usage(400, b'{"error": {"message": "messages is too long"}}')
    assert not refuses_usage(500, b"stream_options")


PATTERNS = [
    rb"usage",
    rb"null",
    rb"\d",
    rb"[{}]",
    rb'"',
    rb"\n",
    rb"say",
    rb"choices",
    rb"data",
    rb"(?s).+",
    rb"usage.*\n",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "stream",
    [
        ASKED,
        ASKED.replace(b"\n", b"\r\n"),
        ASKED[:-2],
        event(usage=None, ending=""),
        b'data:"usage":null}\ndata:{"usage":null}\n',
    ],
)
def test_a_mask_hides_as_much_as_there_was_before(pattern: bytes, stream: bytes) -> None:
    masked = re.sub(pattern, lambda match: b"*" * len(match[0]), stream)
    alike = hidden_alike(stream, masked)
    assert len(alike) == len(stream)
    # A half delivered stream goes on at its offset: up to the end of every line as many bytes are shown.
    for end in (place.end() for place in re.finditer(rb"\n|\Z", stream)):
        assert len(hidden(alike[:end])) == len(hidden(stream[:end])), (pattern, alike)
    # And nothing comes back that was masked, but for the fixed words of what is hidden.
    secret = re.findall(rb"say|chatcmpl", masked)
    assert len(re.findall(rb"say|chatcmpl", alike)) <= len(secret)


def test_a_mask_that_changes_nothing_hidden_is_left_alone() -> None:
    masked = ASKED.replace(b"say", b"***").replace(b"chatcmpl", b"********")
    assert hidden_alike(ASKED, masked) == masked
