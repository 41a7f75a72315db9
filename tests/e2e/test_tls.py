"""TLS inside of a session that slept until the server's certificate had expired, with real certificates."""

import datetime as dt
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.agents import certificates
from tests.e2e.asleep import forget_all_but_the_store, sleep_deeply, wait_until_asleep
from tests.stage import SLOWER, Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENTS = Path(__file__).parent / "agents"
VALID_SECONDS = 10 * SLOWER
"""Enough for an agent to begin, and longer than the tickets of the Node agent's server live."""


def sleep_beyond_the_certificate(stage: Stage, *command: str) -> dict[str, Any]:
    """What the agent says that slept until its certificate had expired and then got a new one, valid from then on."""
    sleep_deeply(stage, linger=0.5)
    for name in ("certificates.py", "tls_agent.py", "tls_agent.mjs"):
        shutil.copy(AGENTS / name, stage.project)
    made = [sys.executable, "certificates.py", f"{VALID_SECONDS:.0f}"]
    stage.torpor("run", "-d", "--name", "one", "--", *made, *command)
    log = stage.follow("one")
    asked = log.wait("waitpoint.created")
    wait_until_asleep(log)
    log.close()
    forget_all_but_the_store(stage, "one")
    while time.time_ns() < asked["wall_ns"] + VALID_SECONDS * 10**9:
        time.sleep(0.1)  # The wait is what is tested.
    stage.torpor("pull", "one", "files")
    files = stage.project / "files"
    authority = certificates.read_authority(
        (files / "authority.key").read_bytes(), (files / "authority.pem").read_bytes()
    )
    resolve(stage, certificates.server_pem(authority, dt.timedelta(days=1)))
    stage.torpor("up")
    stage.torpor("wait", "one")
    stage.torpor("down")
    check_nothing_left(stage)
    said: dict[str, Any] = json.loads(stage.torpor("output", "one").stdout)
    return said


def resolve(stage: Stage, answer: bytes) -> None:
    command = [*stage.command, "resolve", "one", "-"]
    subprocess.run(command, env=stage.environment, cwd=stage.project, input=answer, check=True, capture_output=True)


def test_an_open_connection_goes_on_and_a_ticket_still_opens_one_though_the_certificate_has_expired(
    quick: Stage,
) -> None:
    """Python's tickets live for two hours, and no certificate is looked at when one is taken."""
    found = sleep_beyond_the_certificate(quick, sys.executable, "tls_agent.py")
    assert found["before"] == [True, "full", "ticket"]
    assert found["after"] == [True, "certificate has expired", "ticket"]
    assert found["renewed"] == "full", "a certificate that is valid since the sleep is valid inside: no clock is behind"
    assert found["ticket_seconds"] == 7200


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")
def test_a_ticket_that_expired_in_the_sleep_opens_no_connection_without_a_valid_certificate(quick: Stage) -> None:
    found = sleep_beyond_the_certificate(quick, "node", "tls_agent.mjs")
    assert found["before"] == [True, "full", "ticket"]
    assert found["after"] == [True, "CERT_HAS_EXPIRED", "CERT_HAS_EXPIRED"]
    assert found["renewed"] == "full"
