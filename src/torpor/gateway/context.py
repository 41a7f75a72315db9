"""What a model saw last, for an agent that has lost its memory: its newest answered call, the request and the answer.

A request to a model carries the conversation so far, so these two are the context that the agent had. To look is no
call: an agent that began anew has no past to be kept on, and what it reads is what the log has now.
"""

from base64 import b64encode
from typing import Any

from torpor.core.errors import Damaged
from torpor.core.ids import SessionId
from torpor.db import calls, requests
from torpor.db.database import Transaction
from torpor.gateway.agent_api import Reply

NOTHING: dict[str, Any] = {"seq": None, "model": None, "target": None, "request": None, "answer": None}


def newest(tx: Transaction, session_id: SessionId) -> Reply:
    """The answer of `GET /torpor/v1/context`. What can't be read in the log is left out: an older call is given."""
    for call_id in reversed(calls.list_llm(tx, session_id)):
        call = calls.load_call(tx, call_id)
        if not call.answered:
            continue
        try:
            body = requests.read_request(tx, call_id).body
            chunks = calls.load_chunks(tx, call_id, call.attempts[-1].number)
        except Damaged:
            continue
        answer = b"".join(chunk.data for chunk in chunks)
        told = {"seq": call.intended_seq, "model": call.model, "target": call.target}
        return Reply(status=200, body={**told, "request": _text(body), "answer": _text(answer)})
    return Reply(status=200, body=NOTHING)


def _text(data: bytes) -> str:
    """As it went over the wire; what is no UTF-8 (a compressed body) in base64."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return b64encode(data).decode()
