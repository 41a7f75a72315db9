"""A restored agent that takes another path than the log's, under each policy."""

import json
import socket
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_stage import Node, Stage, gateway_stage, http_request, with_usage_asked
from tests.integration.test_gateway import CHAT, MESSAGES, client, question, status_of
from tests.integration.test_gateway_restart import redo_everything, slow_at_first

from torpor.core.call import CallState
from torpor.core.divergence import OnDivergence
from torpor.core.events import Kind
from torpor.core.redo import RedoSet
from torpor.gateway.crossroads import Crossroads

COUNT = "/v1/messages/count_tokens"


async def lived_once(stage: Stage) -> RedoSet:
    """A first life with two model calls, a count and a note; the next one is expected to make them again."""
    async with stage.node() as node:
        await stage.raw(http_request(CHAT, question("one")))
        await stage.raw(http_request(CHAT, question("two")))
        await stage.raw(http_request(COUNT, question("two")))
        await stage.raw(http_request("/torpor/v1/notes", b'{"text": "two"}'))
        redo = await redo_everything(node)
    stage.reboot()
    return redo


async def diverged(node: Node) -> dict[str, Any]:
    [event] = await node.events(Kind.CALL_DIVERGED)
    return dict(event.data)


async def test_by_default_it_goes_on_and_the_log_says_what_was_left(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        async with stage.node(incarnation=2, redo=redo) as node:
            assert status_of(await stage.raw(http_request(CHAT, question("another")))) == 200
            told = await diverged(node)
            # A count is no effect outside, and neither is a note in the log.
            assert (len(told["pending"]), told["orphaned"], told["policy"]) == (4, [], "continue")
            assert await node.events(Kind.AGENT_TOLD) == []
            assert stage.model.requests[-1].body == with_usage_asked(question("another"))


@pytest.mark.parametrize("policy", [OnDivergence.ASK, OnDivergence.FAIL])
async def test_a_held_call_is_neither_made_nor_logged_and_others_are_served(
    tmp_path: Path, policy: OnDivergence
) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        crossroads = Crossroads(policy)
        async with stage.node(incarnation=2, redo=redo, crossroads=crossroads) as node:
            asked = len(stage.model.requests)
            async with client(stage, http_request(CHAT, question("another"))):
                assert await crossroads.reached() == f"POST {CHAT}"
                assert status_of(await stage.raw(http_request(CHAT, question("two")))) == 200
                assert await node.events(Kind.CALL_DIVERGED) == []
                assert len(await node.calls()) == 4
            assert len(stage.model.requests) == asked


async def test_a_held_call_is_made_when_a_person_lets_it_and_is_told_as_such(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        crossroads = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, redo=redo, crossroads=crossroads) as node:
            async with client(stage, http_request(CHAT, question("another"))) as (reader, _):
                await crossroads.reached()
                crossroads.go_on()
                assert status_of(await reader.read(-1)) == 200
            assert (await diverged(node))["policy"] == "ask"
            # From here on this is the path.
            assert status_of(await stage.raw(http_request(CHAT, question("and another")))) == 200


async def test_a_client_that_leaves_while_it_is_held_has_asked_for_nothing(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        crossroads = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, redo=redo, crossroads=crossroads) as node:
            async with client(stage, http_request(CHAT, question("another"))) as (_, writer):
                await crossroads.reached()
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # The relay says that it left before it has a later one's answer.
            assert status_of(await stage.raw(http_request(CHAT, question("one")))) == 200
            crossroads.go_on()
            assert status_of(await stage.raw(http_request(CHAT, question("third")))) == 200
            assert len(await node.calls()) == 5


async def test_a_client_that_gave_up_while_it_was_held_and_its_retry_are_one_call(tmp_path: Path) -> None:
    """A FIN does not tell a client that left from one that waits, so the first request is made, and the retry joins."""
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        crossroads = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, redo=redo, crossroads=crossroads) as node:
            async with client(stage, http_request(CHAT, question("another"))):
                await crossroads.reached()
            async with client(stage, http_request(CHAT, question("another"))) as (reader, _):
                assert status_of(await stage.raw(http_request(CHAT, question("one")))) == 200
                crossroads.go_on()
                assert status_of(await reader.read(-1)) == 200
            assert len(await node.calls()) == 5


async def test_a_held_call_is_held_again_by_the_next_node(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        connected = client(stage, http_request(CHAT, question("another")))
        first = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, redo=redo, crossroads=first):
            reader, _ = await connected.__aenter__()
            await first.reached()
        second = Crossroads(OnDivergence.ASK)
        async with stage.node(incarnation=2, crossroads=second) as node:
            await second.reached()
            second.go_on()
            assert status_of(await reader.read(-1)) == 200
            assert len((await diverged(node))["pending"]) == 4
        await connected.__aexit__(None, None, None)


async def test_an_answer_given_before_the_node_lived_holds_nothing(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        async with stage.node(incarnation=2, redo=redo, crossroads=Crossroads(OnDivergence.ASK, let_go=True)):
            assert status_of(await stage.raw(http_request(CHAT, question("another")))) == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_tell_adds_one_note_to_the_next_model_request_and_to_no_other_bytes(tmp_path: Path, path: str) -> None:
    async with gateway_stage(tmp_path) as stage:
        redo = await lived_once(stage)
        async with stage.node(incarnation=2, redo=redo, crossroads=Crossroads(OnDivergence.TELL)) as node:
            # The request that leaves the path may be none to a model: the note waits for one.
            await stage.raw(http_request(COUNT, question("else")))
            assert stage.model.requests[-1].body == question("else")
            first = await stage.raw(http_request(path, question("another")))
            sent = json.loads(stage.model.requests[-1].body)
            await stage.raw(http_request(path, question("third")))
            third = question("third")
            assert stage.model.requests[-1].body == (with_usage_asked(third) if path == CHAT else third)
            [told] = await node.events(Kind.AGENT_TOLD)
            added = sent["messages"][-1] if path == CHAT else sent["system"][-1]
            [text] = await node.texts(Kind.AGENT_TOLD)
            assert text in added.values()
            asked = next(call for call in await node.calls() if call.call_id == told.call_id)
            assert first == await node.logged_response(asked)
            redo = RedoSet([*redo_entries(await node.calls())])
        stage.reboot()
        # The log has the request without the note, so the agent's own bytes match it.
        async with stage.node(incarnation=3, redo=redo, crossroads=Crossroads(OnDivergence.TELL)):
            assert await stage.raw(http_request(path, question("another"))) == first


def redo_entries(calls: list[Any]) -> list[Any]:
    from torpor.core.redo import entry_of

    return [entry_of(call) for call in calls]


async def test_a_note_still_owed_is_told_by_the_next_node_and_goes_with_each_attempt(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            async with client(stage, http_request(CHAT, question("one"))):
                await node.logged(Kind.CALL_SENT)
            redo = await redo_everything(node)
        stage.reboot()
        connected = client(stage, http_request(CHAT, question("another")))
        async with stage.node(incarnation=2, redo=redo, crossroads=Crossroads(OnDivergence.TELL)) as node:
            await stage.raw(http_request(COUNT, question("else")))
        async with stage.node(incarnation=2, crossroads=Crossroads(OnDivergence.TELL)) as node:
            begun = len(await node.events(Kind.CALL_ANSWERING))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_ANSWERING, begun + 1)
        async with stage.node(incarnation=2, crossroads=Crossroads(OnDivergence.TELL)) as node:
            stage.on_call.gate.set()
            assert status_of(await reader.read(-1)) == 200
            [told] = await node.events(Kind.AGENT_TOLD)
            [text] = await node.texts(Kind.AGENT_TOLD)
            asked = next(call for call in await node.calls() if call.call_id == told.call_id)
            assert (asked.state, len(asked.attempts)) == (CallState.ANSWERED, 2)
        with_note = [request for request in stage.model.requests if text.encode() in request.body]
        assert len(with_note) == 2
        await connected.__aexit__(None, None, None)


async def test_a_budget_reserves_for_the_note_too(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget="9") as stage:
        priced = json.dumps({**json.loads(question("another")), "model": "scripted-large", "max_tokens": 9}).encode()
        async with stage.node() as node:
            await stage.raw(http_request(CHAT, priced))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo, crossroads=Crossroads(OnDivergence.TELL)) as node:
            await stage.raw(http_request(CHAT, priced.replace(b"another", b"further")))
            first, second = [Decimal(event.data["reserved"]) for event in await node.events(Kind.CALL_SENT)]
            plain, noted = [len(request.body) for request in stage.model.requests]
            # A byte of a prompt is at most a token, and a token costs a microdollar.
            assert (second - first) * 1_000_000 == noted - plain > 0
