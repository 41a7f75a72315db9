"""The official MCP client with the gateway: the same tools, exactly once, and no state to lose."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from mcp import Client
from tests.integration.gateway_stage import Stage, gateway_stage, http_request
from tests.integration.test_agent_api import checkpoint_of, notes_of
from tests.integration.test_gateway import body_of
from tests.integration.test_gateway_restart import redo_everything

from torpor.core.events import Kind
from torpor.gateway.agent_api import RULES


@asynccontextmanager
async def connected(stage: Stage) -> AsyncGenerator[Client]:
    async with Client(f"{stage.url}/mcp") as client:
        yield client


def tool_call(name: str, arguments: dict[str, str]) -> bytes:
    params = {"name": name, "arguments": arguments}
    return http_request(
        "/mcp", json.dumps({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": params}).encode()
    )


async def test_the_official_client_finds_and_uses_every_tool(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        async with connected(stage) as client:
            listed = await client.list_tools()
            assert [tool.name for tool in listed.tools] == [rule.tool for rule in RULES]
            told = await client.call_tool("torpor_session", {})
            noted = await client.call_tool("torpor_note", {"text": "from a tool"})
            made = await client.call_tool("torpor_checkpoint", {})
        assert told.structured_content is not None
        assert told.structured_content["session"] == stage.session_id
        assert made.structured_content == {"checkpoint": 3, "seq": 17}
        [event] = await node.events(Kind.NOTE_ADDED)
        assert noted.structured_content == {"seq": event.seq}
        assert await notes_of(node) == ["from a tool"]
        # Greetings and lists follow from the request alone; only what a tool did is a call.
        assert {call.target for call in await node.calls()} == {"/mcp"}
        assert len(await node.calls()) == 3


async def test_a_failed_tool_is_told_to_the_model(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        async with connected(stage) as client:
            failed = await client.call_tool("torpor_checkpoint", {})
        assert failed.is_error


async def test_a_tool_call_that_a_restored_agent_repeats_is_not_done_again(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            first = await stage.raw(tool_call("torpor_note", {"text": "once"}))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            assert await stage.raw(tool_call("torpor_note", {"text": "once"})) == first
            assert json.loads(body_of(first))["id"] == 3
            assert await notes_of(node) == ["once"]


async def test_a_client_goes_on_with_the_next_life_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """No session id: a client that was restored, or only outlived its server's node, does not connect again."""
    async with gateway_stage(tmp_path) as stage:
        async with stage.node():
            client = Client(f"{stage.url}/mcp")
            await client.__aenter__()
            await client.call_tool("torpor_note", {"text": "one"})
        async with stage.node() as node:
            await client.call_tool("torpor_note", {"text": "two"})
            assert await notes_of(node) == ["one", "two"]
            await client.__aexit__(None, None, None)
