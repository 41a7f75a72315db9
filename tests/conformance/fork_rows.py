"""Arguments of the functions that write what forks and rewinds need, for `test_database.Rows`."""

from dataclasses import replace

from tests.unit.db.scene import NOW, REQUEST_HEAD

from torpor.core.ids import CallId, SessionId, new_call_id
from torpor.core.origin import Plan, at_checkpoint
from torpor.db import calls, checkpoints, copies, log, messages, requests, rewinds
from torpor.db.database import Transaction
from torpor.db.messages import Box

FORK_AREAS = (copies, rewinds)


def fork_arguments(
    tx: Transaction, session_id: SessionId, answered: CallId, *, opened: CallId, intended: CallId
) -> dict[str, dict[str, object]]:
    """Args:
    answered, opened, intended: calls of the session: answered; open at the cut of checkpoint 0; never sent.
    """
    events = log.events(tx, session_id)
    source = copies.read_source(tx, calls.load_call(tx, answered), events, past_seq=events[-1].seq)
    first = checkpoints.numbered(tx, session_id, 0)
    assert first is not None
    [received] = messages.list_after(tx, session_id, Box.IN)
    copied = {"source": replace(source, head=REQUEST_HEAD), "prepared": requests.prepare(b"{}"), "origin": {}}
    return {
        "messages.bring": {"message": replace(received, number=5), "call_id": None, "wall_ns": NOW},
        "messages.begin_from": {"inbox": 7, "outbox": 8},
        "messages.unhandle": {"call_ids": [opened]},
        "checkpoints.leave": {"point": first, "left_seq": first.seq},
        "copies.copy": {**copied, "call_id": new_call_id(NOW), "wall_ns": NOW},
        "copies.take_answer": {"call_id": intended, "answer": source.answer, "joined": answered, "wall_ns": NOW},
        "rewinds.rewind": {
            "origin": at_checkpoint(first),
            "plan": Plan(kept=(), anew=(opened,), pending=(), joinable=()),
            "wall_ns": NOW,
        },
    }
