"""The main job as a user sees it: run, kill -9, resume; what is kept, what is shown, what stays hidden."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.crash.witness import check_attempts, check_nothing_left
from tests.stage import REAL_KEY, Stage

from torpor.core.clock import SystemClock
from torpor.runtime.losses import IN_A_ROW_MAX
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.gvisor import GvisorDriver
from torpor.sandbox.rootfs import directory_image
from torpor.sandbox.tools import inspect_runsc

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
COUNTERS = ("memory", "mapped", "sqlite", "subprocess")
RUN_AGENT = ("run", "--name", "one", "--", sys.executable, "agent.py")


def report_of(stage: Stage) -> dict[str, object]:
    return json.loads(stage.torpor("output", "one").stdout.rpartition("[report] ")[2])


def test_run_streams_output_and_exits_with_the_agents_status(quick: Stage) -> None:
    finished = quick.torpor("run", "--", "bash", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert finished.returncode == 7
    assert finished.stdout == "out\n"
    assert "err" in finished.stderr
    assert finished.stderr.startswith("session ses_")
    assert quick.rows("ls")[0]["status"] == "failed"
    check_nothing_left(quick)


def test_a_killed_sandbox_is_restored_in_mid_answer_without_a_second_call(slow: Stage) -> None:
    node = slow.node(*RUN_AGENT)
    log = slow.follow("one")
    log.wait("call.answering", 3)
    slow.kill_sandbox()
    assert node.wait(300) == 0
    log.close()
    events = slow.events("one")
    assert sum(event["kind"] == "recovery.chosen" for event in events) == 2
    assert check_attempts(slow, events, node_kills=0) == {"calls": 6, "sent": 6, "torn": 0, "asked": 6}
    assert report_of(slow) == {**dict.fromkeys(COUNTERS, 5), "background": {"ticker": None}}
    check_nothing_left(slow)


def test_a_killed_node_costs_one_reported_attempt_and_nothing_else(slow: Stage) -> None:
    node = slow.node(*RUN_AGENT)
    log = slow.follow("one")
    log.wait("call.answering", 3)
    node.kill()
    node.wait()
    assert slow.sandbox_pids(), "the sandbox outlives its node"
    resumed = slow.node("resume", "one")
    assert resumed.wait(300) == 0
    log.close()
    counted = check_attempts(slow, slow.events("one"), node_kills=1)
    assert counted == {"calls": 6, "sent": 7, "torn": 1, "asked": 7}
    assert report_of(slow)["memory"] == 5
    timeline = slow.torpor("log", "one").stdout
    assert "boot from checkpoint #0: started" in timeline
    assert timeline.count("call 3: attempt 1 was cut short: its node died") == 1
    assert timeline.count("call 3: attempt 2, with token counts asked for\n") == 1


def test_an_agent_that_ended_while_no_node_lived_is_found_with_its_output(quick: Stage) -> None:
    script = "echo begin; while [ ! -e /workspace/gate ]; do sleep 0.1; done; echo end; exit 4"
    node = quick.node("run", "--name", "one", "--", "bash", "-c", script)
    log = quick.follow("one")
    log.wait("session.status")
    node.kill()
    node.wait()
    workspace = next((quick.home / "sessions").glob("*/incarnations/1/workspace"))
    (workspace / "gate").write_text("go\n")
    finished = quick.torpor("resume", "one", check=False)
    log.close()
    assert finished.returncode == 4
    assert quick.torpor("output", "one").stdout == "begin\nend\n"


def test_stop_frees_the_sandbox_and_resume_goes_on(lasting: Stage) -> None:
    """The answer that was arriving has arrived; one that the agent asked for since may be torn."""
    node = lasting.node(*RUN_AGENT)
    log = lasting.follow("one")
    log.wait("call.delivered")
    asked_seq = lasting.events("one")[-1]["seq"]
    stopped = lasting.torpor("stop", "one").stderr
    newest = lasting.rows("show", "one")[0]["newest_checkpoint"]
    assert f"stopped at checkpoint #{newest}" in stopped
    assert node.wait(300) == 79
    assert "the session was stopped" in (lasting.directory / "node.log").read_text()
    assert lasting.rows("ls")[0]["status"] == "asleep"
    assert lasting.sandbox_pids() == []
    resumed = lasting.node("resume", "one")
    assert resumed.wait(300) == 0
    log.close()
    events = lasting.events("one")
    torn = {event["call"] for event in events if event["kind"] == "call.torn"}
    begun = {event["call"] for event in events if event["kind"] == "call.intended" and event["seq"] <= asked_seq}
    assert not torn & begun
    assert report_of(lasting) == {**dict.fromkeys(COUNTERS, 10), "background": {"ticker": None}}


def test_stop_now_waits_for_no_answer(quick: Stage) -> None:
    """Here one that never comes; it is asked for anew."""
    silent = json.dumps({"fault": "silent", "times": 1}).encode()
    urllib.request.urlopen(f"{quick.control}/faults", data=silent).close()
    node = quick.node(*RUN_AGENT)
    log = quick.follow("one")
    log.wait("call.sent")
    quick.torpor("stop", "--now", "one")
    assert node.wait(300) == 79
    assert quick.rows("ls")[0]["status"] == "asleep"
    assert quick.node("resume", "one").wait(300) == 0
    log.close()
    assert (log.count("call.torn"), report_of(quick)["memory"]) == (1, 5)


COUNTING = "for ((i = 1; ; i++)); do echo $i >> count; echo $i; sleep 0.005; done"


def lines_of(stage: Stage) -> list[int]:
    return [int(line) for line in stage.torpor("output", "one").stdout.splitlines()]


def test_after_the_cut_of_a_stop_the_agent_does_nothing_more(quick: Stage) -> None:
    """Its counter in the workspace is never behind what it printed: at the cut, and still when all is over."""
    node = quick.node("run", "--name", "one", "--", "bash", "-c", COUNTING)
    log = quick.follow("one")
    log.wait("session.status")
    quick.torpor("checkpoint", "one")
    quick.torpor("stop", "one")
    node.wait(300)
    quick.torpor("pull", "one", "pulled")
    counted = int((quick.project / "pulled/count").read_text().split()[-1])
    printed = lines_of(quick)
    assert printed == list(range(1, len(printed) + 1))
    assert len(printed) <= counted

    resumed = quick.node("resume", "one")
    log.wait("recovery.chosen", 2)
    quick.torpor("checkpoint", "one")
    quick.torpor("kill", "one")
    resumed.wait(300)
    log.close()
    goes_on = lines_of(quick)
    assert goes_on == list(range(1, len(goes_on) + 1))
    assert len(goes_on) > counted
    assert "output.differed" not in {event["kind"] for event in quick.events("one")}


def test_a_sandbox_that_outlives_its_stop_is_not_adopted(quick: Stage) -> None:
    """The node dies when the session is asleep and its sandbox, paused, is not destroyed yet."""
    node = quick.node("run", "--name", "one", "--", "bash", "-c", COUNTING, TORPOR_CRASH_POINT="session.asleep")
    log = quick.follow("one")
    log.wait("session.status")
    quick.torpor("stop", "one", check=False)
    node.wait(300)
    assert quick.rows("ls")[0]["status"] == "asleep"
    assert quick.sandbox_pids() != []
    resumed = quick.node("resume", "one")
    assert log.wait("recovery.chosen", 2)["data"]["mode"] == "restore"
    quick.torpor("kill", "one")
    resumed.wait(300)
    log.close()
    check_nothing_left(quick)


def test_output_that_the_last_life_did_not_write_again_is_superseded(quick: Stage) -> None:
    """After the cut the first life prints more, and dies; the second finds another workspace, and exits instead."""
    script = "echo begin; until [ -e more ]; do [ -e end ] && exit 0; sleep 0.05; done; echo more; sleep 600"
    node = quick.node("run", "--name", "one", "--", "bash", "-c", script)
    log = quick.follow("one")
    log.wait("session.status")
    quick.torpor("checkpoint", "one")
    lives = next((quick.home / "sessions").glob("*/incarnations"))
    (lives / "1/workspace/more").write_text("go\n")
    while quick.torpor("output", "one").stdout != "begin\nmore\n":
        assert node.poll() is None
    quick.kill_sandbox()
    log.wait("recovery.chosen", 2)
    (lives / "2/workspace/end").write_text("go\n")
    assert node.wait(300) == 0
    log.close()
    assert quick.torpor("output", "one").stdout == "begin\n"
    [differed] = [event for event in quick.events("one") if event["kind"] == "output.differed"]
    assert differed["data"] == {"channel": 1, "offset": len("begin\n")}


def test_interrupt_goes_to_the_agent(quick: Stage) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    node = quick.start("run", "--name", "one", "--", "bash", "-c", script, stdout=subprocess.PIPE)
    assert node.stdout is not None
    assert node.stdout.readline() == "ready\n"
    node.send_signal(signal.SIGINT)
    assert node.wait(120) == 9
    assert node.stdout.readline() == "caught\n"
    node.stdout.close()


def test_detached_sessions_can_be_watched_checkpointed_and_killed(lasting: Stage) -> None:
    started = lasting.torpor("run", "--detach", "--name", "one", "--", sys.executable, "agent.py")
    session = started.stdout.strip()
    assert session.startswith("ses_")
    assert "torpor log -f one" in started.stderr
    log = lasting.follow("one")
    log.wait("call.delivered")
    made = json.loads(lasting.torpor("checkpoint", "one", "--json").stdout)
    assert made["freeze_ns"] > 0
    assert made["number"] in [row["number"] for row in lasting.rows("checkpoints", "one")]
    assert f"{session} killed" in lasting.torpor("kill", "one").stderr
    log.wait("session.status", 2)
    log.close()
    assert lasting.rows("ls")[0]["status"] == "cancelled"
    check_nothing_left(lasting)
    assert f"{session} removed" in lasting.torpor("rm", "one").stderr


def test_a_foreground_session_says_that_it_was_killed_from_outside(quick: Stage) -> None:
    node = quick.start("run", "--name", "one", "--", "sh", "-c", "echo up; sleep 600", stdout=-1, stderr=-1)
    assert node.stdout is not None
    assert node.stdout.readline() == "up\n"
    quick.torpor("kill", "one")
    _, said = node.communicate(timeout=120)
    assert node.returncode == 137
    assert "the session was killed by another command" in said


def test_show_has_times_and_sizes_for_people_and_says_nothing_of_nothing(quick: Stage) -> None:
    quick.torpor("run", "--", "true")
    session = quick.rows("ls")[0]["session"]
    shown = dict(line.split("  ", 1) for line in map(str.strip, quick.torpor("show", session).stdout.splitlines()))
    assert shown["name"].strip() == shown["node"].strip() == "-"
    assert re.fullmatch(r" *\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d \(\d+[sm] ago\)", shown["created"])
    assert shown["stored bytes"].endswith("B")
    assert "None" not in "".join(shown.values())


def test_files_that_are_mapped_for_writing_are_known_to_the_host(quick: Stage, runsc: Path) -> None:
    """Stores through a mapping need not move a time stamp: a checkpoint has to read such files again."""
    script = """
import mmap, time
file = open("mapped", "wb+")
file.truncate(4096)
mapped = mmap.mmap(file.fileno(), 4096)
file.close()
print("up", flush=True)
time.sleep(600)
"""
    node = quick.start("run", "--", sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert node.stdout is not None
    assert node.stdout.readline() == "up\n"
    workspace = next((quick.home / "sessions").glob("*/incarnations/1/workspace"))
    driver = GvisorDriver(
        runsc=inspect_runsc(runsc, SystemClock()), state_directory=quick.home / "runsc", clock=SystemClock()
    )
    plan = SandboxPlan(
        sandbox_id=next(name for name in driver.sandbox_ids() if name.endswith("-1")),
        directory=workspace.parent,
        image=directory_image(Path("/")),
        workspace=workspace,
        init_directory=quick.home,
    )
    sandbox = driver.find(plan)
    assert sandbox is not None
    assert (workspace / "mapped").stat().st_ino in (sandbox.open_for_writing() or ())
    assert (workspace / "agent.py").stat().st_ino not in (sandbox.open_for_writing() or ())
    node.kill()
    node.stdout.close()


def test_the_workspace_is_a_copy_that_diff_shows_and_pull_brings_back(quick: Stage) -> None:
    (quick.project / "kept.txt").write_text("old\n")
    (quick.project / "gone.txt").write_text("x")
    quick.torpor("run", "--name", "one", "--", "bash", "-c", "echo new > kept.txt; rm gone.txt; mkdir d; echo 1 > d/f")
    assert (quick.project / "kept.txt").read_text() == "old\n"
    changes = {row["path"]: row["what"] for row in quick.rows("diff", "one")}
    assert changes["kept.txt"] == "changed"
    assert changes["gone.txt"] == "removed"
    assert changes["d/f"] == "added" or changes["d"] == "added"
    quick.torpor("pull", "one", str(quick.directory / "back"))
    assert (quick.directory / "back/kept.txt").read_text() == "new\n"
    assert (quick.directory / "back/d/f").read_text() == "1\n"


def test_a_secret_in_the_home_directory_is_not_visible_inside(quick: Stage) -> None:
    secret = "planted-secret-7d1f"
    home = quick.directory / "user"
    (home / ".ssh").mkdir(parents=True)
    for name in (".ssh/id_rsa", ".planted"):
        (home / name).write_text(secret)
    look = f"grep -rs {secret} /root /home /etc /var /tmp /run /workspace {home} ~ | head; ls -a /root; env"
    shown = quick.torpor("run", "--", "bash", "-c", look, HOME=str(home)).stdout
    assert secret not in shown
    assert REAL_KEY not in shown
    assert "OPENAI_BASE_URL=http://127.0.0.1:4100" in shown


def test_the_real_key_is_nowhere_in_the_home(quick: Stage) -> None:
    quick.torpor(*RUN_AGENT)
    found = subprocess.run(
        ["grep", "-rlF", REAL_KEY, quick.home, "/dev/shm"], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_a_root_file_system_can_be_the_image(quick: Stage) -> None:
    root = quick.directory / "root"
    for name in ("bin", "lib", "lib64", "usr"):
        link = Path("/", name)
        if link.is_symlink():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).symlink_to(link.readlink())
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (root / "usr/lib64").mkdir()
    for file in ("/usr/bin/dash", "/usr/lib/x86_64-linux-gnu/libc.so.6"):
        (root / file.lstrip("/")).write_bytes(Path(file).read_bytes())
        (root / file.lstrip("/")).chmod(0o755)
    loader = Path("/lib64/ld-linux-x86-64.so.2").resolve()
    (root / "usr/lib64/ld-linux-x86-64.so.2").write_bytes(loader.read_bytes())
    (root / "usr/lib64/ld-linux-x86-64.so.2").chmod(0o755)
    shown = quick.torpor("run", "--image", str(root), "--", "/bin/dash", "-c", "echo /usr/bin/*").stdout
    assert shown == "/usr/bin/dash\n"


def test_a_sandbox_that_dies_again_and_again_is_given_up_and_tried_again_by_hand(quick: Stage) -> None:
    (quick.project / "asking.sh").write_text('torpor-guest ask "Go on?"\n')
    node = quick.node("run", "--name", "one", "--", "bash", "asking.sh")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    for life in range(IN_A_ROW_MAX):
        log.wait("recovery.chosen", life + 1)
        quick.kill_sandbox()
    assert node.wait(300) != 0
    assert "session_crash_loop" in (quick.directory / "node.log").read_text()
    log.close()
    assert sum(event["kind"] == "recovery.chosen" for event in quick.events("one")) == IN_A_ROW_MAX
    quick.torpor("resolve", "one", "yes")
    assert quick.torpor("resume", "one").returncode == 0
    assert quick.torpor("output", "one").stdout == "yes\n"
    check_nothing_left(quick)
