"""An agent begins sessions of its own, in real sandboxes, and learns how they ended, whoever dies meanwhile."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import pathlib
from torpor import agent

part = pathlib.Path("part")
part.mkdir()
(part / "file").write_text("of the parent")
(part / "up").symlink_to("..")
for wrong in ("nowhere", "..", "part/up", "part/file"):
    try:
        agent.spawn(["true"], workspace=wrong)
    except agent.Refused as refused:
        print(refused.code)
child = agent.spawn(
    ["sh", "-c", "cat file; echo ' '$WHO; pwd; ls; echo $TORPOR_SESSION > made; exit 3"],
    name="kid", workspace="part", environment={"WHO": "the child"},
)
print(agent.wait(child, timeout=0))
print(agent.wait(child))
"""


def start(stage: Stage, agent: str = AGENT, **variables: str) -> subprocess.Popen[str]:
    (stage.project / "parent.py").write_text(agent)
    return stage.node("run", "--name", "one", "--", sys.executable, "parent.py", **variables)


def named(stage: Stage) -> dict[str, dict[str, object]]:
    return {str(row["name"]): row for row in stage.rows("ls")}


@pytest.mark.parametrize("point", ["", "child.created", "child.seeded", "call.completed:5"])
def test_a_child_is_begun_once_and_its_end_is_told(quick: Stage, point: str) -> None:
    node = start(quick, **({"TORPOR_CRASH_POINT": point} if point else {}))
    if point:
        assert node.wait(120) == -signal.SIGKILL
        quick.kill_sandbox()
        node = quick.node("resume", "one")
    log = quick.follow("one")
    log.wait("waitpoint.created")
    assert sorted(named(quick)) == ["kid", "one"]
    assert named(quick)["kid"]["status"] == "created"
    # A node daemon runs what is due; here a person does.
    ran = quick.torpor("resume", "kid", check=False)
    assert (ran.returncode, ran.stdout) == (3, "of the parent the child\n/workspace\nfile\nup\n")
    assert node.wait(300) == 0
    log.close()
    refusals = "workspace_part_unknown\n" * 4
    assert quick.torpor("output", "one").stdout == f"{refusals}None\nEnded(status='failed', exit_status=3)\n"
    kinds = [event["kind"] for event in quick.events("one")]
    assert kinds.count("waitpoint.resolved") == kinds.count("waitpoint.created")
    assert "call.diverged" not in kinds
    for session in ("one", "kid"):
        quick.torpor("log", session, "--verify")
    assert (quick.torpor("wait", "kid", "one", check=False).returncode, len(quick.rows("ls"))) == (3, 2)
    check_nothing_left(quick)


BEGETTER = """
from torpor import agent
kept = agent.spawn(["sleep", "1000"], name="kept", detach=True)
child = agent.spawn(["sleep", "1000"], name="kid")
print(agent.wait(child))
"""


def test_who_cancels_a_parent_cancels_its_children_but_for_those_that_are_detached(quick: Stage) -> None:
    node = start(quick, BEGETTER)
    log = quick.follow("one")
    log.wait("waitpoint.created", 2)
    log.close()
    child = quick.node("resume", "kid", log="kid.log")
    running = quick.follow("kid")
    running.wait("recovery.chosen")
    running.close()
    waiting = quick.start("wait", "one", "kid", "kept", "--any", "--json", stdout=subprocess.PIPE)
    killed = json.loads(quick.torpor("kill", "one", "--json").stdout)
    assert killed["children"] == [named(quick)["kid"]["session"]]
    assert node.wait(60) == child.wait(60) == 137
    statuses = {name: row["status"] for name, row in named(quick).items()}
    assert statuses == {"one": "cancelled", "kid": "cancelled", "kept": "created"}
    out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, json.loads(out)["status"]) == (137, "cancelled")
    late = quick.torpor("wait", "one", "kept", "--timeout", "0", "--json", check=False)
    assert (late.returncode, json.loads(late.stdout)["error"]["code"]) == (69, "wait_timed_out")
    check_nothing_left(quick)


FAMILY = """
from torpor import agent
children = [agent.spawn(["sh", "-c", f"echo {number}; exit {number}"], name=f"kid{number}") for number in range(3)]
print([agent.wait(child).exit_status for child in children])
"""


def test_a_node_daemon_runs_children_while_their_parent_sleeps(quick: Stage) -> None:
    (quick.project / "parent.py").write_text(FAMILY)
    quick.torpor("up")
    quick.torpor("run", "-d", "--name", "one", "--", sys.executable, "parent.py")
    assert quick.torpor("wait", "one").returncode == 0
    kids = [f"kid{number}" for number in range(3)]
    assert quick.torpor("wait", *kids, check=False).returncode == 1
    assert quick.torpor("output", "one").stdout == "[0, 1, 2]\n"
    assert [quick.torpor("output", kid).stdout for kid in kids] == ["0\n", "1\n", "2\n"]
    quick.torpor("down")
    check_nothing_left(quick)


SPENDER = """
import json, os, urllib.request
body = {"model": "scripted-large", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
request = urllib.request.Request(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode())
with urllib.request.urlopen(request) as answer:
    print(json.load(answer)["content"][0]["text"])
"""
SHARER = """
import sys
from pathlib import Path
from torpor import agent
print(agent.wait(agent.spawn([sys.executable, "spender.py"], name="kid")).exit_status)
"""


def test_a_child_that_its_parents_budget_holds_goes_on_when_that_is_raised(scratch: Path, runsc: Path) -> None:
    with stage(scratch, runsc, ["--script", "plain"]) as made:
        made.home.mkdir(mode=0o700)
        (made.home / "config.toml").write_text('[prices."scripted-*"]\ninput = "1"\noutput = "10"\n')
        (made.project / "spender.py").write_text(SPENDER)
        (made.project / "parent.py").write_text(SHARER)
        made.torpor("up")
        made.torpor("run", "-d", "--name", "one", "--budget", "0.001", "--", sys.executable, "parent.py")
        log = made.follow("kid")
        held = log.wait("waitpoint.created")
        log.close()
        assert held["data"]["kind"] == "budget"
        assert made.witness == []
        refused = made.torpor("budget", "kid", "--add", "1", check=False)
        assert "budget_shared" in refused.stderr
        made.torpor("budget", "one", "--add", "0.02")
        assert made.torpor("wait", "one", "kid").returncode == 0
        assert "Hello" in made.torpor("output", "kid").stdout
        spent = {made.rows("budget", session)[0]["spent"] for session in ("one", "kid")}
        assert len(spent) == 1
        assert spent != {"0"}
        made.torpor("down")
        check_nothing_left(made)
