"""Every client is killed with kill -9 at every point of an answer and between two, and restored: it never notices."""

from pathlib import Path

import pytest
from tests.e2e.clients.npm import NotInstallable
from tests.matrix.clients import CLIENTS, Client
from tests.matrix.model import POINTS
from tests.matrix.session import matrix_session

pytestmark = [pytest.mark.runsc, pytest.mark.npm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_survives_a_kill_at_every_point(client: Client, scratch: Path, runsc: Path) -> None:
    try:
        client.start("")
    except NotInstallable as error:
        pytest.skip(str(error))
    with matrix_session(scratch, runsc, client) as session:
        for turn in range(1, len(POINTS) + 1):
            session.kill_at(turn)
        session.check(session.end())
