"""The last rungs of the ladder: no memory of a session restores, and its policy decides what becomes of it."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.stage import Stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

AGENT = """
import os, pathlib
from torpor import agent

lost = [os.environ.get("TORPOR_MEMORY_LOST"), agent.session()["memory_lost"]]
work = pathlib.Path("work.txt")
with work.open("a") as file:
    file.write("a life\\n")
agent.send(f"{lost} {work.read_text().count('life')}")
agent.checkpoint()
agent.checkpoint()
print(agent.ask("Go on?"), lost, work.read_text().count("life"))
"""


def the_interpreters_pack(made: Stage) -> Path:
    """The pack with most of the first image's pages, which all later images share; it has no file of the workspace."""
    return max((made.home / "store/packs").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def die_with_all_images_damaged(made: Stage, *options: str) -> Path:
    """Gives where the pack is that would mend them."""
    (made.project / "agent.py").write_text(AGENT)
    node = made.node("run", "--name", "one", *options, "--", sys.executable, "agent.py")
    log = made.follow("one")
    log.wait("waitpoint.created")
    node.kill()
    assert node.wait(60) == -signal.SIGKILL
    made.kill_sandbox()
    log.close()
    session = made.rows("ls")[0]["session"]
    subprocess.run(["find", "/dev/shm", "-name", session, "-exec", "rm", "-rf", "{}", "+"], check=True)
    pack = the_interpreters_pack(made)
    shutil.copy(pack, made.directory / "mended")
    pack.chmod(0o600)
    content = bytearray(pack.read_bytes())
    for at in range(0, len(content), 4096):
        content[at] ^= 0xFF
    pack.write_bytes(content)
    return pack


def data_of(made: Stage, kind: str) -> list[dict[str, object]]:
    return [event["data"] for event in made.events("one") if event["kind"] == kind]


def outbox(made: Stage) -> list[str]:
    return [row["text"] for row in made.rows("tail", "one")]


@pytest.mark.parametrize("asked", [(), ("--boot",)], ids=["by policy", "by a person"])
def test_it_begins_anew_with_the_newest_files_and_is_told(quick: Stage, asked: tuple[str, ...]) -> None:
    die_with_all_images_damaged(quick)
    node = quick.node("resume", *asked, "one")
    log = quick.follow("one")
    log.wait("call.joined")  # It asks again, and waits for the answer to the question that is open.
    [waiting] = quick.rows("waitpoints")
    quick.torpor("resolve", "one", "yes")
    assert node.wait(300) == 0
    log.close()
    assert waiting["question"] == "Go on?"
    assert outbox(quick) == ["[None, False] 1", "['1', True] 2"]
    assert quick.torpor("output", "one").stdout == "yes ['1', True] 2\n"
    rejected = data_of(quick, "recovery.rejected")
    assert [data["checkpoint"] for data in rejected] == ([] if asked else [2, 1])
    chosen = data_of(quick, "recovery.chosen")[-1]
    assert (chosen["mode"], chosen["checkpoint"], chosen["memory_lost"]) == ("boot", 2, True)
    assert data_of(quick, "call.diverged") == []
    assert (
        "no memory restores: started anew with the files of checkpoint 2" in (quick.directory / "node.log").read_text()
    )
    quick.torpor("log", "one", "--verify")
    check_nothing_left(quick)


def test_it_does_all_again_from_the_log_if_that_is_wanted(quick: Stage) -> None:
    die_with_all_images_damaged(quick, "--on-lost", "replay")
    quick.torpor("resolve", "one", "yes")
    assert quick.node("resume", "one").wait(300) == 0
    assert outbox(quick) == ["[None, False] 1"]
    assert quick.torpor("output", "one").stdout == "yes [None, False] 1\n"
    assert data_of(quick, "call.diverged") == []
    check_nothing_left(quick)


def test_it_is_lost_until_somebody_mends_what_is_broken(quick: Stage) -> None:
    pack = die_with_all_images_damaged(quick, "--on-lost", "fail")
    refused = quick.torpor("resume", "one", "--json", check=False)
    assert "session_lost" in refused.stderr + refused.stdout
    assert quick.rows("ls")[0]["status"] == "lost"
    assert quick.sandbox_pids() == []
    waited = quick.torpor("wait", "one", "--json", check=False)
    assert (waited.returncode, json.loads(waited.stdout)["error"]["code"]) == (71, "session_lost")
    shutil.copy(quick.directory / "mended", pack)
    quick.torpor("resolve", "one", "yes")
    assert quick.node("resume", "one").wait(300) == 0
    assert quick.torpor("output", "one").stdout == "yes [None, False] 1\n"
    assert data_of(quick, "recovery.chosen")[-1]["mode"] == "restore"
    assert json.dumps(outbox(quick)) == '["[None, False] 1"]'
    check_nothing_left(quick)
