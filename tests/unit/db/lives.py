"""What a state machine of sessions stands on: a real database, sessions with a model each, and what must be so."""

import asyncio
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine, invariant
from tests.unit.db.life import Life
from tests.unit.db.scene import Scene, StaleFirst

from torpor.core.errors import Superseded, TorporError
from torpor.core.events import Kind
from torpor.core.ids import CallId, SessionId, WaitpointId
from torpor.core.session import ENDED, TRANSITIONS, SessionStatus
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import budgets, log, messages, sessions, sleeping, verify, waitpoints
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock

T = TypeVar("T")
Owner = dict[str, Any]


class LivesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="torpor-test-")
        path = f"{self.directory}/torpor.db"
        self.clock = FakeClock()
        self.runner = asyncio.Runner()
        self.database = self.runner.run(open_database(f"sqlite://{path}", clock=self.clock))
        self.onlooker = sqlite3.connect(path)
        self.lives: list[Life] = []

    def teardown(self) -> None:
        try:
            for life in self.lives:
                self.check_log(life)
        finally:
            self.onlooker.close()
            self.runner.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.directory)

    @property
    def now(self) -> int:
        return self.clock.wall_ns()

    def life(self, which: int, *statuses: SessionStatus) -> Life | None:
        among = [life for life in self.lives if not statuses or life.status in statuses]
        return among[which % len(among)] if among else None

    def waiting(self, which: int) -> Life:
        """Any, but most often one that sleeps over a waitpoint."""
        sleepers = (
            [life for life in self.lives if life.status is SessionStatus.ASLEEP and life.open] if which % 4 else []
        )
        among = sleepers or [life for life in self.lives if life.points] or self.lives
        return among[which % len(among)]

    def young(self) -> list[Life]:
        return [life for life in self.lives if life.parent is not None and life.status not in ENDED]

    def point(self, life: Life, which: int) -> Waitpoint | None:
        points = life.open if which % 4 else list(life.points.values())
        return points[which % len(points)] if points else None

    def commit(self, work: Callable[[Transaction], T]) -> T:
        return self.runner.run(self.database.write(work, durable=False, brief=True))

    def read(self, work: Callable[[Transaction], T]) -> T:
        return self.runner.run(self.database.read(work))

    def owner(self, life: Life, *, ago: int = 0) -> Owner:
        return {"session_id": life.session_id, "owner_token": life.token - ago}

    def write(self, life: Life, work: Callable[[Transaction, Owner], T]) -> T:
        """As its owner; but first as the one before, whose every statement has to do nothing."""
        if life.token:
            self.refuse(Superseded, lambda tx: work(tx, self.owner(life, ago=1)))
        return self.commit(lambda tx: work(StaleFirst(tx), self.owner(life)))

    def refuse(self, error: type[TorporError], work: Callable[[Transaction], object], code: str | None = None) -> None:
        """What is refused has written nothing, although the transaction goes on and is committed."""
        before = self.version()
        raised = self.commit(lambda tx: _failure(work, tx))
        assert isinstance(raised, error), raised
        assert code is None or raised.code == code
        assert self.version() == before

    def version(self) -> int:
        """Another number as soon as anything was committed."""
        return int(self.onlooker.execute("PRAGMA data_version").fetchone()[0])

    def intend(self, life: Life) -> CallId:
        """A call of the agent's, which hangs in the log."""
        return self.write(life, lambda tx, owner: self.scene(owner).intend(tx, is_llm=False).call_id)

    def scene(self, owner: Owner) -> Scene:
        return Scene(self.database, owner["session_id"], owner["owner_token"])

    def due(self, seconds: float | None) -> int | None:
        return None if seconds is None else self.now + int(seconds * 1e9)

    def session(self, life: Life) -> sessions.Session:
        return self.read(lambda tx: sessions.get(tx, life.session_id))

    def rows(self, life: Life) -> list[Waitpoint]:
        return self.read(lambda tx: waitpoints.list_of_session(tx, life.session_id))

    def resolved_now(self, life: Life, among: Sequence[Waitpoint]) -> list[Waitpoint]:
        ids = {point.waitpoint_id for point in among}
        return [point for point in self.rows(life) if point.waitpoint_id in ids and not point.is_open]

    def resolution_of(self, life: Life, waitpoint_id: WaitpointId) -> dict[str, Any]:
        found = self.read(lambda tx: waitpoints.find(tx, life.session_id, waitpoint_id))
        assert found is not None and found.resolution is not None
        return dict(found.resolution)

    def child_has_ended(self, life: Life, point: Waitpoint) -> bool:
        if point.kind is not WaitpointKind.CHILD:
            return False
        child_id = SessionId(point.data["child"])
        child = next((other for other in self.lives if other.session_id == child_id), None)
        return child is None or child.has_ended

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.read(self.check)

    def check(self, tx: Transaction) -> None:
        for life in self.lives:
            row = sessions.get(tx, life.session_id)
            assert (row.status, row.owner_token, row.incarnation) == (life.status, life.token, life.incarnation)
            assert (row.budget_nanousd, row.exit_status) == (life.limit, life.exit_status)
            assert budgets.account(tx, life.session_id) == life.account(self.lives)
            points = waitpoints.list_of_session(tx, life.session_id)
            told = {waitpoint_id: life.resolutions.get(waitpoint_id) for waitpoint_id in life.points}
            assert {point.waitpoint_id: point.resolution for point in points} == told
            inbox = messages.list_after(tx, life.session_id, messages.Box.IN)
            assert [(m.number, m.call_id) for m in inbox] == list(enumerate(life.inbox, 1))
        self.check_wakes(tx)

    def check_wakes(self, tx: Transaction) -> None:
        """Who has to be due is, nobody else, and the next time is no later than any sleeper's."""
        due = {session.session_id for session in sleeping.list_due(tx, self.now)}
        due_ns, count = sleeping.next_wake(tx, self.now)
        for life in self.lives:
            must = life.must_be_due(self.now)
            assert must is None or (life.session_id in due) == must, life
        sleepers = [life for life in self.lives if life.status is SessionStatus.ASLEEP and not life.is_stopped]
        assert count >= len(sleepers)
        times = [life.wakes_ns for life in sleepers if not life.must_be_due(self.now) and life.wakes_ns is not None]
        assert not times or (due_ns is not None and due_ns <= min(times))

    def check_log(self, life: Life) -> None:
        """Without a gap, each hash behind the one before, and every status by the table."""
        assert self.read(lambda tx: verify.verify_chain(tx, life.session_id)) == []
        events = self.read(lambda tx: log.events(tx, life.session_id))
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        moves = [(event.data["from"], event.data["to"]) for event in events if event.kind is Kind.SESSION_STATUS]
        assert all(SessionStatus(after) in TRANSITIONS[SessionStatus(before)] for before, after in moves)
        path = [SessionStatus.CREATED.value, *(after for _, after in moves)]
        assert [before for before, _ in moves] == path[:-1]
        assert path[-1] == life.status
        resolved = [event.data["waitpoint"] for event in events if event.kind is Kind.WAITPOINT_RESOLVED]
        assert Counter(resolved) == Counter(list(life.resolutions))
        tokens = [event.data["owner_token"] for event in events if event.kind is Kind.LEASE_ACQUIRED]
        assert tokens == list(range(1, life.token + 1))


def _failure(work: Callable[[Transaction], object], tx: Transaction) -> TorporError | None:
    try:
        work(tx)
    except TorporError as error:
        return error
    return None
