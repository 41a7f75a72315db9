"""Forks and rewinds on every database: rows of their own, nothing lost, nothing twice, and logs that hold."""

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.db.scene import NOW, Scene, wrapped_key

from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import Conflict
from torpor.core.events import Kind
from torpor.core.ids import CallId, new_call_id, new_session_id, new_snapshot_id
from torpor.core.origin import at_checkpoint, plan
from torpor.core.retention import Reason, RetentionPolicy
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Question
from torpor.db import (
    blocks,
    calls,
    checkpoints,
    forks,
    keys,
    log,
    messages,
    outputs,
    questions,
    requests,
    rewinds,
    roots,
    sessions,
    verify,
    waitpoints,
)
from torpor.db.database import Transaction
from torpor.db.forks import Child
from torpor.db.messages import Box
from torpor.db.waitpoints import find
from torpor.runtime.origins import find_origin

DUE = NOW + 10**12


class Story(Scene):
    """A session with a past: an open question, a message that is handled and one that is not, a call at the cut."""

    asked: CallId
    point: Checkpoint

    def tell(self, tx: Transaction) -> None:
        keys.add_tenant(tx, wrapped_key(keys.TENANT))
        self.answer(tx, b"first")
        self.asking = self.intend(tx, is_llm=False).call_id
        asked: dict[str, Any] = {"question": Question(text="Which?"), "due_ns": DUE, "wall_ns": NOW}
        self.question = questions.ask(tx, **self.owner, **asked, call_id=self.asking)
        for text in ("handled", "waiting"):
            messages.deliver(tx, **self.owner, text=text, wall_ns=NOW)
        messages.take(tx, **self.owner, call_id=self.asking)
        messages.send(tx, **self.owner, call_id=self.asking, text="out", wall_ns=NOW)
        output = {"channel": 1, "incarnation": 0, "wall_ns": NOW}
        outputs.append_output(tx, **self.owner, **output, position=0, data=b"before after")
        self.asked = self.send(tx, b'{"messages":["cut"]}')
        row = sessions.get(tx, self.session_id)
        point = replace(self.checkpoint(0, row.head_seq, self.asked), cursor_seq=row.cursor_seq, stdout_bytes=6)
        self.point = checkpoints.commit(tx, **self.owner, checkpoint=replace(point, joinable=()), wall_ns=NOW)

    def go_on(self, tx: Transaction) -> None:
        """What a rewind to the cut leaves: the answer, another call that takes a message and asks, a message out."""
        self.add_chunks(tx, self.asked, b"the ", b"answer")
        calls.complete(tx, **self.owner, call_id=self.asked, usage={"input_tokens": 3}, wall_ns=NOW)
        self.later = self.intend(tx, is_llm=False).call_id
        messages.take(tx, **self.owner, call_id=self.later)
        late: dict[str, Any] = {"question": Question(text="Late?"), "due_ns": None, "wall_ns": NOW}
        self.late = questions.ask(tx, **self.owner, **late, call_id=self.later)
        messages.send(tx, **self.owner, call_id=self.later, text="out again", wall_ns=NOW)
        row = sessions.get(tx, self.session_id)
        tip = replace(self.checkpoint(1, row.head_seq), cursor_seq=row.cursor_seq)
        self.tip = checkpoints.commit(tx, **self.owner, checkpoint=tip, wall_ns=NOW)


@pytest.fixture
async def story(scene: Scene) -> Story:
    made = Story(scene.database, scene.session_id, scene.owner_token)
    await made.write(made.tell)
    return made


def fork(
    tx: Transaction,
    story: Story,
    *,
    resample: bool = False,
    message: str | None = None,
    point: Checkpoint | None = None,
) -> Scene:
    """A child of the cut, or of another point, acquired by nobody."""
    made = {call.call_id: call for call in calls.load_calls(tx, story.session_id)}
    origin = at_checkpoint(checkpoints.get(tx, (point or story.point).checkpoint_id))
    planned = plan(origin, made, rewinds.past_of(tx, story.session_id).timeline, resample=resample)
    past = forks.read_past(tx, story.session_id, origin, planned)
    session_id = new_session_id(NOW)
    ids = {one.source.call.call_id: new_call_id(NOW) for one in past.calls}
    child = Child(
        session_id=session_id,
        name=None,
        spec={"argv": ["b"]},
        key=wrapped_key(session_id),
        snapshot_id=new_snapshot_id(NOW),
        manifest_digest="cd" * 32,
        call_ids=ids,
        bodies={one.source.call.call_id: requests.prepare(one.source.body) for one in past.calls},
        message=message,
        wake_ns=None,
    )
    forks.create(tx, past, child, wall_ns=NOW)
    return Scene(story.database, session_id, 0)


async def check_logs(*scenes: Scene) -> None:
    for scene in scenes:
        assert await scene.read(lambda tx, scene=scene: verify.verify_chain(tx, scene.session_id)) == []


async def test_a_child_has_the_answer_that_its_parent_got_and_pays_nothing(story: Story) -> None:
    await story.write(story.go_on)
    child = await story.write(lambda tx: fork(tx, story))
    [call] = await child.read(lambda tx: calls.load_calls(tx, child.session_id))
    assert (call.answered, call.cost_nanousd, dict(call.usage)) == (True, 0, {})
    assert call.call_id != story.asked
    chunks = await child.read(lambda tx: calls.load_chunks(tx, call.call_id, 1))
    assert [chunk.data for chunk in chunks] == [b"the ", b"answer"]
    [point] = await child.read(lambda tx: checkpoints.list_intact(tx, child.session_id))
    assert [stream.call_id for stream in point.open_streams] == [call.call_id]
    row = await child.read(lambda tx: sessions.get(tx, child.session_id))
    assert (row.status, row.parent) == (
        SessionStatus.ASLEEP,
        sessions.Parent(session_id=story.session_id, seq=story.point.seq),
    )
    await check_logs(story, child)


async def test_a_child_of_a_call_that_is_on_its_way_waits_for_it_and_one_that_resamples_does_not(story: Story) -> None:
    joins = await story.write(lambda tx: fork(tx, story))
    anew = await story.write(lambda tx: fork(tx, story, resample=True))
    for child, expected in ((joins, [story.asked]), (anew, [])):
        [call] = await child.read(lambda tx, child=child: calls.load_calls(tx, child.session_id))
        assert call.attempts == ()
        found = await child.read(lambda tx, child=child: forks.copies.list_joining(tx, child.session_id))
        assert [one.parent_call for one in found] == expected
    await check_logs(joins, anew)


async def test_a_question_is_answered_for_each_session_by_itself_under_one_id(story: Story) -> None:
    left, right = [await story.write(lambda tx: fork(tx, story)) for _ in range(2)]
    waitpoint_id = story.question.waitpoint_id
    for scene, said in ((left, "east"), (story, "west")):
        answer: dict[str, Any] = {"waitpoint_id": waitpoint_id, "text": said, "wall_ns": NOW}
        await scene.write(lambda tx, scene=scene, answer=answer: questions.answer(tx, **scene.owner, **answer))

    def answered(tx: Transaction) -> list[str | None]:
        points = [find(tx, scene.session_id, waitpoint_id) for scene in (story, left, right)]
        assert all(point is not None and point.due_ns == DUE for point in points)
        answers = [questions.answer_of(tx, point) for point in points if point is not None]
        return [answer and answer.text for answer in answers]

    assert await story.read(answered) == ["west", "east", None]
    await check_logs(story, left, right)


async def test_messages_that_nobody_had_handled_come_along_and_numbers_go_on(story: Story) -> None:
    await story.write(story.go_on)
    child = await story.write(lambda tx: fork(tx, story, message="hello"))
    inbox = await child.read(lambda tx: messages.list_after(tx, child.session_id, Box.IN))
    assert [(message.number, message.text, message.call_id) for message in inbox] == [
        (2, "waiting", None),
        (3, "hello", None),
    ]
    call_id = await child.write(lambda tx: child.intend(tx, is_llm=False).call_id)
    sent = await child.write(lambda tx: messages.send(tx, **child.owner, call_id=call_id, text="mine", wall_ns=NOW))
    assert sent.number == 2
    # A grandchild begins where its parent's numbers are, although its parent has no message of that number.
    assert await child.read(lambda tx: messages.begun_from(tx, child.session_id, Box.OUT)) == 1
    await check_logs(child)


async def test_a_child_outlives_the_rows_of_its_parent(story: Story) -> None:
    await story.write(story.go_on)
    child = await story.write(lambda tx: fork(tx, story))
    await story.write(lambda tx: sessions.forget(tx, **story.owner))
    await check_logs(child)
    [point] = await child.read(lambda tx: waitpoints.open_waitpoints(tx, child.session_id))
    assert (await child.read(lambda tx: questions.question_of(tx, point))).text == "Which?"


async def test_what_was_redacted_is_never_sent_by_a_child(story: Story) -> None:
    digest = requests.prepare(b'{"messages":["cut"]}').digests[:32]

    def redact(tx: Transaction) -> None:
        masked = b"*" * len(blocks.read(tx, story.session_id, digest).data)
        blocks.redact(tx, **story.owner, digest=digest, masked=masked)

    await story.write(redact)
    with pytest.raises(Conflict) as refused:
        await story.write(lambda tx: fork(tx, story, resample=True))
    assert refused.value.code == "request_redacted"


async def test_retention_keeps_where_children_began_and_what_was_left_is_no_way_back(story: Story) -> None:
    await story.write(story.go_on)
    await story.write(lambda tx: fork(tx, story))
    policy = RetentionPolicy(keep_last=1, keep_hourly=0, keep_daily=0)
    kept = (await story.read(lambda tx: roots.plan(tx, story.session_id, policy))).kept
    assert kept[story.point.number] is Reason.FORKED
    await rewind(story)
    kept = (await story.read(lambda tx: roots.plan(tx, story.session_id, policy))).kept
    assert kept[story.tip.number] is Reason.PINNED


async def rewind(story: Story, point: Checkpoint | None = None) -> Checkpoint:
    def work(tx: Transaction) -> Checkpoint:
        made = {call.call_id: call for call in calls.load_calls(tx, story.session_id)}
        origin = at_checkpoint(checkpoints.get(tx, (point or story.point).checkpoint_id))
        past = rewinds.past_of(tx, story.session_id)
        origin = replace(origin, checkpoint=past.point(origin.checkpoint))
        planned = plan(origin, made, past.timeline, resample=True)
        return rewinds.rewind(tx, **story.owner, origin=origin, plan=planned, wall_ns=NOW)

    return await story.write(work, durable=True)


async def test_a_rewind_undoes_what_came_after_and_nothing_that_went_out(story: Story) -> None:
    await story.write(story.go_on)
    made = await rewind(story)
    row = await story.read(lambda tx: sessions.get(tx, story.session_id))
    assert (row.status, made.number, made.seq < row.head_seq) == (SessionStatus.ASLEEP, 2, True)
    assert await story.read(lambda tx: checkpoints.newest(tx, story.session_id)) == made
    points = await story.read(lambda tx: checkpoints.list_intact(tx, story.session_id))
    assert [point.number for point in points] == [0, 2]
    inbox = await story.read(lambda tx: messages.list_after(tx, story.session_id, Box.IN))
    assert [message.call_id for message in inbox] == [story.asking, None]
    sent = await story.read(lambda tx: messages.list_after(tx, story.session_id, Box.OUT))
    assert [message.text for message in sent] == ["out", "out again"]
    late = await story.read(lambda tx: find(tx, story.session_id, story.late.waitpoint_id))
    assert late is not None
    assert late.resolution == {"abandoned": True}
    assert [point.waitpoint_id for point in await story.read(_open(story))] == [story.question.waitpoint_id]
    assert await story.read(lambda tx: outputs.read(tx, story.session_id, 1)) == b"before"
    [stream] = made.open_streams
    anew = await story.read(lambda tx: calls.load_call(tx, stream.call_id or story.asked))
    old = await story.read(lambda tx: calls.load_call(tx, story.asked))
    assert (anew.attempts, anew.key, anew.stream) == ((), old.key, old.stream)
    events = {event.seq: event for event in await story.read(lambda tx: log.events(tx, story.session_id))}
    assert events[anew.intended_seq].parent_seq == events[old.intended_seq].parent_seq
    assert events[anew.intended_seq].data["resamples"] == story.asked
    await check_logs(story)


def _open(story: Story) -> Any:
    return lambda tx: waitpoints.open_waitpoints(tx, story.session_id)


async def test_rewinding_twice_asks_anew_what_stands_for_the_call_by_then(story: Story) -> None:
    await story.write(story.go_on)
    first = await rewind(story)
    second = await rewind(story)
    past = await story.read(lambda tx: rewinds.past_of(tx, story.session_id))
    [one], [two] = first.open_streams, second.open_streams
    assert past.replaced == {story.asked: one.call_id, one.call_id: two.call_id}
    assert [stream.call_id for stream in past.point(story.point).open_streams] == [two.call_id]
    assert not past.timeline.holds(first.seq)
    left = await story.read(lambda tx: checkpoints.list_left(tx, story.session_id))
    assert sorted(left) == [story.tip.number, first.number]
    await check_logs(story)


async def test_a_turn_is_gone_back_to_by_no_checkpoint_that_a_rewind_left(story: Story) -> None:
    """A later cut amid the same turn was left; the turn's call is in the past all the same, by the cut that stays."""

    def cut_again(tx: Transaction) -> Checkpoint:
        row = sessions.get(tx, story.session_id)
        later = replace(story.checkpoint(1, row.head_seq, story.asked), cursor_seq=row.cursor_seq, joinable=())
        return checkpoints.commit(tx, **story.owner, checkpoint=later, wall_ns=NOW)

    later = await story.write(cut_again)
    await rewind(story)
    found: dict[str, Any] = {"session_id": story.session_id, "at": "turn:2", "pump_alive": lambda _: False}
    stays = await story.read(lambda tx: find_origin(tx, **found, branches=False))
    left = await story.read(lambda tx: find_origin(tx, **found, branches=True))
    assert (stays.checkpoint.number, left.checkpoint.number) == (story.point.number, later.number)
    with pytest.raises(Conflict) as refused:
        await rewind(story, left.checkpoint)
    assert refused.value.code == "origin_left"
    await rewind(story, stays.checkpoint)
    await story.read(lambda tx: rewinds.past_of(tx, story.session_id))
    await check_logs(story)


async def test_a_fork_of_what_a_rewind_left_has_handled_what_was_handled_there(story: Story) -> None:
    await story.write(story.go_on)
    await rewind(story)

    def take_again(tx: Transaction) -> None:
        messages.take(tx, **story.owner, call_id=story.intend(tx, is_llm=False).call_id)

    await story.write(take_again)
    inboxes = []
    for point in (story.tip, story.point):
        child = await story.write(lambda tx, point=point: fork(tx, story, point=point))
        inboxes.append(await child.read(lambda tx, child=child: messages.list_after(tx, child.session_id, Box.IN)))
    assert [[message.text for message in inbox] for inbox in inboxes] == [[], ["waiting"]]


async def test_an_ended_session_is_not_rewound(story: Story) -> None:
    def end(tx: Transaction) -> None:
        for status in (SessionStatus.RUNNING, SessionStatus.SUCCEEDED):
            sessions.set_status(tx, **story.owner, status=status, wall_ns=NOW)

    await story.write(end)
    with pytest.raises(Conflict) as refused:
        await rewind(story)
    assert refused.value.code == "session_ended"
    assert await story.read(lambda tx: log.last_of_kind(tx, story.session_id, Kind.SESSION_REWOUND)) is None


async def test_output_after_a_rewind_joins_the_end_of_the_past(story: Story) -> None:
    await story.write(story.go_on)
    await rewind(story)
    life = (await story.read(lambda tx: sessions.get(tx, story.session_id))).incarnation + 1

    def go_on(tx: Transaction) -> None:
        sessions.set_incarnation(tx, **story.owner, incarnation=life, wall_ns=NOW)
        output = {"channel": 1, "incarnation": life, "wall_ns": NOW}
        outputs.append_output(tx, **story.owner, **output, position=6, data=b" anew")

    await story.write(go_on)
    assert await story.read(lambda tx: outputs.read(tx, story.session_id, 1)) == b"before anew"
