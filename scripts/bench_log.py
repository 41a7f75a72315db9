"""Measure what a long session costs in the database, and how fast one turn is read.

    PYTHONPATH=src python scripts/bench_log.py --turns 1000

Writes the session as the gateway does (the same functions, durably where it is durable), then re-assembles every
request byte for byte and verifies the log. B/turn is the whole database's growth without the answers' raw bytes, the
lines below say where all bytes are. Exits with 1 when a target is missed.
"""

import argparse
import asyncio
import hashlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from torpor.core.call import RequestKey
from torpor.core.clock import SystemClock
from torpor.core.ids import CallId, NodeId, SessionId, StreamId, new_call_id, new_session_id
from torpor.db import calls, requests, sessions, verify
from torpor.db.calls import Chunk, NewCall
from torpor.db.database import Database, Transaction, open_database
from torpor.testing.coding_agent import REQUEST_HEAD, RESPONSE_HEAD, CodingAgent

TURN_BYTES_MAX = 4096
READ_SECONDS_MAX = 0.050


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    print(
        f"{'text':<14}{'turns':>7}{'sent':>10}{'stored':>10}{'answers':>10}{'B/turn':>8}{'1st half':>9}{'2nd half':>9}"
        f"{'write':>9}{'read p50':>9}{'read max':>9}{'(cpu)':>9}{'verify':>9}"
    )
    missed = False
    for plain in (True, False):
        with tempfile.TemporaryDirectory(prefix="bench-log-", dir=arguments.disk) as directory:
            missed |= asyncio.run(Bench(Path(directory), plain=plain).run(arguments.turns))
    sys.exit(1 if missed else 0)


class Bench:
    """One session in a database of its own."""

    def __init__(self, directory: Path, *, plain: bool) -> None:
        self.path = directory / "torpor.db"
        self.plain = plain
        self.clock = SystemClock()
        self.sent_bytes = self.answer_bytes = 0
        self.write_seconds: list[float] = []
        self.written: list[tuple[CallId, str]] = []

    async def run(self, turns: int) -> bool:
        """Whether a target was missed."""
        database = await open_database(f"sqlite://{self.path}", clock=self.clock)
        try:
            session_id, token = await self.create(database)
            agent = CodingAgent(plain=self.plain)
            await self.turn(database, session_id, token, agent)  # the fixed part is stored once
            marks = [self.stored()]
            answers = [self.answer_bytes]
            for half in (turns // 2, turns - turns // 2):
                for _ in range(half):
                    await self.turn(database, session_id, token, agent)
                marks.append(self.stored())
                answers.append(self.answer_bytes)
            elapsed, processor = zip(
                *[await self.read(database, call_id, digest) for call_id, digest in self.written], strict=True
            )
            began = time.perf_counter()
            problems = await database.read(lambda tx: verify.verify_chain(tx, session_id))
            verified = time.perf_counter() - began
        finally:
            await database.close()
        assert not problems, problems
        halves = [
            (marks[n + 1] - marks[n] - (answers[n + 1] - answers[n])) / half
            for n, half in enumerate((turns // 2, turns - turns // 2))
        ]
        per_turn = (marks[2] - marks[0] - (answers[2] - answers[0])) / turns
        print(
            f"{'words' if self.plain else 'random':<14}{turns:>7}{_mb(self.sent_bytes):>10}{_mb(marks[2]):>10}"
            f"{_mb(self.answer_bytes):>10}{per_turn:>8.0f}{halves[0]:>9.0f}{halves[1]:>9.0f}"
            f"{statistics.median(self.write_seconds) * 1e3:>6.1f} ms{statistics.median(elapsed) * 1e3:>6.1f} ms"
            f"{max(elapsed) * 1e3:>6.1f} ms{max(processor) * 1e3:>6.1f} ms{verified:>7.2f} s"
        )
        self.tell_tables()
        return per_turn > TURN_BYTES_MAX or statistics.quantiles(processor, n=100)[-1] > READ_SECONDS_MAX

    async def create(self, database: Database) -> tuple[SessionId, int]:
        session_id = new_session_id(self.clock.wall_ns())

        def work(tx: Transaction) -> int:
            sessions.create(tx, session_id=session_id, name=None, spec={}, wall_ns=self.clock.wall_ns())
            node = NodeId("node_1")
            return sessions.acquire(
                tx,
                session_id=session_id,
                seen_token=0,
                node_id=node,
                boot_id="boot",
                pid=1,
                wall_ns=self.clock.wall_ns(),
            )

        return session_id, await database.write(work, durable=True)

    async def turn(self, database: Database, session_id: SessionId, token: int, agent: CodingAgent) -> None:
        """One call, in the transactions that the gateway uses."""
        body = agent.body()
        pieces = agent.answer()
        owner: dict[str, Any] = {"session_id": session_id, "owner_token": token}
        digest = hashlib.sha256(body).hexdigest()
        call = NewCall(
            call_id=new_call_id(self.clock.wall_ns()),
            key=RequestKey(exact=digest, canonical=digest[::-1], logical=digest),
            dialect="anthropic",
            method=REQUEST_HEAD.method,
            target=REQUEST_HEAD.target,
            model="claude-sonnet-4-5",
            incarnation=1,
            stream=StreamId(len(self.written) + 1),
            request_bytes=len(body) + 900,
        )
        began = time.perf_counter()
        prepared = requests.prepare(body)

        async def write(work: Callable[[Transaction, int], object], *, durable: bool) -> None:
            await database.write(lambda tx: work(tx, self.clock.wall_ns()), durable=durable)

        await write(
            lambda tx, now: calls.intend(tx, **owner, call=call, head=REQUEST_HEAD, body=prepared, wall_ns=now),
            durable=True,
        )
        owner["call_id"] = call.call_id
        await write(lambda tx, now: calls.mark_sent(tx, **owner, wall_ns=now), durable=True)
        await write(
            lambda tx, now: calls.record_head(tx, **owner, attempt=1, head=RESPONSE_HEAD, wall_ns=now), durable=False
        )
        chunks = [
            Chunk(number=number, offset_ns=2_000_000_000 + number * 20_137_911, data=data)
            for number, data in enumerate(pieces)
        ]
        await write(lambda tx, _: calls.append_chunks(tx, **owner, attempt=1, chunks=chunks), durable=False)
        usage = {"input_tokens": 31_000, "output_tokens": 150, "cache_read_input_tokens": 30_000}
        await write(
            lambda tx, now: calls.complete(
                tx, **owner, usage=usage, facts={"status": 200, "finish_reason": "tool_use"}, wall_ns=now
            ),
            durable=True,
        )
        self.write_seconds.append(time.perf_counter() - began)
        self.written.append((call.call_id, digest))
        self.sent_bytes += len(body)
        self.answer_bytes += sum(map(len, pieces))

    async def read(self, database: Database, call_id: CallId, digest: str) -> tuple[float, float]:
        """Seconds, elapsed and of a processor, to read a request and its answer; the request is what was sent."""
        began = (time.perf_counter(), time.process_time())

        def work(tx: Transaction) -> bytes:
            calls.load_chunks(tx, call_id, 1)
            return requests.get_request(tx, call_id)[1]

        body = await database.read(work)
        seconds = (time.perf_counter() - began[0], time.process_time() - began[1])
        assert hashlib.sha256(body).hexdigest() == digest, f"{call_id} came back with other bytes"
        return seconds

    def stored(self) -> int:
        """Bytes of the database, without its free pages and its WAL."""
        with closing(sqlite3.connect(self.path)) as connection:
            pages, free, size = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def tell_tables(self) -> None:
        """Where the bytes are."""
        with closing(sqlite3.connect(self.path)) as connection:
            try:
                rows = connection.execute(
                    "SELECT name, SUM(pgsize) FROM dbstat GROUP BY name ORDER BY 2 DESC"
                ).fetchall()
            except sqlite3.OperationalError:
                return
        print(
            "  " + ", ".join(f"{name} {size / len(self.written):.0f}" for name, size in rows[:9]) + "  (bytes a turn)"
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
