"""A call that is intended and sent in one transaction, on every database."""

import pytest
from tests.unit.db.scene import NOW, Scene

from torpor.core.call import Call, CallState
from torpor.db import calls, log
from torpor.db.database import Transaction


async def test_a_call_sent_at_once_is_as_one_that_is_sent_after(scene: Scene) -> None:
    def work(tx: Transaction) -> tuple[Call, Call]:
        after = scene.intend(tx)
        calls.mark_sent(tx, **scene.owner, call_id=after.call_id, wall_ns=NOW, usage_asked=True)
        at_once = scene.intend(tx, at_once=True, usage_asked=True)
        assert at_once == calls.load_call(tx, at_once.call_id)
        return calls.load_call(tx, after.call_id), at_once

    after, at_once = await scene.write(work)
    assert (at_once.state, at_once.attempts) == (after.state, after.attempts)
    events = (await scene.read(lambda tx: log.events(tx, scene.session_id)))[-4:]
    assert [event.kind for event in events] == ["call.intended", "call.sent"] * 2
    assert events[1].data == events[3].data
    assert [event.parent_seq for event in events] == [1, None, after.intended_seq, None]


@pytest.mark.parametrize("is_llm", [True, False])
async def test_a_budget_is_asked_before_a_model_call_is_sent(scene: Scene, is_llm: bool) -> None:
    def work(tx: Transaction) -> Call:
        tx.run("budget/set_limit_fenced", **scene.owner, budget_nanousd=5, wall_ns=NOW)
        return scene.intend(tx, at_once=True, is_llm=is_llm)

    assert (await scene.write(work)).state is (CallState.INTENDED if is_llm else CallState.SENT)
