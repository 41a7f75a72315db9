"""The node daemon by hand: started, killed, replaced, ended, and what it does when a session can't be run."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Log, Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]


def status(stage: Stage) -> dict[str, Any]:
    return json.loads(stage.torpor("status", "--json").stdout)


def modes(stage: Stage, session: str) -> list[str]:
    return [event["data"]["mode"] for event in stage.events(session) if event["kind"] == "recovery.chosen"]


def test_it_is_replaced_and_no_agent_notices(lasting: Stage) -> None:
    """Sandboxes are adopted; answers that were arriving have arrived: no call has a second attempt."""
    logs = start_two(lasting)
    first = status(lasting)
    assert [one["state"] for one in first["sessions"]] == ["running", "running"]
    lasting.torpor("up", "--replace")
    assert status(lasting)["pid"] != first["pid"]
    for name, log in logs.items():
        log.wait("agent.exited")
        log.close()
        assert modes(lasting, name) == ["boot", "adopt"]
        assert log.count("call.torn") == 0
        assert lasting.rows("show", name)[0]["exit_status"] == 0
    lasting.torpor("down")
    check_nothing_left(lasting)


def test_the_next_one_goes_on_with_everything_when_it_was_killed(lasting: Stage) -> None:
    logs = start_two(lasting)
    lasting.kill_daemon()
    lasting.torpor("up")
    for name, log in logs.items():
        log.wait("agent.exited")
        log.close()
        assert len(modes(lasting, name)) == 2
        assert lasting.rows("show", name)[0]["exit_status"] == 0
        assert log.count("call.torn") <= 1
    lasting.torpor("down")
    check_nothing_left(lasting)


def start_two(stage: Stage) -> dict[str, Log]:
    """Two sessions in their second turn."""
    for name in ("one", "two"):
        stage.torpor("run", "-d", "--name", name, "--", sys.executable, "agent.py")
    logs = {name: stage.follow(name) for name in ("one", "two")}
    for log in logs.values():
        log.wait("call.delivered")
    return logs


def test_down_puts_everything_to_sleep_and_up_goes_on(lasting: Stage) -> None:
    lasting.torpor("run", "-d", "--name", "one", "--", sys.executable, "agent.py")
    log = lasting.follow("one")
    log.wait("call.delivered")
    lasting.torpor("down")
    assert lasting.rows("ls")[0]["status"] == "asleep"
    assert lasting.sandbox_pids() == []
    refused = lasting.torpor("status", check=False)
    assert (refused.returncode, "daemon_not_running" in refused.stderr) == (75, True)
    lasting.torpor("up")
    log.wait("agent.exited")
    log.close()
    assert modes(lasting, "one") == ["boot", "restore"]
    lasting.torpor("down")
    check_nothing_left(lasting)


def test_a_second_one_is_refused_and_up_tells_of_the_first(quick: Stage) -> None:
    quick.torpor("up")
    assert "already" in quick.torpor("up").stderr
    refused = quick.torpor("up", "--foreground", check=False)
    assert (refused.returncode, "daemon_running" in refused.stderr) == (75, True)
    assert quick.torpor("status", "--pid").stdout == f"{status(quick)['pid']}\n"
    assert json.loads(quick.torpor("down", "--json").stdout)["ended"] is not None
    assert json.loads(quick.torpor("down", "--json").stdout) == {"ended": None}


def test_a_command_that_can_not_start_says_so_to_who_started_it(quick: Stage) -> None:
    failed = quick.torpor("run", "-d", "--name", "one", "--json", "--", "no-such-command", check=False)
    assert json.loads(failed.stdout)["error"]["code"] == "agent_cannot_start"
    quick.torpor("run", "-d", "--name", "two", "--", "true")
    log = quick.follow("two")
    log.wait("agent.exited")
    log.close()
    quick.torpor("down")
    check_nothing_left(quick)


def test_other_providers_than_the_shells_are_told(quick: Stage) -> None:
    quick.torpor("up")
    started = quick.torpor("run", "-d", "--name", "one", "--", "true", OPENAI_API_KEY="sk-another")
    assert "torpor up --replace" in started.stderr
    assert "other providers" not in quick.torpor("run", "-d", "--name", "two", "--", "true").stderr
    quick.torpor("down")


def test_what_dead_nodes_left_is_freed_at_the_start(quick: Stage) -> None:
    """A session that was ended while its sandbox lived on, as by a kill between the two; and a socket of nobody."""
    node = quick.node("run", "--name", "one", "--", "sleep", "600", TORPOR_CRASH_POINT="session.asleep")
    log = quick.follow("one")
    log.wait("recovery.chosen")
    assert quick.torpor("stop", "one", check=False).returncode != 0
    node.wait(60)
    log.close()
    assert quick.sandbox_pids() != []
    sockets = list((quick.home / "run").glob("*.sock"))
    assert sockets != []
    quick.torpor("up")
    while not status(quick):
        continue
    assert quick.sandbox_pids() == []
    assert not any(path.exists() for path in sockets)
    quick.torpor("rm", "one")
    quick.torpor("down")
    check_nothing_left(quick)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_unit(quick: Stage) -> None:
    unit = quick.directory / "torpor.service"
    unit.write_text(quick.torpor("up", "--systemd-unit").stdout)
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
