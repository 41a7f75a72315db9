"""What is stored is sealed: what it takes to read it, what it tells without a key, and that no other byte passes."""

import random
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.making import IDS, KEY, World, contents, page, pages

from torpor.core.errors import Damaged
from torpor.core.ids import SnapshotId
from torpor.snapshots.cipher import NotAuthentic, key_of, new_key, unwrap, wrap
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.manifest import SnapshotRef, decode_head, encode_manifest, load_head
from torpor.snapshots.store import SavedSnapshot

OTHER_KEY = key_of(b"the key of another test's session")
SAID = b"a sentence that the agent has in its memory, in its workspace, and in the names of files"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def small_snapshot(world: World) -> SavedSnapshot:
    """Two packs of pages, two of objects and a manifest, of a few hundred bytes each."""
    world.write_image(SAID.ljust(4096, b".") + b"\1" * 8192, checkpoint=SAID)
    (world.workspace / "directory").mkdir()
    (world.workspace / "directory" / SAID.decode()[:60]).write_bytes(SAID)
    parent = world.save("a")
    world.write_image(SAID.ljust(4096, b".") + b"\2" * 4096, checkpoint=SAID)
    (world.workspace / "other").write_bytes(SAID * 2)
    return world.save("b", parent)


def stored_objects(world: World, saved: SavedSnapshot) -> dict[Path, bytes]:
    """What the snapshot needs, by file."""
    needed = [f"manifests/{saved.id}", *world.store.pack_names(saved.id, saved.manifest_digest)]
    paths = [path for path in world.object_paths() if f"{path.parent.parent.name}/{path.name}" in needed]
    assert len(paths) == len(needed) == 5
    return {path: path.read_bytes() for path in paths}


def restore(world: World, saved: SavedSnapshot) -> None:
    store = world.new_store()
    store.restore_image(saved.ref, world.fresh("image"))
    store.restore_workspace(saved.ref, world.fresh("workspace"))


def test_every_flipped_bit_of_every_object_is_found_and_the_object_is_named(world: World) -> None:
    saved = small_snapshot(world)
    chance, flips = random.Random(1), 0
    for path, good in stored_objects(world, saved).items():
        for at in range(len(good)):
            bad = bytearray(good)
            bad[at] ^= 1 << chance.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(Damaged, match=path.name):
                restore(world, saved)
            problems = world.new_store().verify(saved.ref)
            assert len(problems) == 1
            assert path.name in problems[0]
            flips += 1
        path.write_bytes(good)
    assert flips > 1000
    restore(world, saved)


Told = tuple[World, SavedSnapshot, dict[Path, bytes]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    world = World(tmp_path_factory.mktemp("any"))
    saved = small_snapshot(world)
    return world, saved, stored_objects(world, saved)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_that_were_not_written_never_reach_a_restore(told: Told, data: st.DataObject) -> None:
    """Written over, cut, lengthened, or another object of the store."""
    world, saved, objects = told
    path = data.draw(st.sampled_from(sorted(objects)))
    good = objects[path]
    others = st.sampled_from([other for other in objects.values() if other != good])
    at = data.draw(st.integers(0, len(good)))
    written = data.draw(st.binary(min_size=1, max_size=40))
    changes = st.one_of(
        others,
        st.just(good[:at]),
        st.just(good[:at] + written + good[at + len(written) :]),
        st.just(good[:at] + written + good[at:]),
        others.map(lambda other: good[:at] + other[at:]),
    )
    bad = data.draw(changes.filter(lambda changed: changed != good))
    path.write_bytes(bad)
    try:
        if path.parent.parent.name == "packs" and bad.startswith(good):
            # What lies behind a pack's end is never read by a restore.
            assert world.new_store().verify(saved.ref) != []
        else:
            with pytest.raises(Damaged):
                restore(world, saved)
    finally:
        path.write_bytes(good)


def test_nothing_of_what_was_saved_is_in_the_store(world: World) -> None:
    """Neither as it is, nor in what can be decompressed, nor by its digest."""
    world.write_image(SAID.ljust(4096, b".") * 300)
    (world.workspace / SAID.decode()[:60]).write_bytes(SAID * 1000)
    saved = world.save("a", pins={"said": SAID.decode()})
    for path in world.object_paths():
        data = path.read_bytes()
        assert SAID[:12] not in data
        assert zstandard.FRAME_HEADER not in data
        assert KEY.secret not in data
    assert contents(world.restored_workspace(saved))[SAID.decode()[:60]] == SAID * 1000


def test_content_ids_of_two_tenants_have_nothing_in_common(world: World) -> None:
    other = ContentIds(b"the secret of a tenant next door")
    assert IDS.of_page(page(1)) == ContentIds(b"the secret of the tests' tenant..").of_page(page(1))
    assert IDS.of_page(page(1)) != other.of_page(page(1))
    assert IDS.of_object(b"x") != other.of_object(b"x")
    assert len({IDS.of_page(page(number)) for number in range(50)}) == 50


def test_page_is_found_again_alone_and_among_others() -> None:
    three = IDS.of_pages(memoryview(pages([1, 2, 3])))
    assert three == [IDS.of_page(page(number)) for number in (1, 2, 3)]


def test_wrong_key_is_told_by_the_keys_ids(world: World) -> None:
    saved = small_snapshot(world)
    wrong = replace(saved.ref, key=OTHER_KEY)
    for read in (world.store.read_manifest, world.new_store().read_manifest):
        with pytest.raises(Damaged, match=f"sealed with {KEY.id}, not with {OTHER_KEY.id}") as caught:
            read(wrong)
        assert caught.value.code == "snapshot_key_wrong"
        assert caught.value.hint
    assert world.new_store().verify(wrong)[0].startswith("cannot read manifests/snp_b")
    assert not (world.root / "x").exists()
    with pytest.raises(Damaged):
        world.store.restore_image(wrong, world.root / "x")
    assert not (world.root / "x").exists()


def test_key_that_only_claims_the_right_id_opens_nothing(world: World) -> None:
    saved = small_snapshot(world)
    with pytest.raises(Damaged, match="not what its key sealed") as caught:
        world.store.read_manifest(replace(saved.ref, key=replace(OTHER_KEY, id=KEY.id)))
    assert caught.value.code == "snapshot_damaged"


def test_a_parent_of_another_session_costs_sharing_unless_its_key_is_there(world: World) -> None:
    world.write_image(pages(range(20)))
    first = world.save("a", key=OTHER_KEY)
    apart = world.save("b", replace(first, ref=replace(first.ref, key=KEY)))
    assert apart.new_pages == 20
    assert OTHER_KEY.id in apart.parent_problem
    shared = world.save("c", first)
    assert shared.new_pages == 0
    assert world.store.verify(shared.ref) == []
    with pytest.raises(Damaged):
        world.store.read_manifest(replace(shared.ref, key=OTHER_KEY))


def test_head_of_a_manifest_names_the_packs_to_who_has_no_key(world: World) -> None:
    saved = small_snapshot(world)
    named = world.store.pack_names(saved.id, saved.manifest_digest)
    assert set(named) <= set(world.backend.list("packs/"))
    assert named == tuple(ref.key for ref in world.store.read_manifest(saved.ref).packs)
    head = load_head(world.backend, saved.id, None)
    assert head.key_id == KEY.id
    with pytest.raises(Damaged, match="not what was written"):
        world.store.pack_names(saved.id, "00" * 32)


def test_head_is_sealed_with_the_body_whatever_digest_somebody_commits(world: World) -> None:
    saved = small_snapshot(world)
    (path,) = (path for path in world.object_paths() if path.name == "snp_b")
    good = path.read_bytes()
    assert world.store.read_manifest(saved.ref).snapshot_id == saved.id
    for at in range(20, load_head(world.backend, saved.id, None).size):
        bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        path.write_bytes(bad)
        with pytest.raises(Damaged):
            world.store.read_manifest(replace(saved.ref, manifest_digest=sha256(bad).hexdigest()))


def test_head_that_is_cut_or_of_another_snapshot_is_damaged(world: World) -> None:
    saved = small_snapshot(world)
    data = world.backend.get("manifests/snp_b")
    size = load_head(world.backend, saved.id, None).size
    for length in (0, 7, 39, 44, size - 1):
        with pytest.raises(Damaged, match="snp_b"):
            decode_head(saved.id, data[:length])
    with pytest.raises(Damaged, match="it is the manifest of snp_b"):
        decode_head(SnapshotId("snp_c"), data)


@pytest.mark.parametrize(
    ("data", "version"),
    [(zstandard.ZstdCompressor().compress(b"\x99\x01\xa5snp_1"), 1), (b"TORPORMF\x07\0" + bytes(60), 7)],
)
def test_manifest_of_another_version_is_refused_by_its_number(world: World, data: bytes, version: int) -> None:
    world.backend.put("manifests/snp_1", data)
    ref = SnapshotRef(id=SnapshotId("snp_1"), manifest_digest="00" * 32, key=KEY)
    with pytest.raises(Damaged, match=f"has version {version} of the format") as caught:
        world.store.read_manifest(ref)
    assert caught.value.code == "snapshot_version_unknown"


def test_the_same_manifest_is_sealed_differently_each_time(world: World) -> None:
    saved = small_snapshot(world)
    manifest = world.store.read_manifest(saved.ref)
    one, other = encode_manifest(manifest, KEY), encode_manifest(manifest, KEY)
    assert len(one) == len(other)
    size = decode_head(saved.id, one).size
    assert one[size:] != other[size:]


class TestWrapping:
    def test_wrapped_key_comes_back_with_its_id(self) -> None:
        master, key = new_key(), new_key()
        assert unwrap(master, wrap(master, key, "session a"), "session a") == key

    def test_wrapped_key_opens_for_nobody_else_and_not_after_a_change(self) -> None:
        master, key = new_key(), new_key()
        wrapped = wrap(master, key, "session a")
        for at in range(len(wrapped)):
            bad = bytearray(wrapped)
            bad[at] ^= 4
            with pytest.raises(NotAuthentic):
                unwrap(master, bytes(bad), "session a")
        for wrong in ((new_key(), wrapped, "session a"), (master, wrapped, "session b"), (master, b"", "session a")):
            with pytest.raises(NotAuthentic):
                unwrap(*wrong)

    def test_keys_do_not_show_themselves(self) -> None:
        key = new_key()
        assert re.fullmatch(r"Key\(id='key_[0-9a-f]{16}'\)", repr(key))
        assert key.secret[:8].hex() not in key.id
