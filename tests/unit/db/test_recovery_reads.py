"""What a recovery reads of the calls: as much as lies beyond its checkpoint, and enough for the same redo set."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.core.conftest import make_checkpoint, make_stream
from tests.unit.db.scene import NOW, Scene, new_scene

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint
from torpor.core.ids import CallId
from torpor.core.restart import Restart, redo_set_after_restarts
from torpor.db import calls
from torpor.db.database import Transaction, open_database
from torpor.testing.clock import FakeClock

TURNS = 24
CUTS = 60


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    made = await new_scene(database)
    await made.write(lambda tx: take_turns(made, tx))
    yield made
    await database.close()


def take_turns(scene: Scene, tx: Transaction) -> None:
    for turn in range(TURNS):
        if turn % 4 == 2:
            calls.fail(tx, **scene.owner, call_id=scene.send(tx), error="refused", wall_ns=NOW)
        elif turn % 4 == 3:
            scene.intend(tx, is_llm=False)
        else:
            scene.answer(tx, b"yes")


def cut(dice: random.Random, made: list[Call]) -> Checkpoint:
    """Amid the log, with some of the earlier calls still to be answered from it, or open."""
    seq = dice.randrange(made[-1].intended_seq + 2)
    before = [call.call_id for call in made if call.intended_seq <= seq]
    dice.shuffle(before)
    named = [before[start : start + 2] for start in (0, 2, 4)]
    streams = [make_stream(call_id) for call_id in (*named[0], None)]
    return make_checkpoint(seq, *streams, pending_redo=(*named[1], CallId("call_of_another")), joinable=tuple(named[2]))


@pytest.mark.parametrize("seed", range(CUTS))
async def test_what_is_read_beyond_a_checkpoint_makes_the_redo_set_that_all_calls_make(scene: Scene, seed: int) -> None:
    dice = random.Random(seed)
    made = await scene.read(lambda tx: calls.load_calls(tx, scene.session_id))
    point = cut(dice, made)
    beyond = await scene.read(lambda tx: calls.load_beyond(tx, scene.session_id, point))
    failed = dice.randrange(1, made[-1].intended_seq)
    restarts = [Restart(incarnation=1, seq=failed + 5, failed_seq=failed)] if seed % 2 else []
    timeline = Timeline() if seed % 3 else Timeline.of_rewinds([(failed, failed + 7)])
    told = {call.call_id: call for call in beyond}.values()
    few, all_of_them = (redo_set_after_restarts(list(one), point, restarts, timeline) for one in (told, made))
    assert (few.pending, few.joinable, few.attached) == (
        all_of_them.pending,
        all_of_them.joinable,
        all_of_them.attached,
    )
    assert len(told) <= 6 + sum(call.intended_seq > point.seq for call in made)


async def test_calls_in_a_state_and_of_streams_are_those_of_the_whole_list(scene: Scene) -> None:
    made = await scene.read(lambda tx: calls.load_calls(tx, scene.session_id))
    for state in CallState:
        found = await scene.read(lambda tx, state=state: calls.load_in_state(tx, scene.session_id, state))
        assert found == [call for call in made if call.state is state]
    streams = [
        make_stream(made[3].call_id),
        make_stream(None),
        make_stream("call_of_nobody"),
        make_stream(made[1].call_id),
    ]
    assert await scene.read(lambda tx: calls.load_of_streams(tx, scene.session_id, streams)) == [made[3], made[1]]
