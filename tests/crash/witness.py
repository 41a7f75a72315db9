"""The witness outside: checks the ten invariants from what the model counted, what the log says and what is left.

It trusts neither the node nor the agent: attempts are counted by the model server, files are pulled from the store,
and the transcript is rebuilt from the logged bytes.
"""

import asyncio
import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from tests.stage import Stage

from torpor.core.call import Call
from torpor.core.clock import SystemClock
from torpor.db import calls, requests, sessions
from torpor.db.database import Transaction, open_database


def check_session(stage: Stage, session: str, *, turns: int, node_kills: int) -> dict[str, int]:
    """Assert the invariants of an ended session; gives what was counted."""
    events = stage.events(session)
    counted = check_attempts(stage, events, node_kills=node_kills)
    check_order(events)
    check_agent(stage, session, turns=turns)
    check_files(stage, session, turns=turns)
    check_transcript(stage, session)
    assert "is whole" in stage.torpor("log", session, "--verify").stdout
    check_nothing_left(stage)
    return counted


def check_attempts(stage: Stage, events: list[dict[str, Any]], *, node_kills: int) -> dict[str, int]:
    """Invariants 1 and 6: attempts per call are 1 plus the node deaths while it was open; nothing is paid for twice."""
    sent = Counter(event["call"] for event in events if event["kind"] == "call.sent")
    torn = Counter(event["call"] for event in events if event["kind"] == "call.torn")
    completed = Counter(event["call"] for event in events if event["kind"] == "call.completed")
    for call, attempts in sent.items():
        assert attempts == 1 + torn[call], f"call {call} was sent {attempts} times and torn {torn[call]} times"
        assert completed[call] == 1, f"call {call} completed {completed[call]} times"
    assert sum(torn.values()) <= node_kills, "more calls were torn than nodes were killed"
    asked = Counter(line["digest"] for line in stage.witness if line["event"] == "start")
    assert len(asked) == len(sent), f"{len(asked)} different requests reached the model, the log has {len(sent)} calls"
    assert sum(asked.values()) <= sum(sent.values()), "the model was asked more often than the log knows"
    assert sum(asked.values()) >= len(sent)
    return {"calls": len(sent), "sent": sum(sent.values()), "torn": sum(torn.values()), "asked": sum(asked.values())}


def check_order(events: list[dict[str, Any]]) -> None:
    """Invariants 4 and 10: no gap in seq, tokens and incarnations only rise, a cut is before its commit."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    tokens = [event["data"]["owner_token"] for event in events if event["kind"] == "lease.acquired"]
    assert tokens == sorted(set(tokens))
    started = [event["incarnation"] for event in events if event["kind"] == "incarnation.started"]
    assert started == sorted(set(started))
    for event in events:
        if event["kind"] == "checkpoint.committed":
            assert event["data"]["seq"] < event["seq"]
        if event["parent_seq"] is not None:
            assert event["parent_seq"] < event["seq"]


def check_agent(stage: Stage, session: str, *, turns: int) -> None:
    """Invariant 9: memory, the subprocess at the end of a pipe and an open SQLite database agree with the output."""
    text = stage.torpor("output", session).stdout
    report = json.loads(text.rpartition("[report] ")[2])
    assert report.pop("background") == {"ticker": None}
    assert report == dict.fromkeys(("memory", "mapped", "sqlite", "subprocess"), turns)
    steps = [line for line in text.splitlines() if line.startswith("[tool ")]
    assert [line.split("]")[0] for line in steps] == [f"[tool {number}" for number in range(1, turns + 1)], text


def check_files(stage: Stage, session: str, *, turns: int) -> None:
    """Invariant 9: every step left its mark in the workspace exactly once."""
    pulled = stage.directory / f"pulled-{session}"
    stage.torpor("pull", session, str(pulled))
    trail = (pulled / "trail.txt").read_text().split()
    assert trail == [str(number) for number in range(2, turns) if number % 4 in (2, 3)], trail
    assert int.from_bytes((pulled / "counter.bin").read_bytes(), "little") == turns
    journal = _rows(pulled / "journal.db", "SELECT number FROM step ORDER BY number")
    assert journal == [(number,) for number in range(1, turns + 1)]
    noted = _rows(pulled / "steps.db", "SELECT number FROM step ORDER BY number")
    assert noted == [(number,) for number in range(5, turns, 4)]
    modules = sorted(int(path.stem.partition("_")[2]) for path in (pulled / "src").glob("module_*.py"))
    assert modules == list(range(4, turns, 4))


def _rows(database: Path, query: str) -> list[Any]:
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def check_transcript(stage: Stage, session: str) -> None:
    """Invariant 2: what the agent says it was answered is what the log says it was answered, word by word."""
    asked, answered = asyncio.run(_transcript(stage, session))
    said = [message["content"] for message in asked if message["role"] == "assistant"]
    assert said == answered[:-1], "the agent's conversation is not the log's"


async def _transcript(stage: Stage, session: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of the session's last request, and the texts of all its answers in order."""
    database = await open_database(f"sqlite://{stage.home}/torpor.db", clock=SystemClock())

    def work(tx: Transaction) -> tuple[list[dict[str, Any]], list[str]]:
        session_id = sessions.find(tx, session).session_id
        made = sorted(calls.load_calls(tx, session_id), key=lambda call: call.intended_seq)
        _, body = requests.get_request(tx, made[-1].call_id)
        return json.loads(body)["messages"], [_text(tx, call) for call in made]

    try:
        return await database.read(work)
    finally:
        await database.close()


def _text(tx: Transaction, call: Call) -> str:
    assert call.answered
    chunks = calls.load_chunks(tx, call.call_id, call.attempts[-1].number)
    text = ""
    for line in b"".join(chunk.data for chunk in chunks).decode().splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text += choice["delta"].get("content") or ""
    return text


def check_nothing_left(stage: Stage) -> None:
    """An ended session has no process and no staged image."""
    assert stage.sandbox_pids() == []
    # Homes of other tests come and go meanwhile, which os.walk passes over.
    staged = {name for _, directories, _ in os.walk("/dev/shm") for name in directories}
    assert staged.isdisjoint(row["session"] for row in stage.rows("ls"))
