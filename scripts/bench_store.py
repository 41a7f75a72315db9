"""Measure the snapshot store on real successive images of a Python agent in runsc.

    PYTHONPATH=src python scripts/bench_store.py --runsc /usr/bin/runsc --heap-mb 118 --steps 10

Prints for each step what was new, what was stored, and how long capture, save, restore and verification took.
Images and restores go to --memory (a tmpfs), the store and the workspace to --disk.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from bench_images import agent_images

from torpor.core.clock import SystemClock
from torpor.core.ids import SnapshotId, new_snapshot_id
from torpor.snapshots.backend import LocalDirectory
from torpor.snapshots.capture import capture
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

HEADER = "step  image MB  new pages  new MB  stored KB  manifest KB  packs  capture ms  save ms  index ms  restore"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runsc", type=Path, required=True)
    parser.add_argument("--heap-mb", type=int, default=118, help="118 gives images of 78 MB, 400 of 250 MB")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--restore-every", type=int, default=1)
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
    backend = LocalDirectory(disk / "store")
    store = SnapshotStore(backend)
    last: SavedSnapshot | None = None
    print(HEADER)
    with agent_images(arguments.runsc, memory / "agent", arguments.heap_mb, arguments.steps) as images:
        for step, (image, workspace) in enumerate(images):
            staging = memory / "staging"
            staging.mkdir()
            started = time.perf_counter()
            captured = capture(workspace, staging, last and last.tree)
            capture_ms = 1000 * (time.perf_counter() - started)
            saved = store.save(
                image_dir=image,
                workspace=captured,
                parent=last and last.id,
                pins={},
                snapshot_id=new_snapshot_id(SystemClock().wall_ns()),
            )
            cold_ms = cold_index_ms(backend, saved)
            restore = "-"
            if step % arguments.restore_every == 0:
                restore = f"{restore_ms(store, saved, image, memory / 'restored'):.0f}"
            manifest = store.read_manifest(saved.id, saved.manifest_digest)
            manifest_kb = len(backend.get(f"manifests/{saved.id}")) / 1000
            print(
                f"{step:4d}  {saved.raw_bytes / 1e6:8.1f}"
                f"  {saved.new_pages:9d}  {saved.new_pages * 4096 / 1e6:6.2f}"
                f"  {saved.stored_bytes / 1000:9.0f}  {manifest_kb:11.1f}  {len(manifest.packs):5d}"
                f"  {capture_ms:10.1f}  {1000 * saved.seconds:7.0f}  {cold_ms:8.0f}  {restore:>7s}",
                flush=True,
            )
            last = saved
            shutil.rmtree(image)
            shutil.rmtree(staging)


def cold_index_ms(backend: LocalDirectory, saved: SavedSnapshot) -> float:
    """What the next save pays more when a new process has to rebuild the parent's index."""
    started = time.perf_counter()
    SnapshotStore(backend)._load_indexes(SnapshotId(saved.id))
    return 1000 * (time.perf_counter() - started)


def restore_ms(store: SnapshotStore, saved: SavedSnapshot, image: Path, target: Path) -> float:
    """Restore, check that the result is byte-identical, and remove it."""
    started = time.perf_counter()
    store.restore_image(saved.id, saved.manifest_digest, target)
    elapsed = 1000 * (time.perf_counter() - started)
    for path in image.iterdir():
        if path.read_bytes() != (target / path.name).read_bytes():
            raise RuntimeError(f"{path.name} differs after a restore")
    shutil.rmtree(target)
    return elapsed


if __name__ == "__main__":
    main()
