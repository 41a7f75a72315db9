"""Measure the snapshot store on real successive images of a Python agent in runsc.

    PYTHONPATH=src:. python scripts/bench_store.py --runsc /usr/bin/runsc --heap-mb 118 --steps 10

With --s3 the objects go to an S3 server on loopback, which is started for it, instead of a directory.

Prints for each step what was new, what was stored, and the milliseconds (elapsed/processor) of capture, save,
rebuilding the parent's index, and restore. Each restore is compared byte for byte.
Images and restores go to --memory (a tmpfs), the store and the workspace to --disk.
"""

import argparse
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench_images import agent_images
from tests.seaweedfs import seaweedfs

from torpor.core.clock import SystemClock
from torpor.core.ids import new_snapshot_id
from torpor.snapshots.backend import Backend, LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import new_key
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

_T = TypeVar("_T")
COLUMNS = "step|image MB|new pages|new MB|stored KB|manifest KB|packs|capture|save|index|restore"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runsc", type=Path, required=True)
    parser.add_argument("--heap-mb", type=int, default=118, help="118 gives images of 78 MB, 400 of 250 MB")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--restore-every", type=int, default=1)
    parser.add_argument("--s3", action="store_true", help="keep the objects in SeaweedFS")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    memory = Path(tempfile.mkdtemp(prefix="bench-store-", dir=arguments.memory))
    disk = Path(tempfile.mkdtemp(prefix="bench-store-", dir=arguments.disk))
    try:
        measure(arguments, memory, disk)
    finally:
        shutil.rmtree(memory)
        shutil.rmtree(disk)


def measure(arguments: argparse.Namespace, memory: Path, disk: Path) -> None:
    show(COLUMNS.split("|"))
    with contextlib.ExitStack() as open_now:
        if arguments.s3:
            backend = open_now.enter_context(seaweedfs(disk / "seaweedfs")).backend("bench/store")
            backend.ready()
        else:
            backend = LocalDirectory(disk / "store")
        bench = Bench(memory, backend)
        images = open_now.enter_context(
            agent_images(arguments.runsc, memory / "agent", arguments.heap_mb, arguments.steps)
        )
        for step, (image, workspace) in enumerate(images):
            cells = bench.step(image, workspace, restores=step % arguments.restore_every == 0)
            show([step, *cells])
            shutil.rmtree(image)


class Bench:
    """A store and the newest snapshot in it."""

    def __init__(self, memory: Path, backend: Backend) -> None:
        self.memory = memory
        self.backend = backend
        self.ids, self.key = ContentIds(new_key().secret), new_key()
        self.store = SnapshotStore(backend, self.ids)
        self.last: SavedSnapshot | None = None

    def step(self, image: Path, workspace: Path, *, restores: bool) -> list[object]:
        """Save the image as the child of the last one; the cells of the table."""
        last = self.last
        staging = self.memory / "staging"
        staging.mkdir()
        captured, capture_ms = timed(lambda: capture(workspace, staging, last and last.tree))
        saved, save_ms = timed(
            lambda: self.store.save(
                image_dir=image,
                workspace=captured,
                parent=last and last.ref,
                pins={},
                snapshot_id=new_snapshot_id(SystemClock().wall_ns()),
                key=self.key,
                lease=self.store.lease(),
            )
        )
        shutil.rmtree(staging)
        self.last = saved
        # What the next save would pay more in a new process, which has to rebuild the parent's index.
        _, index_ms = timed(lambda: SnapshotStore(self.backend, self.ids)._load_indexes(saved.ref))
        restore_ms = self.restore(saved, image) if restores else "-"
        manifest = self.store.read_manifest(saved.ref)
        manifest_kb = len(self.backend.get(f"manifests/{saved.id}")) / 1000
        new_mb = saved.new_pages * 4096 / 1e6
        amounts = [f"{saved.raw_bytes / 1e6:.1f}", saved.new_pages, f"{new_mb:.2f}", saved.stored_bytes // 1000]
        return [*amounts, f"{manifest_kb:.1f}", len(manifest.packs), capture_ms, save_ms, index_ms, restore_ms]

    def restore(self, saved: SavedSnapshot, image: Path) -> str:
        restored = self.memory / "restored"
        _, restore_ms = timed(lambda: self.store.restore_image(saved.ref, restored))
        for path in image.iterdir():
            if path.read_bytes() != (restored / path.name).read_bytes():
                raise RuntimeError(f"{path.name} differs after a restore")
        shutil.rmtree(restored)
        return restore_ms


def timed(work: Callable[[], _T]) -> tuple[_T, str]:
    """The result, and "elapsed/processor" in milliseconds: on a busy machine only the second means anything."""
    elapsed, processor = time.perf_counter(), time.process_time()
    result = work()
    elapsed, processor = time.perf_counter() - elapsed, time.process_time() - processor
    return result, f"{1000 * elapsed:.0f}/{1000 * processor:.0f}"


def show(cells: Sequence[object]) -> None:
    print(" ".join(f"{cell!s:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
