"""Sessions whose snapshots are in an object store: a real S3 server, which the network may part them from."""

import asyncio
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_attempts, check_nothing_left
from tests.e2e.clients.key_search import files_with
from tests.fault_proxy import Fault, FaultProxy, Rule
from tests.seaweedfs import KEY, KEY_ID, OPEN_BUCKET, SeaweedFS
from tests.stage import Stage, stage

from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import SystemClock
from torpor.db import checkpoints, sessions
from torpor.db.database import open_database
from torpor.runtime.keyring import open_keyring
from torpor.runtime.master_key import MasterKeys
from torpor.snapshots.backend import Backend
from torpor.snapshots.cipher import Key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.store import SnapshotStore

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
TURNS = 6
RUN_AGENT = ("run", "--name", "one", "--", sys.executable, "agent.py")
PACE = ["--turns", str(TURNS), "--first-byte-seconds", "0.2", "--chunk-seconds", "0.1"]
WHOLE = {**dict.fromkeys(("memory", "mapped", "sqlite", "subprocess"), TURNS), "background": {"ticker": None}}


@pytest.fixture
def path() -> str:
    return f"sessions/{secrets.token_hex(8)}"


@pytest.fixture
def direct(s3_server: SeaweedFS, path: str) -> Backend:
    return s3_server.backend(path)


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as made:
        yield made


@pytest.fixture
def remote(scratch: Path, runsc: Path, proxy: FaultProxy, path: str) -> Iterator[Stage]:
    """A stage whose snapshots go through the proxy, and none of them to its home."""
    with stage(scratch, runsc, PACE) as made:
        configure(made.home, f"s3://{path}", proxy.endpoint)
        made.environment |= {"STORE_SECRET": KEY}
        yield made
        assert not (made.home / "store/packs").exists()


def configure(home: Path, url: str, endpoint: str, *, key: str = 'key_env = "STORE_SECRET"') -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    key_id = f'key_id = "{KEY_ID}"' if key else ""
    (home / "config.toml").write_text(
        f'[store]\nurl = "{url}"\nendpoint = "{endpoint}"\n{key_id}\n{key}\nrequest_seconds = 2\nretry_seconds = 2\n'
    )


def check_every_checkpoint_is_whole(made: Stage, backend: Backend) -> int:
    """Asked by who knows nothing of the session but names, digests and its key; gives how many there are."""

    async def committed() -> tuple[list[Checkpoint], SnapshotStore, Key]:
        database = await open_database(f"sqlite:///{made.home}/torpor.db", clock=SystemClock())
        session = await database.read(lambda tx: sessions.find(tx, "one"))
        found = await database.read(lambda tx: checkpoints.list_intact(tx, session.session_id))
        keyring = await open_keyring(database, MasterKeys(made.home / "keys", made.environment))
        key = await keyring.session_key(session.session_id)
        await database.close()
        return found, SnapshotStore(backend, ContentIds(keyring.tenant.secret)), key

    points, store, key = asyncio.run(committed())
    for point in points:
        ref = SnapshotRef(id=point.snapshot_id, manifest_digest=point.manifest_digest, key=key)
        assert store.verify(ref) == [], f"checkpoint {point.number}"
    told = [event for event in made.events("one") if event["kind"] == "checkpoint.committed"]
    assert len(points) == len(told)
    return len(points)


def staged_of(made: Stage) -> Path:
    """The images of its newest checkpoints, in memory: with them a session may go on without its store."""
    session = made.rows("ls")[0]["session"]
    return next(Path("/dev/shm").glob(f"torpor-*/{session}"))


def report_of(made: Stage) -> dict[str, object]:
    return json.loads(made.torpor("output", "one").stdout.rpartition("[report] ")[2])


def test_a_killed_session_goes_on_from_the_object_store_alone(
    remote: Stage, direct: Backend, scratch: Path, proxy: FaultProxy
) -> None:
    node = remote.node(*RUN_AGENT)
    log = remote.follow("one")
    log.wait("call.answering", 3)
    node.kill()
    node.wait()
    remote.kill_sandbox()
    log.close()
    # Another home, with the rows and the master key and nothing else: no store, no staged image, no workspace.
    other = Stage(
        directory=scratch / "other", environment=remote.environment | {"TORPOR_HOME": f"{scratch}/other/home"}
    )
    other.project.mkdir(parents=True)
    configure(other.home, direct.name.split(" ")[0], proxy.endpoint)
    for file in remote.home.glob("torpor.db*"):
        shutil.copy(file, other.home)
    shutil.copytree(remote.home / "keys", other.home / "keys")
    proxy.requests.clear()
    try:
        resumed = other.node("resume", "one")
        assert resumed.wait(300) == 0, (other.directory / "node.log").read_text()
        assert "restored checkpoint" in (other.directory / "node.log").read_text()
        assert any(request.startswith("GET") and "/packs/" in request for request in proxy.requests)
        assert report_of(other) == WHOLE
        assert check_every_checkpoint_is_whole(other, direct) > TURNS
        assert not (other.home / "store/packs").exists()
        remote.torpor("rm", "one")  # What the first home had staged in memory bears the same session's name.
        check_nothing_left(other)
    finally:
        other.close()


def test_an_outage_fails_checkpoints_and_not_the_session(remote: Stage, direct: Backend, proxy: FaultProxy) -> None:
    node = remote.node(*RUN_AGENT)
    log = remote.follow("one")
    log.wait("checkpoint.committed", 2)
    proxy.down()
    failed = log.wait("checkpoint.failed")
    assert failed["data"]["code"] == "storage_unreachable"
    before = log.count("call.completed")
    log.wait("call.completed", before + 1)
    proxy.up()
    log.wait("checkpoint.committed", log.count("checkpoint.committed") + 1)
    assert node.wait(300) == 0
    log.close()
    events = remote.events("one")
    assert check_attempts(remote, events, node_kills=0)["torn"] == 0
    assert report_of(remote) == WHOLE
    assert check_every_checkpoint_is_whole(remote, direct) >= 4
    check_nothing_left(remote)


def test_what_waits_for_a_store_that_is_down_is_shown(remote: Stage, direct: Backend, proxy: FaultProxy) -> None:
    """The store is away for longer than a turn, and back before a save gives up."""
    config = remote.home / "config.toml"
    config.write_text(config.read_text().replace("retry_seconds = 2", "retry_seconds = 600"))
    node = remote.node(*RUN_AGENT)
    log = remote.follow("one")
    log.wait("checkpoint.committed", 2)
    proxy.down()
    before = log.count("call.completed")
    log.wait("call.completed", before + 2)  # One turn at least was cut meanwhile: its image can go nowhere.
    shown = json.loads(remote.torpor("show", "one", "--json").stdout)
    assert shown["waiting_for_the_store"] >= 1
    assert shown["in_memory_bytes"] > 0
    committed = log.count("checkpoint.committed")
    proxy.up()
    log.wait("checkpoint.committed", committed + 1)
    assert node.wait(300) == 0
    log.close()
    assert json.loads(remote.torpor("show", "one", "--json").stdout)["waiting_for_the_store"] == 0
    assert [event for event in remote.events("one") if event["kind"] == "checkpoint.failed"] == []
    check_every_checkpoint_is_whole(remote, direct)
    check_nothing_left(remote)


def test_a_session_whose_store_is_down_waits_for_it_and_is_not_lost(
    remote: Stage, direct: Backend, proxy: FaultProxy
) -> None:
    node = remote.node(*RUN_AGENT)
    log = remote.follow("one")
    log.wait("call.answering", 3)
    node.kill()
    node.wait()
    remote.kill_sandbox()
    log.close()
    proxy.down()
    refused = remote.torpor("resume", "one", check=False)
    assert refused.returncode == 69
    assert "refused the connection" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert remote.rows("ls")[0]["status"] == "recovering"
    rejected = [event for event in remote.events("one") if event["kind"] == "recovery.rejected"]
    assert len(rejected) == 1, "an older checkpoint is no remedy"
    proxy.up()
    assert remote.torpor("resume", "one").returncode == 0
    assert report_of(remote) == WHOLE
    assert check_every_checkpoint_is_whole(remote, direct) > TURNS
    check_nothing_left(remote)


def test_a_sleeping_session_that_cannot_be_woken_sleeps_on(remote: Stage, direct: Backend, proxy: FaultProxy) -> None:
    node = remote.node(*RUN_AGENT)
    log = remote.follow("one")
    log.wait("call.answering", 3)
    log.close()
    remote.torpor("stop", "one")
    node.wait()
    shutil.rmtree(staged_of(remote))
    proxy.down()
    assert remote.torpor("resume", "one", check=False).returncode == 69
    assert remote.rows("ls")[0]["status"] == "asleep"
    proxy.up()
    assert remote.torpor("resume", "one").returncode == 0
    assert report_of(remote) == WHOLE
    check_every_checkpoint_is_whole(remote, direct)
    check_nothing_left(remote)


def test_a_living_sandbox_is_adopted_while_the_store_is_down(remote: Stage, direct: Backend, proxy: FaultProxy) -> None:
    script = "echo begin; while [ ! -e /workspace/gate ]; do sleep 0.1; done; echo end; exit 4"
    node = remote.node("run", "--name", "one", "--", "bash", "-c", script)
    log = remote.follow("one")
    log.wait("session.status")
    node.kill()
    node.wait()
    proxy.down()
    resumed = remote.node("resume", "one", log="resumed.log")
    assert log.wait("recovery.chosen", 2)["data"]["mode"] == "adopt"
    proxy.up()
    workspace = next((remote.home / "sessions").glob("*/incarnations/1/workspace"))
    (workspace / "gate").write_text("go\n")
    assert resumed.wait(300) == 4
    log.close()
    assert "no checkpoint can be made for now" in (remote.directory / "resumed.log").read_text()
    assert remote.torpor("output", "one").stdout == "begin\nend\n"
    check_every_checkpoint_is_whole(remote, direct)
    check_nothing_left(remote)


def test_a_session_without_its_store_is_not_begun(remote: Stage, proxy: FaultProxy) -> None:
    proxy.down()
    refused = remote.torpor("run", "--", "true", check=False)
    assert refused.returncode == 69
    assert "refused the connection" in refused.stderr
    assert remote.rows("ls") == []


def test_the_key_is_nowhere_but_where_it_was_given(remote: Stage, proxy: FaultProxy) -> None:
    remote.torpor(*RUN_AGENT)
    configure(remote.home, f"s3://sessions/{secrets.token_hex(8)}", proxy.endpoint)
    wrong = remote.torpor("--verbose", "run", "--", "true", check=False, STORE_SECRET=f"{KEY}-but-wrong")
    assert wrong.returncode == 69
    assert "access was denied" in wrong.stderr
    assert KEY not in wrong.stderr + wrong.stdout
    assert files_with(KEY, remote.home) == []


class TestDoctor:
    def test_tries_the_store_that_is_configured(self, remote: Stage, proxy: FaultProxy) -> None:
        finished = remote.torpor("doctor", "--json")
        [point] = [line for line in map(json.loads, finished.stdout.splitlines()) if line["check"] == "snapshot store"]
        assert point["ok"]
        assert proxy.endpoint in point["detail"]

    def test_and_run_refuse_a_store_that_lets_objects_be_replaced(self, remote: Stage, proxy: FaultProxy) -> None:
        configure(remote.home, f"s3://{OPEN_BUCKET}/{secrets.token_hex(8)}", proxy.endpoint, key="")
        proxy.strike(Rule(fault=Fault.STRIP_CONDITION, method="PUT"))
        unsigned = {"AWS_SKIP_SIGNATURE": "true"}
        examined = remote.torpor("doctor", "--json", check=False, **unsigned)
        lines = [json.loads(line) for line in examined.stdout.splitlines()]
        [point] = [line for line in lines if line.get("check") == "snapshot store"]
        assert (examined.returncode, point["ok"]) == (69, False)
        assert "a second write" in point["detail"]
        assert point["remedy"]
        refused = remote.torpor("run", "--", "true", check=False, **unsigned)
        assert refused.returncode == 69
        assert "a second write" in refused.stderr
        assert remote.rows("ls") == []
