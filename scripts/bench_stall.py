"""Measure how long the node's event loop stands still while a snapshot is saved beside it.

    python scripts/bench_stall.py --heap-mb 400 --steps 4

Another process writes a time stamp into a pipe every millisecond. The loop passes each one on through a socket, as
the gateway does with a piece of an answer, and notes how old it is when it comes out: that is the stall, in
milliseconds. The first line is the loop alone, for the machine has stalls of its own; then one line for each save,
with the processor seconds that it took. Images are those of a Python agent in runsc (400 gives 250 MB).
"""

import argparse
import asyncio
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from bench_images import agent_images

from torpor.config import torpor_home
from torpor.core.clock import SystemClock
from torpor.core.ids import new_snapshot_id
from torpor.node import put_the_loop_first
from torpor.sandbox.tools import find_runsc
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import new_key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

CLOCK = SystemClock()
KEY = new_key()
T = TypeVar("T")
STAMP = struct.Struct("<d")
PINGER = """
import os, struct, time
while True:
    try:
        os.write(1, struct.pack("<d", time.monotonic()))
    except BrokenPipeError:
        break
    time.sleep(0.001)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heap-mb", type=int, default=400, help="118 gives images of 78 MB, 400 of 250 MB")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="leave the interpreter's switch interval as it comes")
    arguments = parser.parse_args()
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, CLOCK).path
    scratch = Path(tempfile.mkdtemp(prefix="bench-stall-"))
    memory = Path(tempfile.mkdtemp(prefix="bench-stall-", dir="/dev/shm"))
    if not arguments.plain:
        put_the_loop_first()
    try:
        asyncio.run(
            measure(arguments, runsc, memory, SnapshotStore(LocalDirectory(scratch / "store"), ContentIds(KEY.secret)))
        )
    finally:
        shutil.rmtree(scratch)
        shutil.rmtree(memory)


async def measure(arguments: argparse.Namespace, runsc: Path, memory: Path, store: SnapshotStore) -> None:
    print(f"load {os.getloadavg()[0]:.1f}, switch interval {sys.getswitchinterval() * 1e3:.1f} ms")
    print(f"{'what':>12} {'elapsed s':>10} {'CPU s':>7} {'median':>8} {'p99':>8} {'longest':>8}  (ms)")
    last: SavedSnapshot | None = None
    async with asyncio.TaskGroup() as tasks:
        gateway = Pieces()
        running = tasks.create_task(gateway.run())
        await gateway.beside("loop alone", lambda: time.sleep(2))
        with agent_images(runsc, memory / "agent", arguments.heap_mb, arguments.steps) as images:
            for step, (image, workspace) in enumerate(images):
                staging = memory / "staging"
                staging.mkdir()
                with store.lease() as lease:
                    save = partial(
                        store.save,
                        image_dir=image,
                        workspace=capture(workspace, staging, last and last.tree),
                        parent=last and last.ref,
                        pins={},
                        snapshot_id=new_snapshot_id(CLOCK.wall_ns()),
                        key=KEY,
                        lease=lease,
                    )
                    last = await gateway.beside("first save" if step == 0 else f"step {step}", save)
                shutil.rmtree(staging)
                shutil.rmtree(image)
        running.cancel()
    print(f"load at the end {os.getloadavg()[0]:.1f}")


class Pieces:
    """Pieces of an answer that pass through the loop, and how old each is at the other end."""

    def __init__(self) -> None:
        self.ages: list[float] = []

    async def run(self) -> None:
        pinger = subprocess.Popen([sys.executable, "-c", PINGER], stdout=subprocess.PIPE)
        assert pinger.stdout is not None
        ends = [end.setblocking(False) or end for end in socket.socketpair()]
        loop = asyncio.get_running_loop()
        descriptor = pinger.stdout.fileno()
        loop.add_reader(descriptor, lambda: ends[0].send(os.read(descriptor, 65536)))
        try:
            reader, writer = await asyncio.open_connection(sock=ends[1])
            while True:
                (sent,) = STAMP.unpack(await reader.readexactly(STAMP.size))
                self.ages.append(time.monotonic() - sent)
        finally:
            loop.remove_reader(descriptor)
            writer.close()
            ends[0].close()
            pinger.kill()
            pinger.wait()
            pinger.stdout.close()

    async def beside(self, name: str, work: Callable[[], T]) -> T:
        """Do the work on a thread and print what the pieces met meanwhile."""
        await asyncio.sleep(0.3)
        self.ages.clear()
        loop_before, before, started = own_seconds(), all_seconds(), time.monotonic()
        result = await asyncio.to_thread(work)
        elapsed = time.monotonic() - started
        spent = all_seconds() - before - (own_seconds() - loop_before)
        ages = sorted(age * 1e3 for age in self.ages)
        median, p99 = ages[len(ages) // 2], ages[len(ages) * 99 // 100]
        print(f"{name:>12} {elapsed:>10.2f} {spent:>7.2f} {median:>8.2f} {p99:>8.2f} {ages[-1]:>8.2f}", flush=True)
        return result


def own_seconds() -> float:
    """Processor time of the event loop's thread."""
    assert threading.current_thread() is threading.main_thread()
    return time.thread_time()


def all_seconds() -> float:
    """Processor time of this process, and of those of its children that have ended."""
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
