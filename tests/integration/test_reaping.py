"""What a node daemon frees when it starts, of what is not a sandbox: nothing that anybody may still need."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from tests.unit.db.scene import NOW, new_scene

from torpor.core.clock import SystemClock
from torpor.core.ids import NodeId, SessionId, SnapshotId
from torpor.core.session import SessionStatus
from torpor.db import sessions
from torpor.runtime.image_cache import HOME_MARK, staging_directory
from torpor.runtime.reaping import reap
from torpor.runtime.runtime import Runtime, node_holder, open_runtime
from torpor.runtime.spec import ImageSpec, SessionSpec
from torpor.runtime.staging import Staging

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(120)]
SPEC = SessionSpec(
    argv=("true",),
    environment={},
    cwd="/workspace",
    image=ImageSpec(name="host", root="/", mounts=(), path="", digest=""),
    init_directory="/nowhere",
    workspace_source="",
)


@pytest.fixture
async def runtime(scratch: Path, runsc: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runtime]:
    monkeypatch.setenv("TORPOR_RUNSC", str(runsc))
    async with open_runtime({"TORPOR_HOME": str(scratch / "home")}, SystemClock()) as opened:
        yield opened
    shutil.rmtree(staging_directory(scratch / "home"), ignore_errors=True)


@pytest.fixture
def other_home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="torpor-test-"))
    yield home
    shutil.rmtree(staging_directory(home), ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


async def reap_once(runtime: Runtime) -> None:
    await reap(runtime, node_holder(runtime.home, NodeId("node_000000000001")))


def stage_image(home: Path, session: SessionId) -> Staging:
    staging = Staging(home, session)
    staging.begin(SnapshotId("snp_1"), 0)
    (staging.image(SnapshotId("snp_1")) / "pages.img").write_bytes(b"x")
    staging.complete(SnapshotId("snp_1"))
    return staging


async def session_in(runtime: Runtime, *statuses: SessionStatus) -> SessionId:
    """A session that went through these."""
    scene = await new_scene(runtime.database, **msgspec.to_builtins(SPEC))
    for status in statuses:
        await scene.write(
            lambda tx, status=status: sessions.set_status(tx, **scene.owner, status=status, wall_ns=NOW), durable=True
        )
    runtime.home.session(scene.session_id).mkdir()
    return scene.session_id


async def test_the_images_of_who_was_cancelled_go_and_a_sleepers_stay(runtime: Runtime) -> None:
    ended = await session_in(runtime, SessionStatus.RUNNING, SessionStatus.CANCELLED)
    asleep = await session_in(runtime, SessionStatus.ASLEEP)
    staged = {session: stage_image(runtime.home.root, session) for session in (ended, asleep)}
    await reap_once(runtime)
    assert not staged[ended].root.exists()
    assert list(staged[asleep].images()) == ["snp_1"]


async def test_images_of_homes_that_are_gone_go_unless_somebody_holds_them(runtime: Runtime, other_home: Path) -> None:
    first, second = (stage_image(other_home, SessionId(f"ses_{number}")) for number in (1, 2))
    unmarked = staging_directory(other_home.with_name(f"{other_home.name}-unmarked"))
    (unmarked / "ses_3").mkdir(parents=True)
    await reap_once(runtime)
    assert first.root.exists()
    shutil.rmtree(other_home)
    second.hold()
    await reap_once(runtime)
    assert (first.root.exists(), second.root.exists(), unmarked.exists()) == (False, True, True)
    second.clear()
    second.let_go()
    assert not staging_directory(other_home).exists()
    shutil.rmtree(unmarked)


async def test_what_a_killed_import_was_installing_goes(runtime: Runtime) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    installed = runtime.home.tools / "init-0123456789abcdef"
    sdk = installed / "python/torpor"
    sdk.mkdir(parents=True)
    programs = [installed / "torpor-init", sdk / "agent.py"]
    for program in programs:
        for name in (program.name, f"{program.name}.{dead.pid}", f"{program.name}.{os.getpid()}"):
            program.with_name(name).touch()
    await reap_once(runtime)
    for program in programs:
        assert sorted(path.name for path in program.parent.glob(f"{program.name}*")) == [
            program.name,
            f"{program.name}.{os.getpid()}",
        ]


async def test_an_empty_directory_of_a_home_goes_with_its_mark(runtime: Runtime) -> None:
    staging = Staging(runtime.home.root, SessionId("ses_1"))
    staging.hold()
    directory = staging_directory(runtime.home.root)
    assert (directory / HOME_MARK).readlink() == runtime.home.root
    staging.let_go()
    assert not directory.exists()
