"""What the rows of a session must say, kept beside them by a few lines of Python."""

from dataclasses import dataclass, field
from typing import Any

from torpor.core.ids import CallId, SessionId, WaitpointId
from torpor.core.money import Account
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import Waitpoint

ALIVE = frozenset({SessionStatus.RUNNING, SessionStatus.WAITING})
"""Its agent runs, and asks."""
ASLEEP = frozenset({SessionStatus.ASLEEP, SessionStatus.WAKING})
"""A wake that fails sleeps on as before."""
ON_ITS_WAY = frozenset({SessionStatus.WAKING, SessionStatus.RECOVERING})
GIVEN_UP = ENDED | {SessionStatus.LOST}


@dataclass
class Life:
    """One session.

    Attributes:
        points: as they were made; `resolutions` has what became of them.
        inbox: which call handled each message, by number.
        reserved, spent: in nano-dollars, by itself.
        cut_seq: the log's head at its last cut.
        is_stopped: nobody but a person may wake it.
        is_called: something came for it since it fell asleep.
        is_wanted: a node daemon is to run it, whether one does or not.
        wakes_ns: the first time that it fell asleep for, or by which it was to be awake.
    """

    session_id: SessionId
    limit: int | None = None
    parent: "Life | None" = None
    token: int = 0
    status: SessionStatus = SessionStatus.CREATED
    incarnation: int = 0
    exit_status: int | None = None
    points: dict[WaitpointId, Waitpoint] = field(default_factory=dict)
    resolutions: dict[WaitpointId, dict[str, Any]] = field(default_factory=dict)
    inbox: list[CallId | None] = field(default_factory=list)
    reserved: dict[CallId, int] = field(default_factory=dict)
    spent: int = 0
    cut_seq: int = 0
    has_news: bool = False
    is_gone: bool = False
    is_stopped: bool = False
    is_called: bool = False
    is_wanted: bool = False
    wakes_ns: int | None = None

    @property
    def open(self) -> list[Waitpoint]:
        return [point for point in self.points.values() if point.waitpoint_id not in self.resolutions]

    @property
    def has_ended(self) -> bool:
        return self.is_gone or self.status in ENDED

    def add(self, point: Waitpoint, *, waits: bool = True) -> None:
        self.points[point.waitpoint_id] = point
        if waits and self.status is SessionStatus.RUNNING:
            self.status = SessionStatus.WAITING

    def resolve(self, waitpoint_id: WaitpointId, resolution: dict[str, Any]) -> None:
        assert waitpoint_id not in self.resolutions
        self.resolutions[waitpoint_id] = resolution
        self.hear()
        if self.status is SessionStatus.WAITING and not self.open:
            self.status = SessionStatus.RUNNING

    def hear(self) -> None:
        """Something came that the agent may wait for."""
        self.has_news = True
        if self.status in ASLEEP and not self.is_stopped:
            self.is_called = True

    def move(self, status: SessionStatus) -> None:
        self.status = status
        if status in GIVEN_UP:
            self.is_wanted = False
        if self.has_ended and self.parent is not None and self.parent.status in ASLEEP:
            self.parent.hear()

    def fall_asleep(self, *, wakes_ns: int | None, stopped: bool) -> None:
        self.move(SessionStatus.ASLEEP)
        self.is_stopped, self.is_called, self.is_wanted, self.wakes_ns = stopped, False, False, wakes_ns

    def make_due(self) -> None:
        self.is_wanted = self.is_called = True
        self.is_stopped = False

    def must_be_due(self, wall_ns: int) -> bool | None:
        """Whether a node has to run it now; None: either will do, until its wake has come to its end."""
        if self.status in ON_ITS_WAY and not self.is_wanted:
            return None
        if self.status is SessionStatus.ASLEEP and not self.is_stopped:
            return self.is_called or (self.wakes_ns is not None and self.wakes_ns <= wall_ns)
        return self.is_wanted

    def account(self, lives: list["Life"]) -> Account:
        """Where it stands, with all that share its budget and are still there."""
        root = self.root
        kin = [life for life in lives if life.root is root]
        reserved = sum(sum(life.reserved.values()) for life in kin)
        return Account(limit=root.limit, spent=sum(life.spent for life in kin), reserved=reserved)

    @property
    def root(self) -> "Life":
        """Whose budget it spends."""
        return self if self.parent is None or self.parent.is_gone else self.parent.root
