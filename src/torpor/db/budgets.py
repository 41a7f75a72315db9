"""A session's budget: admitting a call under it, and raising it. What was spent stands in the rows of the attempts.

Order, and what a kill -9 between any two steps leaves (the names are crash points):

    a call is intended, its worst case computed
        `call.intended`        as ever: it is sent by whoever has its stream next, under the same budget
    it fits: one transaction: reservation, attempt, call.sent
        `call.sent`            a reservation whose attempt is torn by the next owner. A torn attempt costs what it
                               reported; one that reported nothing keeps its reservation
    it does not fit: one transaction: waitpoint, waitpoint.created, the status `waiting`
        `waitpoint.created`    a call that is intended and held: never sent, safe to send. Its stream finds the
                               waitpoint again, whether the sandbox is adopted or restored
    somebody raises the budget: one transaction: limit, budget.changed, all budget waitpoints resolved, status
        `waitpoint.resolved`   nobody told the held calls: they ask again when a node runs them, and now they fit
    an attempt ends: one transaction: its cost in place of its reservation, call.completed (failed, torn)
        `call.completed`       as ever; calls that wait for the reservation to be settled ask again
"""

from torpor.core.errors import Conflict
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CallId, SessionId
from torpor.core.money import Account, Verdict, decide, dollars_text
from torpor.core.waitpoint import WaitpointKind
from torpor.db import children, sessions, waitpoints
from torpor.db.database import Transaction
from torpor.db.fence import held_row, refusal
from torpor.db.log import append


def account(tx: Transaction, session_id: SessionId) -> Account:
    """Where a session stands, with all that share its budget.

    Raises:
        NotFound: there is no such session.
    """
    row = tx.one("budget/find_account", session_id=session_id)
    if row is None:
        raise sessions.not_found(session_id)
    return Account(limit=row["budget_nanousd"], spent=row["spent_nanousd"], reserved=row["reserved_nanousd"])


def admit(
    tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId, needed_nanousd: int, wall_ns: int
) -> Verdict:
    """Whether a call may be sent, in the transaction that then sends it; one that must be held waits from here on."""
    held_row(tx, session_id, owner_token)
    verdict = decide(account(tx, session_id), needed_nanousd)
    if verdict is Verdict.HOLD:
        waitpoints.wait_on(
            tx,
            session_id=session_id,
            owner_token=owner_token,
            kind=WaitpointKind.BUDGET,
            call_id=call_id,
            data={"needed": dollars_text(needed_nanousd)},
            wall_ns=wall_ns,
        )
    return verdict


def add(tx: Transaction, *, session_id: SessionId, owner_token: int, amount_nanousd: int, wall_ns: int) -> Account:
    """Raise the limit, and let everything that waits for a higher one ask again. Commit it durably.

    A child has no limit of its own: raised by nothing it asks again, after its parent's was.

    Raises:
        Conflict: `budget_missing`, nothing limits this session; `budget_shared`, it is a child.
    """
    row = held_row(tx, session_id, owner_token)
    before = row["budget_nanousd"]
    parent_id = children.parent_of(tx, session_id)
    if parent_id is not None and amount_nanousd == 0:
        return _ask_again(tx, session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)
    if parent_id is not None:
        raise Conflict(
            "budget_shared",
            f"cannot raise the budget of session {session_id}: it spends that of the session that began it",
            hint=f"torpor budget {parent_id} --add DOLLARS",
        )
    if before is None:
        raise Conflict(
            "budget_missing",
            f"cannot raise the budget of session {session_id}: it has none, nothing limits it",
            hint="A budget is given at the start: torpor run --budget 5.",
        )
    limit = before + amount_nanousd
    if not tx.run(
        "budget/set_limit_fenced",
        session_id=session_id,
        owner_token=owner_token,
        budget_nanousd=limit,
        wall_ns=wall_ns,
    ):
        raise refusal(tx, session_id, owner_token, sessions.changed(session_id))
    draft = EventDraft(
        kind=Kind.BUDGET_CHANGED,
        incarnation=row["incarnation"],
        data={"from": dollars_text(before), "to": dollars_text(limit)},
    )
    append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)
    return _ask_again(tx, session_id=session_id, owner_token=owner_token, wall_ns=wall_ns)


def _ask_again(tx: Transaction, *, session_id: SessionId, owner_token: int, wall_ns: int) -> Account:
    """Let go on what the budget held: it may fit now."""
    now = account(tx, session_id)
    waitpoints.resolve_all(
        tx,
        session_id=session_id,
        owner_token=owner_token,
        kind=WaitpointKind.BUDGET,
        resolution={"limit": None if now.limit is None else dollars_text(now.limit)},
        wall_ns=wall_ns,
    )
    return now


def costs(tx: Transaction) -> dict[SessionId, int]:
    """What each session cost so far, in nano-dollars; without those of which nothing is known."""
    return {SessionId(row["session_id"]): row["cost_nanousd"] for row in tx.all("budget/list_costs")}
