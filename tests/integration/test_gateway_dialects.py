"""OpenAI Responses and Gemini behind the gateway: the providers' SDKs, kept answers, and every shape for a retry."""

import asyncio
import json
import re
from pathlib import Path

import openai
import pytest
from google import genai
from google.genai import types
from tests.integration.gateway_stage import REAL_KEY, Stage, gateway_stage, http_request
from tests.integration.test_gateway import body_of, client, status_of
from tests.integration.test_gateway_restart import redo_everything

from torpor.config import FAKE_KEY
from torpor.core.call import CallState
from torpor.core.events import Kind
from torpor.testing.model_scripts import coding

GENERATE, STREAM = "/v1beta/models/m:generateContent", "/v1beta/models/m:streamGenerateContent"
NONCE = re.compile(rb"n[0-9]+x[0-9a-f]{8,}")
CONTENTS = json.dumps({"contents": [{"role": "user", "parts": [{"text": "go on"}]}]}).encode()


def openai_client(stage: Stage) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=FAKE_KEY, max_retries=0)


def gemini_client(stage: Stage) -> genai.Client:
    return genai.Client(api_key=FAKE_KEY, http_options=types.HttpOptions(base_url=stage.url))


async def test_the_openai_sdk_asks_for_responses_whole_and_streamed(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node, openai_client(stage) as asking:
        whole = await asking.responses.create(model="m", input="go on")
        assert "attempt 1" in whole.output_text
        async with asking.responses.stream(model="m", input="go on") as stream:
            assert "attempt 2" in (await stream.get_final_response()).output_text
        counted = await asking.responses.input_tokens.count(model="m", input="go on")
        assert counted.input_tokens > 0
        compacted = await asking.responses.compact(model="m", input="go on")
        assert compacted.output[0].type == "compaction"
        calls = await node.calls()
        assert [call.state for call in calls] == [CallState.ANSWERED] * 4
        assert [call.is_llm for call in calls] == [True, True, False, True]
        assert {call.dialect for call in calls} == {"openai_responses"}
        assert calls[1].usage["output_tokens"] > 0
        assert len(stage.on_call.calls) == 3
        completed = await node.events(Kind.CALL_COMPLETED)
        assert completed[0].data["response_id"] == whole.id
        assert {event.data["upstream"] for event in completed} == {"openai"}


async def test_a_kept_answer_is_read_streamed_again_cancelled_and_deleted(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node, openai_client(stage) as asking:
        receipt = await asking.responses.create(model="m", input="go on", background=True)
        assert receipt.status == "queued"
        looks = [await asking.responses.retrieve(receipt.id) for _ in range(2)]
        assert [look.status for look in looks] == ["in_progress", "completed"]
        stream = await asking.responses.retrieve(receipt.id, stream=True, starting_after=2)
        numbers = [event.sequence_number async for event in stream]
        assert numbers[0] == 3 and numbers == sorted(numbers)
        assert (await asking.responses.input_items.list(receipt.id)).data == []
        assert (await asking.responses.cancel(receipt.id)).status == "cancelled"
        await asking.responses.delete(receipt.id)
        with pytest.raises(openai.NotFoundError):
            await asking.responses.retrieve(receipt.id)
        calls = await node.calls()
        assert [call.is_llm for call in calls] == [True] + [False] * 7
        # Only asking costs: what is read again repeats a usage that was counted, or will be.
        assert [call.usage for call in calls[1:]] == [{}] * 7
        assert stage.model.witness.requests == 1
        assert len(stage.on_call.calls) == 1


async def test_a_kept_answer_that_stops_in_the_middle_is_broken_off(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node, openai_client(stage) as asking:
        kept = await asking.responses.create(model="m", input="go on")
        request = http_request(f"/v1/responses/{kept.id}?stream=true", b"", {"x-torpor-fault": "cut_mid"}, method="GET")
        with pytest.raises(ConnectionResetError):
            await stage.raw(request)
        assert (await node.calls())[-1].state is CallState.FAILED


async def test_the_google_sdk_asks_whole_and_streamed(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node, gemini_client(stage).aio as asking:
        whole = await asking.models.generate_content(model="gemini-x", contents="go on")
        assert "attempt 1" in (whole.text or "")
        pieces = [
            piece.text or ""
            async for piece in await asking.models.generate_content_stream(model="gemini-x", contents="go on")
        ]
        assert "attempt 2" in "".join(pieces) and len(pieces) > 2
        counted = await asking.models.count_tokens(model="gemini-x", contents="go on")
        assert counted.total_tokens
        assert [model.name async for model in await asking.models.list()]
        calls = await node.calls()
        assert [call.state for call in calls] == [CallState.ANSWERED] * 4
        assert [call.is_llm for call in calls] == [True, True, False, False]
        assert [call.model for call in calls] == ["gemini-x"] * 3 + [None]
        assert calls[0].usage["input_tokens"] > 0
        assert all(request.credential == REAL_KEY for request in stage.model.requests)


GEMINI_AGENT = """
from google import genai
from google.genai import types
client = genai.Client()
functions = [types.FunctionDeclaration(name=name) for name in ("run_shell", "write_file")]
config = types.GenerateContentConfig(tools=[types.Tool(function_declarations=functions)])
contents = [types.Content(role="user", parts=[types.Part(text="do the task")])]
turns = 0
while True:
    answer = client.models.generate_content(model="m", contents=contents, config=config)
    if not answer.function_calls:
        print(turns, answer.text)
        break
    turns += 1
    contents.append(answer.candidates[0].content)
    parts = [types.Part.from_function_response(name=c.name, response={"ok": 1}) for c in answer.function_calls]
    contents.append(types.Content(role="user", parts=parts))
"""
RESPONSES_AGENT = """
import openai
client = openai.OpenAI()
items = [{"role": "user", "content": "do the task"}]
tools = [{"type": "function", "name": n, "parameters": {"type": "object"}} for n in ("run_shell", "write_file")]
turns = 0
while True:
    with client.responses.stream(model="m", input=items, tools=tools, store=False) as stream:
        response = stream.get_final_response()
    calls = [item for item in response.output if item.type == "function_call"]
    if not calls:
        print(turns, response.output_text)
        break
    turns += 1
    items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "ok"} for call in calls]
"""


@pytest.mark.parametrize("program", [GEMINI_AGENT, RESPONSES_AGENT], ids=["gemini", "responses"])
async def test_an_agent_finds_its_endpoint_in_its_environment_and_does_its_task(tmp_path: Path, program: str) -> None:
    async with gateway_stage(tmp_path, script=coding(4)) as stage, stage.node() as node:
        said = await stage.output(program)
        assert said.startswith("4 The task is done after 4 steps")
        assert [call.state for call in await node.calls()] == [CallState.ANSWERED] * 5
        assert stage.model.witness.requests == 5


ADDRESSES = {"message": GENERATE, "events": f"{STREAM}?alt=sse", "array": STREAM}


@pytest.mark.parametrize(("first", "then"), [(a, b) for a in ADDRESSES for b in ADDRESSES if a != b])
async def test_a_retry_of_geminis_in_another_shape_gets_the_same_answer(tmp_path: Path, first: str, then: str) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request(ADDRESSES[first], CONTENTS)):
            await node.logged(Kind.CALL_COMPLETED)
        stage.on_call.gate.set()
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(ADDRESSES[then], CONTENTS, {"x-goog-api-key": "other"}))
        assert status_of(received) == 200
        body = body_of(received)
        if then == "events":
            assert body.startswith(b"data: {")
        else:
            assert isinstance(json.loads(body), list if then == "array" else dict)
        assert b"Hello, this" in body
        assert stage.model.witness.requests == 1
        assert len(await node.calls()) == 1


@pytest.mark.parametrize("first_streams", [True, False])
async def test_a_retry_of_responses_in_the_other_shape_gets_the_same_answer(
    tmp_path: Path, *, first_streams: bool
) -> None:
    def body(*, stream: bool) -> bytes:
        return json.dumps({"model": "m", "input": "go on"} | ({"stream": True} if stream else {})).encode()

    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        async with client(stage, http_request("/v1/responses", body(stream=first_streams))):
            await node.logged(Kind.CALL_COMPLETED)
        stage.on_call.gate.set()
        await node.logged(Kind.CALL_DELIVERED)
        received = body_of(await stage.raw(http_request("/v1/responses", body(stream=not first_streams))))
        if first_streams:
            assert json.loads(received)["status"] == "completed"
        else:
            assert received.startswith(b"event: response.created\n")
            assert b"event: response.completed\n" in received
        assert stage.model.witness.requests == 1


async def test_codex_repeats_one_call_with_other_keys_and_other_time_stamps(tmp_path: Path) -> None:
    """Six bodies, one call: each retry of a cut stream has another order of keys, also within strings of JSON."""

    def body(attempt: int) -> bytes:
        turn = {"turn_id": "t", "turn_started_at_unix_ms": 1000 + attempt, "a": {"b": 1, "c": 2}}
        metadata = {"x-codex-turn-metadata": json.dumps(turn if attempt % 2 else dict(reversed(turn.items())))}
        fields = {"model": "m", "input": "go on", "stream": True, "store": False, "client_metadata": metadata}
        names = sorted(fields)
        names = names[attempt % 5 :] + names[: attempt % 5]
        return json.dumps({name: fields[name] for name in names}).encode()

    bodies = [body(attempt) for attempt in range(6)]
    assert len(set(bodies)) == 6
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        for number, sent in enumerate(bodies[:-1], start=1):
            async with client(stage, http_request("/v1/responses", sent)):
                await node.logged(Kind.CALL_INTENDED if number == 1 else Kind.CALL_JOINED, max(1, number - 1))
        stage.on_call.gate.set()
        received = await stage.raw(http_request("/v1/responses", bodies[-1]))
        assert received == await node.logged_response((await node.calls())[0])
        assert stage.model.witness.requests == 1


EVERY_LLM = pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/messages", "/v1/responses", f"{STREAM}?alt=sse"],
    ids=["chat", "messages", "responses", "gemini"],
)


async def at_once(stage: Stage, requests: list[bytes]) -> list[bytes]:
    """What parallel clients of one agent get, in the order of their requests."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stage.raw(request)) for request in requests]
    return [task.result() for task in tasks]


@EVERY_LLM
async def test_best_of_five_is_five_calls_and_none_after_a_restore(tmp_path: Path, path: str) -> None:
    """Each is repeated once, first in first out: the answers of the second life are those of the first."""
    request = http_request(path, json.dumps({"model": "m", "stream": True}).encode())
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            assert len(set(await at_once(stage, [request] * 5))) == 5
            await node.logged(Kind.CALL_DELIVERED, 5)
            in_order = [await node.logged_response(call) for call in await node.calls()]
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            assert [await stage.raw(request) for _ in range(3)] == in_order[:3]
            assert sorted(await at_once(stage, [request] * 2)) == sorted(in_order[3:])
            assert stage.model.witness.requests == 5
            assert status_of(await stage.raw(request)) == 200
            assert stage.model.witness.requests == 6


@EVERY_LLM
async def test_parallel_calls_get_their_own_answers_whatever_the_order_of_their_return(
    tmp_path: Path, path: str
) -> None:
    """As sub-agents do, and with other spellings and another shape: one in three asks without streaming."""

    def ask(number: int, *, again: bool) -> bytes:
        whole = again and number % 3 == 0
        fields = {"model": "m", "max_tokens": number, "contents": []}
        if not whole and path.startswith("/v1/"):
            fields["stream"] = True
        where = path.replace(f"{STREAM}?alt=sse", GENERATE) if whole else path
        return http_request(where, json.dumps(dict(sorted(fields.items(), reverse=again))).encode())

    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            first = await at_once(stage, [ask(number, again=False) for number in range(6)])
            await node.logged(Kind.CALL_DELIVERED, 6)
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            order = [4, 3, 0, 5, 1, 2]
            again = await at_once(stage, [ask(number, again=True) for number in order])
            for number, received in zip(order, again, strict=True):
                if number % 3:
                    assert received == first[number]
                else:
                    [nonce] = set(NONCE.findall(first[number])) & set(NONCE.findall(received))
                    assert nonce
                    assert b"text/event-stream" not in received
            assert len(await node.events(Kind.CALL_REPEATED)) == 6
            assert await node.events(Kind.CALL_DIVERGED) == []
            assert stage.model.witness.requests == 6
