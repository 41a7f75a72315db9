"""Claude Code works through a tool loop under `torpor run` and survives a kill -9 of its sandbox in mid-answer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.e2e.clients.claude_code import ENVIRONMENT, claude_code
from tests.e2e.clients.client_session import TURNS, ClientSession, client_session
from tests.e2e.clients.npm import NotInstallable

pytestmark = [pytest.mark.runsc, pytest.mark.npm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def claude() -> Path:
    try:
        return claude_code()
    except NotInstallable as error:
        pytest.skip(str(error))


@contextmanager
def claude_session(scratch: Path, runsc: Path, claude: Path, *arguments: str) -> Iterator[ClientSession]:
    """It finds its endpoint in ANTHROPIC_BASE_URL, which is set in every sandbox; its package is shown read-only."""
    options = ["--mount", str(claude.parent)]
    for name, value in ENVIRONMENT.items():
        options += ["--env", f"{name}={value}"]
    command = [str(claude), "-p", "Build it.", "--allowedTools", "Bash", *arguments]
    with client_session(scratch, runsc, command=command, options=options) as session:
        yield session


def test_claude_code_gets_the_rest_of_its_answer(claude: Path, scratch: Path, runsc: Path) -> None:
    arguments = ("--output-format", "stream-json", "--verbose", "--include-partial-messages")
    with claude_session(scratch, runsc, claude, *arguments) as session:
        # It tells each piece of an answer as it comes: this one's beginning was delivered, and the end is not sent yet.
        session.output.wait_for('"text":"Step 2 of')
        session.kill_in_mid_answer()
        result = json.loads(session.end().splitlines()[-1])
        assert (result["type"], result["is_error"]) == ("result", False)
        assert result["num_turns"] == TURNS + 1
        assert result["result"] == session.model.said[-1]
        # Each line of this format has a random id: what it tells of the answer a second time differs from the first.
        session.check(output_differs=True)


def test_claude_code_gets_an_answer_of_which_it_had_nothing(claude: Path, scratch: Path, runsc: Path) -> None:
    with claude_session(scratch, runsc, claude) as session:
        # The first checkpoint is cut by now, and most likely still being committed: the session goes back to it.
        session.log.wait("call.answering", 2)
        session.kill_in_mid_answer()
        assert session.end() == f"{session.model.said[-1]}\n"
        session.check()
