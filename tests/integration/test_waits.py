"""What an agent waits for: each wait is a call in the log, answered once, whoever dies and however long it takes."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_stage import CLOCK, Node, Stage, gateway_stage, http_request
from tests.integration.test_gateway import body_of, client, status_of
from tests.integration.test_gateway_budget import run_session, status
from tests.integration.test_gateway_restart import redo_everything

from torpor.core.call import CallState
from torpor.core.errors import Conflict, InvalidInput, NotFound
from torpor.core.events import Kind
from torpor.core.ids import WaitpointId
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Waitpoint, told_file
from torpor.db import messages, questions, verify, waitpoints
from torpor.db.blobs import BLOB_BYTES_MIN, prefix_of
from torpor.db.messages import Box
from torpor.runtime.records import Records
from torpor.testing.clock import FakeClock

NO_MESSAGE = {"state": "timed_out", "number": None, "text": None, "sent_at": None}
YEARS = 10 * 365 * 86_400


def ask(operation: str, **body: Any) -> bytes:
    return http_request(f"/torpor/v1/{operation}", json.dumps(body).encode())


def json_of(received: bytes) -> Any:
    return json.loads(body_of(received))


def records(node: Node) -> Records:
    return Records(database=node.database, session_id=node.session_id, owner_token=node.owner_token, clock=CLOCK)


async def the_point(node: Node) -> Waitpoint:
    [point] = await node.database.read(lambda tx: waitpoints.open_waitpoints(tx, node.session_id))
    return point


async def answer(node: Node, text: str | None, *files: Mapping[str, str]) -> None:
    """As the owner does for a person."""
    await records(node).resolve((await the_point(node)).waitpoint_id, text, files)
    node.gateway.look_again()


async def deliver(node: Node, text: str) -> int:
    number = await records(node).deliver(text)
    node.gateway.look_again()
    return number


async def whole(node: Node) -> None:
    assert await node.database.read(lambda tx: verify.verify_chain(tx, node.session_id)) == []


async def test_a_question_waits_for_a_person_and_the_session_with_it(tmp_path: Path) -> None:
    told: list[str] = []
    async with gateway_stage(tmp_path) as stage, stage.node(on_wait=told.append) as node:
        await run_session(node)
        async with client(stage, ask("ask", question="Deploy?", choices=["yes", "no"])) as (reader, _):
            await node.logged(Kind.WAITPOINT_CREATED)
            assert await status(node) is SessionStatus.WAITING
            assert told == ["the agent asks: Deploy? (yes, no)"]
            await answer(node, "YES")
            received = await reader.read(-1)
            assert status_of(received) == 200
            assert json_of(received)["answer"] == "yes"
            assert json_of(received)["state"] == "resolved"
            assert await status(node) is SessionStatus.RUNNING
            [call] = await node.calls()
            assert received == await node.logged_response(call)
            await whole(node)


async def test_only_a_choice_answers_and_only_the_first_answer_counts(tmp_path: Path) -> None:
    request = ask("ask", question="Which?", choices=["a", "b"])
    async with gateway_stage(tmp_path) as stage, stage.node() as node, client(stage, request) as (reader, _):
        await node.logged(Kind.WAITPOINT_CREATED)
        point = (await the_point(node)).waitpoint_id
        for wrong, code in [("c", "answer_not_a_choice"), (None, "answer_missing")]:
            with pytest.raises(InvalidInput) as refused:
                await records(node).resolve(point, wrong)
            assert refused.value.code == code
        await records(node).resolve(point, "b")
        with pytest.raises(Conflict) as late:
            await records(node).resolve(point, "a")
        assert late.value.code == "waitpoint_resolved"
        with pytest.raises(NotFound):
            await records(node).resolve(WaitpointId("wp_none"), "a")
        node.gateway.look_again()
        assert json_of(await reader.read(-1))["answer"] == "b"
        assert len(await node.events(Kind.WAITPOINT_RESOLVED)) == 1


async def test_files_go_with_a_question_and_with_its_answer(tmp_path: Path) -> None:
    plan, picture = told_file("plan.md", "erst \u00fcben\n".encode()), told_file("map.png", bytes(range(256)) * 9_000)
    assert (plan["text"], sorted(picture)) == ("erst \u00fcben\n", ["base64", "name"])
    told: list[str] = []
    async with gateway_stage(tmp_path) as stage, stage.node(on_wait=told.append) as node:
        request = ask("ask", question="Is it good?", choices=["yes", "no"], files=["out/report.pdf", "a b"])
        async with client(stage, request) as (reader, _):
            await node.logged(Kind.WAITPOINT_CREATED)
            assert told == ["the agent asks: Is it good? (yes, no); see out/report.pdf, a b"]
            point = await the_point(node)
            asked = await node.database.read(lambda tx: questions.question_of(tx, point))
            assert asked.files == ("out/report.pdf", "a b")
            await answer(node, "No", plan, picture)
            said = json_of(await reader.read(-1))
            assert (said["answer"], said["files"]) == ("no", [plan, picture])
            assert (await node.events(Kind.WAITPOINT_RESOLVED))[0].data["files"] == 2
            await whole(node)


async def test_a_timer_takes_no_files(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node, client(stage, ask("sleep", seconds=YEARS)):
        await node.logged(Kind.WAITPOINT_CREATED)
        with pytest.raises(InvalidInput) as refused:
            await answer(node, None, told_file("a", b"a"))
        assert refused.value.code == "answer_refused"


async def test_a_question_outlives_its_node_and_is_answered_while_none_lives(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            connected = client(stage, ask("ask", question="Go on?"))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.WAITPOINT_CREATED)
            await records(node).resolve((await the_point(node)).waitpoint_id, "go\n\u00e9 \U0001f600")
        async with stage.node() as node:
            assert json_of(await reader.read(-1))["answer"] == "go\n\u00e9 \U0001f600"
            assert len(await node.events(Kind.WAITPOINT_CREATED)) == 1
            await whole(node)
        await connected.__aexit__(None, None, None)


async def test_a_restored_agent_that_asks_again_gets_the_answer_that_came_meanwhile(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node, client(stage, ask("ask", question="Go on?", timeout_seconds=YEARS)):
            await node.logged(Kind.WAITPOINT_CREATED)
            redo = await redo_everything(node)
            await answer(node, "yes")
            await node.logged(Kind.CALL_COMPLETED)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            # How long it is ready to wait is no part of the question.
            received = await stage.raw(ask("ask", question="Go on?", timeout_seconds=7))
            assert json_of(received)["answer"] == "yes"
            assert len(await node.events(Kind.WAITPOINT_CREATED)) == 1


async def test_a_client_that_lost_its_patience_waits_on_for_the_same_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with client(stage, ask("ask", question="Go on?")):
            await node.logged(Kind.WAITPOINT_CREATED)
        async with client(stage, ask("ask", question="Go on?", timeout_seconds=99)) as (reader, _):
            await node.logged(Kind.CALL_JOINED)
            await answer(node, "yes")
            assert json_of(await reader.read(-1))["answer"] == "yes"
        [call] = await node.calls()
        assert call.state is CallState.ANSWERED


Wait = Callable[[Stage], Awaitable[bytes]]


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        (ask("sleep", seconds=YEARS), {"kind": "timer", "state": "resolved"}),
        (ask("sleep", until="2033-11-14T00:00:00+01:00"), {"kind": "timer", "state": "resolved"}),
        (
            ask("ask", question="Anybody?", timeout_seconds=YEARS),
            {"kind": "ask", "state": "timed_out", "answer": None, "files": []},
        ),
        (ask("receive", timeout_seconds=YEARS), NO_MESSAGE),
    ],
)
async def test_years_pass_for_whoever_waits(tmp_path: Path, request_of: bytes, expected: dict[str, Any]) -> None:
    clock = FakeClock()
    async with (
        gateway_stage(tmp_path) as stage,
        stage.node(clock=clock) as node,
        client(stage, request_of) as (reader, _),
    ):
        await node.logged(Kind.WAITPOINT_CREATED)
        clock.advance(YEARS / 2)
        node.gateway.look_again()
        await node.logged(Kind.WAITPOINT_CREATED)
        assert await node.events(Kind.CALL_COMPLETED) == []
        clock.advance(YEARS)
        node.gateway.look_again()
        got = json_of(await reader.read(-1))
        got.pop("waitpoint", None)
        assert got == expected
        assert [event.data["timed_out"] for event in await node.events(Kind.WAITPOINT_RESOLVED)] == [True]


async def test_a_time_that_has_come_already_answers_at_once(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        for request in (ask("sleep"), ask("sleep", seconds=0.05), ask("sleep", until="2001-01-01T00:00:00Z")):
            assert json_of(await stage.raw(request))["state"] == "resolved"
        assert json_of(await stage.raw(ask("receive", timeout_seconds=0))) == NO_MESSAGE
        await whole(node)


async def test_a_person_ends_a_sleep_before_its_time(tmp_path: Path) -> None:
    request = ask("sleep", seconds=YEARS)
    async with gateway_stage(tmp_path) as stage, stage.node() as node, client(stage, request) as (reader, _):
        await node.logged(Kind.WAITPOINT_CREATED)
        with pytest.raises(InvalidInput):
            await records(node).resolve((await the_point(node)).waitpoint_id, "an answer")
        await answer(node, None)
        assert json_of(await reader.read(-1))["state"] == "resolved"


async def test_messages_are_given_out_once_in_their_order_to_whoever_waits(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        assert await deliver(node, "one") == 1
        assert json_of(await stage.raw(ask("receive")))["text"] == "one"
        async with client(stage, ask("receive")) as (reader, _):
            await node.logged(Kind.WAITPOINT_CREATED)
            await deliver(node, "two")
            await deliver(node, "three")
            got = json_of(await reader.read(-1))
            assert (got["number"], got["text"]) == (2, "two")
        assert json_of(await stage.raw(ask("receive", timeout_seconds=5)))["text"] == "three"
        inbox = await node.database.read(lambda tx: messages.list_after(tx, node.session_id, Box.IN))
        by_call = {call.call_id: call for call in await node.calls()}
        assert [by_call[message.call_id].state for message in inbox if message.call_id] == [CallState.ANSWERED] * 3
        await whole(node)


async def test_a_restored_agent_receives_again_what_it_had_received_and_nothing_twice(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            for text in ("one", "two", "three"):
                await deliver(node, text)
            for text in ("one", "two"):
                assert json_of(await stage.raw(ask("receive", timeout_seconds=9)))["text"] == text
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            for seconds, text in enumerate(("one", "two", "three")):
                received = await stage.raw(ask("receive", timeout_seconds=seconds))
                assert json_of(received)["text"] == text
            assert json_of(await stage.raw(ask("receive", timeout_seconds=0))) == NO_MESSAGE


async def test_what_an_agent_sends_is_in_the_outbox_once_however_often_it_is_restored(tmp_path: Path) -> None:
    large = random.Random(1).randbytes(2 * BLOB_BYTES_MIN).hex()
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            assert json_of(await stage.raw(ask("send", text=large))) == {"number": 1}
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            assert json_of(await stage.raw(ask("send", text=large))) == {"number": 1}
            assert json_of(await stage.raw(ask("send", text="two"))) == {"number": 2}
            sent = await node.database.read(lambda tx: messages.list_after(tx, node.session_id, Box.OUT))
            assert [message.text for message in sent] == [large, "two"]
            assert len(list(stage.blobs.list(prefix_of(node.session_id)))) >= 1
            await whole(node)


async def test_any_and_all_of_several_waitpoints(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        first = json_of(await stage.raw(ask("ask", question="A?", wait=False)))
        second = json_of(await stage.raw(ask("sleep", seconds=YEARS, wait=False)))
        assert (first["state"], second["state"]) == ("open", "open")
        names = [first["waitpoint"], second["waitpoint"]]
        for_any, for_all = ask("wait", waitpoints=names), ask("wait", waitpoints=names, mode="all")
        async with client(stage, for_any) as (any_of, _), client(stage, for_all) as (all_of, _):
            await node.logged(Kind.CALL_INTENDED, 4)
            await records(node).resolve(WaitpointId(names[0]), "a")
            node.gateway.look_again()
            got = json_of(await any_of.read(-1))
            assert got["done"] is True
            assert [point["state"] for point in got["waitpoints"]] == ["resolved", "open"]
            assert got["waitpoints"][0]["answer"] == "a"
            assert len(await node.events(Kind.CALL_COMPLETED)) == 3
            await records(node).resolve(WaitpointId(names[1]), None)
            node.gateway.look_again()
            got = json_of(await all_of.read(-1))
            assert [point["state"] for point in got["waitpoints"]] == ["resolved", "resolved"]


async def test_a_wait_for_several_ends_at_its_timeout_and_refuses_what_there_is_not(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        name = json_of(await stage.raw(ask("ask", question="A?", wait=False)))["waitpoint"]
        got = json_of(await stage.raw(ask("wait", waitpoints=[name], timeout_seconds=0.05)))
        assert (got["done"], got["waitpoints"][0]["state"]) == (False, "open")
        received = await stage.raw(ask("wait", waitpoints=[name, "wp_none"]))
        assert (status_of(received), json_of(received)["code"]) == (404, "waitpoint_unknown")


async def test_five_questions_at_once_are_five_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        asking = [asyncio.create_task(stage.raw(ask("ask", question="Same?"))) for _ in range(5)]
        await node.logged(Kind.WAITPOINT_CREATED, 5)
        points = await node.database.read(lambda tx: waitpoints.open_waitpoints(tx, node.session_id))
        for number, point in enumerate(points):
            await records(node).resolve(point.waitpoint_id, str(number))
        node.gateway.look_again()
        answers = [json_of(received)["answer"] for received in await asyncio.gather(*asking)]
        assert sorted(answers) == list("01234")
