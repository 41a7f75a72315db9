"""Every verb that moves a session's rows, in any order, against a real SQLite database and a model of a few lines.

Whatever happens: only transitions of the table, and a refused one leaves no row; each waitpoint is resolved once at
most; a session that sleeps for something is due as soon as that has come and not before, one that a person stopped
never is, nor one that has ended or is lost; the log has no gap; nothing is written with a superseded token.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from tests.unit.db.life import ALIVE, GIVEN_UP, Life
from tests.unit.db.lives import LivesMachine, Owner
from tests.unit.db.scene import HEAD, acquire

from torpor.core.errors import Conflict, InvalidInput, Superseded
from torpor.core.ids import CallId, new_session_id
from torpor.core.money import Bill, Verdict, decide
from torpor.core.session import ENDED, SessionStatus, may_follow
from torpor.core.waitpoint import TIMED_OUT, Question, Waitpoint, WaitpointKind
from torpor.db import budgets, calls, children, messages, questions, sessions, sleeping, waitpoints
from torpor.db.children import OnCancel
from torpor.db.database import Transaction

S = SessionStatus
LIVES_MAX = 5
DAY = 86_400.0
WHICH = st.integers(0, 10**6)
RARELY = st.sampled_from([True, False, False, False])
WAY_UP = {S.CREATED: S.RUNNING, S.HIBERNATING: S.RUNNING, S.ASLEEP: S.WAKING, S.WAKING: S.RUNNING} | {
    S.RECOVERING: S.RUNNING,
    S.LOST: S.RECOVERING,
}
LATER = st.sampled_from([None, 0.0, 1.0, 60.0, 30 * DAY, 3650 * DAY])


class SessionMachine(LivesMachine):
    # Beginning, and whose it is.

    @initialize()
    def begin(self) -> None:
        self.create(100)
        self.spawn(0, waits=True)
        self.create(None)

    @precondition(lambda self: len(self.lives) < LIVES_MAX)
    @rule(limit=st.sampled_from([None, 100]))
    def create(self, limit: int | None) -> None:
        life = Life(session_id=new_session_id(self.now), limit=limit)
        made: dict[str, Any] = {"session_id": life.session_id, "name": None, "spec": {}, "budget_nanousd": limit}
        self.commit(lambda tx: sessions.create(tx, **made, wall_ns=self.now))
        self.lives.append(life)
        self.acquire(life)

    def acquire(self, life: Life) -> None:
        """Of two who saw the same token one gets the session."""
        seen = life.token
        life.token = self.commit(lambda tx: acquire(tx, life.session_id, seen_token=seen))
        assert life.token == seen + 1
        self.refuse(Superseded, lambda tx: acquire(tx, life.session_id, seen_token=seen))

    @rule(which=WHICH)
    def change_hands(self, which: int) -> None:
        life = self.lives[which % len(self.lives)]
        self.write(life, lambda tx, owner: sessions.release(tx, **owner, wall_ns=self.now))
        self.acquire(life)

    @rule(seconds=st.sampled_from([0.5, 60.0, DAY, 31 * DAY, 4000 * DAY, -60.0, -DAY]))
    def time_passes(self, seconds: float) -> None:
        """Or somebody sets the clock back."""
        self.clock.jump(seconds)

    # Moving along the table.

    @rule(which=WHICH, status=st.sampled_from(list(S)), attended=st.booleans(), ends=RARELY)
    def try_to_move(self, which: int, status: SessionStatus, attended: bool, ends: bool) -> None:
        """To any status; but few sessions end, or there would be nothing to see."""
        life = self.lives[which % len(self.lives)]
        if ends or status not in GIVEN_UP or not may_follow(life.status, status):
            self.move(life, status, attended=attended)

    def move(self, life: Life, status: SessionStatus, *, attended: bool) -> None:
        """As its owner does it: with what the move says about waking."""
        exit_status = 3 if status in ENDED else None

        def work(tx: Transaction, owner: Owner) -> None:
            set_to: dict[str, Any] = {"status": status, "exit_status": exit_status, "wall_ns": self.now}
            sessions.set_status(tx, **owner, **set_to)
            if status is S.RUNNING:
                sleeping.set_wake(tx, **owner, wake_ns=None if attended else sleeping.NOW)
            if status is S.ASLEEP and life.status is not S.WAKING:
                sleeping.set_wake(tx, **owner, wake_ns=None)

        if not may_follow(life.status, status):
            code = "session_transition_refused"
            self.refuse(Conflict, lambda tx: work(tx, self.owner(life)), code)
            return
        self.write(life, work)
        life.exit_status = life.exit_status if exit_status is None else exit_status
        if status is S.RUNNING:
            life.is_wanted = not attended
        if status is S.HIBERNATING:
            life.cut_seq, life.has_news = self.session(life).head_seq, False
        if status is S.ASLEEP and life.status is not S.WAKING:
            life.fall_asleep(wakes_ns=None, stopped=True)
        life.move(status)

    @rule(which=WHICH, attended=st.booleans())
    def get_up(self, which: int, attended: bool) -> None:
        life = self.lives[which % len(self.lives)]
        while life.status in WAY_UP:
            self.move(life, WAY_UP[life.status], attended=attended)

    @rule(which=WHICH, number=st.integers(-1, 2))
    def begin_incarnation(self, which: int, number: int) -> None:
        life = self.lives[which % len(self.lives)]
        begun: dict[str, Any] = {"incarnation": life.incarnation + number, "wall_ns": self.now}
        if number <= 0:
            work = lambda tx: sessions.set_incarnation(tx, **self.owner(life), **begun)  # noqa: E731
            self.refuse(Conflict, work, "incarnation_not_new")
            return
        self.write(life, lambda tx, owner: sessions.set_incarnation(tx, **owner, **begun))
        life.incarnation += number

    @rule(which=WHICH, awake_in=st.sampled_from([None, None, None, -60.0, DAY]))
    def fall_asleep(self, which: int, awake_in: float | None) -> None:
        """One that is cut; any other is refused, unless it does not get so far."""
        life = self.lives[which % len(self.lives)]
        at_latest = self.due(awake_in)
        asked: dict[str, Any] = {"cut_seq": life.cut_seq, "at_latest": at_latest, "wall_ns": self.now}
        hears = life.has_news or any(self.child_has_ended(life, point) for point in life.open)
        if life.status is S.HIBERNATING:
            slept = self.write(life, lambda tx, owner: sleeping.fall_asleep(tx, **owner, **asked))
            assert slept == (not hears)
            if slept:
                due = [point.due_ns for point in life.open if point.due_ns is not None]
                wakes_ns = min([*due, *([] if at_latest is None else [at_latest])], default=None)
                life.fall_asleep(wakes_ns=wakes_ns, stopped=not life.open and at_latest is None)
        elif not may_follow(life.status, S.ASLEEP) and not hears:
            asked["cut_seq"] = self.session(life).head_seq
            self.refuse(Conflict, lambda tx: sleeping.fall_asleep(tx, **self.owner(life), **asked))

    @rule(awake_in=st.sampled_from([None, None, None, DAY]))
    def hibernate(self, awake_in: float | None) -> None:
        """Whatever lives, without anything between its cut and its sleep."""
        self.alive(0)
        if not any(life.open for life in self.lives if life.status in ALIVE):
            self.ask(0, due_in=None, is_timer=False, waits=True)
        for life in [life for life in self.lives if life.status in ALIVE]:
            self.move(life, S.HIBERNATING, attended=True)
            self.fall_asleep(self.lives.index(life), awake_in)

    @rule(which=WHICH, status=st.sampled_from(sorted(GIVEN_UP)), ends=RARELY)
    def end(self, which: int, status: SessionStatus, ends: bool) -> None:
        """One that nobody attends, of the children if there are some."""
        among = self.young() or ([life for life in self.lives if life.status not in ENDED] if ends else [])
        if among:
            life = among[which % len(among)]
            while life.status in WAY_UP:
                self.move(life, WAY_UP[life.status], attended=False)
            if status is S.LOST:
                self.move(life, S.RECOVERING, attended=False)
            self.move(life, status, attended=False)

    @rule(which=WHICH)
    def make_due(self, which: int) -> None:
        """A person wants it to run, also one that is lost."""
        life = self.lives[which % len(self.lives)]
        if life.status not in ENDED:
            self.write(life, lambda tx, owner: sleeping.set_wake(tx, **owner, wake_ns=sleeping.NOW))
            life.make_due()

    # What it waits for.

    @rule(which=WHICH, due_in=LATER, is_timer=st.booleans(), waits=st.booleans())
    def ask(self, which: int, due_in: float | None, is_timer: bool, waits: bool) -> None:
        life = self.alive(which)
        call_id = self.intend(life)

        def work(tx: Transaction, owner: Owner) -> Waitpoint:
            made: dict[str, Any] = {"call_id": call_id, "due_ns": self.due(due_in), "wall_ns": self.now}
            if is_timer:
                point = waitpoints.create(tx, **owner, kind=WaitpointKind.TIMER, **made)
            else:
                point = questions.ask(tx, **owner, question=Question(text="Deploy?", choices=["yes", "no"]), **made)
            if waits:
                waitpoints.wait(tx, **owner, kind=point.kind, wall_ns=self.now)
            return point

        life.add(self.write(life, work), waits=waits)

    @rule(which=WHICH, due_in=LATER)
    def receive(self, which: int, due_in: float | None) -> None:
        """The first message that no call handled, else a waitpoint for the next."""
        life = self.alive(which)
        call_id = self.intend(life)
        waiting: dict[str, Any] = {"kind": WaitpointKind.MESSAGE, "call_id": call_id, "due_ns": self.due(due_in)}

        def work(tx: Transaction, owner: Owner) -> messages.Message | Waitpoint:
            taken = messages.take(tx, **owner, call_id=call_id)
            if taken is not None:
                again = messages.take(tx, **owner, call_id=call_id)
                assert again is not None and again.number == taken.number
                return taken
            point = waitpoints.create(tx, **owner, **waiting, wall_ns=self.now)
            waitpoints.wait(tx, **owner, kind=WaitpointKind.MESSAGE, wall_ns=self.now)
            return point

        got = self.write(life, work)
        if isinstance(got, Waitpoint):
            assert None not in life.inbox
            life.add(got)
        else:
            assert got.number == life.inbox.index(None) + 1
            life.inbox[got.number - 1] = call_id

    @precondition(lambda self: len(self.lives) < LIVES_MAX)
    @rule(which=WHICH, waits=st.booleans())
    def spawn(self, which: int, waits: bool) -> None:
        life = self.alive(which)
        call_id, child = self.intend(life), Life(session_id=new_session_id(self.now), parent=life)
        self.commit(lambda tx: sessions.create(tx, session_id=child.session_id, name=None, spec={}, wall_ns=self.now))

        def work(tx: Transaction, owner: Owner) -> Waitpoint:
            kin: dict[str, Any] = {"kind": WaitpointKind.CHILD, "call_id": call_id, "data": {"child": child.session_id}}
            point = waitpoints.create(tx, **owner, **kin, wall_ns=self.now)
            bound: dict[str, Any] = {"child_id": child.session_id, "waitpoint_id": point.waitpoint_id}
            children.add(tx, **owner, **bound, on_cancel=OnCancel.CANCEL)
            if waits:
                waitpoints.wait(tx, **owner, kind=WaitpointKind.CHILD, wall_ns=self.now)
            return point

        life.add(self.write(life, work), waits=waits)
        child.is_wanted = True
        self.lives.append(child)

    @rule(which=WHICH, need=st.sampled_from([10, 40, 90]))
    def spend(self, which: int, need: int) -> None:
        """A call of a model's, under the family's budget."""
        life = self.alive(which)
        account = life.account(self.lives)

        def work(tx: Transaction, owner: Owner) -> tuple[CallId, Verdict]:
            call_id = self.scene(owner).intend(tx).call_id
            asked: dict[str, Any] = {**owner, "call_id": call_id, "wall_ns": self.now}
            verdict = budgets.admit(tx, **asked, needed_nanousd=need)
            if verdict is Verdict.SEND:
                calls.mark_sent(tx, **asked, reserved_nanousd=need)
            elif verdict is Verdict.HOLD:
                budgets.admit(tx, **asked, needed_nanousd=need)
            return call_id, verdict

        call_id, verdict = self.write(life, work)
        assert verdict is decide(account, need)
        if verdict is Verdict.SEND:
            life.reserved[call_id] = need
        held = [point for point in self.rows(life) if point.waitpoint_id not in life.points]
        assert len(held) == (verdict is Verdict.HOLD)
        for point in held:
            life.add(point)

    # What comes for it.

    @rule(which=WHICH, cost=st.sampled_from([None, 5, 30]))
    def answer_call(self, which: int, cost: int | None) -> None:
        """A model has answered: whoever has the session, whatever its agent does meanwhile."""
        life = self.lives[which % len(self.lives)]
        if not life.reserved or life.status in ENDED or life.status is S.ASLEEP:
            return
        call_id = next(iter(life.reserved))

        def work(tx: Transaction, owner: Owner) -> None:
            asked: dict[str, Any] = {**owner, "call_id": call_id, "wall_ns": self.now}
            calls.record_head(tx, **asked, attempt=1, head=HEAD)
            calls.complete(tx, **asked, usage={}, bill=Bill(cost_nanousd=cost, prices="table"))

        self.write(life, work)
        reserved = life.reserved.pop(call_id)
        life.spent += reserved if cost is None else cost
        life.has_news = True

    @rule(which=WHICH, point=WHICH)
    def answer(self, which: int, point: int) -> None:
        """A person resolves a waitpoint, or tries to."""
        life = self.waiting(which)
        meant = self.point(life, point)
        if meant is None:
            return
        text = "yes" if meant.kind is WaitpointKind.ASK else None
        said: dict[str, Any] = {"waitpoint_id": meant.waitpoint_id, "text": text, "wall_ns": self.now}
        work = lambda tx, owner: questions.answer(tx, **owner, **said)  # noqa: E731
        is_late = meant.due_ns is not None and meant.due_ns <= self.now
        if meant.kind not in (WaitpointKind.ASK, WaitpointKind.TIMER):
            self.refuse(InvalidInput, lambda tx: work(tx, self.owner(life)), "answer_refused")
        elif is_late or meant.waitpoint_id in life.resolutions:
            before = self.version()
            with pytest.raises(Conflict) as refused:
                self.write(life, work)
            assert (refused.value.code, self.version()) == ("waitpoint_resolved", before)
        else:
            self.write(life, work)
            resolution = self.resolution_of(life, meant.waitpoint_id)
            assert list(resolution) == ([] if text is None else ["text"])
            self.resolved(life, meant, resolution)

    @rule(which=WHICH, point=WHICH)
    def resolve(self, which: int, point: int) -> None:
        """By one who read it when it was open; the first wins."""
        life = self.waiting(which)
        meant = self.point(life, point)
        if meant is None:
            return
        resolution = {"by": self.now}
        asked: dict[str, Any] = {"point": meant, "resolution": resolution, "wall_ns": self.now}
        if meant.waitpoint_id in life.resolutions:
            self.lose(life, meant)
        else:
            assert self.write(life, lambda tx, owner: waitpoints.resolve(tx, **owner, **asked))
            self.resolved(life, meant, resolution)

    def resolved(self, life: Life, point: Waitpoint, resolution: Mapping[str, Any]) -> None:
        life.resolve(point.waitpoint_id, dict(resolution))
        self.lose(life, point)

    def lose(self, life: Life, point: Waitpoint) -> None:
        """Somebody was first."""
        before = self.version()
        late: dict[str, Any] = {"point": point, "resolution": {"by": "another"}, "wall_ns": self.now}
        assert not self.write(life, lambda tx, owner: waitpoints.resolve(tx, **owner, **late))
        assert self.version() == before

    @precondition(lambda self: self.life(0, *ALIVE, S.HIBERNATING, S.WAKING, S.RECOVERING))
    @rule(which=WHICH)
    def look(self, which: int) -> None:
        """A node that has the session looks what its waitpoints came to."""
        life = self.life(which, *ALIVE, S.HIBERNATING, S.WAKING, S.RECOVERING)
        assert life is not None
        for point in life.open:
            if self.child_has_ended(life, point):
                settle = lambda tx, owner, point=point: children.settle(tx, **owner, point=point, wall_ns=self.now)  # noqa: E731
                settled = self.write(life, settle)
                assert settled.resolution is not None
                self.resolved(life, point, settled.resolution)
            elif point.due_ns is not None and point.due_ns <= self.now:
                asked: dict[str, Any] = {"point": point, "resolution": TIMED_OUT, "wall_ns": self.now}
                assert self.write(life, lambda tx, owner, asked=asked: waitpoints.resolve(tx, **owner, **asked))
                self.resolved(life, point, TIMED_OUT)

    @rule(which=WHICH)
    def send(self, which: int) -> None:
        """The call that has waited for longest handles it; with the same instant any of these."""
        life = self.waiting(which)
        work = lambda tx, owner: messages.deliver(tx, **owner, text="go on", wall_ns=self.now)  # noqa: E731
        if life.status in ENDED:
            self.refuse(Conflict, lambda tx: work(tx, self.owner(life)), "session_ended")
            return
        waiting = [point for point in life.open if point.kind is WaitpointKind.MESSAGE]
        sent = self.write(life, work)
        life.inbox.append(None)
        assert sent.number == len(life.inbox)
        if waiting:
            first = min(point.created_ns for point in waiting)
            heard = [point for point in self.rows(life) if point in self.resolved_now(life, waiting)]
            assert [point.created_ns for point in heard] == [first]
            life.inbox[-1] = heard[0].call_id
            self.resolved(life, heard[0], {"number": sent.number})

    @rule(which=WHICH, amount=st.sampled_from([0, 50]))
    def add_budget(self, which: int, amount: int) -> None:
        life = self.waiting(which)
        work = lambda tx, owner: budgets.add(tx, **owner, amount_nanousd=amount, wall_ns=self.now)  # noqa: E731
        refused = "budget_missing" if life.parent is None and life.limit is None else None
        refused = "budget_shared" if life.parent is not None and amount else refused
        if refused is not None:
            self.refuse(Conflict, lambda tx: work(tx, self.owner(life)), refused)
            return
        held = [point for point in life.open if point.kind is WaitpointKind.BUDGET]
        self.write(life, work)
        if life.limit is not None:
            life.limit += amount
        for point in held:
            self.resolved(life, point, self.resolution_of(life, point.waitpoint_id))

    @precondition(lambda self: len(self.lives) > 1)
    @rule(which=WHICH, forgets=RARELY)
    def forget(self, which: int, forgets: bool) -> None:
        """`torpor rm`, whatever its status: nobody runs it."""
        if not forgets:
            return
        among = self.young() or self.lives
        life = among[which % len(among)]
        self.lives.remove(life)
        self.check_log(life)
        self.write(life, lambda tx, owner: sessions.forget(tx, **owner))
        life.is_gone = True
        life.move(life.status)

    def alive(self, which: int) -> Life:
        """One whose agent runs; if there is none, one that gets up, or a new one."""
        life = self.life(which, *ALIVE)
        if life is not None:
            return life
        if not self.life(0, *WAY_UP):
            self.lives.pop()
            self.create(None)
        life = self.life(which, *WAY_UP)
        assert life is not None
        self.get_up(self.lives.index(life), attended=which % 2 == 0)
        return life


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
TestSessionMachine.pytestmark = [pytest.mark.timeout(600)]
