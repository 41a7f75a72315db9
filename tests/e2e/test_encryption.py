"""Snapshots at rest: nothing of an agent's memory is in the store, and nothing is read without the keys."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.clients.key_search import files_with, snapshots_with
from tests.stage import PATIENCE_SECONDS, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

WORDS = "said-in-memory-and-in-a-file"
AGENT = """
import json, os, time, urllib.request
kept = [("said-in-memory" + "-and-in-a-file").upper().lower() for _ in range(100)]
open("said.txt", "w").write(kept[0] * 1000)
body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
headers = {"content-type": "application/json"}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)).read()
print("asked", flush=True)
while not os.path.exists("/workspace/gate"):
    time.sleep(0.1)
print(len(set(kept)), flush=True)
"""


@pytest.fixture
def plain(scratch: Path, runsc: Path) -> Iterator[Stage]:
    with stage(scratch, runsc, ["--script", "plain"]) as made:
        (made.project / "keeper.py").write_text(AGENT)
        yield made


def start(made: Stage) -> None:
    """A session that was checkpointed with the words in it, and whose processes are all gone."""
    node = made.node("run", "--name", "one", "--", sys.executable, "keeper.py")
    log = made.follow("one")
    log.wait("call.delivered")
    made.torpor("checkpoint", "one")
    log.close()
    node.kill()
    node.wait()
    made.kill_sandbox()


def keys_of(made: Stage) -> dict[str, dict[str, str]]:
    return {row["of"] if row["kind"] == "session" else row["kind"]: row for row in made.rows("keys")}


def test_words_of_the_memory_are_in_the_snapshots_and_in_no_file_of_the_store(plain: Stage) -> None:
    start(plain)
    found = snapshots_with(WORDS, plain.home)
    assert {name.rpartition("/")[2] for name in found} == {"pages.img", "said.txt"}
    assert files_with(WORDS, plain.home / "store") == []
    plain.torpor("rm", "one")
    check_nothing_left(plain)


def test_keys_are_rotated_while_the_session_runs_and_it_goes_on_after_a_crash(plain: Stage) -> None:
    node = plain.node("run", "--name", "one", "--", sys.executable, "keeper.py")
    log = plain.follow("one")
    log.wait("call.delivered")
    before = keys_of(plain)
    done = json.loads(plain.torpor("keys", "rotate", "--json").stdout)
    after = keys_of(plain)
    assert (done["before"], done["after"]) == (before["master"]["key"], after["master"]["key"])
    assert done["keys"] == 2
    session = plain.rows("ls")[0]["session"]
    assert before[session]["key"] == after[session]["key"]
    assert before[session]["wrapped_by"] != after[session]["wrapped_by"] == after["master"]["key"]
    plain.torpor("checkpoint", "one")
    log.close()
    node.kill()
    node.wait()
    plain.kill_sandbox()
    resumed = plain.node("resume", "one")
    gate = plain.follow("one")
    gate.wait("recovery.chosen", 2)
    next((plain.home / "sessions").glob("*/incarnations/2/workspace")).joinpath("gate").write_text("go")
    assert resumed.wait(PATIENCE_SECONDS) == 0
    gate.close()
    assert plain.torpor("output", "one").stdout == "asked\n1\n"
    check_nothing_left(plain)


def test_without_the_master_key_a_session_stays_as_it_is_and_its_log_can_be_read(plain: Stage) -> None:
    start(plain)
    master = plain.home / "keys/master"
    copy = plain.directory / "copy"
    master.rename(copy)
    before = plain.rows("log", "one")
    for command in (["resume", "one"], ["pull", "one", "x"], ["diff", "one"], ["run", "--", "true"], ["keys"]):
        refused = plain.torpor(*command, check=False)
        assert refused.returncode == 69, command
        assert "master_key_missing" in refused.stderr
    assert not master.exists()
    assert plain.rows("log", "one") == before
    assert plain.torpor("log", "one", "--verify").returncode == 0
    assert plain.torpor("pull", "one", "there", check=False, TORPOR_MASTER_KEY=copy.read_text()).returncode == 0
    assert (plain.project / "there/said.txt").read_text().startswith(WORDS)
    plain.torpor("rm", "one")
    check_nothing_left(plain)


def test_removed_session_has_no_key_and_what_it_alone_had_cannot_be_read(plain: Stage) -> None:
    start(plain)
    session = plain.rows("ls")[0]["session"]
    manifests = sorted((plain.home / "store/manifests").rglob("snp_*"))
    assert manifests
    plain.torpor("rm", "one")
    assert session not in keys_of(plain)
    for file in plain.home.glob("torpor.db*"):
        assert session.encode() not in file.read_bytes()
    for manifest in manifests:
        assert manifest.exists(), "the store's objects are for `collect`"
    check_nothing_left(plain)


def test_files_of_a_second_session_are_stored_once_and_stay_when_the_first_is_removed(plain: Stage) -> None:
    (plain.project / "big").write_bytes(os.urandom(3_000_000))
    start(plain)
    shared = plain.home / "cache/shared"
    assert len(list(shared.iterdir())) == 2
    node = plain.node("run", "--name", "two", "--", sys.executable, "keeper.py")
    log = plain.follow("two")
    log.wait("call.delivered")
    log.close()
    first, second = plain.rows("checkpoints", "one")[0], plain.rows("checkpoints", "two")[0]
    assert first["stored_bytes"] > 3_000_000
    assert second["stored_bytes"] < 10_000
    plain.torpor("rm", "one")
    assert list(shared.iterdir()) == []
    plain.torpor("pull", "two", "there")
    assert (plain.project / "there/big").read_bytes() == (plain.project / "big").read_bytes()
    plain.torpor("kill", "two")
    node.wait()
    plain.torpor("rm", "two")
    check_nothing_left(plain)
