"""The scripted model speaks the real wire formats, counts every request, and fails in every way it promises."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try, coding, leaky, plain
from torpor.testing.model_server import ModelServer, serve_model
from torpor.testing.model_witness import read_witness

QUESTION = [{"role": "user", "content": "go on"}]
OPENAI_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("run_shell", "write_file", "start_process", "query_sqlite")
]
ANTHROPIC_TOOLS = [{"name": tool["function"]["name"], "input_schema": {"type": "object"}} for tool in OPENAI_TOOLS]


def openai_client(server: ModelServer, *, retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=retries)


def anthropic_client(server: ModelServer, *, retries: int = 0) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=retries)


async def test_the_openai_sdk_reads_a_whole_answer_and_a_streamed_one() -> None:
    async with serve_model(script=plain) as server, openai_client(server) as client:
        whole = await client.chat.completions.create(model="m", messages=QUESTION)
        assert "attempt 1" in (whole.choices[0].message.content or "")
        assert whole.usage and whole.usage.prompt_tokens > 0
        text, usage = "", None
        stream = await client.chat.completions.create(
            model="m", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert "attempt 2" in text
        assert usage and usage.completion_tokens > 0


async def test_a_streamed_completion_counts_tokens_only_if_it_is_asked_to() -> None:
    """As OpenAI has it: one more chunk before the end, without choices, and a null in every other."""
    body = {"model": "m", "messages": QUESTION, "stream": True}
    async with serve_model(script=plain) as server, httpx.AsyncClient(base_url=server.url) as client:

        async def chunks(**more: object) -> list[dict[str, Any]]:
            answer = await client.post("/v1/chat/completions", json=body | more)
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert lines.pop() == "[DONE]"
            return [json.loads(line) for line in lines]

        assert not any("usage" in chunk for chunk in await chunks())
        *others, last = await chunks(stream_options={"include_usage": True})
        assert [chunk["usage"] for chunk in others] == [None] * len(others)
        assert all(chunk["choices"] for chunk in others)
        assert last["choices"] == [] and last["usage"]["total_tokens"] > 0


async def test_the_anthropic_sdk_reads_a_whole_answer_and_a_streamed_one() -> None:
    async with serve_model(script=plain) as server, anthropic_client(server) as client:
        whole = await client.messages.create(model="m", max_tokens=9, messages=QUESTION)
        assert whole.content[0].type == "text" and "attempt 1" in whole.content[0].text
        async with client.messages.stream(model="m", max_tokens=9, messages=QUESTION) as stream:
            message = await stream.get_final_message()
        assert message.content[0].type == "text" and "attempt 2" in message.content[0].text
        assert message.stop_reason == "end_turn"


async def test_the_coding_task_ends_after_its_turns_with_openai_tools() -> None:
    async with serve_model(script=coding(6)) as server, openai_client(server) as client:
        messages: list = list(QUESTION)
        for _ in range(6):
            async with client.chat.completions.stream(model="m", messages=messages, tools=OPENAI_TOOLS) as stream:
                message = (await stream.get_final_completion()).choices[0].message
            assert message.tool_calls
            messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
            for call in message.tool_calls:
                assert isinstance(json.loads(call.function.arguments), dict)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "ok"})
        last = await client.chat.completions.create(model="m", messages=messages, tools=OPENAI_TOOLS)
        assert last.choices[0].finish_reason == "stop"
        assert "done after 6 steps" in (last.choices[0].message.content or "")


async def test_the_coding_task_ends_after_its_turns_with_anthropic_tools() -> None:
    async with serve_model(script=coding(6)) as server, anthropic_client(server) as client:
        messages: list = list(QUESTION)
        for turn in range(7):
            async with client.messages.stream(
                model="m", max_tokens=9, messages=messages, tools=ANTHROPIC_TOOLS
            ) as stream:
                message = await stream.get_final_message()
            uses = [block for block in message.content if block.type == "tool_use"]
            messages.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
            results = [{"type": "tool_result", "tool_use_id": use.id, "content": "ok"} for use in uses]
            messages.append({"role": "user", "content": results})
            assert message.stop_reason == ("tool_use" if turn < 6 else "end_turn")


async def test_small_requests_are_answered_and_not_counted() -> None:
    async with serve_model(script=plain) as server:
        async with openai_client(server) as client:
            assert [model.id async for model in client.models.list()]
        async with anthropic_client(server) as client:
            assert [model.id async for model in client.models.list()]
            count = await client.messages.count_tokens(model="m", messages=QUESTION)
            assert count.input_tokens > 0
        assert server.witness.requests == 0


async def test_a_wrong_key_is_refused_and_the_right_one_can_leak() -> None:
    async with serve_model(script=leaky, key="right") as server:
        wrong = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        right = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0)
        async with wrong, right:
            with pytest.raises(openai.AuthenticationError, match="wrong"):
                await wrong.chat.completions.create(model="m", messages=QUESTION)
            answer = await right.chat.completions.create(model="m", messages=QUESTION)
        assert "key right end" in (answer.choices[0].message.content or "")


BEFORE_HEAD = {Fault.DROP, Fault.RESET_BEFORE_HEAD, Fault.GARBAGE}
TRANSPORT = {Fault.RESET_AFTER_HEAD, Fault.RESET_MID, Fault.CLOSE_MID}
STATUSES = {Fault.STATUS_500: 500, Fault.STATUS_429: 429, Fault.STATUS_529: 529, Fault.UNKNOWN_OPTION: 400}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("fault", sorted(set(Fault) - {Fault.SLOW, Fault.SILENT}))
async def test_each_fault_breaks_an_answer_in_its_own_way(fault: Fault, path: str, *, stream: bool) -> None:
    body = {"model": "m", "messages": QUESTION, "stream": stream, "max_tokens": 9}
    terminal = b"[DONE]" if path.endswith("completions") else b'"message_stop"'
    async with serve_model(script=plain) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = {"x-torpor-fault": fault.value}
        received, failure, status = b"", None, None
        try:
            async with client.stream("POST", path, json=body, headers=headers) as response:
                status = response.status_code
                async for data in response.aiter_raw():
                    received += data
        except httpx.TransportError as error:
            failure = error
        assert (status is None) == (fault in BEFORE_HEAD)
        assert (failure is not None) == (fault in BEFORE_HEAD | TRANSPORT)
        assert (status or 200) == STATUSES.get(fault, 200)
        assert terminal not in received
        outcomes = [entry["tries"][0]["outcome"] for entry in server.witness.report()["requests"]]
        assert outcomes == [fault.value]


async def test_a_silent_model_says_nothing_until_the_client_leaves() -> None:
    async with serve_model(script=plain) as server, openai_client(server) as client:
        server.faults.add(FaultRule(fault=Fault.SILENT))
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.2).chat.completions.create(model="m", messages=QUESTION)


async def test_a_refusing_model_listens_again_on_the_same_port() -> None:
    async with serve_model(script=plain) as server, httpx.AsyncClient() as client:
        url = server.url
        await client.post(f"{server.control_url}/refuse")
        async with openai_client(server) as agent:
            with pytest.raises(openai.APIConnectionError):
                await agent.chat.completions.create(model="m", messages=QUESTION)
            await client.post(f"{server.control_url}/accept")
            assert server.url == url
            await agent.chat.completions.create(model="m", messages=QUESTION)


async def test_rules_strike_the_attempts_that_they_name_and_attempts_are_told_apart() -> None:
    async with serve_model(script=plain) as server, httpx.AsyncClient() as control:
        rule = {"fault": "status_500", "attempts": [1, 2]}
        await control.post(f"{server.control_url}/faults", json=rule)
        async with openai_client(server, retries=2) as client:
            answer = await client.chat.completions.create(model="m", messages=QUESTION)
        assert "attempt 3" in (answer.choices[0].message.content or "")
        report = (await control.get(f"{server.control_url}/witness")).json()
        assert [one["outcome"] for one in report["requests"][0]["tries"]] == ["status_500", "status_500", "complete"]


async def test_the_witness_sees_a_client_that_leaves() -> None:
    said = asyncio.Event()

    def forever(_conversation: Conversation, _this: Try) -> Answer:
        said.set()
        return Answer(parts=(Say(text="x" * 5000),), pace=Pace(chunk_seconds=0.01, chunk_characters=1))

    async with serve_model(script=forever) as server:
        async with asyncio.TaskGroup() as group, openai_client(server) as client:
            stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
            await anext(aiter(stream))
            await stream.close()
            group.create_task(said.wait())
        while server.witness.lines[-1]["event"] != "end":
            await asyncio.sleep(0)
        assert server.witness.lines[-1]["outcome"] == "aborted"


async def test_the_witness_file_survives_the_death_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "witness.jsonl"
    for attempt in (1, 2):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "torpor.testing.model_server", "--script", "plain", "--witness", str(path)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ},
        )
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client:
            answer = await client.chat.completions.create(model="m", messages=QUESTION)
        assert f"attempt {attempt}" in (answer.choices[0].message.content or "")
        process.send_signal(signal.SIGKILL)
        await process.communicate()
    assert read_witness(path)["requests"][0]["attempts"] == 2
