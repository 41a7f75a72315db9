"""Bad input and broken surroundings: one clear sentence, a hint, a stable code, an exit status, and nothing lost."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tests.stage import Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
RUN_AGENT = ("run", "--name", "one", "--", sys.executable, "agent.py")


def refusal(made: Stage, *command: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, code and message of a refused command; a traceback is never shown."""
    finished = made.torpor(*command, check=False, **variables)
    assert "Traceback" not in finished.stderr, finished.stderr
    words = finished.stderr[finished.stderr.index("error ") :].split(":", 1)
    return finished.returncode, words[0].removeprefix("error ").strip(), words[1].strip()


def fake_runsc(made: Stage, version: str, otherwise: str) -> str:
    script = made.directory / "fake-runsc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo runsc version {version}; exit 0; }}\n{otherwise}\n')
    script.chmod(0o755)
    return str(script)


def test_an_unknown_session_is_not_found(quick: Stage) -> None:
    assert refusal(quick, "resume", "nobody")[:2] == (66, "session_not_found")
    assert refusal(quick, "log", "ses_0000")[:2] == (66, "session_not_found")


def test_without_runsc_a_session_says_what_to_do(quick: Stage) -> None:
    status, code, _ = refusal(quick, "run", "--", "true", TORPOR_RUNSC="", PATH="/nowhere")
    assert (status, code) == (69, "runsc_missing")
    status, code, _ = refusal(quick, "run", "--", "true", TORPOR_RUNSC="/nonexistent/runsc")
    assert (status, code) == (69, "runsc_unusable")
    for command in (("up",), ("run", "-d", "--", "true")):
        status, code, message = refusal(quick, *command, TORPOR_RUNSC="", PATH="/nowhere")
        assert (status, code) == (71, "node_not_started")
        assert "cannot find runsc" in message
    assert quick.rows("ls") == [], "a session is left that nobody could run"


def test_debians_2022_runsc_is_refused(quick: Stage) -> None:
    old = fake_runsc(quick, "0.0~20221219.0", "exit 1")
    status, code, message = refusal(quick, "run", "--", "true", TORPOR_RUNSC=old)
    assert (status, code) == (69, "runsc_too_old")
    assert "systrap" in message


def test_a_kernel_that_runsc_cannot_use_is_explained_and_the_session_survives(quick: Stage, runsc: Path) -> None:
    complaint = "echo 'cannot set up namespaces: operation not permitted' >&2; exit 1"
    broken = fake_runsc(quick, "release-20240729.0", complaint)
    status, code, message = refusal(quick, "run", "--name", "one", "--", "true", TORPOR_RUNSC=broken)
    assert (status, code) == (71, "session_lost")
    assert "cannot recover" in message
    assert quick.rows("ls")[0]["status"] == "lost"
    reasons = [event["data"]["reason"] for event in quick.events("one") if event["kind"] == "recovery.rejected"]
    assert any("operation not permitted" in reason for reason in reasons)
    quick.torpor("resume", "one")
    assert quick.rows("ls")[0]["status"] == "succeeded"


def test_a_command_that_does_not_exist_in_the_sandbox_is_said_so(quick: Stage) -> None:
    status, code, message = refusal(quick, "run", "--name", "one", "--", "no-such-command")
    assert (status, code) == (64, "agent_cannot_start")
    assert "no-such-command" in message
    assert quick.rows("ls")[0]["status"] == "failed"
    assert quick.sandbox_pids() == []


def test_a_second_resume_of_a_running_session_is_refused(slow: Stage) -> None:
    node = slow.node(*RUN_AGENT)
    log = slow.follow("one")
    log.wait("call.sent")
    assert refusal(slow, "resume", "one")[:2] == (75, "session_running")
    assert refusal(slow, "rm", "one")[:2] == (75, "session_running")
    assert node.wait(300) == 0
    log.close()
    assert refusal(slow, "resume", "one")[:2] == (75, "session_ended")


def test_malformed_options_are_refused_before_anything_is_made(quick: Stage) -> None:
    assert refusal(quick, "run", "--env", "NOVALUE", "--", "true")[:2] == (64, "env_malformed")
    assert refusal(quick, "run", "--workspace", "/nonexistent", "--", "true")[:2] == (64, "workspace_missing")
    assert refusal(quick, "run", "--workspace", "/", "--", "true")[:2] == (64, "workspace_refused")
    assert refusal(quick, "run", "--workspace", str(Path.home()), "--", "true")[:2] == (64, "workspace_refused")
    assert refusal(quick, "run", "--image", str(quick.project), "--", "true")[:2] == (64, "image_unusable")
    assert refusal(quick, "run", "--name", "a b", "--", "true")[:2] == (64, "session_name_malformed")
    finished = quick.torpor("resume", "nobody", "--json", check=False)
    assert json.loads(finished.stdout)["error"]["code"] == "session_not_found"
    assert quick.rows("ls") == []


def test_a_huge_workspace_is_not_copied_unasked(quick: Stage) -> None:
    with (quick.project / "huge").open("wb") as file:
        file.truncate(1_000_000_001)
    status, code, message = refusal(quick, "run", "--", "true")
    assert (status, code) == (64, "workspace_needs_consent")
    assert "--yes" in message
    assert quick.rows("ls") == []
    assert list((quick.home / "sessions").iterdir()) == []
    quick.torpor("run", "--yes", "--", "true")
    (quick.home / "config.toml").write_text("workspace_bytes_max = 2000000000\n")
    quick.torpor("run", "--", "true")
    assert [row["status"] for row in quick.rows("ls")] == ["succeeded", "succeeded"]


@pytest.mark.parametrize(("typed", "sessions"), [(b"n\n", 0), (b"y\n", 1)])
def test_a_person_at_a_terminal_is_asked_about_a_huge_workspace(quick: Stage, typed: bytes, sessions: int) -> None:
    with (quick.project / "huge").open("wb") as file:
        file.truncate(1_000_000_001)
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    command = [*quick.command, "run", "--", "true"]
    finished = subprocess.run(
        command, cwd=quick.project, env=quick.environment, stdin=theirs, capture_output=True, text=True, check=False
    )
    os.close(ours)
    os.close(theirs)
    assert "Copy it? [y/N]" in finished.stderr
    assert finished.returncode == (0 if sessions else 64)
    assert len(quick.rows("ls")) == sessions


def stopped_in_the_middle(made: Stage) -> None:
    """A session with a few checkpoints and neither node nor sandbox nor images in memory."""
    node = made.node(*RUN_AGENT)
    log = made.follow("one")
    log.wait("checkpoint.committed", 4)
    node.kill()
    node.wait()
    made.kill_sandbox()
    log.close()
    session = made.rows("ls")[0]["session"]
    subprocess.run(["find", "/dev/shm", "-name", session, "-exec", "rm", "-rf", "{}", "+"], check=True)


def newest(made: Stage, kind: str) -> Path:
    files = [path for path in (made.home / "store").rglob("*") if path.is_file() and kind in str(path)]
    return max(files, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("damage", ["corrupt pack", "vanished pack", "missing manifest"])
def test_a_damaged_checkpoint_falls_back_to_an_older_one_and_says_so(slow: Stage, damage: str) -> None:
    stopped_in_the_middle(slow)
    if damage == "corrupt pack":
        pack = newest(slow, "pack")
        content = bytearray(pack.read_bytes())
        content[len(content) // 2] ^= 0xFF
        pack.chmod(0o600)
        pack.write_bytes(content)
    else:
        newest(slow, damage.rpartition(" ")[2]).unlink()
    slow.torpor("resume", "one")
    rejected = [event["data"] for event in slow.events("one") if event["kind"] == "recovery.rejected"]
    assert rejected, "the damaged checkpoint was restored"
    chosen = [event["data"] for event in slow.events("one") if event["kind"] == "recovery.chosen"][-1]
    assert chosen["checkpoint"] < rejected[0]["checkpoint"]
    report = json.loads(slow.torpor("output", "one").stdout.rpartition("[report] ")[2])
    assert report["memory"] == report["sqlite"] == report["subprocess"] == 5
    assert sum(line["event"] == "start" for line in slow.witness) <= 7, "answers that were paid for were asked again"


def test_no_space_left_fails_the_checkpoint_and_not_the_session(scratch: Path, runsc: Path) -> None:
    with stage(scratch, runsc, ["--turns", "4"]) as made:
        made.home.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", made.home], check=True)
        try:
            assert "runsc cannot be kept" in made.torpor(*RUN_AGENT).stderr
            failed = [event["data"] for event in made.events("one") if event["kind"] == "checkpoint.failed"]
            assert failed
            assert failed[0]["code"] == "no_space"
            assert "is whole" in made.torpor("log", "one", "--verify").stdout
        finally:
            subprocess.run(["umount", "--lazy", made.home], check=True)


def test_a_session_that_cannot_be_checkpointed_is_not_stopped_and_runs_on(scratch: Path, runsc: Path) -> None:
    with stage(scratch, runsc) as made:
        made.home.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", made.home], check=True)
        try:
            fill = "head -c 20000000 /dev/urandom > /tmp/more; echo full; read -r line"
            node = made.start("run", "--name", "one", "--", "bash", "-c", f"{fill} < <(sleep 600)", stdout=-1)
            assert node.stdout is not None
            assert node.stdout.readline() == "full\n"
            assert refusal(made, "stop", "one")[:2] == (75, "checkpoint_failed")
            assert made.rows("ls")[0]["status"] == "running"
            made.torpor("kill", "one")
            assert node.wait(120) == 137
            node.stdout.close()
        finally:
            subprocess.run(["umount", "--lazy", made.home], check=True)
