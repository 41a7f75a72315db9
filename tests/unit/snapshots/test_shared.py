"""Two sessions of one image share what is equal: through a file that may be lost, stale or wrong without harm."""

import os
from pathlib import Path

import pytest
from tests.unit.snapshots.making import IDS, KEY, World, contents, page, pages

from torpor.core.errors import Damaged
from torpor.core.ids import SnapshotId
from torpor.snapshots import shared as shared_module
from torpor.snapshots.capture import capture
from torpor.snapshots.cipher import new_key
from torpor.snapshots.shared import NOTHING_SHARED, SharedIndexes, drop_shared
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

TENANT = b"the secret of the tests' tenant.."
NAMES = ("python agent.py", "python")


class Session:
    """One of several sessions over a world's store, each with a key of its own."""

    def __init__(self, world: World, name: str, names: tuple[str, ...] = NAMES, tenant: bytes = TENANT) -> None:
        self.world, self.name, self.names = world, name, names
        self.key = new_key()
        self.indexes = SharedIndexes(world.root / "shared", tenant)
        self.store = SnapshotStore(world.backend, IDS, shared=self.indexes)

    def save(self, number: int = 0, parent: SavedSnapshot | None = None) -> SavedSnapshot:
        with self.store.lease() as lease:
            return self.store.save(
                image_dir=self.world.image,
                workspace=capture(self.world.workspace, self.world.fresh("staging"), parent and parent.tree),
                parent=parent and parent.ref,
                pins={},
                snapshot_id=SnapshotId(f"snp_{self.name}_{number}"),
                key=self.key,
                lease=lease,
                shares=self.names,
            )

    def share(self, saved: SavedSnapshot) -> None:
        self.store.share(saved.ref, self.names, f"session {self.name}")


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.write_image(pages(range(600)), checkpoint=os.urandom(2000))
    (made.workspace / "big").write_bytes(os.urandom(700_000))
    return made


@pytest.fixture
def golden(world: World) -> SavedSnapshot:
    first = Session(world, "first")
    saved = first.save()
    first.share(saved)
    return saved


def files(world: World) -> list[Path]:
    return sorted((world.root / "shared").iterdir())


def test_first_snapshot_of_another_session_stores_only_what_differs(world: World, golden: SavedSnapshot) -> None:
    world.write_image(page(9000) + pages(range(599)), checkpoint=os.urandom(2000))
    (world.workspace / "own").write_bytes(b"own")
    second = Session(world, "second")
    saved = second.save()
    assert golden.stored_bytes > 3_000_000
    assert saved.new_pages == 1
    assert saved.stored_bytes < 4096 + 2000 + 3000
    assert world.restored_image(saved) == contents(world.image)
    assert contents(world.restored_workspace(saved)) == contents(world.workspace)
    assert second.store.verify(saved.ref) == []


def test_shared_snapshot_needs_nothing_of_the_other_session_but_its_packs(world: World, golden: SavedSnapshot) -> None:
    second = Session(world, "second")
    saved = second.save()
    world.backend.delete(f"manifests/{golden.id}")
    drop_shared(world.root / "shared", "session first")
    assert second.store.verify(saved.ref) == []
    assert world.restored_image(saved) == contents(world.image)
    own = second.store.pack_names(saved.id, saved.manifest_digest)
    assert set(own) <= set(world.backend.list("packs/"))


def test_snapshot_with_pages_of_a_parent_is_compared_with_that_alone(world: World, golden: SavedSnapshot) -> None:
    other = Session(world, "other", names=())
    world.write_image(pages(range(2000, 2010)))
    parent = other.save()
    world.write_image(pages(range(600)))
    other.names = NAMES
    assert other.save(1, parent).new_pages == 600


def test_seed_without_memory_leaves_the_pages_to_the_first_that_has_some(world: World, golden: SavedSnapshot) -> None:
    image = contents(world.image)
    for path in world.image.iterdir():
        path.unlink()
    second = Session(world, "second")
    seed = second.save()
    assert seed.stored_bytes < 1500
    assert second.store.verify(seed.ref) == []
    for name, data in image.items():
        (world.image / name).write_bytes(data)
    assert second.save(1, seed).new_pages == 0


def test_packs_of_which_nothing_is_used_are_not_named(world: World, golden: SavedSnapshot) -> None:
    world.write_image(pages(range(3000, 3010)), checkpoint=os.urandom(500))
    (world.workspace / "big").unlink()
    second = Session(world, "second")
    saved = second.save()
    first_packs = world.store.pack_names(golden.id, golden.manifest_digest)
    assert not set(second.store.pack_names(saved.id, saved.manifest_digest)) & set(first_packs)


def test_packs_that_are_gone_are_not_referred_to(world: World, golden: SavedSnapshot) -> None:
    for name in world.backend.list("packs/"):
        world.backend.delete(name)
    second = Session(world, "second")
    saved = second.save()
    assert saved.new_pages == 600
    assert second.store.verify(saved.ref) == []


def test_program_is_shared_when_the_command_is_another(world: World, golden: SavedSnapshot) -> None:
    assert Session(world, "second", names=("python other.py", "python")).save().new_pages == 0
    assert Session(world, "third", names=("python other.py", "node")).save().new_pages == 600


def test_the_first_that_was_shared_stays(world: World, golden: SavedSnapshot) -> None:
    before = {path: path.read_bytes() for path in files(world)}
    assert len(before) == 2
    world.write_image(pages(range(50, 60)))
    second = Session(world, "second", names=("python agent.py", "python", "more"))
    second.share(second.save())
    assert {path: path.read_bytes() for path in files(world) if path in before} == before
    assert len(files(world)) == 3


@pytest.mark.parametrize("gone", ["packs", "file"])
def test_one_that_is_of_no_use_any_more_is_replaced(world: World, golden: SavedSnapshot, gone: str) -> None:
    if gone == "packs":
        for name in world.backend.list("packs/"):
            world.backend.delete(name)
    for path in files(world) if gone == "file" else ():
        path.write_bytes(b"no index")
    second = Session(world, "second")
    second.share(second.save())
    assert all(b"session second" in path.read_bytes() for path in files(world))
    assert Session(world, "third").save().new_pages == 0


def test_dropping_an_origin_removes_its_files_alone(world: World, golden: SavedSnapshot) -> None:
    second = Session(world, "second", names=("node agent.js",))
    second.share(second.save())
    half = world.root / "shared" / ".half.0123"
    half.write_bytes(files(world)[0].read_bytes()[:60])
    mine = [path for path in files(world) if b"session second" in path.read_bytes()]
    drop_shared(world.root / "shared", "session first")
    assert files(world) == mine
    drop_shared(world.root / "shared", "session first")
    drop_shared(world.root / "nothing here", "session first")
    assert Session(world, "third").save().new_pages == 600


def test_index_of_another_tenant_is_neither_found_nor_opened(world: World, golden: SavedSnapshot) -> None:
    stranger = Session(world, "stranger", tenant=b"the secret of a tenant next door.")
    assert stranger.indexes.find(NAMES) is NOTHING_SHARED
    theirs = stranger.indexes._path(NAMES[0])
    theirs.write_bytes(Session(world, "x").indexes._path(NAMES[0]).read_bytes())
    assert stranger.indexes.find(NAMES) is NOTHING_SHARED


def test_file_of_another_name_or_with_any_other_byte_is_nothing(world: World, golden: SavedSnapshot) -> None:
    indexes = Session(world, "x").indexes
    path = indexes._path(NAMES[0])
    good = path.read_bytes()
    indexes._path("another").write_bytes(good)
    assert indexes.find(["another"]) is NOTHING_SHARED
    for at in [*range(120), *range(120, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert indexes.find(NAMES[:1]) is NOTHING_SHARED
    for cut in (0, 10, 30, 60, len(good) - 1):
        path.write_bytes(good[:cut])
        assert indexes.find(NAMES[:1]) is NOTHING_SHARED
    path.write_bytes(good)
    assert indexes.find(NAMES[:1]).pages.pages == 600


def test_no_key_and_no_id_is_in_the_file_as_it_is(world: World, golden: SavedSnapshot) -> None:
    manifest = world.store.read_manifest(golden.ref)
    for path in files(world):
        data = path.read_bytes()
        assert IDS.of_page(page(5)) not in data
        assert b"python" not in data
        for ref in manifest.packs:
            assert ref.secret not in data
            assert ref.name not in data


def test_number_of_pages_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "PAGES_MAX", 300)
    first = Session(world, "first")
    first.share(first.save())
    found = first.indexes.find(NAMES)
    assert found.pages.pages == 300
    assert Session(world, "second").save().new_pages == 300


def test_snapshot_that_cannot_be_read_is_not_shared(world: World) -> None:
    first = Session(world, "first")
    saved = first.save()
    world.backend.delete(f"manifests/{saved.id}")
    with pytest.raises(Damaged):
        Session(world, "first").share(saved)
    assert not (world.root / "shared").exists()


def test_store_without_shared_indexes_shares_nothing(world: World, golden: SavedSnapshot) -> None:
    assert world.save("alone").new_pages == 600
    world.store.share(golden.ref, ("x",), "y")
    assert golden.ref.key != KEY
