"""Questions of agents and their answers: waitpoints with texts, which are blocks, so that they can be redacted."""

from collections.abc import Sequence
from typing import Any

from torpor.core.errors import Conflict, InvalidInput, NotFound
from torpor.core.ids import CallId, SessionId, WaitpointId
from torpor.core.waitpoint import Answer, Question, ToldFile, Waitpoint, WaitpointKind
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
    if question.files:
        asked["files"] = list(question.files)
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
        return Question(
            text=asked["question"],
            choices=tuple(asked["choices"]),
            free_text=asked["free_text"],
            files=tuple(asked.get("files", ())),
        )
    except (ValueError, KeyError, TypeError):
        return Question(text=text)


def answer_of(tx: Transaction, point: Waitpoint) -> Answer | None:
    """What a person said to a question, or what redaction left of it; None: nothing yet.

    Raises:
        Damaged: `block_damaged`.
    """
    if point.resolution is None or "text" not in point.resolution:
        return None
    return answer_from(_text(tx, point, point.resolution["text"]), has_files="files" in point.resolution)


def answer_from(text: str, *, has_files: bool) -> Answer:
    """An answer as `answer` keeps it: alone its text as it is, so that it is found and redacted as such."""
    try:
        said: Any = decode_json(text) if has_files else {"answer": text}
        return Answer(text=said["answer"], files=tuple(said.get("files", ())))
    except (ValueError, KeyError, TypeError):
        return Answer(text=text)


def answer(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    waitpoint_id: WaitpointId,
    text: str | None,
    files: Sequence[ToldFile] = (),
    wall_ns: int,
) -> Waitpoint:
    """Resolve a waitpoint as a person wants it: a question with an answer, a timer before its time. Commit it durably.

    Args:
        files: that go with the answer.

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
    elif text is not None or files:
        raise InvalidInput("answer_refused", f"cannot resolve waitpoint {waitpoint_id}: a timer takes no answer")
    is_late = point.due_ns is not None and point.due_ns <= wall_ns
    kept = encode_json({"answer": text, "files": list(files)}) if files else text
    said = None if kept is None else _put(tx, owner, kept)
    resolution = {"files": len(files)} if files else {}
    if is_late or not resolve(tx, **owner, point=point, resolution=resolution, text=said, wall_ns=wall_ns):
        reason = f"cannot resolve waitpoint {waitpoint_id}: it was resolved before, or its time has come"
        raise Conflict("waitpoint_resolved", reason, hint=_HINT)
    return point


def _text(tx: Transaction, point: Waitpoint, digest: str) -> str:
    return blocks.read(tx, point.session_id, bytes.fromhex(digest)).data.decode("utf-8", "surrogatepass")


def _put(tx: Transaction, owner: dict[str, Any], text: str) -> str:
    return blocks.put(tx, **owner, data=text.encode("utf-8", "surrogatepass")).hex()
