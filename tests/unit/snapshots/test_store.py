"""Snapshots saved and restored: what is shared, what is verified, what is said when it is broken."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.snapshots.making import IDS, KEY, World, contents, page, pages, settled

from torpor.core.errors import Conflict, Damaged, InvalidInput
from torpor.core.ids import SnapshotId
from torpor.snapshots import fold
from torpor.snapshots.manifest import PagedFile, SnapshotRef, decode_extents, encode_extents, encode_manifest
from torpor.snapshots.pages import Extent
from torpor.snapshots.store import SavedSnapshot, SnapshotStore


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_restored_image_is_byte_identical(world: World) -> None:
    world.write_image(pages(range(300)) + b"a short last page", checkpoint=os.urandom(700_000), empty=b"")
    saved = world.save("a")
    assert world.restored_image(saved) == contents(world.image)
    assert saved.total_pages == saved.new_pages == 301
    assert saved.raw_bytes == sum(map(len, contents(world.image).values()))


def test_save_of_a_changed_image_stores_only_changed_pages(world: World) -> None:
    world.write_image(pages(range(1000)))
    first = world.save("a")
    world.write_image(page(5000) + pages(range(500)) + page(6000) + pages(range(501, 1000)))
    second = world.save("b", first)
    assert second.new_pages == 2
    assert second.total_pages == 1001
    assert second.stored_bytes < 2 * 4096 + 3000
    assert world.restored_image(second) == contents(world.image)


def test_stored_bytes_is_what_the_store_grew_by(world: World) -> None:
    sizes = [0]
    parent = None
    for step in range(3):
        world.write_image(pages(range(step * 10, step * 10 + 100)))
        (world.workspace / f"file{step}").write_bytes(os.urandom(1000))
        parent = world.save(f"s{step}", parent)
        sizes.append(sum(path.stat().st_size for path in world.object_paths()))
        assert parent.stored_bytes == sizes[-1] - sizes[-2]


def test_unchanged_image_and_workspace_store_a_manifest_and_nothing_else(world: World) -> None:
    world.write_image(pages(range(100)))
    (world.workspace / "file").write_bytes(b"x" * 1000)
    first = world.save("a")
    before = {path.name for path in world.object_paths()}
    world.save("b", first)
    assert {path.name for path in world.object_paths()} - before == {"snp_b"}


def test_sharing_needs_no_memory_of_the_parent_in_this_process(world: World) -> None:
    world.write_image(pages(range(200)))
    first = world.save("a")
    world.write_image(pages(range(1, 201)))
    second = world.save("b", first, store=world.new_store())
    assert second.new_pages == 1
    assert second.parent_problem == ""
    assert world.restored_image(second) == contents(world.image)


def test_image_without_paged_files_and_empty_workspace_is_a_snapshot(world: World) -> None:
    saved = world.save("a")
    assert world.restored_image(saved) == {}
    assert list(world.restored_workspace(saved).iterdir()) == []


def test_empty_memory_image_is_restored_empty(world: World) -> None:
    world.write_image(b"")
    assert world.restored_image(world.save("a"))["pages.img"] == b""


def test_pins_are_kept_as_given(world: World) -> None:
    saved = world.save("a", pins={"runsc": "sha256:00", "cpu": "sse4 ñ"})
    assert world.store.read_manifest(saved.ref).pins == {"runsc": "sha256:00", "cpu": "sse4 ñ"}


def test_manifest_names_its_parent_but_restores_without_it(world: World) -> None:
    world.write_image(pages(range(50)))
    first = world.save("a")
    world.write_image(pages(range(10, 60)))
    second = world.save("b", first)
    world.backend.delete("manifests/snp_a")
    assert world.store.read_manifest(second.ref).parent == first.id
    assert world.restored_image(second) == contents(world.image)
    assert world.store.verify(second.ref) == []


def test_packs_of_which_no_page_is_left_are_not_named(world: World) -> None:
    world.write_image(pages(range(10)))
    first = world.save("a")
    world.write_image(pages(range(20, 30)))
    second = world.save("b", first)
    manifest = world.store.read_manifest(second.ref)
    assert len(manifest.page_packs) == 1
    third = world.save("c", second)
    assert third.new_pages == 0
    assert world.restored_image(third) == contents(world.image)


def test_saving_an_id_twice_is_a_conflict_and_keeps_the_first(world: World) -> None:
    world.write_image(pages(range(5)))
    first = world.save("a")
    expected = contents(world.image)
    world.write_image(pages(range(6)))
    with pytest.raises(Conflict, match="snp_a") as caught:
        world.save("a")
    assert caught.value.code == "snapshot_exists"
    assert world.restored_image(first) == expected


def test_missing_parent_costs_sharing_and_is_reported(world: World) -> None:
    world.write_image(pages(range(20)))
    first = world.save("a")
    world.backend.delete("manifests/snp_a")
    second = world.save("b", first, store=world.new_store())
    assert second.new_pages == 20
    assert "manifests/snp_a" in second.parent_problem
    assert world.restored_image(second) == contents(world.image)


def test_pack_that_went_away_is_not_referred_to_again(world: World) -> None:
    world.write_image(pages(range(20)))
    first = world.save("a")
    manifest = world.store.read_manifest(first.ref)
    world.backend.delete(manifest.page_packs[0].key)
    second = world.save("b", first)
    assert second.new_pages == 20
    assert world.restored_image(second) == contents(world.image)


def test_capture_that_was_compared_with_an_older_snapshot_is_whole_all_the_same(world: World) -> None:
    """Its parent, a newer one, needs nothing any more of what the capture left out as unchanged."""
    directory = world.workspace / "d"
    directory.mkdir()
    (directory / "kept").write_bytes(b"kept")
    world.write_image(pages(range(20)))
    older = world.save("older")
    directory.rename(world.root / "elsewhere")
    newer = older
    for number in range(fold.OBJECT_PACKS_MAX + 2):
        (world.workspace / "counter").write_bytes(b"%d" % number)
        world.write_image(pages(range(21)), checkpoint=b"another", pages_meta=b"another")
        newer = world.save(f"n{number}", newer, index=newer.tree)
    (world.workspace / "counter").unlink()
    (world.root / "elsewhere").rename(directory)
    saved = world.save("newest", newer, index=settled(older.tree), compared_with=older)
    assert saved.new_pages == 0, "pages are compared with the parent"
    assert saved.tree_root == older.tree_root, "nothing was read"
    assert world.store.verify(saved.ref) == []
    assert (world.restored_workspace(saved) / "d/kept").read_bytes() == b"kept"


def test_capture_needs_no_parent_but_what_it_was_compared_with(world: World) -> None:
    (world.workspace / "file").write_bytes(b"shared")
    first = world.save("a")
    alone = world.save("b", None, index=first.tree, compared_with=first)
    assert contents(world.restored_workspace(alone)) == {"file": b"shared"}
    with pytest.raises(InvalidInput) as caught:
        world.save("c", None, index=first.tree)
    assert caught.value.code == "capture_of_other_parent"


def test_capture_that_shares_files_with_a_lost_parent_is_refused_not_saved_incomplete(world: World) -> None:
    (world.workspace / "file").write_bytes(b"shared")
    first = world.save("a")
    for ref in world.store.read_manifest(first.ref).object_packs:
        world.backend.delete(ref.key)
    with pytest.raises(Damaged) as caught:
        world.save("b", first, index=first.tree)
    assert caught.value.code == "snapshot_object_missing"
    third = world.save("c", first)
    assert world.store.verify(third.ref) == []


def test_restore_refuses_a_directory_that_is_not_empty(world: World) -> None:
    saved = world.save("a")
    target = world.fresh("target")
    (target / "precious").write_bytes(b"x")
    for restore in (world.store.restore_image, world.store.restore_workspace):
        with pytest.raises(InvalidInput) as caught:
            restore(saved.ref, target)
        assert caught.value.code == "directory_not_empty"
    assert contents(target) == {"precious": b"x"}


class TestDamage:
    @pytest.fixture
    def saved(self, world: World) -> SavedSnapshot:
        world.write_image(pages(range(70)))
        (world.workspace / "directory").mkdir()
        (world.workspace / "directory" / "file").write_bytes(os.urandom(5000))
        parent = world.save("a")
        world.write_image(pages(range(5, 75)))
        (world.workspace / "other").write_bytes(b"text " * 5000)
        return world.save("b", parent)

    def restore(self, world: World, saved: SavedSnapshot) -> None:
        store = world.new_store()
        store.restore_image(saved.ref, world.fresh("image"))
        store.restore_workspace(saved.ref, world.fresh("workspace"))

    def needed_objects(self, world: World, saved: SavedSnapshot) -> list[Path]:
        manifest = world.store.read_manifest(saved.ref)
        keys = [f"manifests/{saved.id}", *(ref.key for ref in manifest.packs)]
        paths = [path for path in world.object_paths() if any(key.endswith(path.name) for key in keys)]
        assert len(paths) == len(keys) == 5
        return paths

    def test_flipped_byte_anywhere_is_found_and_the_object_is_named(self, world: World, saved: SavedSnapshot) -> None:
        chance = random.Random(1)
        for path in self.needed_objects(world, saved):
            good = path.read_bytes()
            for at in {0, len(good) - 1, *(chance.randrange(len(good)) for _ in range(25))}:
                bad = bytearray(good)
                bad[at] ^= 1 << chance.randrange(8)
                path.write_bytes(bad)
                problems = world.store.verify(saved.ref)
                assert len(problems) == 1
                assert path.name in problems[0]
                with pytest.raises(Damaged, match=path.name) as caught:
                    self.restore(world, saved)
                assert caught.value.code == "snapshot_damaged"
                assert caught.value.hint
            path.write_bytes(good)
        self.restore(world, saved)

    def test_truncated_object_is_found_and_named(self, world: World, saved: SavedSnapshot) -> None:
        for path in self.needed_objects(world, saved):
            good = path.read_bytes()
            for length in (0, len(good) // 2, len(good) - 1):
                path.write_bytes(good[:length])
                assert any(path.name in problem for problem in world.store.verify(saved.ref))
                with pytest.raises(Damaged, match=path.name):
                    self.restore(world, saved)
            path.write_bytes(good)

    def test_missing_object_is_named(self, world: World, saved: SavedSnapshot) -> None:
        for path in self.needed_objects(world, saved):
            good = path.read_bytes()
            path.unlink()
            assert any(path.name in problem for problem in world.store.verify(saved.ref))
            with pytest.raises(Damaged, match=path.name) as caught:
                self.restore(world, saved)
            assert caught.value.code == "snapshot_object_missing"
            path.write_bytes(good)

    def test_sound_manifest_that_is_not_the_one_that_was_committed_is_refused(
        self, world: World, saved: SavedSnapshot
    ) -> None:
        (path,) = (path for path in world.object_paths() if path.name == "snp_b")
        manifest = world.store.read_manifest(saved.ref)
        path.write_bytes(encode_manifest(replace(manifest, pins={"runsc": "another"}), KEY))
        with pytest.raises(Damaged, match="snp_b"):
            world.store.read_manifest(saved.ref)

    def test_manifest_of_another_snapshot_is_no_parent(self, world: World, saved: SavedSnapshot) -> None:
        by_name = {path.name: path for path in world.object_paths()}
        by_name["snp_b"].write_bytes(by_name["snp_a"].read_bytes())
        child = world.save("child", saved, store=world.new_store())
        assert "manifest of snp_a" in child.parent_problem

    def test_lying_parent_manifest_costs_sharing_and_never_reaches_a_child(
        self, world: World, saved: SavedSnapshot
    ) -> None:
        """One that was sealed with the very key, but is not the one that was committed."""
        manifest = world.store.read_manifest(saved.ref)
        (file,) = (file for file in manifest.files if isinstance(file, PagedFile))
        lies = [Extent(extent.count, extent.pack, 0) for extent in decode_extents(file.extents)]
        others = tuple(other for other in manifest.files if other is not file)
        lying = replace(
            manifest, files=(*others, PagedFile(file.name, file.size, file.page_list, encode_extents(lies)))
        )
        (path,) = (path for path in world.object_paths() if path.name == "snp_b")
        path.write_bytes(encode_manifest(lying, KEY))
        child = world.save("child", saved, store=world.new_store())
        assert "not what was written" in child.parent_problem
        assert child.new_pages == child.total_pages
        assert world.restored_image(child) == contents(world.image)
        assert world.store.verify(child.ref) == []

    def test_broken_parent_manifest_costs_sharing_and_is_reported(self, world: World, saved: SavedSnapshot) -> None:
        (path,) = (path for path in world.object_paths() if path.name == "snp_b")
        path.write_bytes(path.read_bytes()[:-1])
        child = world.save("child", saved, store=world.new_store())
        assert child.new_pages == child.total_pages
        assert "snp_b" in child.parent_problem

    def test_sound_snapshot_has_no_problems(self, world: World, saved: SavedSnapshot) -> None:
        assert world.store.verify(saved.ref) == []

    def test_snapshot_that_never_was_is_missing(self, world: World) -> None:
        never = SnapshotRef(id=SnapshotId("snp_never"), manifest_digest="00" * 32, key=KEY)
        with pytest.raises(Damaged, match="snp_never") as caught:
            world.store.restore_image(never, world.root / "x")
        assert caught.value.code == "snapshot_object_missing"
        assert not (world.root / "x").exists()


def test_saves_and_restores_of_several_sessions_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Four worlds over one store, which share most of their pages and all of their threads."""
    (tmp_path / "store").mkdir()
    worlds = []
    for number in range(4):
        (tmp_path / f"world{number}").mkdir()
        worlds.append(World(tmp_path / f"world{number}", store=tmp_path / "store"))
    store = SnapshotStore(worlds[0].backend, IDS)

    def live(number: int) -> None:
        world, saved = worlds[number], None
        for step in range(4):
            world.write_image(pages(range(step, 100)) + page(1000 + number))
            (world.workspace / "file").write_bytes(b"world %d step %d" % (number, step))
            saved = world.save(f"w{number}s{step}", saved, index=saved and saved.tree, store=store)
            assert world.restored_image(saved) == contents(world.image)
            assert contents(world.restored_workspace(saved)) == contents(world.workspace)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(live, range(4)))


def test_hundredth_snapshot_names_few_packs_and_restores(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step leaves one file behind that no later step touches."""
    monkeypatch.setattr(fold, "OBJECT_PACKS_MAX", 8)
    monkeypatch.setattr(fold, "_FOLD_TO_PACKS", 4)
    saved = None
    for step in range(30):
        world.write_image(pages(range(step, step + 20)), checkpoint=os.urandom(300))
        (world.workspace / f"file{step}").write_bytes(b"step %d" % step)
        saved = world.save(f"s{step}", saved, index=saved and saved.tree)
        assert len(world.store.read_manifest(saved.ref).object_packs) <= 8
    assert saved is not None
    assert world.store.verify(saved.ref) == []
    assert contents(world.restored_workspace(saved)) == contents(world.workspace)


def test_index_cache_is_bounded_and_a_forgotten_parent_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torpor.snapshots.index_cache.ITEMS_MAX", 100)
    world.write_image(pages(range(80)))
    first = world.save("a")
    world.write_image(pages(range(100, 180)))
    second = world.save("b")
    assert second.ref in world.store._cache
    assert first.ref not in world.store._cache
    world.write_image(pages(range(1, 81)))
    assert world.save("c", first).new_pages == 1


def test_index_cache_holds_the_last_two_of_a_session_however_long_it_goes_on(world: World) -> None:
    saved: list[SavedSnapshot] = []
    for step in range(5):
        world.write_image(pages(range(step, step + 20)))
        saved.append(world.save(f"s{step}", saved[-1] if saved else None))
    other = world.save("other")
    assert [one.ref in world.store._cache for one in (*saved, other)] == [False, False, False, True, True, True]
