"""Runs schedules and adds up what they showed; one seed is one schedule, always the same."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

from torpor.testing.simulator.mutations import MUTATIONS
from torpor.testing.simulator.rules import Rules
from torpor.testing.simulator.witness import INVARIANTS, Violation
from torpor.testing.simulator.world import World

CHUNK = 200
ALLOCATIONS_PER_COLLECTION = 50_000


@dataclass(slots=True)
class Report:
    """The sum over some schedules.

    Attributes:
        happened: kills, recoveries by rung and other events, by name.
        checked: how often each invariant was looked at.
        violations: (seed, invariant, text), by seed.
    """

    schedules: int = 0
    steps: int = 0
    happened: Counter[str] = field(default_factory=Counter[str])
    checked: Counter[int] = field(default_factory=Counter[int])
    violations: list[tuple[int, int, str]] = field(default_factory=list[tuple[int, int, str]])

    def add(self, other: Report) -> None:
        self.schedules += other.schedules
        self.steps += other.steps
        self.happened += other.happened
        self.checked += other.checked
        self.violations = sorted([*self.violations, *other.violations])

    @property
    def never_checked(self) -> list[int]:
        """Invariants that nothing looked at: they prove nothing."""
        return [number for number in INVARIANTS if not self.checked[number]]

    @property
    def passed(self) -> bool:
        return not self.violations and not self.never_checked


def rules_of(broken: str | None) -> Rules:
    """The rules, or those with one broken on purpose.

    Raises:
        KeyError: there is no mutation of that name.
    """
    return MUTATIONS[broken].rules() if broken is not None else Rules()


def run_schedules(seeds: Iterable[int], broken: str | None = None) -> Report:
    """Run these seeds in this process."""
    rules = rules_of(broken)
    report = Report()
    with _few_collections():
        for seed in seeds:
            world = World(seed, rules, stats=report.happened, checked=report.checked)
            try:
                world.run()
            except Violation as violation:
                report.violations.append((seed, violation.invariant, str(violation)))
            report.schedules += 1
            report.steps += world.steps
    return report


@contextmanager
def _few_collections() -> Generator[None]:
    """A world is one heap of cycles that dies as a whole: look for garbage once in many worlds, not during each."""
    before = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS_PER_COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_in_workers(first: int, count: int, *, broken: str | None, workers: int) -> Iterator[Report]:
    """Run `count` seeds from `first` on, in pieces, over worker processes; yields a report for each piece."""
    pieces = [(start, min(start + CHUNK, first + count), broken) for start in range(first, first + count, CHUNK)]
    if workers == 1:
        yield from map(_run_piece, pieces)
        return
    with get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(_run_piece, pieces)


def _run_piece(piece: tuple[int, int, str | None]) -> Report:
    start, end, broken = piece
    return run_schedules(range(start, end), broken)


def first_caught(broken: str, seeds: Iterable[int]) -> tuple[int, Violation] | None:
    """The first of these seeds at which the witness notices a broken rule."""
    rules = rules_of(broken)
    for seed in seeds:
        try:
            World(seed, rules).run()
        except Violation as violation:
            return seed, violation
    return None


def trace_of(seed: int, broken: str | None = None) -> tuple[list[str], Violation | None]:
    """Run one seed and tell every step of it."""
    trace: list[str] = []
    try:
        World(seed, rules_of(broken), trace=trace).run()
    except Violation as violation:
        return trace, violation
    return trace, None
