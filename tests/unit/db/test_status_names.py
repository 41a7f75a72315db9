"""A statement that names a status says what the one table in core/session.py says, and no other text does."""

import re
from importlib import resources
from pathlib import Path

from tests.unit.test_docs import ROOT

from torpor.core.call import CallState
from torpor.core.session import ENDED, TRANSITIONS, SessionStatus
from torpor.db.statements import statements

NAMED = {
    "session/set_status_fenced": ENDED | {SessionStatus.LOST},
    "waitpoint/list_open": ENDED,
    "child/begin_fenced": frozenset({SessionStatus.CREATED}),
}
"""What each statement means by the statuses that it names."""
OF_CALLS_TOO = frozenset(SessionStatus) & frozenset(CallState)


def test_statements_name_the_statuses_that_the_table_means() -> None:
    found = {name: _named(text) for name, text in statements().items()}
    assert {name: named for name, named in found.items() if named - OF_CALLS_TOO or name in NAMED} == NAMED


def test_nothing_follows_the_statuses_that_statements_take_for_the_end() -> None:
    assert {status for status in SessionStatus if not TRANSITIONS[status]} == ENDED


def test_no_table_and_no_module_names_a_status_of_its_own() -> None:
    """Words that only a session's status has: a copy of the table would need them."""
    telling = ENDED | {SessionStatus.HIBERNATING, SessionStatus.ASLEEP, SessionStatus.RECOVERING}
    own = "|".join(sorted(telling - OF_CALLS_TOO))
    texts = [*_under("src/torpor/db", ".sql"), *_under("src/torpor/db", ".py"), *_under("src/torpor/runtime", ".py")]
    assert len(texts) > 100
    copies = [text for text in texts if re.search(rf"""['"]({own})['"]""", text.read_text()) and not _is_named(text)]
    assert copies == []


def _named(statement: str) -> frozenset[SessionStatus]:
    words = set(re.findall(r"'(\w+)'", statement))
    return frozenset(status for status in SessionStatus if status.value in words)


def _under(directory: str, suffix: str) -> list[Path]:
    return [path for path in (ROOT / directory).rglob(f"*{suffix}") if path.is_file()]


def _is_named(path: Path) -> bool:
    return f"{path.parent.name}/{path.stem}" in NAMED and path.is_relative_to(str(resources.files("torpor.db")))
