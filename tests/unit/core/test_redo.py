"""Which call answers a request (RECOVERY 5.1 to 5.4)."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from torpor.core.branch import Timeline
from torpor.core.call import CallState, RequestKey
from torpor.core.events import EventDraft, Kind, seal
from torpor.core.ids import SessionId
from torpor.core.join import StreamEnd, may_join
from torpor.core.redo import RedoEntry, RedoSet, entry_of, follow, redo_set_after_recovery, redo_set_at_cut


def entries(make, *pairs: tuple[str, str], **changes: object) -> list[RedoEntry]:
    return [entry_of(make.call(name, seq, text, **changes)) for seq, (name, text) in enumerate(pairs, start=10)]


def test_calls_after_the_cut_are_pending_and_those_before_it_are_not(make):
    calls = [make.call("old", 5), make.call("new", 15)]
    redo = redo_set_after_recovery(calls, make.checkpoint(10), Timeline())
    assert redo.pending == ("new",)


def test_a_failed_call_answers_nothing(make):
    calls = [make.call("bad", 15, state=CallState.FAILED)]
    redo = redo_set_after_recovery(calls, make.checkpoint(10, make.stream("bad")), Timeline())
    assert redo.pending == ()
    assert redo.attached == frozenset()


def test_a_call_open_at_the_cut_belongs_to_its_stream(make):
    calls = [make.call("open", 5)]
    redo = redo_set_after_recovery(calls, make.checkpoint(10, make.stream("open")), Timeline())
    assert redo.pending == ()
    assert redo.match(make.key("same")) is None, "an equal request on purpose is a new call"
    assert not redo.diverged, "and nothing was expected"


def test_a_call_open_at_the_cut_is_joined_once_its_stream_is_gone(make):
    redo = redo_set_after_recovery([make.call("open", 5)], make.checkpoint(10, make.stream("open")), Timeline())
    redo.ended("open", StreamEnd.GONE)
    assert redo.match(make.key("same")) == "open"


def test_what_was_pending_at_the_cut_stays_pending(make):
    calls = [make.call("early", 5, "a"), make.call("late", 15, "b")]
    redo = redo_set_after_recovery(calls, make.checkpoint(10, pending_redo=("early",)), Timeline())
    assert redo.pending == ("early", "late")


def test_a_call_whose_client_had_given_up_at_the_cut_is_joined_but_not_waited_for(make):
    redo = redo_set_after_recovery([make.call("c", 5)], make.checkpoint(10, joinable=("c",)), Timeline())
    assert redo.match(make.key("other")) is None
    assert not redo.diverged
    assert redo.match(make.key("same")) == "c"


def test_calls_that_a_rewind_took_off_the_timeline_answer_nothing(make):
    calls = [make.call("undone", 15), make.call("redone", 25)]
    redo = redo_set_after_recovery(calls, make.checkpoint(10), Timeline().rewound(to_seq=10, at_seq=20))
    assert redo.pending == ("redone",)


def test_calls_of_a_side_path_are_never_paid_for_twice(make):
    # X diverged from A; both were made after the cut, whichever of them the cursor is on.
    calls = [make.call("A", 15, "a"), make.call("X", 20, "x")]
    redo = redo_set_after_recovery(calls, make.checkpoint(10), Timeline())
    assert {redo.match(make.key("x")), redo.match(make.key("a"))} == {"X", "A"}


def test_after_a_rewind_or_a_fork_only_calls_open_at_the_cut_are_there(make):
    calls = [make.call("open", 5), make.call("after", 15)]
    redo = redo_set_at_cut(calls, make.checkpoint(10, make.stream("open")))
    assert (redo.pending, redo.joinable, redo.attached) == ((), (), {"open"})


def test_equal_requests_take_equal_calls_first_in_first_out(make):
    redo = RedoSet(entries(make, ("c1", "a"), ("c2", "a"), ("c3", "b")))
    assert [redo.match(make.key(text)) for text in "baaa"] == ["c3", "c1", "c2", None]


def test_an_exact_match_goes_before_a_canonical_and_that_before_a_logical_one(make):
    def entry(name: str, seq: int, *texts: str) -> RedoEntry:
        return entry_of(make.call(name, seq, RequestKey(exact=texts[0], canonical=texts[1], logical=texts[2])))

    redo = RedoSet(
        [entry("logical", 1, "x", "x", "l"), entry("canonical", 2, "y", "c", "l"), entry("exact", 3, "e", "c", "l")]
    )
    request = RequestKey(exact="e", canonical="c", logical="l")
    assert [redo.match(request) for _ in range(4)] == ["exact", "canonical", "logical", None]


def test_divergence_is_the_first_miss_while_calls_are_pending(make):
    redo = RedoSet(entries(make, ("c1", "a"), ("c2", "b")))
    redo.match(make.key("a"))
    assert not redo.diverged
    assert redo.match(make.key("z")) is None
    assert redo.diverged
    assert redo.pending == ()
    assert redo.match(make.key("b")) == "c2", "a pending LLM call stays matchable"


def test_a_miss_with_nothing_pending_is_no_divergence(make):
    redo = RedoSet(entries(make, ("c1", "a")))
    redo.match(make.key("a"))
    redo.match(make.key("z"))
    assert not redo.diverged


def test_divergence_shows_effects_as_orphans_and_lets_go_of_reads(make):
    effects = entries(make, ("pay", "a"), is_llm=False)
    reads = entries(make, ("poll", "b"), is_llm=False, method="GET")
    redo = RedoSet([*effects, *reads, *entries(make, ("llm", "c"))])
    redo.match(make.key("z"))
    assert redo.orphans == ("pay",)
    assert redo.match(make.key("b")) is None, "an old reading would be worse than a new one"
    assert redo.match(make.key("a")) == "pay", "an effect that is made again late is not made twice"


def test_five_equal_requests_at_once_are_five_calls(make):
    redo = RedoSet()
    for entry in entries(make, *[(f"c{n}", "a") for n in range(5)]):
        assert redo.match(make.key("a")) is None
        redo.attach(entry)
    assert not redo.diverged


def test_a_retry_joins_and_a_request_after_consumption_does_not(make):
    redo = RedoSet()
    redo.attach(entries(make, ("c1", "a"))[0])
    redo.ended("c1", StreamEnd.GONE)
    assert redo.match(make.key("a")) == "c1"
    assert redo.match(make.key("a")) is None, "it has a stream again"
    redo.ended("c1", StreamEnd.CONSUMED)
    assert redo.match(make.key("a")) is None


def test_only_a_stream_that_ended_short_may_be_joined():
    assert [may_join(end) for end in (None, StreamEnd.CONSUMED, StreamEnd.GONE, StreamEnd.RESET)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_failed_call_is_not_joined(make):
    redo = RedoSet()
    redo.attach(entries(make, ("c1", "a"))[0])
    redo.failed("c1")
    redo.ended("c1", StreamEnd.RESET)
    assert redo.match(make.key("a")) is None


def test_an_adopting_node_finds_the_redo_set_as_the_dead_one_left_it(make):
    calls = {c.call_id: c for c in [make.call("old", 15, "a"), make.call("lost", 16, "b"), make.call("new", 21, "c")]}
    left = redo_set_after_recovery([calls["old"], calls["lost"]], make.checkpoint(10), Timeline())
    assert left.match(make.key("a")) == "old"
    assert left.match(make.key("c")) is None
    left.attach(entry_of(calls["new"]))
    left.ended("old", StreamEnd.CONSUMED)
    left.ended("new", StreamEnd.GONE)

    drafts = [
        EventDraft(kind=Kind.CALL_REPEATED, incarnation=2, call_id="old"),
        EventDraft(kind=Kind.CALL_DIVERGED, incarnation=2),
        EventDraft(kind=Kind.CALL_INTENDED, incarnation=2, call_id="new"),
        EventDraft(kind=Kind.CALL_DELIVERED, incarnation=2, call_id="old", data={"end": "consumed"}),
        EventDraft(kind=Kind.CALL_DELIVERED, incarnation=2, call_id="new", data={"end": "gone"}),
    ]
    events = [
        seal(session_id=SessionId("s"), seq=n, draft=d, wall_ns=0, prev_hash="") for n, d in enumerate(drafts, 20)
    ]
    found = follow(
        redo_set_after_recovery([calls["old"], calls["lost"]], make.checkpoint(10), Timeline()), events, calls
    )
    assert (found.pending, found.joinable, found.attached, found.diverged) == (
        left.pending,
        left.joinable,
        left.attached,
        left.diverged,
    )
    assert found.joinable == ("lost", "new")


def test_the_late_end_of_an_earlier_stream_does_not_free_a_call_that_a_retry_holds(make):
    call = make.call("c", 20, stream=16)
    drafts = [
        EventDraft(kind=Kind.CALL_INTENDED, incarnation=1, call_id="c"),
        EventDraft(kind=Kind.CALL_DELIVERED, incarnation=1, call_id="c", data={"end": "gone", "stream": 16}),
        EventDraft(kind=Kind.CALL_JOINED, incarnation=1, call_id="c", data={"stream": 17}),
        EventDraft(kind=Kind.CALL_DELIVERED, incarnation=1, call_id="c", data={"end": "gone", "stream": 16}),
    ]
    events = [
        seal(session_id=SessionId("s"), seq=n, draft=d, wall_ns=0, prev_hash="") for n, d in enumerate(drafts, 20)
    ]
    assert follow(RedoSet(), events, {"c": call}).match(make.key("same")) is None
    late = EventDraft(kind=Kind.CALL_DELIVERED, incarnation=1, call_id="c", data={"end": "gone", "stream": 17})
    events.append(seal(session_id=SessionId("s"), seq=30, draft=late, wall_ns=0, prev_hash=""))
    assert follow(RedoSet(), events, {"c": call}).match(make.key("same")) == "c"


def test_across_a_rewind_a_model_is_asked_anew_and_the_rest_stays(make):
    calls = [make.call("llm", 5, "a"), make.call("inbox", 6, "b", is_llm=False)]
    point = make.checkpoint(10, joinable=("llm", "inbox"))
    assert redo_set_after_recovery(calls, point, Timeline().rewound(to_seq=10, at_seq=20)).joinable == ("inbox",)
    assert redo_set_after_recovery(calls, point, Timeline()).joinable == ("llm", "inbox")


@given(st.lists(st.sampled_from("abc"), max_size=12), st.randoms(use_true_random=False))
def test_the_same_requests_in_any_order_find_every_call_once(make, texts: list[str], rng):
    redo = RedoSet(entries(make, *[(f"c{n}", text) for n, text in enumerate(texts)]))
    again = texts.copy()
    rng.shuffle(again)
    found = [redo.match(make.key(text)) for text in again]
    assert Counter(found) == Counter(f"c{n}" for n in range(len(texts)))
    assert not redo.diverged


@given(st.lists(st.sampled_from("abcd"), max_size=10), st.lists(st.sampled_from("abcd"), max_size=10))
def test_a_call_is_found_at_most_once_and_only_by_its_own_request(make, logged: list[str], asked: list[str]):
    redo = RedoSet(entries(make, *[(f"c{n}", text) for n, text in enumerate(logged)]))
    found = [(text, redo.match(make.key(text))) for text in asked]
    hits = [(text, name) for text, name in found if name is not None]
    assert len({name for _, name in hits}) == len(hits)
    assert all(logged[int(name[1:])] == text for text, name in hits)
    assert Counter(text for text, _ in hits) == Counter(logged) & Counter(asked)


def test_a_call_whose_answer_is_lost_answers_nothing_and_is_still_waited_for(make):
    redo = RedoSet(entries(make, ("c1", "a"), ("c2", "b")))
    assert redo.match(make.key("a")) == "c1"
    redo.lost("c1", expected=True)
    assert redo.pending == ("c1", "c2")
    assert redo.leaves_path(make.key("a")), "to make it anew is another path"
    assert redo.match(make.key("a")) is None
    assert redo.diverged
    assert redo.match(make.key("b")) == "c2", "the others answer as before"
    redo.failed("c1")
    assert "c1" not in redo.joinable


def test_a_lost_call_that_nobody_waited_for_is_simply_a_new_one(make):
    redo = RedoSet(joinable=entries(make, ("c1", "a")))
    assert redo.match(make.key("a")) == "c1"
    redo.lost("c1", expected=False)
    assert (redo.pending, redo.joinable, redo.attached) == ((), (), frozenset())
    assert redo.match(make.key("a")) is None
    assert not redo.diverged
