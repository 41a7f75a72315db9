"""`torpor collect` on real homes: what it forgets, frees and leaves, and what a kill at any point of it leaves."""

import fcntl
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.store_stage import StoreStage, generate
from tests.memory import memory_directory
from tests.seaweedfs import KEY, KEY_ID, SeaweedFS

from torpor.core.crash import CRASH_POINTS
from torpor.snapshots.backend import Backend

THIN = "[retention]\nkeep_last = 3\nkeep_hourly = 0\nkeep_daily = 0\n"
NOW = ("collect", "--grace", "0")
POINTS = [point for point in CRASH_POINTS if point.startswith(("retention.", "repack.", "collect."))]


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory: what is tested is not how fast a disk syncs."""
    with memory_directory() as made:
        yield made


@pytest.fixture(scope="module")
def made(memory: Path) -> StoreStage:
    """Two sessions, one of them long."""
    stage = StoreStage(memory / "made")
    generate(stage, {"long": 12, "short": 2})
    return stage


@pytest.fixture
def stage(made: StoreStage, memory: Path) -> Iterator[StoreStage]:
    copied = made.copy(memory / "stage")
    yield copied
    shutil.rmtree(copied.directory)


def check_sound(stage: StoreStage) -> dict[str, object]:
    """Every checkpoint restores, by its bytes, and both logs hold."""
    report = stage.result("verify", "--read-data")
    assert report["problems"] == []
    for session in ("long", "short"):
        stage.torpor("log", session, "--verify")
    return report


def test_nothing_goes_that_a_checkpoint_needs(stage: StoreStage) -> None:
    before = set(stage.objects())
    report = stage.result(*NOW, "--no-repack")
    assert (report["forgotten"], report["packs"], report["freed_bytes"]) == (0, 0, 0)
    assert set(stage.objects()) == before
    check_sound(stage)


def test_what_a_removed_session_left_is_freed_and_the_other_session_is_untouched(stage: StoreStage) -> None:
    sizes = sum(path.stat().st_size for path in stage.objects().values())
    stage.forget("long")
    report = stage.result(*NOW)
    assert report["manifests"] == 13
    assert report["freed_bytes"] == sizes - sum(path.stat().st_size for path in stage.objects().values()) > 100_000
    after = stage.result("verify", "--read-data")
    assert (after["checkpoints"], after["garbage"], after["problems"]) == (3, 0, [])
    assert stage.result(*NOW)["freed_bytes"] == 0


def test_young_garbage_stays_and_is_told_of(stage: StoreStage) -> None:
    before = set(stage.objects())
    stage.forget("long")
    report = stage.result("collect")
    assert (report["manifests"], report["packs"]) == (0, 0)
    assert report["young_bytes"] > 100_000
    assert set(stage.objects()) == before


def test_a_dry_run_says_what_would_go_and_changes_nothing(stage: StoreStage) -> None:
    stage.configure(THIN)
    before, numbers = set(stage.objects()), stage.numbers("long")
    planned = stage.result(*NOW, "--dry-run", "--no-repack")
    assert set(stage.objects()) == before
    assert stage.numbers("long") == numbers
    done = stage.result(*NOW, "--no-repack")
    named = ("forgotten", "manifests", "packs", "freed_bytes")
    assert [planned[name] for name in named] == [done[name] for name in named]
    assert done["freed_bytes"] > 0


def test_old_checkpoints_are_forgotten_and_the_log_says_which(stage: StoreStage) -> None:
    stage.configure(THIN)
    assert stage.result(*NOW, "--no-repack")["forgotten"] == 9
    assert stage.numbers("long") == [0, 10, 11, 12]
    assert stage.numbers("short") == [0, 1, 2]
    assert stage.kinds("long").count("checkpoint.forgotten") == 1
    assert check_sound(stage)["garbage"] == 0


def test_pinned_checkpoints_stay_until_the_pin_is_removed(stage: StoreStage) -> None:
    stage.configure(THIN)
    assert stage.result("pin", "long@4")["pinned"] is True
    stage.result(*NOW)
    assert stage.numbers("long") == [0, 4, 10, 11, 12]
    stage.torpor("unpin", "long@4")
    stage.result(*NOW)
    assert stage.numbers("long") == [0, 10, 11, 12]
    assert stage.refused("pin", "long@4", status=66) == "checkpoint_not_found"
    assert stage.refused("pin", "long", status=64) == "checkpoint_unclear"
    assert stage.refused("pin", "long@x", status=64) == "checkpoint_unclear"


def test_mostly_dead_packs_are_written_anew_and_everything_restores(stage: StoreStage) -> None:
    stage.configure(THIN)
    kept = stage.copy(stage.directory.with_name("unpacked"))
    kept.result(*NOW, "--no-repack")
    plain_bytes = sum(path.stat().st_size for path in kept.objects().values())
    shutil.rmtree(kept.directory)
    report = stage.result(*NOW)
    assert report["repacked"] > 0
    assert report["moved"] > 0
    assert report["note"] == ""
    assert stage.kinds("long").count("checkpoint.repacked") == report["moved"]
    assert sum(path.stat().st_size for path in stage.objects().values()) < plain_bytes - 100_000
    assert check_sound(stage)["garbage"] == 0
    again = stage.result(*NOW)
    assert (again["repacked"], again["freed_bytes"]) == (0, 0)


def test_a_session_that_a_node_runs_is_left_to_it(stage: StoreStage) -> None:
    stage.configure(THIN)
    lock = next(path for path in (stage.home / "sessions").glob("*/lock") if stage.numbers(path.parent.name)[-1] == 12)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        report = stage.result(*NOW)
        assert report["left"] == [lock.parent.name]
        assert (report["forgotten"], report["moved"]) == (0, 0)
    assert stage.numbers("long") == list(range(13))
    check_sound(stage)


def test_without_the_master_key_everything_goes_on_but_repacking(stage: StoreStage) -> None:
    stage.configure(THIN)
    shutil.rmtree(stage.home / "keys")
    report = stage.result(*NOW)
    assert report["forgotten"] == 9
    assert report["manifests"] == 9
    assert "master" in report["note"]


def test_a_manifest_that_cannot_be_read_stops_everything_until_it_is_given_up(stage: StoreStage) -> None:
    stage.forget("short")
    damaged = next(root for root in stage.roots() if root.number == 5)
    stage.objects()[f"manifests/{damaged.snapshot_id}"].unlink()
    before = set(stage.objects())
    assert stage.refused(*NOW, status=74) == "collect_refused"
    assert set(stage.objects()) == before
    report = stage.result(*NOW, "--forget-damaged", "--no-repack")
    assert report["damaged"] == 1
    assert report["manifests"] == 3
    assert 5 not in stage.numbers("long")
    assert stage.result("verify", "--read-data")["problems"] == []


def test_a_head_that_was_changed_is_not_believed(stage: StoreStage) -> None:
    """Whoever can write to the store could else make a collector delete what a checkpoint needs."""
    victim = stage.objects()[f"manifests/{stage.roots()[5].snapshot_id}"]
    data = bytearray(victim.read_bytes())
    data[80] ^= 1
    victim.write_bytes(data)
    assert stage.refused(*NOW, status=74) == "collect_refused"


def test_a_store_that_another_home_uses_too_is_left_alone(stage: StoreStage) -> None:
    (signature,) = (path for key, path in stage.objects().items() if key.startswith("owners/"))
    other = signature.parents[1] / "ff" / "key_00000000000000ff"
    other.parent.mkdir()
    other.touch()
    stage.forget("long")
    before = set(stage.objects())
    assert stage.refused(*NOW, status=75) == "store_shared"
    assert set(stage.objects()) == before
    other.unlink()
    assert stage.result(*NOW)["manifests"] == 13


def test_bodies_that_no_row_names_go_with_their_session(stage: StoreStage) -> None:
    session_id = stage.forget("short")
    orphan = stage.store / "blobs" / "ab" / f"{session_id.removeprefix('ses_')}_{'ab' * 32}"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x" * 1000)
    assert stage.result(*NOW, "--dry-run")["blobs"] == 1
    assert orphan.exists()
    assert stage.result(*NOW)["blobs"] == 1
    assert not orphan.exists()
    assert not (stage.home / "sessions" / session_id).exists()


@pytest.fixture
def place() -> str:
    return f"collected/{secrets.token_hex(8)}"


@pytest.fixture
def bucket(s3_server: SeaweedFS, place: str) -> Backend:
    return s3_server.backend(place)


@pytest.fixture
def remote(memory: Path, s3_server: SeaweedFS, place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreStage]:
    """The same in an object store, on a real S3 server."""
    monkeypatch.setenv("STORE_SECRET", KEY)
    stage = StoreStage(memory / "remote")
    stage.home.mkdir(parents=True, mode=0o700)
    lines = ("[store]", f'url = "s3://{place}"', f'endpoint = "{s3_server.endpoint}"', f'key_id = "{KEY_ID}"')
    stage.configure("\n".join((*lines, 'key_env = "STORE_SECRET"', "", THIN)))
    generate(stage, {"long": 6, "short": 2})
    yield stage
    assert {key.partition("/")[0] for key in stage.objects()} <= {"blobs"}
    shutil.rmtree(stage.directory)


@pytest.mark.timeout(600)
def test_an_object_store_is_collected_repacked_and_verified_like_a_directory(
    remote: StoreStage, bucket: Backend
) -> None:
    before = remote.result("verify")
    remote.forget("short")
    remote.torpor(*NOW, status=-signal.SIGKILL, TORPOR_CRASH_POINT="collect.manifests_deleted")
    assert remote.result("verify", "--read-data")["problems"] == []
    assert remote.refused(*NOW, status=75) == "collect_running"
    for key in bucket.list("holders/"):  # A dead collector's lease ends by the store's clock, after two minutes.
        bucket.delete(key)
    assert remote.result(*NOW)["packs"] > 0
    assert remote.numbers("long") == [0, 4, 5, 6]
    assert remote.kinds("long").count("checkpoint.repacked") > 0
    after = remote.result("verify", "--read-data")
    assert (after["checkpoints"], after["garbage"], after["problems"]) == (4, 0, [])
    assert after["packs"] < before["packs"]
    remote.torpor("log", "long", "--verify")


@pytest.fixture(scope="module")
def finished(made: StoreStage, memory: Path) -> set[str]:
    """How many of each kind an undisturbed collection leaves."""
    copied = made.copy(memory / "finished")
    copied.configure(THIN)
    copied.forget("short")
    copied.result(*NOW)
    left = {key.partition("/")[0] + str(number) for number, key in enumerate(sorted(copied.objects()))}
    shutil.rmtree(copied.directory)
    return left


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_crash_point_loses_nothing_and_the_next_collection_finishes(
    stage: StoreStage, finished: set[str], point: str
) -> None:
    stage.configure(THIN)
    stage.forget("short")
    stage.torpor(*NOW, status=-signal.SIGKILL, TORPOR_CRASH_POINT=point)
    report = stage.result("verify", "--read-data")
    assert report["problems"] == []
    stage.torpor("log", "long", "--verify")
    stage.result(*NOW)
    report = stage.result("verify", "--read-data")
    assert (report["problems"], report["garbage"]) == ([], 0)
    assert stage.numbers("long") == [0, 10, 11, 12]
    assert {key.partition("/")[0] + str(number) for number, key in enumerate(sorted(stage.objects()))} == finished
    stage.torpor("log", "long", "--verify")
