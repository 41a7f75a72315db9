"""The lineage of a session as `torpor tree` draws it: forks below what they came from, rewinds below their session."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torpor.core.events import Event
from torpor.core.ids import SessionId
from torpor.db import calls, checkpoints, rewinds, sessions
from torpor.db.database import Transaction
from torpor.db.sessions import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the tree.

    Attributes:
        rails: for each level above, whether something comes below it still; the last one is this line's own.
        is_meant: the session that was asked for.
        parent_turn: how many turns of its parent a fork has behind it; None if it began by itself, or that is gone.
    """

    session_id: SessionId
    rails: tuple[bool, ...]
    name: str | None
    status: str
    turns: int
    parent: SessionId | None
    forked_at_seq: int | None
    parent_turn: int | None
    is_meant: bool

    @property
    def begins(self) -> str:
        """Where it comes from, in words."""
        if self.parent is None:
            return ""
        return f"from {self.parent}, which is gone" if self.parent_turn is None else f"from turn {self.parent_turn}"

    @property
    def fields(self) -> dict[str, Any]:
        """For scripts."""
        shown = {name: value for name, value in asdict(self).items() if name not in {"rails", "is_meant", "session_id"}}
        return {"kind": "session", "session": self.session_id, "depth": len(self.rails), **shown}


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch(Line):
    """What a rewind left.

    Attributes:
        rewound_seq: of the rewind's event.
        to_checkpoint, to_turn: where it went back to.
        turns: how many it left.
        tip: the newest checkpoint of what was left; None if there is none any more.
    """

    rewound_seq: int
    to_checkpoint: int
    to_turn: int
    tip: int | None

    @property
    def told(self) -> str:
        tip = "" if self.tip is None else f"; its last checkpoint is {self.tip}"
        return f"rewound to turn {self.to_turn}: {counted(self.turns)} left behind{tip}"

    @property
    def fields(self) -> dict[str, Any]:
        names = ("turns", "rewound_seq", "to_checkpoint", "to_turn", "tip")
        shown = {name: getattr(self, name) for name in names}
        return {"kind": "branch", "session": self.session_id, "depth": len(self.rails), **shown}


def read_lineage(tx: Transaction, session_id: SessionId) -> list[Line]:
    """All that the session comes from, and all that came from those, each below its parent and oldest first."""
    found = sessions.lineage(tx, session_id)
    there = {session.session_id for session in found}
    roots = [one for one in found if one.parent is None or one.parent.session_id not in there]
    lines: list[Line] = []
    for root in roots:
        lines += _below(tx, found, root, session_id, ())
    return lines


def counted(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


def draw(line: Line) -> str:
    """The rails to the left of a line."""
    if not line.rails:
        return ""
    above = "".join("│  " if goes_on else "   " for goes_on in line.rails[:-1])
    return above + ("├─ " if line.rails[-1] else "└─ ")


def _below(
    tx: Transaction, found: Sequence[Session], session: Session, meant: SessionId, rails: tuple[bool, ...]
) -> list[Line]:
    children = [one for one in found if one.parent is not None and one.parent.session_id == session.session_id]
    branches = _branches(tx, session)
    lines: list[Line] = [_line(tx, found, session, meant, rails)]
    count = len(branches) + len(children)
    for number, branch in enumerate(branches, 1):
        lines.append(replace(branch, rails=(*rails, number < count)))
    for number, child in enumerate(children, len(branches) + 1):
        lines += _below(tx, found, child, meant, (*rails, number < count))
    return lines


def _line(
    tx: Transaction, found: Sequence[Session], session: Session, meant: SessionId, rails: tuple[bool, ...]
) -> Line:
    parent = session.parent
    is_there = parent is not None and any(one.session_id == parent.session_id for one in found)
    return Line(
        session_id=session.session_id,
        rails=rails,
        name=session.name,
        status=session.status.value,
        turns=len(calls.list_llm(tx, session.session_id)),
        parent=None if parent is None else parent.session_id,
        forked_at_seq=None if parent is None else parent.seq,
        parent_turn=_turns_by(tx, parent.session_id, parent.seq) if parent is not None and is_there else None,
        is_meant=session.session_id == meant,
    )


def _branches(tx: Transaction, session: Session) -> list[Branch]:
    return [_branch(tx, session, event) for event in rewinds.list_rewinds(tx, session.session_id)]


def _branch(tx: Transaction, session: Session, event: Event) -> Branch:
    session_id, to_seq = session.session_id, event.data["to_seq"]
    before = rewinds.past_of(tx, session_id, before_seq=event.seq).timeline
    made = [call for call in calls.load_calls(tx, session_id) if call.is_llm and before.holds(call.intended_seq)]
    left = checkpoints.list_left(tx, session_id)
    return Branch(
        session_id=session_id,
        rails=(),
        name=None,
        status="",
        turns=sum(to_seq < call.intended_seq < event.seq for call in made),
        parent=None,
        forked_at_seq=None,
        parent_turn=None,
        is_meant=False,
        rewound_seq=event.seq,
        to_checkpoint=event.data["checkpoint"],
        to_turn=event.data["turn"],
        tip=max((number for number, seq in left.items() if seq == event.seq), default=None),
    )


def _turns_by(tx: Transaction, session_id: SessionId, seq: int) -> int:
    return sum(call.is_llm and call.intended_seq <= seq for call in calls.load_calls(tx, session_id))
