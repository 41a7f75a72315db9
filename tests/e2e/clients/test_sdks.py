"""The providers' Python SDKs, sync and async, streaming and not, survive a kill -9 of their sandbox in mid-answer."""

import json
import sys
from pathlib import Path

import pytest
from tests.e2e.clients.client_session import TURNS, ClientSession, client_session
from tests.stage import REAL_KEY

from torpor.config import FAKE_KEY

AGENT = Path(__file__).parent / "agents/sdk_agent.py"
SDKS = ("openai", "anthropic")
MODES = ("sync", "async")

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(300)]


def check_transcript(session: ClientSession, text: str) -> None:
    """The agent had every word of the model's once, in order, and used the key that opens nothing."""
    transcript, _, report = text.partition("[report] ")
    assert transcript == "".join(f"{words}\n" for words in session.model.said)
    facts = json.loads(report)
    assert facts["tools"] == TURNS
    assert facts["key"] == FAKE_KEY
    assert not [value for value in facts["variables"] if REAL_KEY in value]
    session.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sdk", SDKS)
def test_a_streaming_sdk_gets_the_rest_of_its_answer(sdk: str, mode: str, scratch: Path, runsc: Path) -> None:
    pytest.importorskip(sdk, reason=f"the {sdk} package is not installed")
    command = [sys.executable, AGENT.name, sdk, mode, "stream", "Build it."]
    with client_session(scratch, runsc, command=command, files=[AGENT]) as session:
        # The agent has the beginning of the second answer: bytes were delivered that no restore may lose or repeat.
        session.output.wait_for("\nStep 2 of")
        assert "I start a ticker" not in session.output.text
        session.kill_in_mid_answer()
        check_transcript(session, session.end())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sdk", SDKS)
def test_a_waiting_sdk_gets_its_answer(sdk: str, mode: str, scratch: Path, runsc: Path) -> None:
    pytest.importorskip(sdk, reason=f"the {sdk} package is not installed")
    command = [sys.executable, AGENT.name, sdk, mode, "whole", "Build it."]
    with client_session(scratch, runsc, command=command, files=[AGENT]) as session:
        session.log.wait("call.sent", 2)
        if mode == "async":
            session.await_checkpoint(2)  # So it is restored in this turn, the sync client in the one before.
        session.kill_in_mid_answer()
        check_transcript(session, session.end())
