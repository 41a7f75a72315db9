"""What calls cost, and what a budget does: reserved before a call is sent, settled after it; held, never refused."""

import asyncio
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_stage import Node, Stage, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, MESSAGES, body_of, client, slow, status_of

from torpor.core.call import CallState
from torpor.core.checkpoint import StreamFate
from torpor.core.events import Kind
from torpor.core.money import Account, dollars_text, parse_dollars
from torpor.core.session import SessionStatus
from torpor.db import budgets, sessions, verify, waitpoints
from torpor.testing.model_faults import Fault, FaultRule

PATHS = pytest.mark.parametrize("path", [CHAT, MESSAGES])
ROOM_FOR_ONE = "0.005"
"""A question of these tests may cost some 0.0043 dollars, and costs less than 0.0003."""
TOO_LITTLE = "0.001"


def question(text: str = "go on", *, model: str = "scripted-large", stream: bool = True) -> bytes:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 9}
    return json.dumps({**body, "stream": stream, "stream_options": {"include_usage": True}}).encode()


async def account(node: Node) -> Account:
    return await node.database.read(lambda tx: budgets.account(tx, node.session_id))


async def status(node: Node) -> SessionStatus:
    return (await node.database.read(lambda tx: sessions.get(tx, node.session_id))).status


async def run_session(node: Node) -> None:
    """As the owner does once the sandbox lives."""
    await node.database.write(
        lambda tx: sessions.set_status(
            tx, session_id=node.session_id, owner_token=node.owner_token, status=SessionStatus.RUNNING, wall_ns=1
        ),
        durable=True,
    )


async def add(node: Node, dollars: str) -> None:
    await node.database.write(
        lambda tx: budgets.add(
            tx,
            session_id=node.session_id,
            owner_token=node.owner_token,
            amount_nanousd=parse_dollars(dollars),
            wall_ns=2,
        ),
        durable=True,
    )


async def check_log(stage: Stage, node: Node) -> None:
    """The log is whole, and at no seq was more spent and reserved than the limit of that moment."""
    assert await node.database.read(lambda tx: verify.verify_chain(tx, stage.session_id)) == []
    limit, taken = Decimal(0), dict[Any, Decimal]()
    for event in await node.events():
        if event.kind is Kind.SESSION_CREATED:
            limit = Decimal(event.data["budget"])
        elif event.kind is Kind.BUDGET_CHANGED:
            limit = Decimal(event.data["to"])
        elif event.kind is Kind.CALL_SENT:
            taken[event.call_id, event.data["attempt"]] = Decimal(event.data["reserved"])
        elif event.kind in {Kind.CALL_COMPLETED, Kind.CALL_TORN} and event.data["cost"] is not None:
            taken[event.call_id, event.data["attempt"]] = Decimal(event.data["cost"])
        assert sum(taken.values()) <= limit, event


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_a_calls_cost_stands_in_its_event_and_its_row(tmp_path: Path, path: str, stream: bool) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        await stage.raw(http_request(path, question(stream=stream)))
        [completed] = await node.events(Kind.CALL_COMPLETED)
        usage = completed.data["usage"]
        assert Decimal(completed.data["cost"]) * 1_000_000 == usage["input_tokens"] + 10 * usage["output_tokens"]
        assert completed.data["prices"].startswith("config.toml ")
        [call] = await node.calls()
        cost = call.attempts[-1].cost_nanousd
        assert cost is not None
        assert dollars_text(cost) == completed.data["cost"]
        assert (await account(node)).limit is None


async def test_calls_at_once_never_overrun_the_budget_and_all_are_answered(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget=ROOM_FOR_ONE) as stage, stage.node() as node:
        await run_session(node)
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(stage.raw(http_request(MESSAGES, question(f"q{n}")))) for n in range(5)]
        assert [status_of(task.result()) for task in asking] == [200] * 5
        assert stage.model.witness.requests == 5
        assert await node.events(Kind.WAITPOINT_CREATED) == []
        await check_log(stage, node)
        assert (await account(node)).reserved == 0


async def test_a_call_beyond_the_budget_is_held_over_the_death_of_its_node_and_sent_once_it_fits(
    tmp_path: Path,
) -> None:
    async with gateway_stage(tmp_path, budget=TOO_LITTLE) as stage:
        async with stage.node() as node:
            await run_session(node)
            connected = client(stage, http_request(CHAT, question()))
            reader, writer = await connected.__aenter__()
            await node.logged(Kind.WAITPOINT_CREATED)
            assert await status(node) is SessionStatus.WAITING
            [call] = await node.calls()
            assert (call.state, call.attempts) == (CallState.INTENDED, ())
        async with stage.node() as node:
            assert list(node.fates.values()) == [StreamFate.RESEND]
            await node.logged(Kind.CALL_JOINED)
            points = await node.database.read(lambda tx: waitpoints.list_of_session(tx, stage.session_id))
            assert [point.is_open for point in points] == [True]
            assert stage.model.witness.requests == 0
            await add(node, "1")
            assert await status(node) is SessionStatus.RUNNING
            node.gateway.look_again()
            received = await reader.read(-1)
            writer.close()
            assert status_of(received) == 200
            [call] = await node.calls()
            assert received == await node.logged_response(call)
            assert len(call.attempts) == stage.model.witness.requests == 1
            assert len(await node.events(Kind.WAITPOINT_CREATED)) == 1
            await check_log(stage, node)
        await connected.__aexit__(None, None, None)


async def test_a_budget_that_was_raised_while_no_node_lived_lets_the_call_go_on(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget=TOO_LITTLE) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.WAITPOINT_CREATED)
            await add(node, "1")
        async with stage.node():
            assert status_of(await reader.read(-1)) == 200
        assert stage.model.witness.requests == 1
        await connected.__aexit__(None, None, None)


async def test_a_raise_that_is_too_small_holds_the_call_on_a_new_waitpoint(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget=TOO_LITTLE) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())):
            await node.logged(Kind.WAITPOINT_CREATED)
            await add(node, "0.0001")
            node.gateway.look_again()
            await node.logged(Kind.WAITPOINT_CREATED, 2)
        assert stage.model.witness.requests == 0


async def test_a_retry_of_a_held_call_joins_it(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget=TOO_LITTLE) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())):
            await node.logged(Kind.WAITPOINT_CREATED)
        asking = asyncio.ensure_future(stage.raw(http_request(CHAT, question())))
        await node.logged(Kind.CALL_JOINED)
        await add(node, "1")
        node.gateway.look_again()
        assert status_of(await asking) == 200
        assert stage.model.witness.requests == len(await node.calls()) == 1


@PATHS
async def test_an_unknown_price_is_refused_for_good_only_under_a_budget(tmp_path: Path, path: str) -> None:
    (tmp_path / "free").mkdir()
    (tmp_path / "limited").mkdir()
    async with gateway_stage(tmp_path / "free") as stage, stage.node() as node:
        assert status_of(await stage.raw(http_request(path, question(model="other")))) == 200
        [completed] = await node.events(Kind.CALL_COMPLETED)
        assert completed.data["cost"] is None
    async with gateway_stage(tmp_path / "limited", budget="5") as stage, stage.node() as node:
        received = await stage.raw(http_request(path, question(model="other")))
        assert status_of(received) == 400
        assert b"x-should-retry: false" in received
        error = json.loads(body_of(received))
        assert error["error"]["code"] == "model_price_unknown"
        assert "config.toml" in error["error"]["message"]
        assert stage.model.witness.requests == 0
        assert await account(node) == Account(limit=parse_dollars("5"), spent=0, reserved=0)


async def test_a_torn_attempt_costs_what_it_had_reported(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow, budget="5") as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(MESSAGES, question()))
            reader, _ = await connected.__aenter__()
            await reader.readuntil(b'"x"')
        async with stage.node() as node:
            [torn] = await node.events(Kind.CALL_TORN)
            assert torn.data["cost"] is not None
            assert 0 < Decimal(torn.data["cost"]) < Decimal("0.001")
            assert await node.database.read(lambda tx: verify.verify_chain(tx, stage.session_id)) == []
            assert (await account(node)).spent == parse_dollars(torn.data["cost"])
        await connected.__aexit__(None, None, None)


async def test_an_answer_that_counts_no_tokens_keeps_its_reservation(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget="5") as stage:
        stage.upstreams = tuple(replace(upstream, stream_usage=False) for upstream in stage.upstreams)
        async with stage.node() as node:
            body = json.loads(question()) | {"stream_options": {}}
            await stage.raw(http_request(CHAT, json.dumps(body).encode()))
            [sent] = await node.events(Kind.CALL_SENT)
            [completed] = await node.events(Kind.CALL_COMPLETED)
            assert completed.data["cost"] is None
            assert await account(node) == Account(
                limit=parse_dollars("5"), spent=parse_dollars(sent.data["reserved"]), reserved=0
            )


async def test_what_the_provider_refuses_costs_nothing(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget="5") as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_500))
        assert status_of(await stage.raw(http_request(CHAT, question()))) == 500
        assert await account(node) == Account(limit=parse_dollars("5"), spent=0, reserved=0)
