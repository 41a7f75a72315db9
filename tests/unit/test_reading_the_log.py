"""Turns, search, export and signed heads: what is read back is what was logged, and nothing false is believed."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.test_children import begin
from tests.unit.db.scene import NOW, Scene, acquire, new_scene
from typer.testing import CliRunner

from torpor.cli.main import app
from torpor.core.errors import Conflict, Damaged, InvalidInput, NotFound
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CallId, SessionId, new_session_id
from torpor.core.money import Bill
from torpor.db import budgets, calls, checkpoints, children, log, notes, redaction, requests, sessions, verify
from torpor.db.database import Database, Transaction, open_database
from torpor.runtime import heads, spans, transfer, turns
from torpor.runtime.home import Home
from torpor.runtime.search import open_index
from torpor.testing.clock import FakeClock
from torpor.testing.coding_agent import CodingAgent


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    yield await new_scene(database)
    await database.close()


async def converse(scene: Scene, agent: CodingAgent, count: int) -> list[tuple[CallId, bytes, bytes]]:
    made: list[tuple[CallId, bytes, bytes]] = []
    for _ in range(count):
        body = agent.body()
        pieces = agent.answer()
        call_id = await scene.write(lambda tx, body=body, pieces=pieces: scene.answer(tx, *pieces, body=body))
        made.append((call_id, body, b"".join(pieces)))
    return made


async def found(scene: Scene, home: Home, *words: str) -> list[tuple[int | None, str]]:
    async with open_index(home, scene.database, FakeClock()) as index:
        return [(match.turn, match.source) for match in await index.find(list(words), session_id=None, limit=50)]


async def test_a_turn_has_the_exact_bytes_and_the_tools_have_their_results(scene: Scene) -> None:
    made = await converse(scene, CodingAgent(), 4)
    for number, (call_id, body, answer) in enumerate(made, 1):
        content = await scene.read(lambda tx, number=number: turns.read_turn(tx, scene.session_id, number))
        assert (content.call.call_id, content.request, content.answer) == (call_id, body, answer)
    listed = await scene.read(lambda tx: turns.list_turns(tx, scene.session_id))
    assert [turn.tools[0].name for turn in listed] == ["Bash"] * 4
    results = [json.loads(made[-1][1])["messages"][at]["content"][0]["content"] for at in (2, 4, 6)]
    assert [turn.tools[0].result for turn in listed] == [*results, None]


async def test_turns_say_what_each_cost(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORPOR_HOME", str(tmp_path))
    await scene.write(lambda tx: scene.answer(tx, b"dear", bill=Bill(cost_nanousd=1_500, prices="config.toml 1")))
    await scene.write(lambda tx: scene.answer(tx, b"of unknown price"), durable=True)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["turns", scene.session_id, "--json"])
    assert [json.loads(line)["cost"] for line in done.stdout.splitlines()] == ["0.0000015", None]


async def test_a_lineage_costs_what_all_of_its_sessions_cost(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORPOR_HOME", str(tmp_path))
    await scene.write(lambda tx: scene.answer(tx, b"paid once", bill=Bill(cost_nanousd=1_500, prices="config.toml 1")))
    child = SessionId(f"{scene.session_id[:-1]}{'1' if scene.session_id[-1] == '0' else '0'}")

    def fork(tx: Transaction) -> int:
        parent = sessions.Parent(session_id=scene.session_id, seq=2)
        sessions.create(tx, session_id=child, name="child", spec={}, wall_ns=NOW + 1, parent=parent)
        return acquire(tx, child, seen_token=0)

    forked = Scene(scene.database, child, await scene.write(fork, durable=True))
    for bill in (Bill(cost_nanousd=500, prices="config.toml 1"), None):
        await forked.write(lambda tx, bill=bill: forked.answer(tx, b"a", bill=bill), durable=True)

    async def costs(*arguments: str) -> dict[str, Any]:
        done = await asyncio.to_thread(CliRunner().invoke, app, ["cost", *arguments, "--json"])
        return json.loads(done.stdout)

    alone, together = await costs("child"), await costs("child", "--lineage")
    assert (alone["cost"], len(alone["calls"]), alone["without_cost"]) == ("0.0000005", 2, 1)
    assert (together["cost"], together["input_tokens"], together["without_cost"]) == ("0.000002", 3, 1)
    [model] = together["models"]
    assert (model["calls"], model["cost"], model["input_tokens"]) == (3, "0.000002", 3)
    lines = [(line["session"], line["parent"], line["calls"], line["cost"]) for line in together["sessions"]]
    assert lines == [(scene.session_id, None, 1, "0.0000015"), (child, scene.session_id, 2, "0.0000005")]
    assert await costs(scene.session_id, "--lineage") == together | {"session": scene.session_id}


async def test_a_fork_comes_back_from_its_export_with_its_parent(scene: Scene, tmp_path: Path) -> None:
    child = new_session_id(NOW + 10**9)
    parent = sessions.Parent(session_id=scene.session_id, seq=2)
    await scene.write(
        lambda tx: sessions.create(tx, session_id=child, name=None, spec={}, wall_ns=NOW, parent=parent), durable=True
    )
    lines = await scene.read(lambda tx: [json.dumps(line) for line in transfer.export_lines(tx, child)])
    other, _ = await imported(tmp_path / "other", lines)
    assert (await other.read(lambda tx: sessions.get(tx, child))).parent == parent
    await other.close()
    forged = [lines[0].replace('"forked_at_seq": 2', '"forked_at_seq": 1'), *lines[1:]]
    with pytest.raises(InvalidInput, match="its log does not hold"):
        await imported(tmp_path / "forged", forged)


async def test_a_parent_comes_alone_and_finds_its_child_forgotten(scene: Scene, tmp_path: Path) -> None:
    child, point = await begin(scene)
    lines = await exported(scene)
    assert not any(json.loads(line).get("row") == "child" for line in lines)
    other, _ = await imported(tmp_path / "other", lines)
    there = Scene(other, scene.session_id, 0)
    assert await there.read(lambda tx: children.list_of(tx, scene.session_id)) == []
    assert await there.read(lambda tx: children.has_ended(tx, point))
    settled = await there.write(lambda tx: children.settle(tx, **there.owner, point=point, wall_ns=NOW))
    assert settled.resolution == {"status": "forgotten", "exit_status": None}
    await imported_as_well(scene, child, there)
    await other.close()


async def imported_as_well(scene: Scene, child: SessionId, there: Scene) -> None:
    """The child is a session by itself there."""
    lines = await scene.read(lambda tx: [json.dumps(line) for line in transfer.export_lines(tx, child)])
    assert await there.write(lambda tx: transfer.import_lines(tx, lines)) == child
    assert await there.read(lambda tx: children.parent_of(tx, child)) is None


async def test_turns_tell_standing_still_from_not_living(scene: Scene) -> None:
    """A checkpoint in the first turn; in the second a death with a restore; in the third a node's death alone."""
    second = 1_000_000_000

    def event(tx: Transaction, kind: Kind, incarnation: int, at: int, **data: object) -> None:
        draft = EventDraft(kind=kind, incarnation=incarnation, data=data)
        log.append(tx, **scene.owner, drafts=[draft], wall_ns=NOW + at * second)

    def work(tx: Transaction) -> None:
        event(tx, Kind.RECOVERY_CHOSEN, 1, 0, mode="boot")
        call_id = scene.answer(tx, b"1")
        point = replace(scene.checkpoint(1, calls.load_call(tx, call_id).intended_seq), freeze_ns=7)
        checkpoints.commit(tx, **scene.owner, checkpoint=point, wall_ns=NOW)
        scene.answer(tx, b"2")
        event(tx, Kind.INCARNATION_ENDED, 1, 3)
        event(tx, Kind.LEASE_ACQUIRED, 1, 4)
        event(tx, Kind.RECOVERY_CHOSEN, 2, 5, mode="restore")
        scene.answer(tx, b"3")
        event(tx, Kind.LEASE_ACQUIRED, 2, 6)
        event(tx, Kind.RECOVERY_CHOSEN, 2, 60, mode="adopt")

    await scene.write(work)
    listed = await scene.read(lambda tx: turns.list_turns(tx, scene.session_id))
    assert [(turn.frozen_ns, turn.down_ns) for turn in listed] == [(7, 0), (0, 5 * second), (0, 0)]


async def test_unknown_turn_is_not_found(scene: Scene) -> None:
    await converse(scene, CodingAgent(), 1)
    for number in (0, -1, 2):
        with pytest.raises(NotFound):
            await scene.read(lambda tx, number=number: turns.read_turn(tx, scene.session_id, number))


async def test_search_finds_new_text_once_in_the_turn_that_brought_it(scene: Scene, tmp_path: Path) -> None:
    home = Home(tmp_path)
    agent = CodingAgent()
    await converse(scene, agent, 2)
    assert await found(scene, home, "nowhere") == []
    agent.say("the quick brown platypus")
    await converse(scene, agent, 3)
    assert await found(scene, home, "platypus") == [(3, "request")]
    assert await found(scene, home, "quick brown", "platy*") == [(3, "request")]
    assert await found(scene, home, '"quick" OR platypus') == []


async def test_two_searches_at_once_index_everything_once(scene: Scene, tmp_path: Path) -> None:
    home = Home(tmp_path)
    agent = CodingAgent()
    agent.say("platypus")
    await converse(scene, agent, 3)
    async with asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(found(scene, home, "platypus")) for _ in range(2)]
    assert {tuple(task.result()) for task in both} == {((1, "request"),)}
    assert await found(scene, home, "platypus") == [(1, "request")]


async def imported(path: Path, lines: list[str]) -> tuple[Database, str]:
    database = await open_database(f"sqlite://{path}/torpor.db", clock=FakeClock())
    try:
        return database, await database.write(lambda tx: transfer.import_lines(tx, lines), durable=True)
    except BaseException:
        await database.close()
        raise


async def exported(scene: Scene) -> list[str]:
    lines = await scene.read(lambda tx: list(transfer.export_lines(tx, scene.session_id)))
    return [json.dumps(line) for line in lines]


async def test_export_comes_back_with_the_same_chain_and_bytes(scene: Scene, tmp_path: Path) -> None:
    made = await converse(scene, CodingAgent(), 3)
    lines = await exported(scene)
    other, session_id = await imported(tmp_path / "other", lines)
    assert session_id == scene.session_id
    before = await scene.read(lambda tx: log.events(tx, scene.session_id))
    assert await other.read(lambda tx: log.events(tx, scene.session_id)) == before
    assert await other.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []
    for call_id, body, _ in made:
        assert (await other.read(lambda tx, call_id=call_id: requests.get_request(tx, call_id)))[1] == body
    with pytest.raises(Conflict):
        await other.write(lambda tx: transfer.import_lines(tx, lines), durable=True)
    await other.close()


async def test_an_imported_session_cost_what_it_cost(scene: Scene, tmp_path: Path) -> None:
    bill = Bill(cost_nanousd=1_234_567, prices="genai-prices 1")
    call_id = await scene.write(lambda tx: scene.answer(tx, b"dear", bill=bill))
    other, _ = await imported(tmp_path / "other", await exported(scene))
    assert (await other.read(lambda tx: calls.load_call(tx, call_id))).attempts[0].cost_nanousd == 1_234_567
    assert await other.read(lambda tx: budgets.costs(tx)) == {scene.session_id: 1_234_567}
    await other.close()


async def test_an_export_from_before_there_were_costs_is_read(scene: Scene, tmp_path: Path) -> None:
    await converse(scene, CodingAgent(), 1)
    lines = [json.loads(line) for line in await exported(scene)]
    for line in lines:
        line.pop("cost_nanousd", None)
        line.pop("reserved_nanousd", None)
        line.pop("budget_nanousd", None)
    other, session_id = await imported(tmp_path / "other", list(map(json.dumps, lines)))
    assert session_id == scene.session_id
    await other.close()


async def test_import_of_anything_else_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    await converse(scene, CodingAgent(), 1)
    lines = await exported(scene)
    event = next(at for at, line in enumerate(lines) if '"row": "event"' in line)
    changed = lines[event].replace('"incarnation": 0', '"incarnation": 7')
    assert changed != lines[event]
    wrong = {
        "empty": [],
        "cut off": lines[:-1],
        "a line gone": [*lines[:5], *lines[6:]],
        "no JSON": [lines[0], "{"],
        "changed": [*lines[:event], changed, *lines[event + 1 :]],
        "of another session": [lines[0], lines[1].replace(scene.session_id, "ses_other"), *lines[2:]],
        "a table of its own": [lines[0], json.dumps({"row": "session"}), *lines[1:]],
    }
    for name, candidate in wrong.items():
        with pytest.raises((InvalidInput, Conflict)):
            await imported(tmp_path / name, candidate)
        database = await open_database(f"sqlite://{tmp_path / name}/torpor.db", clock=FakeClock())
        assert await database.read(lambda tx: tx.one("session/find_by_id", session_id=scene.session_id)) is None, name
        await database.close()


async def test_signed_head_holds_as_the_log_goes_on_and_not_when_it_is_another(scene: Scene, tmp_path: Path) -> None:
    key = tmp_path / "key"
    heads.new_key(key)
    assert key.stat().st_mode & 0o777 == 0o600
    await converse(scene, CodingAgent(), 1)
    signed = heads.sign(await scene.read(lambda tx: heads.read_head(tx, scene.session_id)), key)
    await converse(scene, CodingAgent(), 1)
    await scene.read(lambda tx: heads.check(tx, scene.session_id, signed, key=signed["key"]))
    heads.new_key(tmp_path / "other")
    other = heads.sign(await scene.read(lambda tx: heads.read_head(tx, scene.session_id)), tmp_path / "other")
    for wrong in ({**signed, "hash": other["hash"]}, {**signed, "seq": 2}, {**signed, "signature": other["signature"]}):
        with pytest.raises(Damaged):
            await scene.read(lambda tx, wrong=wrong: heads.check(tx, scene.session_id, wrong, key=None))
    with pytest.raises(Damaged):
        await scene.read(lambda tx: heads.check(tx, scene.session_id, other, key=signed["key"]))
    with pytest.raises(InvalidInput):
        await scene.read(lambda tx: heads.check(tx, scene.session_id, {"seq": 1}, key=None))


async def test_key_that_others_may_read_is_refused(scene: Scene, tmp_path: Path) -> None:
    key = tmp_path / "key"
    heads.new_key(key)
    key.chmod(0o644)
    head = await scene.read(lambda tx: heads.read_head(tx, scene.session_id))
    with pytest.raises(InvalidInput):
        heads.sign(head, key)
    with pytest.raises(InvalidInput):
        heads.new_key(key)


async def test_spans_have_the_conventions_names_and_no_contents(scene: Scene) -> None:
    await converse(scene, CodingAgent(), 2)
    root = await scene.read(lambda tx: spans.session_spans(tx, scene.session_id, contents=False))
    assert root.attributes["gen_ai.operation.name"] == "invoke_agent"
    operations = [span.attributes["gen_ai.operation.name"] for span in root.below]
    assert operations == ["chat", "execute_tool", "chat"]
    assert root.below[0].attributes["gen_ai.provider.name"] == "anthropic"
    assert root.below[0].attributes["gen_ai.response.finish_reasons"] == ["tool_use"]
    assert not any("messages" in name for span in root.below for name in span.attributes)
    assert root.start_ns == NOW


@pytest.mark.parametrize("kind", [Kind.NOTE_ADDED, Kind.AGENT_TOLD])
async def test_notes_are_found_until_they_are_erased(scene: Scene, tmp_path: Path, kind: Kind) -> None:
    home = Home(tmp_path)
    await scene.write(lambda tx: scene.note(tx, "saw a quick platypus", kind=kind))
    await scene.write(lambda tx: scene.old_note(tx, "saw an old wombat"))
    assert await found(scene, home, "platypus") == [(1, "note")]
    assert await found(scene, home, "wombat") == [(2, "note")]

    def erase(tx: Transaction) -> None:
        plan = redaction.plan_pattern(tx, scene.session_id, re.compile(rb"plat\w+"))
        redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW)

    await scene.write(erase)
    home.drop_search_index()
    assert await found(scene, home, "platypus") == []
    assert await found(scene, home, "quick") == [(1, "note")]


async def test_an_exported_note_comes_back_as_it_is_by_then(scene: Scene, tmp_path: Path) -> None:
    event = await scene.write(lambda tx: scene.note(tx, "the platypus"))
    before = await exported(scene)

    def erase(tx: Transaction) -> None:
        plan = redaction.plan_pattern(tx, scene.session_id, re.compile(rb"plat\w+"))
        redaction.apply(tx, **scene.owner, plan=plan, wall_ns=NOW)

    await scene.write(erase)
    for name, lines, text in (("one", before, "the platypus"), ("two", await exported(scene), "the ********")):
        other, _ = await imported(tmp_path / name, lines)
        assert (await other.read(lambda tx: notes.read(tx, event))).text == text
        await other.close()


async def test_redaction_drops_the_search_index(scene: Scene, tmp_path: Path) -> None:
    home = Home(tmp_path)
    agent = CodingAgent()
    agent.say("platypus")
    await converse(scene, agent, 1)
    assert await found(scene, home, "platypus")
    home.drop_search_index()
    assert not list(tmp_path.glob("search.db*"))
    assert await found(scene, home, "platypus") == [(1, "request")]
