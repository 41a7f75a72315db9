"""One disturbance after the other: an act of a person, and something that dies in it; the same for the same seed.

A *schedule* is one such pair with all that it draws: what is done to which session, what dies, at which crash point or
after how much has happened. It begins in the middle of whatever the schedules before it left.
"""

import json
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.crash.lives.home import LIVING_MAX, Home, Row
from tests.crash.lives.warm import Command

LIVING_MIN = 3
REACH_SECONDS = 8.0
"""So long a crash point is waited for that may never be reached."""
DAEMON_POINTS = (
    ("hibernate.begun", "session.asleep", "hibernate.freed", "wake.begun"),
    ("waitpoint.created", "waitpoint.resolved", "message.received", "child.created", "child.seeded", "fork.joined"),
    ("call.intended", "call.sent", "call.received", "call.completed", "call.delivered", "exit.committed"),
    ("checkpoint.cut", "checkpoint.paused", "checkpoint.imaged", "checkpoint.resumed", "checkpoint.stored"),
    ("checkpoint.committed", "snapshot.pack_written", "snapshot.packs_durable", "snapshot.manifest_written"),
)
"""First a kind is drawn, then one of it."""
COMMAND_POINTS = {
    "fork": ["fork.stored", "fork.committed", "snapshot.manifest_written"],
    "rewind": ["rewind.freed", "rewind.committed"],
    "collect": [
        *("retention.forgotten", "collect.condemned", "collect.manifests_deleted", "collect.pack_deleted"),
        *("collect.swept", "repack.stored", "repack.moved"),
    ],
}
ACTS = [*["fork"] * 4, *["rewind"] * 3, *["collect"] * 3, "hibernate", "checkpoint", "stop", "none", "none"]
FAULTS = [*["in the command"] * 3, "command", "daemon", "sandboxes", "both", *["in the daemon"] * 3, "down", "replace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A fork that was asked for.

    Attributes:
        children: ids that were told; None: nobody was told, and all are there or none.
    """

    name: str
    count: int
    parent: str
    children: tuple[str, ...] | None


@dataclass(slots=True)
class Done:
    """What was asked for, and what the commands said.

    Attributes:
        rewound: by session, the new checkpoint of every rewind that was acknowledged.
        rewinds_cut: by session, rewinds of which nobody was told how they ended.
    """

    forks: list[Fork] = field(default_factory=list)
    rewound: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    rewinds_cut: Counter[str] = field(default_factory=Counter)
    begun: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A command of a person's, drawn."""

    kind: str
    argv: tuple[str, ...] = ()
    session: str = ""
    name: str = ""
    count: int = 0


class Disturber:
    """See the module."""

    def __init__(self, home: Home, chance: random.Random) -> None:
        self._home = home
        self._random = chance
        self._forks = self._runs = 0
        self.done = Done()
        self.counted: Counter[str] = Counter()

    def begin(self) -> None:
        """One more session of one's own."""
        self._runs += 1
        name = f"s{self._runs}"
        argv = ("run", "-d", "--checkpoint-share=always", "--name", name, "--json", "--")
        ran = self._home.torpor(*argv, sys.executable, "agent.py", name)
        self.done.begun.append(json.loads(ran.stdout.splitlines()[-1])["session"])

    def disturb(self) -> None:
        """One schedule."""
        chance, home = self._random, self._home
        home.await_events(chance.randint(0, 8), 2.0)
        self._keep_up()
        act = self._draw_act()
        faults = [fault for fault in FAULTS if fault != "in the command" or act.kind in COMMAND_POINTS]
        fault = chance.choice([one for one in faults if one != "command" or act.argv])
        self.counted["schedules"] += 1
        self.counted[f"fault: {fault}"] += 1
        self.counted[f"act: {act.kind}"] += 1
        points = COMMAND_POINTS.get(act.kind, []) if fault == "in the command" else chance.choice(DAEMON_POINTS)
        point = f"{chance.choice(points)}:{chance.choice([1, 1, 2])}"
        if fault == "in the daemon":
            home.stage.kill_daemon()
            home.up(point=point)
        variables = {"TORPOR_CRASH_POINT": point} if fault == "in the command" else {}
        command = home.start(*act.argv, **variables) if act.argv else None
        self._kill(fault, command)
        if fault == "in the daemon":
            home.await_events(chance.randint(10, 60), REACH_SECONDS, lambda: not home.alive())
            self.counted[f"reached {point.partition(':')[0]} (daemon)"] += not home.alive()
        if command is not None:
            self._end(act, command, point if fault == "in the command" else "")
        if not home.alive():
            home.up(itself=chance.random() < 0.1)

    def _kill(self, fault: str, command: Command | None) -> None:
        """What dies at an instant of its own, in the middle of the act; or ends well there."""
        chance, home = self._random, self._home
        if fault.startswith("in the"):
            return
        instant, deadline = chance.uniform(0, 0.6), chance.randint(0, 6)
        if command is not None:
            time.sleep(instant)  # An instant of the act's: nothing tells how far it is.
        else:
            home.await_events(deadline, 1.0)
        if fault == "command" and command is not None:
            command.kill()
        if fault in ("sandboxes", "both"):
            home.stage.kill_sandbox()
        if fault in ("daemon", "both"):
            home.stage.kill_daemon()
        if fault == "down":
            home.torpor("down", check=False)
        if fault == "replace":
            home.up(replace=True, itself=chance.random() < 0.3)

    def _draw_act(self) -> Act:
        chance = self._random
        mine = [row for row in self._home.living() if row.name is not None]
        kind = chance.choice(ACTS)
        if kind == "fork" and len(mine) >= LIVING_MAX:
            kind = chance.choice(["hibernate", "none"])
        if kind in ("none", "collect") or not mine:
            argv = ("collect", "--grace", chance.choice(["0", "0", "2"]), "--json") if kind == "collect" else ()
            return Act(kind="collect" if argv else "none", argv=argv)
        row = chance.choice(mine)
        if kind == "fork":
            return self._fork(row)
        if kind == "rewind":
            argv = ("rewind", row.session, "--to", self._point(row), "--yes", "--json")
            return Act(kind=kind, argv=argv, session=row.session)
        return Act(kind=kind, argv=(kind, row.session, "--json"), session=row.session)

    def _fork(self, row: Row) -> Act:
        chance, count = self._random, self._random.choice([1, 1, 2])
        self._forks += 1
        name = f"f{self._forks}"
        at = ["--at", self._point(row)] if chance.random() < 0.6 else []
        options = ["--resample"] if chance.random() < 0.3 else []
        argv = ("fork", row.session, *at, "--count", str(count), "--name", name, *options, "--json")
        return Act(kind="fork", argv=argv, session=row.session, name=name, count=count)

    def _point(self, row: Row) -> str:
        """A checkpoint or a turn, mostly a late one."""
        numbers = self._home.look("SELECT number FROM checkpoint WHERE session_id = ? ORDER BY number", row.session)
        [[turns]] = self._home.look(
            "SELECT COUNT(*) FROM call WHERE session_id = ? AND json_extract(about, '$.is_llm')", row.session
        )
        if turns and self._random.random() < 0.5:
            return f"turn:{max(1, turns - self._random.randint(0, 3))}"
        late = [number for (number,) in numbers][-6:]
        return str(self._random.choice(late)) if late else "0"

    def _end(self, act: Act, command: Command, point: str) -> None:
        """Note how the act ended, and what was said of it."""
        status = command.wait()
        text = command.text()
        self._home.started.remove(command)
        command.close()
        assert "Traceback" not in text, f"torpor {act.argv}:\n{text}"
        ended = {0: "done", -signal.SIGKILL: "cut"}.get(status, "refused")
        self.counted[f"act: {act.kind} {ended}"] += 1
        if status == -signal.SIGKILL and point:
            self.counted[f"reached {point.partition(':')[0]} (command)"] += 1
        if ended == "refused":
            error = [json.loads(line) for line in text.splitlines() if line.startswith('{"error"')]
            self.counted[f"refused: {act.kind}: {error[0]['error']['code'] if error else text[-200:]}"] += 1
        told = [json.loads(line) for line in text.splitlines() if line.startswith("{")] if status == 0 else []
        if act.kind == "fork":
            children = tuple(line["session"] for line in told) if status == 0 else None
            self.done.forks.append(Fork(name=act.name, count=act.count, parent=act.session, children=children))
        if act.kind == "rewind" and status == 0:
            self.done.rewound[act.session].append(told[-1]["checkpoint"])
        elif act.kind == "rewind":
            self.done.rewinds_cut[act.session] += 1

    def _keep_up(self) -> None:
        """Who was stopped goes on, and there are sessions enough to be disturbed."""
        self.resume()
        if len([row for row in self._home.living() if row.name is not None]) < LIVING_MIN:
            self.begin()

    def resume(self) -> None:
        """Go on with whoever sleeps until a person says so."""
        for row in self._home.living():
            assert row.status != "lost", row
            if row.status == "asleep" and row.wake_ns is None:
                self._home.torpor("resume", "-d", row.session, check=False)
