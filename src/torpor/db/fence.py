"""What it means that a fenced statement changed no row.

Every statement that writes a session's rows checks the owner token itself (its name ends in `_fenced`). "No row" then
says that the right to write is lost, or, if the token is still the session's, whatever else the statement demands.
"""

from torpor.core.errors import Superseded, TorporError
from torpor.core.ids import SessionId
from torpor.core.lease import check_owner_token
from torpor.db.database import Row, Transaction


def held_row(tx: Transaction, session_id: SessionId, owner_token: int) -> Row:
    """The session's row, for a decision that a fenced statement will then carry out.

    Raises:
        Superseded: the session has another owner token, or is gone.
    """
    row = tx.one("session/find_by_id", session_id=session_id)
    if row is None:
        raise Superseded("owner_superseded", f"cannot write to session {session_id}: it was deleted")
    check_owner_token(session_id, presented=owner_token, current=row["owner_token"])
    return row


def refusal(tx: Transaction, session_id: SessionId, owner_token: int, otherwise: TorporError) -> TorporError:
    """The error for a fenced statement that changed no row: `otherwise`, unless the token was the reason.

    Raises:
        Superseded: the session has another owner token, or is gone.
    """
    held_row(tx, session_id, owner_token)
    return otherwise
