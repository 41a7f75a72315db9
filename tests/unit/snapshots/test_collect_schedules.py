"""One save, or one restore, beside one collection: every schedule in which each of the two is interrupted at most once.

Either of them begins; the other comes in before any of its operations, and is left at any of its own.
"""

import itertools
from collections.abc import Iterator

import pytest
from tests.unit.snapshots.collecting import Scene, Work
from tests.unit.snapshots.stepping import Task

from torpor.snapshots import layout, usage
from torpor.snapshots.condemned import read_condemned

SAVE_OF_GARBAGE = "a save that shares what is garbage, whose index is in memory"
SAVE_THEN_FORGOTTEN = "a save whose parent is forgotten once it has begun"
RESTORE_THEN_FORGOTTEN = "a restore of what is forgotten once it has begun"


@pytest.fixture(autouse=True)
def everything_dead_is_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that images of two pages are repacked, and laid out anew when they lie in two frames."""
    monkeypatch.setattr(usage, "DEAD_BYTES_MIN", 1)
    monkeypatch.setattr(usage, "NEEDED_SHARE_MAX", 0.9)
    monkeypatch.setattr(layout, "FRAMES_OVER_IDEAL", 0)
    monkeypatch.setattr(layout, "_FRAMES_FREE", 1)


def begin(what: str) -> tuple[Scene, Work]:
    scene = Scene()
    scene.run(scene.save("a", 0, length=2))
    if what == RESTORE_THEN_FORGOTTEN:
        return scene, scene.restore(0)
    if what == SAVE_THEN_FORGOTTEN:
        return scene, scene.save("a", 1, length=2)
    scene.rows.clear()
    return scene, scene.save("a", 1, length=2, knows=scene.ever[0])


def count_steps(work: Work) -> int:
    task, steps = Task("counted", work), 0
    while not task.done:
        task.step()
        steps += 1
    task.check()
    return steps


def schedules(what: str) -> Iterator[tuple[bool, int, int]]:
    scene, work = begin(what)
    steps = count_steps(work)
    scene.rows.clear()
    collect_steps = count_steps(scene.collect())
    assert steps > 5
    assert collect_steps > 10
    scene.close()
    for first, second in itertools.product(range(1, steps + 1), range(1, collect_steps + 1)):
        yield False, first, second
        yield True, second, first


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [SAVE_OF_GARBAGE, SAVE_THEN_FORGOTTEN, RESTORE_THEN_FORGOTTEN])
def test_no_schedule_of_two_loses_anything(what: str) -> None:
    for collects_first, first_steps, second_steps in schedules(what):
        scene, work = begin(what)
        old = set(scene.rows)
        task, collector = Task(what, work), Task("collect", scene.collect())
        one, other = (collector, task) if collects_first else (task, collector)
        for _ in range(first_steps):
            one.step()
        if collects_first and what != SAVE_OF_GARBAGE:
            task.step()
            task.step()  # It has its lease, and has read the rows.
            task.step()
        for snapshot_id in old:
            scene.rows.pop(snapshot_id, None)
        for _ in range(second_steps):
            other.step()
        while not (one.done and other.done):
            for stepped in (one, other):
                for _ in range(100):  # A collector that waits for the other never ends before it.
                    stepped.step()
        one.check()
        other.check()
        scene.check()
        scene.check_at_rest()
        scene.close()


def test_a_child_of_what_was_condemned_while_it_was_saved_is_stored_whole() -> None:
    """Its parent's row came after the list was made, and the sweep that reads it has yet to come: both restore."""
    scene = Scene()
    scene.run(scene.save("a", 0, length=2))
    parent = Task("parent", scene.save("a", 1, length=2))
    while len(list(scene.real.list("packs/"))) < 4:  # Pages and objects, of each of the two.
        parent.step()
    collector = Task("collect", scene.collect())
    while not read_condemned(scene.real):
        collector.step()
    parent.finish()
    scene.run(scene.save("a", 2, length=2))
    child = scene.ever[-1]
    assert "a collection that is under way" in child.parent_problem
    assert child.new_pages == child.total_pages
    while not collector.done:
        collector.step()
    collector.check()
    scene.check()
    scene.check_at_rest()
    scene.close()
