"""Sessions that sleep by themselves: nothing is left of them, and what they wait for wakes them."""

import json
import signal
import subprocess
import sys
import time

import jwt
import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import json, os, urllib.request

def call(path, **body):
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/" + path, json.dumps(body).encode()) as answer:
        return json.load(answer)

kept = os.urandom(8).hex()
open("kept", "w").write(kept)
answer = call("ask", question="Deploy?")["answer"]
slept = call("sleep", seconds=SLEEP)["state"]
print(answer, slept, open("kept").read() == kept)
"""
AT_ONCE = "[hibernate]\nlinger_seconds = 0.5\npaused_seconds = {paused}\nready_seconds = {ready}\n"


def prepare(stage: Stage, *, paused: float, ready: float, sleep: float = 0) -> None:
    stage.home.mkdir(exist_ok=True)
    (stage.home / "config.toml").write_text(AT_ONCE.format(paused=paused, ready=ready))
    (stage.project / "asking.py").write_text(AGENT.replace("SLEEP", str(sleep)))


def statuses(stage: Stage, session: str) -> list[str]:
    return [event["data"]["to"] for event in stage.events(session) if event["kind"] == "session.status"]


def test_an_answer_wakes_it_from_the_pause_without_a_restore(quick: Stage) -> None:
    prepare(quick, paused=600, ready=0)
    node = quick.node("run", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("session.status", 4)
    assert (quick.rows("ls")[0]["status"], quick.rows("ls")[0]["tier"]) == ("asleep", "paused")
    quick.torpor("resolve", "one", "yes")
    assert node.wait(300) == 0
    log.close()
    assert quick.torpor("output", "one").stdout == "yes resolved True\n"
    assert statuses(quick, "one")[:6] == ["running", "waiting", "hibernating", "asleep", "waking", "running"]
    assert [event["data"]["mode"] for event in quick.events("one") if event["kind"] == "recovery.chosen"] == ["boot"]
    quick.torpor("log", "one", "--verify")
    check_nothing_left(quick)


def test_in_the_background_nothing_is_left_of_a_sleeper_and_what_it_waits_for_wakes_it(quick: Stage) -> None:
    prepare(quick, paused=0, ready=0, sleep=12)
    session = quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "asking.py").stdout.strip()
    log = quick.follow("one")
    log.wait("session.status", 4)
    gone(quick)
    [row] = quick.rows("ls")
    assert (row["session"], row["status"], row["node"]) == (session, "asleep", "")
    quick.torpor("resolve", "one", "yes")
    log.wait("session.status", 6)
    woken = log.wait("session.status", 11)
    assert woken["data"]["to"] == "running"
    log.wait("agent.exited")
    log.close()
    assert quick.torpor("output", "one").stdout == "yes resolved True\n"
    [_, timer] = [event for event in quick.events("one") if event["kind"] == "waitpoint.created"]
    assert woken["wall_ns"] >= timer["wall_ns"] + 12_000_000_000
    assert [event["data"]["mode"] for event in quick.events("one") if event["kind"] == "recovery.chosen"] == [
        "boot",
        "restore",
        "restore",
    ]
    quick.torpor("down")
    check_nothing_left(quick)


def gone(stage: Stage) -> None:
    """Wait until the daemon has let go of every session."""
    while json.loads(stage.torpor("status", "--json").stdout)["sessions"]:
        continue
    assert stage.sandbox_pids() == []


def test_a_sleeper_is_woken_by_the_next_daemon_when_the_last_one_died(quick: Stage) -> None:
    prepare(quick, paused=600, ready=0)
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("session.status", 4)
    quick.kill_daemon()
    assert quick.sandbox_pids() != []
    told = quick.torpor("resolve", "one", "yes").stderr
    assert "torpor up" in told
    quick.torpor("up")
    log.wait("agent.exited")
    log.close()
    assert quick.torpor("output", "one").stdout == "yes resolved True\n"
    quick.torpor("down")
    check_nothing_left(quick)


def test_what_comes_while_it_goes_to_sleep_keeps_it_awake(quick: Stage) -> None:
    """The last cut is made and nothing is stored yet: the answer that comes then is not slept through."""
    prepare(quick, paused=0, ready=0)
    node = quick.node("run", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("session.status", 3)
    quick.torpor("resolve", "one", "yes")
    assert node.wait(300) == 0
    log.close()
    assert quick.torpor("output", "one").stdout == "yes resolved True\n"
    check_nothing_left(quick)


def test_who_is_stopped_wakes_only_for_a_person(quick: Stage) -> None:
    prepare(quick, paused=600, ready=600)
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "asking.py")
    log = quick.follow("one")
    log.wait("session.status", 4)
    quick.torpor("stop", "one")
    quick.torpor("resolve", "one", "yes")
    assert quick.rows("ls")[0]["status"] == "asleep"
    node = quick.node("resume", "one")
    assert node.wait(300) == 0
    log.close()
    assert quick.torpor("output", "one").stdout == "yes resolved True\n"
    quick.torpor("down")
    check_nothing_left(quick)


def test_signals_and_commands_wake_it_and_kill_ends_it(quick: Stage) -> None:
    prepare(quick, paused=600, ready=0)
    script = "import signal, sys\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n" + AGENT.replace("SLEEP", "0")
    (quick.project / "asking.py").write_text(script)
    node = quick.start("run", "--name", "one", "--", sys.executable, "asking.py", stderr=subprocess.DEVNULL)
    log = quick.follow("one")
    log.wait("session.status", 4)
    assert quick.torpor("exec", "one", "--", "echo", "inside").stdout == "inside\n"
    log.wait("session.status", 9)
    assert quick.rows("ls")[0]["status"] == "asleep"
    node.send_signal(signal.SIGINT)
    assert node.wait(300) == 7
    log.close()

    node = quick.node("run", "--name", "two", "--", sys.executable, "asking.py")
    log = quick.follow("two")
    log.wait("session.status", 4)
    quick.torpor("kill", "two")
    assert node.wait(300) == 137
    log.close()
    check_nothing_left(quick)


def test_a_busy_agent_stays_awake_and_can_not_be_hibernated_by_hand(quick: Stage) -> None:
    prepare(quick, paused=0, ready=0)
    quick.torpor("run", "-d", "--name", "one", "--", "sleep", "600")
    refused = quick.torpor("hibernate", "one", "--json", check=False)
    assert json.loads(refused.stdout)["error"]["code"] == "session_busy"
    quick.torpor("kill", "one")
    (quick.home / "config.toml").write_text('[hibernate]\nlinger_seconds = "never"\n')
    quick.torpor("down")
    quick.torpor("run", "-d", "--name", "two", "--", sys.executable, "asking.py")
    log = quick.follow("two")
    log.wait("waitpoint.created")
    quick.torpor("hibernate", "two")
    assert quick.rows("ls")[0]["status"] == "asleep"
    quick.torpor("resolve", "two", "yes")
    log.wait("agent.exited")
    log.close()
    quick.torpor("down")
    check_nothing_left(quick)


CLOCKS = """
import asyncio, json, time, urllib.request
import jwt

KEY = "a key that both sides have, of 32 bytes"

def is_good(token):
    try:
        return jwt.decode(token, KEY, algorithms=["HS256"])["sub"] == "agent"
    except jwt.InvalidTokenError as error:
        return type(error).__name__

def ask():
    with urllib.request.urlopen("http://127.0.0.1:4100/torpor/v1/ask", b'{"question": "Deploy?"}') as answer:
        return json.load(answer)["answer"]

async def main():
    mine = jwt.encode({"sub": "agent", "exp": int(time.time()) + 6}, KEY, "HS256")
    was_good = is_good(mine)
    before = time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()
    asking = asyncio.ensure_future(asyncio.to_thread(ask))
    try:
        async with asyncio.timeout(6):
            await asyncio.shield(asking)
        own = "in time"
    except TimeoutError:
        own = "timed out"
    answer = await asking
    after = time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()
    tokens = was_good, is_good(mine), is_good(answer)
    print(json.dumps([own, tokens, [round(b - a, 1) for a, b in zip(before, after)]]))

asyncio.run(main())
"""


def test_all_clocks_jump_by_the_sleep_the_agents_own_timeouts_fire_and_its_wait_does_not(quick: Stage) -> None:
    """As docs/session.md says: a token that expired has expired, a new one is valid, and the CPU's time stood still."""
    prepare(quick, paused=0, ready=0)
    (quick.project / "clocks.py").write_text(CLOCKS)
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "clocks.py")
    log = quick.follow("one")
    asked = log.wait("waitpoint.created")
    log.wait("session.status", 4)
    while time.time_ns() < asked["wall_ns"] + 8 * 10**9:
        time.sleep(0.1)  # The wait is what is tested.
    now = int(time.time())
    key = "a key that both sides have, of 32 bytes"
    fresh = jwt.encode({"sub": "agent", "iat": now, "nbf": now, "exp": now + 600}, key, "HS256")
    quick.torpor("resolve", "one", fresh)
    log.wait("agent.exited")
    log.close()
    own, tokens, [wall, monotonic, boot, processor] = json.loads(quick.torpor("output", "one").stdout)
    assert (own, tokens) == ("timed out", [True, "ExpiredSignatureError", True])
    assert min(wall, monotonic, boot) >= 8
    assert max(wall, monotonic, boot) - min(wall, monotonic, boot) < 1
    assert processor < 4
    quick.torpor("down")
    check_nothing_left(quick)
