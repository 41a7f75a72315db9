"""What chance decides before a schedule begins: the agent's program, and what happens to it at which step."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from torpor.testing.simulator.agent import Agent, Op, Thread

HORIZON = 140
"""Steps in which most schedules do most of their work; what happens to them is drawn from here."""

SOON = 40

KILLS = ("kill node", "kill node", "kill sandbox", "kill both", "power cut", "silence node")
OTHERS = ("message", "message", "checkpoint", "hibernate", "rewind", "damage")
KINDS = ("llm", "llm", "llm", "llm", "effect", "effect", "read", "barrier", "receive", "receive")


class Plan:
    """One schedule, drawn from its seed.

    Attributes:
        budget: there is one, so that a call's sending is a step of its own after its intent.
        cluster: silent owners lose the session by time, on another machine; else by SIGKILL, on this one.
        happenings: (step, what), the next one last.
        limit: the session's budget at its start; most have none.
        refusal_rate: how often upstream refuses a sending for now.
        kills_while_held: as those, of a session that the budget has just made wait.
        kills_after_commit: further kills, each within `SOON` steps of a commit, when there is something to restore.
        messages: how many messages people have to say.
        sleepy: how often the node puts the session to sleep when nothing else is to be done.
    """

    __slots__ = (
        "budget",
        "checkpoint_rate",
        "cluster",
        "fickle",
        "happenings",
        "kills_after_commit",
        "kills_while_held",
        "limit",
        "messages",
        "patience",
        "programs",
        "refusal_rate",
        "seed",
        "sleepy",
        "truncation_rate",
    )

    def __init__(self, seed: int, rng: Random) -> None:
        self.seed = seed
        random = rng.random
        self.cluster = random() < 0.2
        self.fickle = random() < 0.25
        self.patience = (0.0, 0.0, 0.06, 0.06, 0.25)[int(random() * 5)]
        self.truncation_rate = 0.15 if random() < 0.25 else 0.0
        self.checkpoint_rate = 0.2 + 0.6 * random()
        self.programs = _programs(random)
        self.messages = sum(op.kind == "receive" for ops in self.programs for op in ops)
        self.kills_after_commit = int(random() * 4)
        self.sleepy = int(random() * 3)
        self.happenings = self._happenings(random)
        # Drawn apart, so that the schedules of all other seeds stay what they are.
        apart = Random(f"refusals {seed}").random
        self.refusal_rate = 0.3 if apart() < 0.15 else 0.0
        self.limit = int(apart() * 5) if apart() < 0.12 else None
        self.kills_while_held = 0
        if self.limit is not None:
            self.kills_while_held = 1 + int(apart() * 3)
            raises = [(int(apart() * HORIZON), "raise budget") for _ in range(int(apart() * 3))]
            self.happenings = sorted([*self.happenings, *raises], reverse=True)
        self.budget = self.limit is not None or Random(f"budget {seed}").random() < 0.5

    def _happenings(self, random: Callable[[], float]) -> list[tuple[int, str]]:
        drawn = [(int(random() * HORIZON), kill(random)) for _ in range(int(random() * 3))]
        if random() < 0.6:
            drawn += [(int(random() * HORIZON), OTHERS[int(random() * len(OTHERS))]) for _ in range(int(random() * 4))]
        return sorted(drawn, reverse=True)

    def agent(self) -> Agent:
        """The agent as it is at its start."""
        return Agent([Thread(ops) for ops in self.programs], fickle=self.fickle, patience=self.patience)


def kill(random: Callable[[], float]) -> str:
    return KILLS[int(random() * len(KILLS))]


def _programs(random: Callable[[], float]) -> list[tuple[Op, ...]]:
    """One to three threads with two to five operations in all; often some ask the same on purpose."""
    threads = (1, 1, 2, 2, 3)[int(random() * 5)]
    same = Op("llm", 0, fixed=True) if random() < 0.4 else None
    programs: list[tuple[Op, ...]] = []
    for _ in range(threads):
        ops: list[Op] = []
        for _ in range(1 + int(random() * (5 - threads))):
            kind = KINDS[int(random() * len(KINDS))]
            ops.append(same if same is not None and random() < 0.6 else Op(kind, int(random() * 8), random() < 0.3))
        programs.append(tuple(ops))
    return programs
