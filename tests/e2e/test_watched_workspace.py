"""What a program does to its files inside of a real sandbox is heard of outside, and only where it was."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tests.stage import Stage
from tests.unit.snapshots.making import HashingWriter, StillClock, flat

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId
from torpor.sandbox.driver import Sandbox, SandboxPlan
from torpor.sandbox.gvisor import GvisorDriver
from torpor.sandbox.rootfs import directory_image
from torpor.sandbox.tools import inspect_runsc
from torpor.snapshots.capture import capture, store_tree
from torpor.snapshots.tree import TreeIndex
from torpor.snapshots.watch import DirectoryWatch

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
AN_HOUR_NS = 3_600_000_000_000

STEPS = """
open("d/file", "r+b").write(b"XX")
open("d/file", "ab").write(b"more")
os.truncate("d/file", 5)
os.close(os.open("d/file", os.O_WRONLY | os.O_TRUNC))
os.chmod("d/file", 0o751)
os.chmod("d/e", 0o711)
os.chown("d/file", 7, 8)
os.utime("d/file", ns=(5, 123_456_000))
os.utime("d/e", ns=(5, 6))
os.symlink("file", "d/link")
os.rename("d/e/other", "d/e/renamed")
os.rename("d/e/renamed", "d/file")
os.mkdir("d/new"), open("d/new/file", "wb").write(b"new")
os.rename("d/e", "quiet/e")
os.rename("quiet/e", "e")
os.link("d/file", "quiet/second name")
open("quiet/second name", "ab").write(b"through the second name")
os.unlink("quiet/second name")
store_through_a_mapping("quiet/mapped")
hold("quiet/held"), store_in_held(b"1")
store_in_held(b"2")
store_in_held(b"3"), let_go()
os.unlink("quiet/mapped"), os.unlink("d/new/file"), os.rmdir("d/new")
shutil.rmtree("e"), os.mkdir("e"), open("e/again", "wb").write(b"x")
subprocess.run(["bash", "-c", "cd quiet; for n in 1 2 3; do echo $n > many$n; done; mv many1 many2; rm many3"])
subprocess.run(["bash", "-c", "git init -q g; cd g; echo x > x; git add x; git gc -q; rm -r .git/hooks"])
""".strip().splitlines()

AGENT = """
import mmap, os, shutil, subprocess, sys, time
def store_through_a_mapping(path):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:1] = b"M"
def hold(path):
    global held
    file = open(path, "r+b")
    held = mmap.mmap(file.fileno(), 0)
    file.close()
def store_in_held(letter):
    held[:1] = letter
def let_go():
    held.close()
print("up", flush=True)
for number, step in enumerate(sys.argv[1:]):
    while not os.path.exists(f"/workspace/go/{number}"):
        time.sleep(0.01)
    exec(step)
    print(step, flush=True)
time.sleep(600)
"""


@pytest.fixture
def inside(quick: Stage, runsc: Path) -> Iterator[tuple[subprocess.Popen[str], Sandbox]]:
    """A program that makes a step whenever it is told to, and its sandbox."""
    for directory in ("d/e", "quiet/below", "go"):
        (quick.project / directory).mkdir(parents=True)
    for name in ("d/file", "d/e/other", "quiet/mapped", "quiet/held", "quiet/below/file"):
        (quick.project / name).write_bytes(name.encode() * 10)
    node = quick.start("run", "--", sys.executable, "-c", AGENT, *STEPS, stdout=subprocess.PIPE)
    assert node.stdout is not None
    assert node.stdout.readline() == "up\n"
    workspace = next((quick.home / "sessions").glob("*/incarnations/1/workspace"))
    clock = SystemClock()
    driver = GvisorDriver(runsc=inspect_runsc(runsc, clock), state_directory=quick.home / "runsc", clock=clock)
    plan = SandboxPlan(
        sandbox_id=next(name for name in driver.sandbox_ids() if name.endswith("-1")),
        directory=workspace.parent,
        image=directory_image(Path("/")),
        workspace=workspace,
        init_directory=quick.home,
    )
    sandbox = driver.find(plan)
    assert sandbox is not None
    yield node, sandbox
    node.kill()
    node.stdout.close()


def test_whatever_a_program_does_inside_is_heard_of_outside(
    inside: tuple[subprocess.Popen[str], Sandbox], scratch: Path
) -> None:
    """After each step the capture is compared with a look at all files; none counts as fresh, which would help."""
    node, sandbox = inside
    workspace, watch, numbers = sandbox.plan.workspace, DirectoryWatch(), count()
    index: TreeIndex | None = None

    def staging() -> Path:
        directory = scratch / f"staging{next(numbers)}"
        directory.mkdir()
        return directory

    def cut(index: TreeIndex | None) -> TreeIndex:
        captured = capture(
            workspace,
            staging(),
            index,
            always_reread=sandbox.open_for_writing(),
            watch=watch,
            clock=StillClock(SystemClock().wall_ns() + AN_HOUR_NS),
        )
        assert flat(captured) == flat(capture(workspace, staging()))
        assert captured.generation
        root = store_tree(captured, HashingWriter())  # type: ignore[arg-type]
        return captured.index(root, SnapshotId("snp_x"))

    index = cut(index)
    for number, step in enumerate(STEPS):
        (workspace / "go" / str(number)).touch()
        assert node.stdout is not None
        assert node.stdout.readline() == step + "\n"
        index = cut(index)
    watch.close()


def test_clones_that_a_killed_node_left_are_removed_by_the_one_that_adopts(quick: Stage) -> None:
    """As a kill -9 between the capture and the commit leaves them, on a file system that clones."""
    node = quick.node("run", "--name", "one", "--", "sleep", "600")
    log = quick.follow("one")
    log.wait("recovery.chosen")
    node.kill()
    node.wait()
    clones = next((quick.home / "sessions").glob("*/incarnations/1")) / "clones"
    clones.mkdir()
    (clones / "1").write_bytes(b"a big file")
    resumed = quick.node("resume", "one")
    assert log.wait("recovery.chosen", 2)["data"]["mode"] == "adopt"
    assert not clones.exists()
    quick.torpor("kill", "one")
    resumed.wait(300)
    log.close()
