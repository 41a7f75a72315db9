"""Real clients of the providers, behind the real relay and the gateway."""

import asyncio
from pathlib import Path

import anthropic
import openai
import pytest
from tests.integration.gateway_stage import REAL_KEY, gateway_stage

from torpor.config import FAKE_KEY
from torpor.core.call import CallState
from torpor.core.events import Kind
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import coding

QUESTION = [{"role": "user", "content": "go on"}]


async def test_the_sdks_of_both_providers_stream_and_get_whole_answers(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=FAKE_KEY, max_retries=0) as client:
            whole = await client.chat.completions.create(model="m", messages=QUESTION)
            assert "attempt 1" in (whole.choices[0].message.content or "")
            async with client.chat.completions.stream(model="m", messages=QUESTION) as stream:
                final = await stream.get_final_completion()
            assert "attempt 2" in (final.choices[0].message.content or "")
            assert [model.id async for model in client.models.list()]
        async with anthropic.AsyncAnthropic(base_url=stage.url, api_key=FAKE_KEY, max_retries=0) as client:
            message = await client.messages.create(model="m", max_tokens=9, messages=QUESTION)
            assert message.stop_reason == "end_turn"
            async with client.messages.stream(model="m", max_tokens=9, messages=QUESTION) as stream:
                assert (await stream.get_final_message()).stop_reason == "end_turn"
            assert (await client.messages.count_tokens(model="m", messages=QUESTION)).input_tokens > 0
        assert stage.model.witness.requests == 4
        assert len(stage.on_call.calls) == 4
        calls = await node.calls()
        assert [call.state for call in calls] == [CallState.ANSWERED] * 6
        assert [call.is_llm for call in calls].count(True) == 4
        assert calls[0].usage["output_tokens"] > 0
        ended = await node.logged(Kind.CALL_DELIVERED, 6)
        assert {event.data["end"] for event in ended} == {"consumed"}


OPENAI_AGENT = """
import json, openai
client = openai.OpenAI()
messages = [{"role": "user", "content": "do the task"}]
functions = [{"name": name, "parameters": {"type": "object"}} for name in ("run_shell", "write_file")]
tools = [{"type": "function", "function": function} for function in functions]
turns = 0
while True:
    with client.chat.completions.stream(model="m", messages=messages, tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    if not message.tool_calls:
        print(turns, message.content)
        break
    turns += 1
    messages.append({"role": "assistant", "content": message.content, "tool_calls": [
        {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}}
        for c in message.tool_calls]})
    for call in message.tool_calls:
        json.loads(call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "ok"})
"""
ANTHROPIC_AGENT = """
import anthropic
client = anthropic.Anthropic()
messages = [{"role": "user", "content": "do the task"}]
tools = [{"name": n, "input_schema": {"type": "object"}} for n in ("run_shell", "write_file")]
turns = 0
while True:
    message = client.messages.create(model="m", max_tokens=99, messages=messages, tools=tools)
    if message.stop_reason != "tool_use":
        print(turns, message.content[0].text)
        break
    turns += 1
    uses = [block for block in message.content if block.type == "tool_use"]
    said = [block.model_dump(exclude_none=True) for block in message.content]
    messages.append({"role": "assistant", "content": said})
    messages.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": use.id, "content": "ok"} for use in uses]})
"""


@pytest.mark.parametrize("program", [OPENAI_AGENT, ANTHROPIC_AGENT], ids=["openai", "anthropic"])
async def test_a_coding_agent_of_its_own_process_does_its_task(tmp_path: Path, program: str) -> None:
    async with gateway_stage(tmp_path, script=coding(6)) as stage, stage.node() as node:
        said = await stage.output(program)
        assert said.startswith("6 The task is done after 6 steps")
        calls = await node.calls()
        assert [call.state for call in calls] == [CallState.ANSWERED] * 7
        assert {call.model for call in calls} == {"m"}
        assert stage.model.witness.requests == 7
        assert all(request.credential == REAL_KEY for request in stage.model.requests)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_client_retries_an_error_in_words_and_succeeds(tmp_path: Path, provider: str) -> None:
    """Where the provider itself would have left it with a broken connection and no retry."""
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.RESET_AFTER_HEAD, times=2))
        if provider == "openai":
            async with openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=FAKE_KEY) as client:
                stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        else:
            async with (
                anthropic.AsyncAnthropic(base_url=stage.url, api_key=FAKE_KEY) as client,
                client.messages.stream(model="m", max_tokens=9, messages=QUESTION) as stream,
            ):
                text = await stream.get_final_text()
        assert "attempt 3" in text
        states = [CallState.FAILED, CallState.FAILED, CallState.ANSWERED]
        assert [call.state for call in await node.calls()] == states


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_a_provider_that_is_not_configured_is_a_clear_error_without_retries(
    tmp_path: Path, provider: str
) -> None:
    async with gateway_stage(tmp_path) as stage:
        stage.upstreams = ()
        async with stage.node() as node:
            if provider == "openai":
                async with openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=FAKE_KEY) as client:
                    with pytest.raises(openai.AuthenticationError, match="OPENAI_API_KEY"):
                        await client.chat.completions.create(model="m", messages=QUESTION)
            else:
                async with anthropic.AsyncAnthropic(base_url=stage.url, api_key=FAKE_KEY) as client:
                    with pytest.raises(anthropic.AuthenticationError, match="ANTHROPIC_API_KEY"):
                        await client.messages.create(model="m", max_tokens=9, messages=QUESTION)
            assert len(await node.calls()) == 1


async def test_a_client_that_times_out_joins_with_its_own_retry(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.on_call.gate.clear()
        patient = openai.AsyncOpenAI(base_url=f"{stage.url}/v1", api_key=FAKE_KEY, timeout=2.0, max_retries=9)
        async with patient as client, asyncio.TaskGroup() as group:
            asking = group.create_task(client.chat.completions.create(model="m", messages=QUESTION))
            await node.logged(Kind.CALL_JOINED)
            stage.on_call.gate.set()
        assert "attempt 1" in (asking.result().choices[0].message.content or "")
        assert stage.model.witness.requests == 1
        assert len(stage.on_call.calls) == 1
