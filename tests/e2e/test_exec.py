"""`torpor exec` in a real sandbox: streams, exit statuses, signals, and what a restore does to it."""

import json
import os
import signal
import subprocess

import pytest
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]


def execute(stage: Stage, *command: str, stdin: bytes = b"", options: tuple[str, ...] = ()) -> tuple[int, bytes, bytes]:
    finished = subprocess.run(
        [*stage.command, "exec", *options, "one", "--", *command],
        env=stage.environment,
        cwd=stage.project,
        input=stdin,
        capture_output=True,
        timeout=240,
        check=False,
    )
    return finished.returncode, finished.stdout, finished.stderr


def test_streams_environment_directory_and_exit_status_are_passed(waiting: Stage) -> None:
    assert execute(waiting, "sh", "-c", "cat; pwd; echo to stderr >&2; exit 7", stdin=b"from stdin\n") == (
        7,
        b"from stdin\n/workspace\n",
        b"to stderr\n",
    )
    options = ("--env", "GREETING=hello there", "--workdir", "/usr")
    told = execute(waiting, "sh", "-c", 'echo "$GREETING"; pwd; echo $TORPOR_SESSION', options=options)
    assert told == (0, b"hello there\n/usr\n1\n", b"")
    assert execute(waiting, "sh", "-c", "kill -9 $$")[0] == 128 + 9
    assert execute(waiting, "cat", stdin=b"unread", options=("--no-stdin",)) == (0, b"", b"")


def test_megabytes_go_both_ways_unchanged(waiting: Stage) -> None:
    data = os.urandom(1 << 20) * 6
    assert execute(waiting, "cat", stdin=data) == (0, data, b"")


def test_what_cannot_be_run_is_told_as_a_shell_does(waiting: Stage) -> None:
    status, _, said = execute(waiting, "no-such-program")
    assert status == 127
    assert b"program_cannot_run" in said
    assert b"No such file" in said
    assert execute(waiting, "/etc/passwd")[0] == 126
    assert execute(waiting, "true", options=("--workdir", "/nowhere"))[0] == 127


def test_an_interrupt_reaches_the_program_even_behind_unread_input(waiting: Stage) -> None:
    script = "trap 'echo caught; exit 9' INT; echo set; sleep 1000 & wait"
    process = subprocess.Popen(
        [*waiting.command, "exec", "one", "--", "sh", "-c", script],
        env=waiting.environment,
        cwd=waiting.project,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"set\n"
    os.set_blocking(process.stdin.fileno(), False)
    while process.stdin.write(bytes(65536)):  # More than pipes and windows hold: nobody reads it.
        pass
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == b"caught\n"
    assert process.wait(60) == 9
    process.stdin.close()
    process.stdout.close()


def test_a_program_goes_on_in_the_restored_sandbox_and_its_exec_says_so(waiting: Stage) -> None:
    script = "echo begun; n=0; while [ $n -lt 2 ]; do cat < tick; n=$((n+1)); echo $n > count; done"
    assert execute(waiting, "mkfifo", "tick")[0] == 0
    process = subprocess.Popen(
        [*waiting.command, "exec", "one", "--", "sh", "-c", script],
        env=waiting.environment,
        cwd=waiting.project,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert execute(waiting, "sh", "-c", "echo a > tick; until [ -e count ]; do sleep 0.1; done")[0] == 0
    waiting.torpor("checkpoint", "one")
    waiting.kill_sandbox()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert b"exec_lost" in said
    log = waiting.follow("one")
    log.wait("recovery.chosen", 2)
    log.close()
    script = 'cat count; echo b > tick; until [ "$(cat count)" = 2 ]; do sleep 0.1; done; cat count'
    assert execute(waiting, "sh", "-c", script) == (0, b"1\n2\n", b"")


def test_a_session_that_is_not_running_refuses_and_says_what_to_do(waiting: Stage) -> None:
    waiting.torpor("stop", "one")
    refused = waiting.torpor("exec", "one", "--", "true", check=False)
    assert refused.returncode == 75
    assert "session_not_running" in refused.stderr
    assert "torpor resume one" in refused.stderr
    waiting.torpor("kill", "one")
    refused = waiting.torpor("exec", "one", "--", "true", check=False)
    assert "torpor pull" in refused.stderr
    assert json.loads(waiting.torpor("show", "--json", "one").stdout)["status"] == "cancelled"
