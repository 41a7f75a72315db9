"""Big files in chunks: what moved is found again, what is sparse stays so, whatever is cut comes back."""

import os
import random
from collections.abc import Iterable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.snapshots.making import IDS, World, settled

from torpor.core.errors import Damaged
from torpor.snapshots.chunks import CELL_BYTES, holds_content, store_file, write_content
from torpor.snapshots.objects import CHUNK_BYTES_MAX, Content, chunks_of, store_content
from torpor.snapshots.tree import FileNode


class Kept:
    """Objects in memory."""

    def __init__(self) -> None:
        self.objects: dict[bytes, bytes] = {}

    def put(self, data: bytes) -> bytes:
        digest = IDS.of_object(data)
        self.objects[digest] = data
        return digest

    def get(self, digest: bytes) -> bytes:
        return self.objects[digest]

    def ahead(self, digests: Iterable[bytes]) -> None:
        pass

    def digest_of(self, data: bytes) -> bytes:
        return IDS.of_object(data)


def stored(path: Path, kept: Kept) -> Content:
    with path.open("rb", buffering=0) as file:
        return store_file(file.fileno(), path.stat().st_size, kept.put)


def cuts(path: Path) -> list[tuple[int, int]]:
    kept = Kept()
    content = stored(path, kept)
    return [(chunk.offset, chunk.length) for chunk in chunks_of(content.encoded, path.stat().st_size, kept)]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("at", [0, 20_000_000])
def test_bytes_put_into_a_50_mb_file_do_not_store_it_all_again(world: World, at: int) -> None:
    body = noise(50_000_000)
    (world.workspace / "big").write_bytes(body)
    first = world.save("a")
    (world.workspace / "big").write_bytes(body[:at] + b"a line more\n" + body[at:])
    second = world.save("b", first, index=settled(first.tree))
    assert second.stored_bytes < 400_000
    assert (world.restored_workspace(second) / "big").read_bytes() == (world.workspace / "big").read_bytes()


def test_moved_and_copied_bytes_are_stored_once(tmp_path: Path) -> None:
    one, other, kept = tmp_path / "one", tmp_path / "other", Kept()
    one.write_bytes(noise(2_000_000))
    stored(one, kept)
    before = sum(map(len, kept.objects.values()))
    other.write_bytes(noise(777, 2) + noise(2_000_000) + noise(2_000_000))
    stored(other, kept)
    assert sum(map(len, kept.objects.values())) - before < 3 * CHUNK_BYTES_MAX


def test_cuts_of_a_known_file_are_where_they_were(tmp_path: Path) -> None:
    """Nothing breaks when they move, but all that sessions have in common with their past is stored once more."""
    path = tmp_path / "known"
    path.write_bytes(noise(3_000_000))
    found = cuts(path)
    assert all(length <= CHUNK_BYTES_MAX for _, length in found)
    assert found[:3] == [(0, KNOWN[0]), (KNOWN[0], KNOWN[1]), (KNOWN[0] + KNOWN[1], KNOWN[2])]
    assert sha256(repr(found).encode()).hexdigest() == KNOWN_CUTS


KNOWN = (74185, 106069, 24113)
KNOWN_CUTS = "70c53548a17003e46f9f796437c498e4b13641bbde7e08128bc59f4671b49f6c"


def test_cuts_do_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(5_000_000))
    whole = cuts(path)
    monkeypatch.setattr("torpor.snapshots.chunks._READ_BYTES", 3 * CELL_BYTES)
    assert cuts(path) == whole


def test_up_to_256_kib_a_file_is_one_object(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(CHUNK_BYTES_MAX))
    assert cuts(path) == [(0, CHUNK_BYTES_MAX)]
    path.write_bytes(noise(CHUNK_BYTES_MAX + 1))
    assert len(cuts(path)) > 1


PIECES = st.lists(
    st.tuples(st.integers(0, 300_000), st.sampled_from(["noise", "zeros", "hole", "text", "dust"])),
    min_size=1,
    max_size=8,
)


def make(path: Path, pieces: list[tuple[int, str]], *, written: bool) -> bytes:
    """A file of such pieces, as bytes too; `written`: its holes are zeros on the disk."""
    body, at = b"", 0
    with path.open("wb") as file:
        for size, kind in pieces:
            piece = {
                "noise": noise(size, size),
                "text": (b"the same line again and again\n" * (size // 30 + 1))[:size],
                "dust": (bytes(9_000) + b"." + bytes(30_000)) * (size // 39_001),
            }.get(kind, bytes(size))
            body += piece
            if kind != "hole" or written:
                os.pwrite(file.fileno(), piece, at)
            at += len(piece)
        file.truncate(at)
    return body


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PIECES, PIECES)
def test_any_file_comes_back_and_holes_of_4_kib_are_holes(tmp_path_factory: pytest.TempPathFactory, one, other) -> None:
    where, kept = tmp_path_factory.mktemp("files"), Kept()
    body = make(where / "sparse", one, written=False)
    assert make(where / "written", one, written=True) == body
    content = stored(where / "sparse", kept)
    assert content == stored(where / "written", kept)
    found = list(chunks_of(content.encoded, len(body), kept))
    assert all(before.offset + before.length <= after.offset for before, after in pairwise(found))
    with (where / "back").open("xb", buffering=0) as file:
        write_content(file.fileno(), content.encoded, len(body), kept)
    assert (where / "back").read_bytes() == body
    not_zero = sum(body[at : at + 4096] != bytes(4096) for at in range(0, len(body), 4096))
    assert (where / "back").stat().st_blocks * 512 <= not_zero * 4096
    for name in ("back", "sparse", "written"):
        with (where / name).open("rb") as file:
            assert holds_content(file.fileno(), content.encoded, len(body), kept)
    changed = make(where / "changed", other, written=False)
    if len(changed) == len(body):
        with (where / "changed").open("rb") as file:
            assert holds_content(file.fileno(), content.encoded, len(body), kept) == (changed == body)


@pytest.mark.parametrize("at", [0, 150_000, 399_999, 400_000, 700_000, 850_000, 999_999])
def test_one_other_byte_is_other_content_also_where_zeros_were(tmp_path: Path, at: int) -> None:
    path, kept = tmp_path / "file", Kept()
    path.write_bytes(noise(400_000) + bytes(400_000) + noise(100_000) + bytes(100_000))
    content = stored(path, kept)
    with path.open("r+b") as file:
        assert holds_content(file.fileno(), content.encoded, 1_000_000, kept)
        before = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([before[0] ^ 1]), at)
        assert not holds_content(file.fileno(), content.encoded, 1_000_000, kept)


class TestDamaged:
    """Lists that nobody wrote, but whose ids are right."""

    def content(self, kept: Kept, *chunks: tuple[int, bytes]) -> bytes:
        return store_content(iter(chunks), CHUNK_BYTES_MAX + 1, kept.put).encoded

    @pytest.mark.parametrize(
        "chunks", [[(5, b"xx"), (6, b"y")], [(9, b"x"), (2, b"y")], [(CHUNK_BYTES_MAX, b"xx")]], ids=str
    )
    def test_chunks_that_overlap_or_leave_the_file_are_refused(self, chunks: list[tuple[int, bytes]]) -> None:
        kept = Kept()
        with pytest.raises(Damaged, match="do not fit"):
            list(chunks_of(self.content(kept, *chunks), CHUNK_BYTES_MAX + 1, kept))

    def test_list_that_is_cut_short_is_refused(self) -> None:
        kept = Kept()
        encoded = b"\x02" + kept.put(bytes(43))
        with pytest.raises(Damaged, match="cut short"):
            list(chunks_of(encoded, CHUNK_BYTES_MAX + 1, kept))

    def test_object_of_another_length_is_refused(self, tmp_path: Path) -> None:
        kept = Kept()
        with (tmp_path / "file").open("xb") as file, pytest.raises(Damaged, match="not 9"):
            write_content(file.fileno(), b"\x01" + kept.put(b"four"), 9, kept)

    def test_one_object_for_a_terabyte_is_refused(self) -> None:
        with pytest.raises(Damaged, match="cannot hold"):
            list(chunks_of(b"\x01" + bytes(32), 1 << 40, Kept()))


def test_verify_finds_a_chunk_of_a_big_file_that_is_gone(world: World) -> None:
    (world.workspace / "big").write_bytes(noise(20_000_000))
    saved = world.save("a")
    node = saved.tree.root.children[b"big"]
    assert isinstance(node, FileNode)
    assert len(node.content.chunks) > 100
    assert world.store.verify(saved.ref) == []
    biggest = max(world.object_paths(), key=lambda path: path.stat().st_size)
    biggest.unlink()
    assert world.store.verify(saved.ref) != []
