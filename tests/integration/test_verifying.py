"""`torpor verify`: whatever is missing, cut off or changed is found, and named by the checkpoint that it is for."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.store_stage import StoreStage, generate
from tests.memory import memory_directory


@pytest.fixture(scope="module")
def made() -> Iterator[StoreStage]:
    with memory_directory("verifying-") as memory:
        stage = StoreStage(memory / "made")
        generate(stage, {"one": 3, "other": 1})
        yield stage


@pytest.fixture
def stage(made: StoreStage) -> Iterator[StoreStage]:
    copied = made.copy(made.directory.with_name("stage"))
    yield copied
    shutil.rmtree(copied.directory)


def problems(stage: StoreStage, *options: str) -> list[tuple[int | None, str]]:
    """Number of the checkpoint and what is wrong with it, of a store that is damaged."""
    done = stage.torpor("verify", *options, "--json", status=74)
    report, error = map(json.loads, done.stdout.splitlines())
    assert error["error"]["code"] == "store_damaged"
    return [(problem["checkpoint"], problem["text"]) for problem in report["problems"]]


def pack_of(stage: StoreStage) -> Path:
    """The largest pack: the first image of one of the sessions."""
    packs = [path for key, path in stage.objects().items() if key.startswith("packs/")]
    return max(packs, key=lambda path: path.stat().st_size)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("options", [(), ("--read-data",)])
def test_a_sound_store_has_no_problem(stage: StoreStage, options: tuple[str, ...]) -> None:
    report = stage.result("verify", *options)
    assert (report["checkpoints"], report["problems"], report["garbage"]) == (6, [], 0)
    assert report["packs"] == sum(key.startswith("packs/") for key in stage.objects())
    assert stage.result("verify", "one")["checkpoints"] == 4


def test_a_missing_pack_is_found_for_every_checkpoint_that_needs_it(stage: StoreStage) -> None:
    victim = pack_of(stage)
    victim.unlink()
    found = problems(stage)
    assert len(found) >= 1
    assert all(victim.name in text for _, text in found)


def test_a_pack_that_is_cut_off_is_found_without_reading_it(stage: StoreStage) -> None:
    victim = pack_of(stage)
    victim.write_bytes(victim.read_bytes()[:-1])
    assert all(victim.name in text for _, text in problems(stage))


def test_a_flipped_byte_of_a_frame_is_found_when_every_byte_is_read(stage: StoreStage) -> None:
    victim = pack_of(stage)
    flip(victim, victim.stat().st_size - 100)
    assert stage.result("verify")["problems"] == []
    assert all(victim.name in text for _, text in problems(stage, "--read-data"))


def test_a_flipped_byte_of_an_index_is_found_in_any_case(stage: StoreStage) -> None:
    victim = pack_of(stage)
    flip(victim, 30)
    assert all(victim.name in text for _, text in problems(stage))


@pytest.mark.parametrize("at", [30, 80, -1])
def test_a_flipped_byte_of_a_manifest_is_found(stage: StoreStage, at: int) -> None:
    root = next(root for root in stage.roots() if root.number == 2)
    flip(stage.objects()[f"manifests/{root.snapshot_id}"], at)
    ((number, text),) = problems(stage)
    assert number == 2
    assert root.snapshot_id in text


def test_a_row_that_names_another_manifest_is_found(stage: StoreStage) -> None:
    """The log says so too: `torpor log --verify`."""
    one, other = [root for root in stage.roots() if root.number in (2, 3)][:2]
    path = stage.objects()[f"manifests/{one.snapshot_id}"]
    path.write_bytes(stage.objects()[f"manifests/{other.snapshot_id}"].read_bytes())
    assert [number for number, _ in problems(stage)] == [2]


def test_garbage_is_counted_and_strangers_are_a_problem(stage: StoreStage) -> None:
    stage.forget("other")
    report = stage.result("verify")
    assert (report["problems"], report["garbage"] > 2) == ([], True)
    stranger = stage.store / "strange" / "xx" / "thing_xx"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    assert problems(stage) == [(None, "strange/thing_xx is no object of Torpor's")]


def test_one_session_is_looked_at_alone(stage: StoreStage) -> None:
    root = next(root for root in stage.roots() if root.number == 2)
    stage.objects()[f"manifests/{root.snapshot_id}"].unlink()
    assert stage.result("verify", "other")["problems"] == []
    assert len(problems(stage, "one")) == 1


def test_verify_changes_nothing(stage: StoreStage) -> None:
    before = {key: path.stat().st_mtime_ns for key, path in stage.objects().items()}
    stage.result("verify", "--read-data")
    assert {key: path.stat().st_mtime_ns for key, path in stage.objects().items()} == before
