"""Questions of agents and their answers: waitpoints with texts, which are blocks, so that they can be redacted."""

from typing import Any

from torpor.core.errors import Conflict, InvalidInput, NotFound
from torpor.core.ids import CallId, SessionId, WaitpointId
from torpor.core.waitpoint import Question, Waitpoint, WaitpointKind
from torpor.db import blocks
from torpor.db.database import Transaction
from torpor.db.encoding import decode_json, encode_json
from torpor.db.fence import held_row
from torpor.db.waitpoints import create, find, resolve

_RESOLVED_BY = {
    WaitpointKind.BUDGET: "budget SESSION --add DOLLARS",
    WaitpointKind.MESSAGE: "send SESSION TEXT",
    WaitpointKind.CHILD: "kill CHILD, if it shall not go on",
}
_HINT = "`torpor waitpoints SESSION` lists what it waits on."


def ask(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    question: Question,
    due_ns: int | None,
    wall_ns: int,
) -> Waitpoint:
    """Make the waitpoint of a question. Commit it durably."""
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    asked = {"question": question.text, "choices": list(question.choices), "free_text": question.free_text}
    made: dict[str, Any] = {"kind": WaitpointKind.ASK, "call_id": call_id, "due_ns": due_ns, "wall_ns": wall_ns}
    return create(tx, **owner, **made, text=_put(tx, owner, encode_json(asked)))


def question_of(tx: Transaction, point: Waitpoint) -> Question:
    """What was asked, or what redaction left of it.

    Raises:
        Damaged: `block_damaged`.
    """
    return question_from(_text(tx, point, point.data["text"]))


def question_from(text: str) -> Question:
    """A question as `ask` keeps it, or what redaction left of it."""
    try:
        asked = decode_json(text)
        return Question(text=asked["question"], choices=tuple(asked["choices"]), free_text=asked["free_text"])
    except (ValueError, KeyError, TypeError):
        return Question(text=text)


def answer_of(tx: Transaction, point: Waitpoint) -> str | None:
    """What a person said to a question; None: nothing yet.

    Raises:
        Damaged: `block_damaged`.
    """
    digest = None if point.resolution is None else point.resolution.get("text")
    return None if digest is None else _text(tx, point, digest)


def answer(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    waitpoint_id: WaitpointId,
    text: str | None,
    wall_ns: int,
) -> Waitpoint:
    """Resolve a waitpoint as a person wants it: a question with an answer, a timer before its time. Commit it durably.

    Raises:
        NotFound: `waitpoint_not_found`.
        Conflict: `waitpoint_resolved`, somebody was first, or its time had come.
        InvalidInput: `answer_missing`; `answer_not_a_choice`; `answer_refused`, it waits for something else.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    held_row(tx, session_id, owner_token)
    point = find(tx, session_id, waitpoint_id)
    if point is None:
        raise NotFound("waitpoint_not_found", f"cannot resolve waitpoint {waitpoint_id}: there is none", hint=_HINT)
    if point.kind in _RESOLVED_BY:
        reason = f"cannot resolve waitpoint {waitpoint_id}: it waits for a {point.kind}"
        raise InvalidInput("answer_refused", reason, hint=f"torpor {_RESOLVED_BY[point.kind]}")
    if point.kind is WaitpointKind.ASK:
        if text is None:
            raise InvalidInput("answer_missing", f"cannot resolve waitpoint {waitpoint_id}: a question wants an answer")
        text = question_of(tx, point).check_answer(text)
    elif text is not None:
        raise InvalidInput("answer_refused", f"cannot resolve waitpoint {waitpoint_id}: a timer takes no answer")
    is_late = point.due_ns is not None and point.due_ns <= wall_ns
    said = None if text is None else _put(tx, owner, text)
    if is_late or not resolve(tx, **owner, point=point, resolution={}, text=said, wall_ns=wall_ns):
        reason = f"cannot resolve waitpoint {waitpoint_id}: it was resolved before, or its time has come"
        raise Conflict("waitpoint_resolved", reason, hint=_HINT)
    return point


def _text(tx: Transaction, point: Waitpoint, digest: str) -> str:
    return blocks.read(tx, point.session_id, bytes.fromhex(digest)).data.decode("utf-8", "surrogatepass")


def _put(tx: Transaction, owner: dict[str, Any], text: str) -> str:
    return blocks.put(tx, **owner, data=text.encode("utf-8", "surrogatepass")).hex()
