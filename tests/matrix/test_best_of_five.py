"""Five equal requests at once are five calls, and none more after restores: each answer goes to who asked for it."""

import time
from pathlib import Path

import pytest
from tests.e2e.clients.npm import NotInstallable
from tests.matrix.clients import python_client
from tests.matrix.model import MatrixModel, Point, Stop
from tests.matrix.session import NAME, POINT_SECONDS, MatrixSession, matrix_session

from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try

pytestmark = [pytest.mark.runsc, pytest.mark.npm, pytest.mark.timeout(300)]
FIVE = python_client("best-of-five", Path(__file__).parent / "agents/best_of_five.py")


class Undecided(MatrixModel):
    """Stands still in the middle of every answer."""

    def _say(self, conversation: Conversation, this: Try) -> Answer:
        text = f"The best is number {this.attempt}, as far as I know ({this.nonce})."
        self.said.append(text)
        return Answer(parts=(Say(text=text),), pace=Pace(chunk_seconds=0.005))

    def _stop_of(self, conversation: Conversation) -> Stop | None:
        if self._is_first:
            self.stops.clear()
            self._is_first = False
        self.stops.append(Stop(Point.MID_TEXT))
        return self.stops[-1]

    _is_first = True


def checkpoint_in_mid_answers(session: MatrixSession) -> None:
    """Make checkpoints until all five are open in one, with a part of each answer in the agent's hands."""
    session.log.wait("call.sent", 5)
    for number in range(1, 6):
        session.model.await_stop(number)
    bytes_sent = min(stop.body_bytes for stop in session.model.stops)
    deadline = time.monotonic() + POINT_SECONDS
    while True:
        session.stage.torpor("checkpoint", NAME)
        taken = [stream.taken for stream in session.newest_checkpoint().open_streams]
        if len(taken) == 5 and min(taken) > bytes_sent:
            return
        assert time.monotonic() < deadline, taken


def test_five_equal_requests_are_five_calls_and_none_more_after_restores(scratch: Path, runsc: Path) -> None:
    try:
        FIVE.start("")
    except NotInstallable as error:
        pytest.skip(str(error))
    with matrix_session(scratch, runsc, FIVE, Undecided) as session:
        checkpoint_in_mid_answers(session)
        session.kill_and_restore(1)
        session.model.release_all()
        session.log.wait("call.completed", 5)
        session.output.wait_for(session.model.said[-1])
        # Answered, and told to the agent: it is restored to where all five were open.
        session.kill_and_restore(2)
        told = session.end().splitlines()
        assert sorted(told) == sorted(session.model.said)
        assert len(set(told)) == 5
        assert session.model.witness.requests == 5
        kinds = [event["kind"] for event in session.stage.events(NAME)]
        assert kinds.count("call.sent") == kinds.count("call.completed") == 5
        # What it told in its second life it told again in its third, word by word.
        assert "output.differed" not in kinds
        assert "call.diverged" not in kinds
        assert "is whole" in session.stage.torpor("log", NAME, "--verify").stdout
