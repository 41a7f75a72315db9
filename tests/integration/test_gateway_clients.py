"""Real clients of the providers, behind the real relay and the gateway."""

from pathlib import Path

import anthropic
import openai
from tests.integration.gateway_stage import gateway_stage

from torpor.config import FAKE_KEY
from torpor.core.call import CallState
from torpor.core.events import Kind

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
