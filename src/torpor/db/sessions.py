"""Session rows: creating, finding, owning, and moving along the status table.

Whoever writes presents the owner token. Only two statements need none: creating a session, and acquiring it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torpor.core.errors import Conflict, InvalidInput, NotFound, TorporError
from torpor.core.events import GENESIS_HASH, Event, EventDraft, Kind
from torpor.core.ids import NodeId, SessionId
from torpor.core.lease import Lease
from torpor.core.money import dollars_text
from torpor.core.session import ENDED, SessionStatus, check_transition
from torpor.db.database import Row, Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import held_row, refusal
from torpor.db.log import EVERYTHING, append, events

NAME_CHARACTERS_MAX = 63
_NAME_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

FIRST_OWNER_TOKEN = 0
"""The token of a session that nobody has acquired yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """Where a session was forked from: the parent's events up to `seq` are its past too. The parent may be gone."""

    session_id: SessionId
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One row of the session table.

    Attributes:
        node_id, boot_id, pid: who acquired it last and has not released it.
        cursor_seq: the last context event of the current branch.
        parent: None if it began by itself.
        wake_ns: when a node is to run it, if none does; see `sleeping`.
    """

    session_id: SessionId
    name: str | None
    status: SessionStatus
    spec: Mapping[str, Any]
    owner_token: int
    node_id: NodeId | None
    boot_id: str | None
    pid: int | None
    incarnation: int
    head_seq: int
    head_hash: str
    cursor_seq: int
    created_ns: int
    updated_ns: int
    exit_status: int | None
    budget_nanousd: int | None
    parent: Parent | None
    wake_ns: int | None

    @property
    def lease(self) -> Lease | None:
        """The label that its last owner left; None when nobody acquired it or its owner released it."""
        if self.node_id is None or self.boot_id is None or self.pid is None:
            return None
        return Lease(
            session_id=self.session_id,
            owner_token=self.owner_token,
            node_id=self.node_id,
            boot_id=self.boot_id,
            pid=self.pid,
        )


def create(
    tx: Transaction,
    *,
    session_id: SessionId,
    name: str | None,
    spec: Mapping[str, Any],
    wall_ns: int,
    budget_nanousd: int | None = None,
    parent: Parent | None = None,
) -> Session:
    """Record a new session with its session.created event, which is the root of its tree.

    That event of a fork names the parent's event that it begins at, with its hash: one chain covers the other.

    Raises:
        InvalidInput: the name is malformed.
        NotFound: the parent has no such event, or is not there.
        Conflict: `session_name_taken`.
    """
    if name is not None:
        _check_name(name)
    forked_at = None if parent is None else _event_of(tx, parent)
    created = tx.run(
        "session/insert_session",
        session_id=session_id,
        name=name,
        status=SessionStatus.CREATED.value,
        spec=encode_json(dict(spec)),
        head_hash=GENESIS_HASH,
        budget_nanousd=budget_nanousd,
        parent_id=None if parent is None else parent.session_id,
        forked_at_seq=None if parent is None else parent.seq,
        wall_ns=wall_ns,
    )
    if not created:
        raise Conflict(
            "session_name_taken",
            f"cannot create session {name!r}: another session has this name",
            hint="Choose another name, or forget that session.",
        )
    data: dict[str, Any] = {"name": name, "spec": dict(spec)}
    if budget_nanousd is not None:
        data["budget"] = dollars_text(budget_nanousd)
    if forked_at is not None:
        data["parent"] = {"session": forked_at.session_id, "seq": forked_at.seq, "hash": forked_at.hash}
    draft = EventDraft(kind=Kind.SESSION_CREATED, incarnation=0, data=data)
    root = append(tx, session_id=session_id, owner_token=FIRST_OWNER_TOKEN, drafts=[draft], wall_ns=wall_ns)[0]
    set_cursor(tx, session_id=session_id, owner_token=FIRST_OWNER_TOKEN, cursor_seq=root.seq)
    return get(tx, session_id)


def get(tx: Transaction, session_id: SessionId) -> Session:
    """The session with exactly this id.

    Raises:
        NotFound: there is none.
    """
    row = tx.one("session/find_by_id", session_id=session_id)
    if row is None:
        raise not_found(session_id)
    return session_of(row)


def find(tx: Transaction, text: str) -> Session:
    """The session that a person means: by id, by name, or by the beginning of an id that only one session has.

    Raises:
        NotFound: no session fits.
        InvalidInput: `session_ambiguous`, several ids begin so.
    """
    row = tx.one("session/find_by_id", session_id=text) or tx.one("session/find_by_name", name=text)
    if row is not None:
        return session_of(row)
    prefix = text if text.startswith("ses_") else f"ses_{text}"
    rows = tx.all("session/find_by_prefix", prefix=prefix, prefix_length=len(prefix)) if text else []
    if len(rows) > 1:
        raise InvalidInput(
            "session_ambiguous",
            f"cannot find session {text!r}: several ids begin so",
            hint="Give more of the id; `torpor ls` lists the sessions.",
        )
    if not rows:
        raise not_found(text)
    return session_of(rows[0])


def list_newest(tx: Transaction, *, limit: int = EVERYTHING) -> list[Session]:
    return [session_of(row) for row in tx.all("session/list_newest", row_limit=limit)]


def lineage(tx: Transaction, session_id: SessionId) -> list[Session]:
    """The session, all that it comes from and all that came from those, as far as they are there; oldest first."""
    return [session_of(row) for row in tx.all("session/list_lineage", session_id=session_id)]


def list_of_node(tx: Transaction, node_id: NodeId) -> list[Session]:
    """The sessions that this node acquired and has not released."""
    return [session_of(row) for row in tx.all("session/list_of_node", node_id=node_id)]


def acquire(
    tx: Transaction, *, session_id: SessionId, seen_token: int, node_id: NodeId, boot_id: str, pid: int, wall_ns: int
) -> int:
    """Take the session over, and return the new owner token; all others are void from here on.

    Args:
        seen_token: the token of the row by which the caller decided that it may; of two who saw the same, one wins.

    Raises:
        Superseded: another node was quicker, or the session is gone.
    """
    row = tx.one(
        "session/acquire_if_unchanged",
        session_id=session_id,
        seen_token=seen_token,
        node_id=node_id,
        boot_id=boot_id,
        pid=pid,
        wall_ns=wall_ns,
    )
    if row is None:
        raise refusal(tx, session_id, seen_token, changed(session_id))
    token = int(row["owner_token"])
    draft = EventDraft(
        kind=Kind.LEASE_ACQUIRED,
        incarnation=get(tx, session_id).incarnation,
        data={"owner_token": token, "node": node_id, "boot": boot_id, "pid": pid},
    )
    append(tx, session_id=session_id, owner_token=token, drafts=[draft], wall_ns=wall_ns)
    return token


def release(tx: Transaction, *, session_id: SessionId, owner_token: int, wall_ns: int) -> None:
    """Say that no node drives the session any more. The token stays: only the next acquisition raises it."""
    if not tx.run("session/release_fenced", session_id=session_id, owner_token=owner_token, wall_ns=wall_ns):
        raise refusal(tx, session_id, owner_token, changed(session_id))


def set_status(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    status: SessionStatus,
    wall_ns: int,
    reason: str = "",
    exit_status: int | None = None,
) -> None:
    """Move the session along the status table, with its session.status event.

    Raises:
        Conflict: the table does not allow it.
    """
    seen = session_of(held_row(tx, session_id, owner_token))
    check_transition(session_id, seen.status, status)
    moved = tx.run(
        "session/set_status_fenced",
        session_id=session_id,
        owner_token=owner_token,
        status=status.value,
        seen_status=seen.status.value,
        exit_status=exit_status,
        wall_ns=wall_ns,
    )
    if not moved:
        raise refusal(tx, session_id, owner_token, changed(session_id))
    if status in ENDED:
        wake_waiting(tx, session_id=session_id, owner_token=owner_token)
    data = {"from": seen.status.value, "to": status.value, "reason": reason, "exit_status": exit_status}
    draft = EventDraft(kind=Kind.SESSION_STATUS, incarnation=seen.incarnation, data=data)
    append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)


def wake_waiting(tx: Transaction, *, session_id: SessionId, owner_token: int) -> None:
    """A child has ended or goes: have a node run who waits for that, its parent and forks of it, if they sleep."""
    held_row(tx, session_id, owner_token)
    tx.run("child/wake_waiting_fenced", session_id=session_id, owner_token=owner_token)


def set_incarnation(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    incarnation: int,
    wall_ns: int,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Begin a life of the sandbox, with its incarnation.started event; `data` says from what.

    Raises:
        Conflict: `incarnation_not_new`, numbers only rise.
    """
    moved = tx.run(
        "session/set_incarnation_fenced", session_id=session_id, owner_token=owner_token, incarnation=incarnation
    )
    if not moved:
        otherwise = Conflict(
            "incarnation_not_new", f"cannot start incarnation {incarnation} of session {session_id}: it is not new"
        )
        raise refusal(tx, session_id, owner_token, otherwise)
    draft = EventDraft(kind=Kind.INCARNATION_STARTED, incarnation=incarnation, data=dict(data or {}))
    append(tx, session_id=session_id, owner_token=owner_token, drafts=[draft], wall_ns=wall_ns)


def set_cursor(tx: Transaction, *, session_id: SessionId, owner_token: int, cursor_seq: int) -> None:
    """Put the branch's cursor onto a context event (RECOVERY 5.2).

    Raises:
        Conflict: `cursor_beyond_head`.
    """
    if not tx.run("session/set_cursor_fenced", session_id=session_id, owner_token=owner_token, cursor_seq=cursor_seq):
        otherwise = Conflict(
            "cursor_beyond_head",
            f"cannot move the cursor of session {session_id} to {cursor_seq}: it is not in its log",
        )
        raise refusal(tx, session_id, owner_token, otherwise)


_ROWS_OF_A_SESSION = (
    "child/delete_of_session_fenced",
    "message/delete_of_session_fenced",
    "waitpoint/delete_of_session_fenced",
    "redo/delete_of_session_fenced",
    "output/delete_of_session_fenced",
    "checkpoint/delete_of_session_fenced",
    "request/delete_of_session_fenced",
    "call/delete_chunks_of_session_fenced",
    "call/delete_answers_of_session_fenced",
    "call/delete_attempts_of_session_fenced",
    "call/delete_of_session_fenced",
    "block/delete_of_session_fenced",
    "log/delete_of_session_fenced",
    "key/delete_of_session_fenced",
)
"""Those that refer to others come first."""


def forget(tx: Transaction, *, session_id: SessionId, owner_token: int) -> None:
    """Delete the session with all its rows. Its snapshots are roots of the store, and the caller's to drop.

    A parent that sleeps until it ends looks what became of it, while the row that binds them is there to find it by.
    """
    wake_waiting(tx, session_id=session_id, owner_token=owner_token)
    for query in _ROWS_OF_A_SESSION:
        tx.run(query, session_id=session_id, owner_token=owner_token)
    if not tx.run("session/delete_fenced", session_id=session_id, owner_token=owner_token):
        raise refusal(tx, session_id, owner_token, changed(session_id))


def _event_of(tx: Transaction, parent: Parent) -> Event:
    """The parent's event that a fork begins at."""
    get(tx, parent.session_id)
    found = events(tx, parent.session_id, after_seq=parent.seq - 1, limit=1) if parent.seq > 0 else []
    if not found:
        raise NotFound(
            "event_not_found",
            f"cannot fork session {parent.session_id} at event {parent.seq}: it has none of that number",
            hint=f"`torpor log {parent.session_id}` lists them.",
        )
    return found[0]


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= NAME_CHARACTERS_MAX or not _NAME_ALPHABET.issuperset(name) or name.startswith("ses_"):
        raise InvalidInput(
            "session_name_malformed",
            f"cannot name a session {name!r}: a name is 1 to {NAME_CHARACTERS_MAX} letters, digits, dots, dashes and "
            "underscores, and does not begin with ses_",
        )


def session_of(row: Row) -> Session:
    return Session(
        session_id=SessionId(row["session_id"]),
        name=row["name"],
        status=SessionStatus(row["status"]),
        spec=decode_json(row["spec"]),
        owner_token=row["owner_token"],
        node_id=NodeId(row["node_id"]) if row["node_id"] is not None else None,
        boot_id=row["boot_id"],
        pid=row["pid"],
        incarnation=row["incarnation"],
        head_seq=row["head_seq"],
        head_hash=row["head_hash"],
        cursor_seq=row["cursor_seq"],
        created_ns=row["created_ns"],
        updated_ns=row["updated_ns"],
        exit_status=row["exit_status"],
        budget_nanousd=row["budget_nanousd"],
        wake_ns=row["wake_ns"],
        parent=None
        if row["parent_id"] is None
        else Parent(session_id=SessionId(row["parent_id"]), seq=row["forked_at_seq"]),
    )


def not_found(text: str) -> NotFound:
    return NotFound(
        "session_not_found", f"cannot find session {text!r}: there is none", hint="`torpor ls` lists the sessions."
    )


def changed(session_id: SessionId) -> TorporError:
    return Conflict("session_changed", f"cannot write session {session_id}: it changed meanwhile")
