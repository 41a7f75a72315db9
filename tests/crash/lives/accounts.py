"""What has to be true of every session of a home when all have ended: its own account, the log, and what was told.

Three parties: the agent (what it says it was told, byte for byte), the log (read from the rows), and the person with
the model's server (what was acknowledged to them, what they were asked). Each is held against the others. Which calls
belong to a session after forks and rewinds is worked out here anew, from the events alone.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.crash.lives.disturber import Done
from tests.crash.lives.home import Home
from tests.crash.lives.person import Said

from torpor.core.call import Call
from torpor.core.clock import SystemClock
from torpor.core.events import Event, Kind
from torpor.core.ids import SessionId
from torpor.db import calls, children, log, messages, requests, sessions
from torpor.db.database import Transaction, open_database
from torpor.db.messages import Box

Key = tuple[str, str]
"""A request of an agent's: its path and its body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A call as the log has it; `answer` is None unless it is whole and was no refusal."""

    call: Call
    key: Key
    answer: str | None
    joined: bool
    resamples: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that the log says of a session."""

    session: sessions.Session
    events: Sequence[Event]
    made: Sequence[Made]
    inbox: Mapping[int, str]
    outbox: Mapping[int, str]
    children: Sequence[str]


def check_home(home: Home, said: Said, done: Done) -> Counter[str]:
    """Assert the invariants; gives how many of what were looked at."""
    told = asyncio.run(_read(home))
    counted: Counter[str] = Counter()
    _check_population(told, done)
    for session_id, one in told.items():
        assert one.session.status == "succeeded", (session_id, one.session.status)
        counted["sessions"] += 1
        counted["events"] += len(one.events)
        _check_order(one)
        counted.update(_check_acknowledged(one, said))
        counted.update(_check_attempts(one))
        counted.update(_check_once(one))
        counted.update(_check_outbox(one))
        counted.update(_check_rewinds(home, one, done))
        counted.update(_check_account(home, told, session_id, said))
        assert "is whole" in home.torpor("log", session_id, "--verify").stdout
    counted.update(_check_model(home, told))
    return counted


async def _read(home: Home) -> dict[str, Told]:
    database = await open_database(f"sqlite://{home.stage.home}/torpor.db", clock=SystemClock())
    try:
        found = [row.session for row in home.sessions()]
        return {one: await database.read(lambda tx, one=one: _told(tx, SessionId(one))) for one in found}
    finally:
        await database.close()


def _told(tx: Transaction, session_id: SessionId) -> Told:
    events = log.events(tx, session_id)
    intended = {event.call_id: event.data for event in events if event.kind is Kind.CALL_INTENDED}
    joined = {event.call_id for event in events if event.kind is Kind.CALL_COMPLETED and "joined" in event.data}
    made: list[Made] = []
    for call in sorted(calls.load_calls(tx, session_id), key=lambda call: call.intended_seq):
        head, body = requests.get_request(tx, call.call_id)
        key = (head.target.lstrip("/"), body.decode())
        resamples = intended[call.call_id].get("resamples")
        is_joined = call.call_id in joined
        made.append(Made(call=call, key=key, answer=_answer(tx, call), joined=is_joined, resamples=resamples))
    boxes = {box: {one.number: one.text for one in messages.list_after(tx, session_id, box)} for box in Box}
    return Told(
        session=sessions.get(tx, session_id),
        events=events,
        made=made,
        inbox=boxes[Box.IN],
        outbox=boxes[Box.OUT],
        children=[child.session.session_id for child in children.list_of(tx, session_id)],
    )


def _answer(tx: Transaction, call: Call) -> str | None:
    if not call.answered:
        return None
    attempt = call.attempts[-1]
    assert attempt.head is not None
    if attempt.head.status >= 300:
        return None
    return b"".join(chunk.data for chunk in calls.load_chunks(tx, call.call_id, attempt.number)).decode()


def past(told: Mapping[str, Told], session_id: str, before_seq: int | None = None) -> list[Made]:
    """The calls that are a session's past at an event, or now: what rewinds left is out, what its parent had is in."""
    one = told[session_id]
    lineage: list[Made] = []
    if one.session.parent is not None:
        parent = one.session.parent
        lineage = [
            made
            for made in past(told, parent.session_id, parent.seq + 1)
            if made.call.session_id != parent.session_id or made.call.intended_seq <= parent.seq
        ]
    own: list[Made] = []
    by_seq = {made.call.intended_seq: made for made in one.made}
    for event in one.events:
        if before_seq is not None and event.seq >= before_seq:
            break
        if event.kind is Kind.SESSION_REWOUND:
            own = [made for made in own if made.call.intended_seq <= event.data["to_seq"]]
        elif event.kind is Kind.CALL_INTENDED:
            made = by_seq[event.seq]
            own = [other for other in own if other.call.call_id != made.resamples]
            own.append(made)
    return [*lineage, *own]


def _check_account(home: Home, told: Mapping[str, Told], session_id: str, said: Said) -> Counter[str]:
    """Every answer that the agent has is the one of its past, once; its rounds have no gap; memory and file agree."""
    account = json.loads(home.torpor("output", session_id).stdout)
    assert account["memory"] == account["file"], session_id
    answers = {made.key: made.answer for made in past(told, session_id) if made.answer is not None}
    keys = [(path, body) for path, body, _ in account["memory"]]
    assert len(set(keys)) == len(keys), (session_id, Counter(keys).most_common(3))
    for path, body, answer in account["memory"]:
        assert answers.get((path, body)) == answer, (session_id, path, body, answer, answers.get((path, body)))
    by_path: dict[str, list[tuple[Any, str]]] = {}
    for path, body, answer in account["memory"]:
        by_path.setdefault(path.rpartition("/")[2], []).append((json.loads(body), answer))
    sent = [json.loads(answer)["number"] for _, answer in by_path.get("send", [])]
    assert len(by_path.get("completions", [])) == len(sent)
    if "ask" in by_path:
        _check_rounds(told, session_id, by_path, said)
        assert sent == sorted(set(sent)), session_id
    return Counter(answers_compared=len(keys), accounts=1)


def _check_rounds(
    told: Mapping[str, Told], session_id: str, by_path: Mapping[str, list[tuple[Any, str]]], said: Said
) -> None:
    rounds = len(by_path["ask"]) - 1
    numbers = [int(body["question"].split()[1]) for body, _ in by_path["ask"]]
    assert numbers == list(range(1, rounds + 2)), session_id
    for path in ("receive", "completions", "send", "sleep"):
        assert len(by_path.get(path, [])) == rounds, (session_id, path)
    taken = [json.loads(answer)["answer"] for _, answer in by_path["ask"]]
    assert len(set(taken)) == rounds + 1, (session_id, taken)
    assert set(taken) <= said.tried
    assert [text.split()[0] for text in taken] == ["on"] * rounds + ["enough"], (session_id, taken)
    received = [json.loads(answer) for _, answer in by_path.get("receive", [])]
    # Each message once, in their order, from the first one on: a fork's numbers go on where its parent's were.
    assert [one["number"] for one in received] == list(range(1, rounds + 1)), session_id
    texts = {**_inboxes(told, session_id)}
    assert [one["text"] for one in received] == [texts[number] for number in range(1, rounds + 1)], session_id
    slept = [json.loads(answer)["state"] for _, answer in by_path.get("sleep", [])]
    assert set(slept) <= {"resolved"}
    for _, answer in by_path.get("wait", []):
        [ended] = json.loads(answer)["waitpoints"]
        assert (ended["kind"], ended["status"], ended["exit_status"]) == ("child", "succeeded", 0), answer
    begun = [json.loads(answer)["session"] for _, answer in by_path.get("spawn", [])]
    assert set(begun) <= set(told), "a child is lost"
    assert len(begun) == len([number for number in numbers[:-1] if number % 4 == 2])


def _inboxes(told: Mapping[str, Told], session_id: str) -> dict[int, str]:
    """Texts by number: the session's own, and below the number that it began from its parent's."""
    one = told[session_id]
    parent = {} if one.session.parent is None else _inboxes(told, one.session.parent.session_id)
    return {**parent, **one.inbox}


def _check_acknowledged(one: Told, said: Said) -> Counter[str]:
    """What was acknowledged is in the log, once; each waitpoint is resolved once; nobody else's words are there."""
    session_id = one.session.session_id
    resolved = Counter(event.data["waitpoint"] for event in one.events if event.kind is Kind.WAITPOINT_RESOLVED)
    assert set(resolved.values()) <= {1}, (session_id, resolved.most_common(3))
    answered = {json.loads(made.answer)["waitpoint"]: json.loads(made.answer)["answer"] for made in _asks(one)}
    acknowledged = {point: texts for (session, point), texts in said.answers.items() if session == session_id}
    for point, texts in acknowledged.items():
        assert len(texts) == 1, (session_id, point, texts)
        assert resolved[point] == 1, (session_id, point, "an acknowledged answer is lost")
        assert answered.get(point, texts[0]) == texts[0], (session_id, point, texts, answered[point])
    sent = said.messages[session_id]
    for number, text in sent:
        assert one.inbox.get(number) == text, (session_id, number, text, "an acknowledged message is lost")
    assert [number for number, _ in sent] == sorted({number for number, _ in sent}), session_id
    texts = list(one.inbox.values())
    assert len(set(texts)) == len(texts), (session_id, texts)
    assert set(texts) <= said.tried
    return Counter(answers_acknowledged=len(acknowledged), messages_acknowledged=len(sent), waitpoints=len(resolved))


def _asks(one: Told) -> list[Made]:
    return [made for made in one.made if made.key[0].endswith("/ask") and made.answer is not None]


def _check_order(one: Told) -> None:
    """No gap in the log; tokens and incarnations only rise; a cut is before its commit; each call ends once."""
    assert [event.seq for event in one.events] == list(range(1, len(one.events) + 1))
    assert one.session.head_seq == len(one.events)
    tokens = [event.data["owner_token"] for event in one.events if event.kind is Kind.LEASE_ACQUIRED]
    assert tokens == sorted(set(tokens)), one.session.session_id
    lives = [event.incarnation for event in one.events if event.kind is Kind.INCARNATION_STARTED]
    assert lives == sorted(set(lives)), one.session.session_id
    for event in one.events:
        if event.kind is Kind.CHECKPOINT_COMMITTED:
            assert event.data["seq"] < event.seq
    exits = [event.data for event in one.events if event.kind is Kind.AGENT_EXITED]
    assert len(exits) == 1, (one.session.session_id, exits)


def _check_attempts(one: Told) -> Counter[str]:
    """A call is sent once, and once more for each time that its node died; it is completed at most once."""
    sent = Counter(event.call_id for event in one.events if event.kind is Kind.CALL_SENT)
    torn = Counter(event.call_id for event in one.events if event.kind is Kind.CALL_TORN)
    completed = Counter(event.call_id for event in one.events if event.kind is Kind.CALL_COMPLETED)
    for call_id, attempts in sent.items():
        assert completed[call_id] <= 1, (one.session.session_id, call_id)
        assert attempts <= 1 + torn[call_id], (one.session.session_id, call_id, attempts, torn[call_id])
    return Counter(calls=len(one.made), calls_torn=sum(torn.values()))


def _check_once(one: Told) -> Counter[str]:
    """What was answered is answered once: a restored agent's request finds that answer, unless somebody went back."""
    rewound = [event.seq for event in one.events if event.kind is Kind.SESSION_REWOUND]
    stretches = [(made.key, sum(seq < made.call.intended_seq for seq in rewound)) for made in one.made if made.answer]
    again = [found for found in Counter(stretches).items() if found[1] > 1]
    assert again == [], (one.session.session_id, again)
    return Counter(requests_answered_once=len(stretches))


def _check_outbox(one: Told) -> Counter[str]:
    """What the agent sent is there once for each call that sent it, numbered without a gap."""
    numbers = list(one.outbox)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    own = [made for made in one.made if made.key[0].endswith("/send") and made.answer is not None and not made.joined]
    texts = Counter(json.loads(made.key[1])["text"] for made in own)
    there = Counter(one.outbox.values())
    assert all(there[text] >= count for text, count in texts.items()), (one.session.session_id, texts - there)
    unanswered = Counter(
        json.loads(made.key[1])["text"] for made in one.made if made.key[0].endswith("/send") and made.answer is None
    )
    assert not there - texts - unanswered, (one.session.session_id, there - texts)
    return Counter(messages_out=len(numbers))


def _check_rewinds(home: Home, one: Told, done: Done) -> Counter[str]:
    """Who was told of a rewind finds it, once; of one that was cut short there is one or none; branches are kept."""
    session_id = one.session.session_id
    rewound = [event for event in one.events if event.kind is Kind.SESSION_REWOUND]
    told = done.rewound[session_id]
    assert len(told) <= len(rewound) <= len(told) + done.rewinds_cut[session_id], (session_id, told, rewound)
    if not rewound:
        return Counter()
    branches = [
        row for row in home.rows("tree", session_id) if row["kind"] == "branch" and row["session"] == session_id
    ]
    assert len(branches) == len(rewound), (session_id, branches)
    there = {row["number"] for row in home.rows("checkpoints", session_id)}
    tips = {row["tip"] for row in branches if row["tip"] is not None}
    assert tips <= there, (session_id, tips - there)
    return Counter(rewinds=len(rewound), branch_tips=len(tips))


def _check_population(told: Mapping[str, Told], done: Done) -> None:
    """No session is lost, and none is there that nobody made: all children of a fork, or none."""
    names = {one.session.name: session_id for session_id, one in told.items() if one.session.name is not None}
    expected = set(done.begun)
    for fork in done.forks:
        wanted = [fork.name] if fork.count == 1 else [f"{fork.name}-{number}" for number in range(1, fork.count + 1)]
        there = [names[name] for name in wanted if name in names]
        assert len(there) in ({fork.count} if fork.children else {0, fork.count}), (fork, there)
        assert fork.children is None or sorted(there) == sorted(fork.children), (fork, there)
        for child in there:
            parent = told[child].session.parent
            assert parent is not None and parent.session_id == fork.parent, (fork, parent)
        expected.update(there)
    spawned: list[str] = []
    for one in told.values():
        spawned += one.children
        asked = [made for made in one.made if made.key[0].endswith("/spawn") and not made.joined]
        begun = {json.loads(made.answer)["session"] for made in asked if made.answer is not None}
        assert begun <= set(one.children), (one.session.session_id, begun, one.children)
        assert len(one.children) <= len(asked), (one.session.session_id, one.children)
    assert len(set(spawned)) == len(spawned)
    assert expected | set(spawned) == set(told), expected | set(spawned) ^ set(told)


def _check_model(home: Home, told: Mapping[str, Told]) -> Counter[str]:
    """The model was asked for every answer that somebody has, and never without the log knowing."""
    asked = sum(line["event"] == "start" for line in home.stage.witness)
    own = [made for one in told.values() for made in one.made if made.call.is_llm and not made.joined]
    sent = sum(len(made.call.attempts) for made in own)
    answers = [made.answer for made in own if made.answer is not None]
    assert len(answers) <= asked <= sent, (len(answers), asked, sent)
    assert len(set(answers)) == len(answers), "one answer was given to two calls"
    return Counter(model_asked=asked)
