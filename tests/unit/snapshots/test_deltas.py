"""Changed pages are stored as what changed: against pages that are whole, however many saves there were before."""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.collecting import Scene
from tests.unit.snapshots.making import IDS, KEY, World, contents, page, variant, variants

from torpor.core.errors import Damaged
from torpor.core.ids import SnapshotId
from torpor.snapshots import manifest, scatter
from torpor.snapshots.capture import capture
from torpor.snapshots.layout import is_scattered
from torpor.snapshots.manifest import Manifest, PagedFile, WholeFile, decode_extents
from torpor.snapshots.pack import Base, PackBuilder, PackIndex, read_pack_index
from torpor.snapshots.pages import PAGES_PER_FRAME
from torpor.snapshots.repack import Repacker
from torpor.snapshots.shared import SharedIndexes
from torpor.snapshots.store import SavedSnapshot, SnapshotStore

Image = list[tuple[int, int]]
"""Pages by number and version."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def save(world: World, name: str, image: Sequence[tuple[int, int]], parent: SavedSnapshot | None = None, **more):
    world.write_image(variants(image))
    return world.save(name, parent, **more)


def packs_of(world: World, manifest: Manifest) -> list[PackIndex]:
    return [read_pack_index(world.backend, ref) for ref in manifest.page_packs]


def frames_needed(world: World, manifest: Manifest) -> int:
    """How many frames a restore opens."""
    packs = packs_of(world, manifest)
    numbers = {pack.ref.name: number for number, pack in enumerate(packs)}
    opened: set[tuple[int, int]] = set()
    for file in manifest.files:
        for extent in decode_extents(file.extents) if isinstance(file, PagedFile) else ():
            for item in range(extent.first, extent.first + extent.count):
                opened.add((extent.pack, packs[extent.pack].frame_of(item)))
    for number, frame in sorted(opened):
        pack = packs[number]
        if pack.frames[frame].is_delta:
            for base, item in pack.bases_of(pack.frames[frame]):
                holder = numbers[pack.base_packs[base]]
                needed = packs[holder].frame_of(item)
                assert not packs[holder].frames[needed].is_delta, "a base is a delta"
                opened.add((holder, needed))
    return len(opened)


def test_changed_pages_store_what_changed(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, number % 2) for number in range(600)], first)
    assert second.new_pages == 300
    assert second.stored_bytes < 300 * 4096 / 20
    assert world.restored_image(second) == contents(world.image)
    assert world.store.verify(second.ref) == []
    manifest = world.store.read_manifest(second.ref)
    assert manifest.needs == ((), (0,))


def test_deltas_need_no_memory_of_the_parent_in_this_process(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, number % 2) for number in range(600)], first, store=world.new_store())
    forgetful = world.new_store()
    third = save(world, "c", [(number, number % 3) for number in range(600)], second, store=forgetful)
    assert second.stored_bytes < 300 * 4096 / 20
    assert third.stored_bytes < 400 * 4096 / 20
    assert world.restored_image(third) == contents(world.image)
    remembered = forgetful._cache.recall(third.ref)
    assert remembered is not None
    assert remembered.pages == world.new_store()._load_indexes(third.ref).pages


def test_pages_that_moved_are_compared_with_what_was_in_their_place(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    inserted = [(9000, 0), (9001, 0)]
    image = [(0, 0), *inserted, *[(number, number % 2) for number in range(1, 600)]]
    second = save(world, "b", image, first)
    assert second.stored_bytes < 2 * 4096 + 300 * 4096 / 20
    assert world.restored_image(second) == contents(world.image)


def test_page_that_has_nothing_in_common_with_its_base_is_none(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number + 1000, 0) for number in range(600)], first)
    assert world.store.read_manifest(second.ref).needs == ((),)
    assert world.restored_image(second) == contents(world.image)


def changed(image: Image, step: int, source: random.Random) -> Image:
    """A step of an agent: pages change, come and go."""
    image = list(image)
    for _ in range(source.randrange(1, 40)):
        at = source.randrange(len(image))
        image[at] = image[at][0], step
    if source.random() < 0.3:
        at = source.randrange(len(image))
        image[at:at] = [(10_000 * step + number, 0) for number in range(source.randrange(1, 12))]
    if source.random() < 0.3:
        at = source.randrange(len(image))
        del image[at : at + source.randrange(1, 12)]
    return image or [(1, step)]


@given(st.integers(0, 2**32), st.integers(1, 120), st.lists(st.sampled_from(["same", "new"]), min_size=2, max_size=9))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_images_restores_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, pages: int, stores: list[str]
) -> None:
    world, source = World(tmp_path_factory.mktemp("world")), random.Random(seed)
    image = [(number, 0) for number in range(pages)]
    saved: list[SavedSnapshot] = []
    raw: list[bytes] = []
    for step, which in enumerate(stores):
        parent = saved[source.randrange(len(saved))] if saved and source.random() < 0.2 else (saved or [None])[-1]
        store = world.store if which == "same" else world.new_store()
        end = page(step)[: source.choice([0, 0, 100])]
        world.write_image(variants(image) + end)
        saved.append(world.save(str(step), parent, store=store))
        raw.append(variants(image) + end)
        image = changed(image, step + 1, source)
    for one, data in zip(saved, raw, strict=True):
        assert world.restored_image(one)["pages.img"] == data
        assert world.new_store().verify(one.ref) == []
        frames_needed(world, world.store.read_manifest(one.ref))


def test_the_hundredth_save_needs_no_more_packs_and_hardly_more_frames_than_the_tenth(world: World) -> None:
    source, image = random.Random(3), [(number, 0) for number in range(3000)]
    saved, packs, frames, stored = None, [0], [0], []
    for step in range(1, 101):
        for at in source.sample(range(3000), 60):
            image[at] = image[at][0], step
        saved = save(world, str(step), image, saved)
        manifest = world.store.read_manifest(saved.ref)
        packs.append(len(manifest.page_packs))
        frames.append(frames_needed(world, manifest))
        stored.append(saved.stored_bytes)
    assert max(packs) <= 1 + scatter.PACKS_FREE_MAX + 1
    assert max(frames) <= 2.25 * 3000 / PAGES_PER_FRAME + 8 + 3
    assert sum(stored[1:]) / 99 < 60 * 4096 / 4
    assert world.restored_image(saved) == contents(world.image)


def test_image_that_needs_too_many_frames_is_stored_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    monkeypatch.setattr(scatter, "FRAMES_NEEDED_MAX", 0.1)
    monkeypatch.setattr(scatter, "_FRAMES_SLACK", 0)
    second = save(world, "b", [(number, number % 2) for number in range(600)], first)
    assert second.new_pages == 600
    assert world.store.read_manifest(second.ref).needs == ((),)
    assert world.restored_image(second) == contents(world.image)


def test_old_bases_are_replaced_once_most_of_an_image_has_moved_away_from_them(world: World) -> None:
    """Each version overwrites another part of every page, until little is as it was in the first."""
    mixed = [bytearray(page(number)) for number in range(400)]
    saved, new = None, []
    for step in range(1, 12):
        world.write_image(b"".join(bytes(one) for one in mixed))
        saved = world.save(str(step), saved)
        new.append(saved.new_pages)
        assert world.restored_image(saved) == contents(world.image)
        for number, one in enumerate(mixed[:300]):
            one[step * 300 : (step + 1) * 300] = random.Random(number * 100 + step).randbytes(300)
    assert 400 in new[1:]
    assert new.count(400) < 6


def test_collector_keeps_what_deltas_need(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, 1) for number in range(600)], first)
    [base] = [ref.key for ref in world.store.read_manifest(first.ref).page_packs]
    assert base in world.store.pack_names(second.id, second.manifest_digest)


def test_repacking_leaves_deltas_and_what_they_need_where_they_are(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, 0 if number < 20 else 1) for number in range(600)], first)
    repacker = Repacker(world.backend, IDS, grace_seconds=0, progress=lambda *_: None, room=lambda _: None)  # type: ignore[arg-type,return-value]
    repacker.look([second.ref])
    assert [weight for weight in repacker.weights if weight.holds_pages] == []
    repacker = Repacker(world.backend, IDS, grace_seconds=0, progress=lambda *_: None, room=lambda _: None)  # type: ignore[arg-type,return-value]
    plain = save(world, "c", [(number, 0) for number in range(20)])
    repacker.look([plain.ref])
    assert repacker.weights == []


def test_repacked_snapshot_still_names_what_its_deltas_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pack is emptied, another one holds deltas of a third."""
    monkeypatch.setattr("torpor.snapshots.usage.DEAD_BYTES_MIN", 1)
    monkeypatch.setattr("torpor.snapshots.usage.NEEDED_SHARE_MAX", 0.9)
    scene = Scene()
    try:
        scene.run(scene.save("a", 0, length=40))
        scene.run(scene.save("a", 0, length=40))
        scene.run(scene.save("a", 25, length=40))
        scene.run(scene.save("a", 25, length=40))
        first, *_ = scene.rows
        del scene.rows[first]
        scene.check_at_rest()
        scene.check_at_rest()
    finally:
        scene.close()


def test_idle_image_with_deltas_counts_as_scattered(world: World) -> None:
    image = [(number, 0) for number in range(1024)]
    first = save(world, "a", image)
    assert not is_scattered(world.store.read_manifest(first.ref))
    second = save(world, "b", [(number, 1) for number in range(1024)], first)
    assert is_scattered(world.store.read_manifest(second.ref))


def test_first_snapshot_of_another_session_is_compared_page_by_page_with_the_shared_one(world: World) -> None:
    """As where nothing is equal, because every page holds addresses; and the next one's with this one's bases."""
    indexes = SharedIndexes(world.root / "shared", b"a secret of the tenant's own.....")

    def session(name: str, version: int) -> SavedSnapshot:
        store = SnapshotStore(world.backend, IDS, shared=indexes)
        world.write_image(variants((number, version) for number in range(600)))
        with store.lease() as lease:
            made = store.save(
                image_dir=world.image,
                workspace=capture(world.workspace, world.fresh("staging")),
                parent=None,
                pins={},
                snapshot_id=SnapshotId(f"snp_{name}"),
                key=KEY,
                lease=lease,
                shares=("agent",),
            )
        store.share(made.ref, ("agent", name), name)
        return made

    first, second = session("one", 0), session("two", 1)
    assert second.stored_bytes < first.stored_bytes / 20
    shared = indexes.find(["two"])
    assert shared.pages.pages == 600
    world.backend.delete(f"manifests/{first.id}")
    assert world.new_store().verify(second.ref) == []
    assert world.restored_image(second) == contents(world.image)
    third = SnapshotStore(world.backend, IDS, shared=indexes)
    world.write_image(variants((number, 2) for number in range(600)))
    with third.lease() as lease:
        made = third.save(
            image_dir=world.image,
            workspace=capture(world.workspace, world.fresh("staging")),
            parent=None,
            pins={},
            snapshot_id=SnapshotId("snp_three"),
            key=KEY,
            lease=lease,
            shares=("two",),
        )
    assert made.stored_bytes < first.stored_bytes / 20
    assert world.restored_image(made) == contents(world.image)


def damage(world: World, key: str, at: int) -> None:
    path = next((world.store_directory / "packs").glob(f"*/{key.removeprefix('packs/')}"))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_base_is_never_restored_and_the_next_save_does_without(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, 1) for number in range(600)], first)
    [base] = [ref.key for ref in world.store.read_manifest(first.ref).page_packs]
    damage(world, base, -100)
    with pytest.raises(Damaged):
        world.restored_image(second)
    assert world.store.verify(second.ref) != []
    third = save(world, "c", [(number, 2) for number in range(600)], second, store=world.new_store())
    assert base in third.parent_problem
    assert third.new_pages == 600
    assert base not in world.store.pack_names(third.id, third.manifest_digest)
    assert world.restored_image(third) == contents(world.image)


def test_base_that_is_gone_is_not_referred_to(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(600)])
    second = save(world, "b", [(number, 1) for number in range(600)], first)
    [base] = [ref.key for ref in world.store.read_manifest(first.ref).page_packs]
    world.backend.delete(base)
    with pytest.raises(Damaged, match="not in the store"):
        world.restored_image(second)
    third = save(world, "c", [(number, 2) for number in range(600)], second)
    assert base not in world.store.pack_names(third.id, third.manifest_digest)
    assert world.restored_image(third) == contents(world.image)


def test_delta_does_not_open_against_other_bytes() -> None:
    builder = PackBuilder(IDS, holds_pages=True)
    raw = b"".join(variant(number, 1) for number in range(4))
    base = b"".join(page(number) for number in range(4))
    assert builder.add_frame(raw, IDS.of_pages(memoryview(raw)), base=Base([(b"n" * 32, at) for at in range(4)], base))
    pack, data = builder.finish()
    [frame] = pack.frames
    stored = data[frame.offset : frame.offset + frame.stored_bytes]
    assert pack.open_frame(frame, stored, base) == raw
    assert pack.bases_of(frame) == [(0, at) for at in range(4)]
    other = bytearray(base)
    other[5000] ^= 1
    with pytest.raises(Damaged, match="does not decompress"):
        pack.open_frame(frame, stored, other)


def test_every_flipped_byte_of_a_delta_and_of_its_base_is_found(world: World) -> None:
    first = save(world, "a", [(number, 0) for number in range(40)])
    second = save(world, "b", [(number, number % 2) for number in range(40)], first)
    manifest = world.store.read_manifest(second.ref)
    assert manifest.needs == ((), (0,))
    chance = random.Random(5)
    for ref in manifest.page_packs:
        path = next((world.store_directory / "packs").glob(f"*/{ref.key.removeprefix('packs/')}"))
        good = path.read_bytes()
        head = range(0, ref.head_bytes, 7)
        for at in [*head, *(chance.randrange(len(good)) for _ in range(60)), len(good) - 1]:
            bad = bytearray(good)
            bad[at] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(Damaged):
                world.new_store().restore_image(second.ref, world.fresh("flipped"))
            assert any(ref.key in problem for problem in world.new_store().verify(second.ref))
        path.write_bytes(good)
    assert world.restored_image(second) == contents(world.image)
    assert world.new_store().verify(second.ref) == []


def test_deltas_occur_in_what_the_collectors_tests_save() -> None:
    scene = Scene()
    try:
        for _ in range(3):
            scene.run(scene.save("a", 0))
        newest = list(scene.rows.values())[-1].saved
        assert any(scene.store(scene.real).read_manifest(newest.ref).needs)
    finally:
        scene.close()


class _BodyOfVersion2(msgspec.Struct, frozen=True, array_like=True):
    """As it was written before there were deltas."""

    parent: str | None
    pins: dict[str, str]
    page_packs: list[tuple[int, bytes]]
    object_packs: list[tuple[int, bytes]]
    files: list[PagedFile | WholeFile]
    tree_root: bytes
    tree_bytes: int


def test_snapshot_of_version_2_restores_and_is_the_parent_of_deltas(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(*, needs: object, debt: object, **others: object) -> _BodyOfVersion2:
        assert (needs, debt) == ([()], 0)
        return _BodyOfVersion2(**others)  # type: ignore[arg-type]

    with monkeypatch.context() as before:
        before.setattr(manifest, "VERSION", 2)
        before.setattr(manifest, "_Body", body)
        first = save(world, "a", [(number, 0) for number in range(600)])
    assert world.backend.get(f"manifests/{first.id}")[8:10] == b"\2\0"
    assert world.restored_image(first) == contents(world.image)
    second = save(world, "b", [(number, number % 2) for number in range(600)], first, store=world.new_store())
    assert second.stored_bytes < 300 * 4096 / 20
    assert world.restored_image(second) == contents(world.image)
