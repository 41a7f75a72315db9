"""Feeds the gateway's readers with bytes that a hostile agent, or a broken provider, might send (atheris).

    python scripts/fuzz_gateway.py [SECONDS]

What must hold: nothing but the errors that are meant comes out, a request means the same however it is cut, and what
was understood once can be understood from the log again. A finding ends the run with the input that made it.
"""

import asyncio
import itertools
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

try:
    import atheris
except ImportError:
    print("fuzz: skipped, atheris is not installed here (pip install atheris)")
    sys.exit(0)

with atheris.instrument_imports(include=["torpor", "h11"]):
    from torpor.core.match import request_key
    from torpor.core.usage import UsageHider, hidden_alike, usage_edit
    from torpor.gateway import agent_api, mcp
    from torpor.gateway.admission import LocalAnswer, admit
    from torpor.gateway.answer import AnswerReader
    from torpor.gateway.dialects import DIALECTS
    from torpor.gateway.dialects.base import Shape
    from torpor.gateway.dialects.sse import EventSplitter, json_object
    from torpor.gateway.intake import Intake, from_log, take_in
    from torpor.gateway.request import Request, RequestLine, Room
    from torpor.gateway.reshape import reshaped
    from torpor.gateway.routing import Destination, Routing
    from torpor.gateway.telling import with_note

from torpor.core.call import ResponseHead, response_bytes

PORT = 4100
NOWHERE = Routing(())
QUESTION = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "{}"}], "system": []}'
SEEDS = (
    QUESTION,
    b"content-length: %d\r\ncontent-encoding: gzip\r\n\r\n" % len(QUESTION) + QUESTION,
    b"transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n5d\r\n" + QUESTION + b"\r\n0\r\n\r\n",
    b"POST /v1/models/a HTTP/1.0\r\nupgrade: websocket\r\n\r\n",
    b'{"text": "a"}',
    b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "torpor_note", "arguments": {}}}',
    b'{"id": "a", "type": "message", "content": [{"type": "text", "text": "a"}], "usage": {"input_tokens": 1}}',
    b'{"choices": [{"index": 0, "message": {"content": "a", "tool_calls": [{"function": {}}]}}], "usage": {}}',
    (
        b'event: message_start\ndata: {"type": "message_start", "message": {"content": []}}\n\n'
        b'data: {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use"}}\r\n\r\n'
        b'data: {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta"}}\n\n'
    ),
    b'data: {"choices": [{"index": 0, "delta": {"content": "a", "tool_calls": [{"index": 0}]}}]}\n\ndata: [DONE]\n\n',
    b'data: {"usage": null, "id": "}"}\n\ndata: {"id": 1, "usage":null}\n\ndata: {"choices":[],"usage":{}}\n\n',
    b'{"stream": true, "a": [{"stream_options": 1}], "stream_options": {"b": 1} , "c": "\\""}',
)
HEADS = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
    b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nanthropic-version: 1\r\n",
    b"POST /torpor/v1/notes HTTP/1.1\r\nhost: x\r\n",
    b"POST /mcp HTTP/1.1\r\nhost: x\r\n",
    b"",
)


class Pieces:
    """What `take_in` needs of a stream."""

    port = PORT

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    async def receive(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def send(self, offset: int, _data: bytes) -> None:
        assert offset == 0


def read(pieces: list[bytes]) -> object:
    async def work() -> Intake | LocalAnswer | None:
        async with AsyncExitStack() as reserved:
            return await take_in(Pieces([piece for piece in pieces if piece]), NOWHERE, Room(), reserved)

    found = asyncio.run(work())
    if isinstance(found, Intake):
        again = from_log(
            found.head,
            found.request.body,
            NOWHERE,
            dialect=found.destination.dialect.name,
            is_llm=found.destination.route.is_llm,
        )
        assert (again.key, again.head) == (found.key, found.head), "the log's request is another one"
        assert b"\r" not in found.request.line.target.encode("latin-1")
        assert not any("\r" in value or "\n" in value for _, value in found.request.line.headers)
        return found.key, found.head, found.request.body
    if isinstance(found, LocalAnswer):
        raw = response_bytes(found.head, [found.body], finished=True)
        assert all("\r" not in value and "\n" not in value for _, value in found.head.headers)
        return raw
    return found


def fuzz_request(data: atheris.FuzzedDataProvider) -> None:
    whole = data.PickValueInList(list(HEADS)) + data.ConsumeBytes(4096)
    cut = data.ConsumeIntInRange(0, len(whole))
    assert read([whole]) == read([whole[:cut], whole[cut:]]), "a request depends on its pieces"


def fuzz_answer(data: atheris.FuzzedDataProvider) -> None:
    dialect = data.PickValueInList(list(DIALECTS))
    kind = data.PickValueInList(["application/json", "text/event-stream", "text/plain"])
    encoding = data.PickValueInList(["identity", "gzip", "deflate", "br"])
    status = data.PickValueInList([200, 500])
    headers = {"content-type": kind, "content-encoding": encoding}
    reader = AnswerReader(dialect, status=status, headers=headers, is_llm=data.ConsumeBool())
    body = data.ConsumeBytes(4096)
    cut = data.ConsumeIntInRange(0, len(body))
    reader.feed(body[:cut])
    reader.feed(body[cut:])
    assert isinstance(reader.complete(), bool)
    splitter = EventSplitter()
    assert EventSplitter().feed(body) == [*splitter.feed(body[:cut]), *splitter.feed(body[cut:])]
    assert hidden(body) == hidden(body[:cut], body[cut:]), "what is hidden depends on the pieces"
    masked = hidden_alike(body, body[:cut] + b"*" * len(body[cut:]))
    assert (len(masked), len(hidden(masked))) == (len(body), len(hidden(body))), "a mask hides another length"
    head = ResponseHead(status=200, reason="OK", headers=(("content-type", kind),))
    for shape in Shape:
        reshaped(dialect, shape, head, [body[:cut], body[cut:]])
    json_object(body)


def hidden(*pieces: bytes) -> bytes:
    hider = UsageHider()
    return b"".join([hider.feed(piece) for piece in pieces]) + hider.rest()


def fuzz_own(data: atheris.FuzzedDataProvider) -> None:
    rule = data.PickValueInList([*agent_api.RULES, None])
    line = RequestLine(
        method="POST" if rule is None else rule.method,
        target=mcp.PATH if rule is None else rule.path,
        http_version="1.1",
        headers=(("origin", data.ConsumeUnicodeNoSurrogates(40)),),
        continued=False,
    )
    body = data.ConsumeBytes(4096)
    request = Request(line=line, body=body, length=len(body))
    try:
        agent_api.check_origin(line)
        found = (mcp if rule is None else agent_api).read_wish(request, body)
    except agent_api.Refused as refused:
        found = refused.reply
    if isinstance(found, agent_api.Reply):
        agent_api.json_bytes(found.body)


def fuzz_match(data: atheris.FuzzedDataProvider) -> None:
    dialect = data.PickValueInList([dialect.name for dialect in DIALECTS])
    body = data.ConsumeBytes(4096)
    request_key(dialect=dialect, method="POST", target="/v1/x", headers=(("content-type", "a"),), body=body)
    note = data.ConsumeUnicode(40)
    told = with_note(dialect, body, note)
    assert told is None or json_object(told) is not None
    said = json_object(body)
    if said:
        edit = usage_edit(body, said.get("stream_options"), said="stream_options" in said)
        asking = None if edit is None else json_object(edit.of(body))
        assert edit is None or (asking is not None and asking["stream_options"]["include_usage"] is True)
        assert asking is None or asking == {**said, "stream_options": asking["stream_options"]}


def fuzz_line(data: atheris.FuzzedDataProvider) -> None:
    target = data.ConsumeUnicodeNoSurrogates(200)
    line = RequestLine(
        method=data.PickValueInList(["GET", "POST", "HEAD", "X"]),
        target=target,
        http_version=data.PickValueInList(["1.0", "1.1", "2.0"]),
        headers=((data.ConsumeUnicodeNoSurrogates(20), data.ConsumeUnicodeNoSurrogates(40)),),
        continued=data.ConsumeBool(),
    )
    found = admit(line, data.PickValueInList([PORT, 4101]), NOWHERE)
    if isinstance(found, Destination):
        assert target.startswith("/")
        assert not target.startswith("//")
        assert ".." not in found.route.path.split("/") or found.dialect.family is None


TARGETS = (fuzz_request, fuzz_answer, fuzz_own, fuzz_match, fuzz_line)


def one(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    TARGETS[data.ConsumeIntInRange(0, len(TARGETS) - 1)](data)


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as corpus:
        for number, (target, payload) in enumerate(itertools.product(range(len(TARGETS)), SEEDS)):
            # Numbers are taken from the end: the target first, then zeros.
            Path(corpus, str(number)).write_bytes(payload + bytes(16) + bytes([target]))
        options = [f"-max_total_time={seconds}", "-max_len=4200", "-len_control=0", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], corpus, *options, f"-artifact_prefix={tempfile.gettempdir()}/torpor-fuzz-"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
