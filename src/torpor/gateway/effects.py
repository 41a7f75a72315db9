"""Steps of the agent's that are done once: their results by name, as calls of the log.

To record a result is a call whose name alone is what it is matched by (`core.match` leaves `result` out); the first
result that the log has under a name is the answer to all later ones. To look for one is no call: its answer is what
the log says now, not what it said when the agent came by here before. Order, and what a kill -9 leaves:

    look up                            nothing: it is asked again
    the agent runs the step            a step that may have happened; the agent runs it again
    call.intended                      its stream, or the agent's repeat, starts it again
    sent, answer, completed: one transaction
                                       the result, for whoever comes here again
"""

from typing import Any

import msgspec

from torpor.core.call import Call, RequestKey
from torpor.core.ids import CallId, SessionId
from torpor.core.match import request_key
from torpor.db import calls
from torpor.db.database import Transaction
from torpor.gateway.agent_api import EFFECTS_PATH, Lookup, Reply
from torpor.gateway.request import RequestLine


def key_of(line: RequestLine, wanted: Lookup) -> RequestKey:
    """The key of the call that would record the result of what is looked for, made by the same client."""
    body = msgspec.json.encode({"name": wanted.name})
    return request_key(dialect="torpor", method="POST", target=EFFECTS_PATH, headers=line.headers, body=body)


def found(tx: Transaction, session_id: SessionId, key: RequestKey) -> Reply:
    """The answer to a lookup."""
    first = _first(tx, session_id, key)
    return Reply(status=200, body={"found": first is not None, "result": None if first is None else first["result"]})


def record(tx: Transaction, call: Call, name: str, result: Any) -> dict[str, Any]:
    """The body of the answer to a recording: the first result under this name."""
    return _first(tx, call.session_id, call.key) or {"name": name, "result": result}


def _first(tx: Transaction, session_id: SessionId, key: RequestKey) -> dict[str, Any] | None:
    row = tx.one("call/find_first_answered", session_id=session_id, key_canonical=key.canonical)
    if row is None:
        return None
    call_id = CallId(row["call_id"])
    newest = calls.load_call(tx, call_id).attempts[-1]
    return msgspec.json.decode(b"".join(chunk.data for chunk in calls.load_chunks(tx, call_id, newest.number)))
