"""The snapshot file's bytes: what was written comes back, and nothing else is believed."""

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torpor.core.errors import InvalidInput
from torpor.snapshots import snapshot_file
from torpor.snapshots.snapshot_file import FileWriter, Record, read_records, split_object

SECRET = b"a passphrase"
CONTENTS = [
    (Record.HEAD, b'{"format": "x"}'),
    (Record.PROGRAM, b"\x7fELF"),
    (Record.LINES, b""),
    (Record.LINES, b"{}\n"),
]


@pytest.fixture(autouse=True)
def quick_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 MB of memory for each key are for those who guess."""
    monkeypatch.setattr(snapshot_file, "_SCRYPT_N", 16)


def written(path: Path, passphrase: bytes | None) -> bytes:
    writer = FileWriter(path, passphrase)
    for kind, content in CONTENTS:
        writer.add(kind, content)
    writer.add_object("packs/ab", b"bytes of a pack")
    assert not path.exists()
    writer.finish()
    writer.abandon()
    return path.read_bytes()


def read(data: bytes, passphrase: bytes | None) -> list[tuple[Record, bytes]]:
    return list(read_records(io.BytesIO(data), passphrase))


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_what_was_written_comes_back(tmp_path: Path, passphrase: bytes | None) -> None:
    found = read(written(tmp_path / "file", passphrase), passphrase)
    assert found[:-1] == CONTENTS
    assert split_object(found[-1][1]) == ("packs/ab", b"bytes of a pack")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("passphrase", [None, SECRET])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, passphrase: bytes | None) -> None:
    data = written(tmp_path / "file", passphrase)
    for at in range(len(data)):
        with pytest.raises(InvalidInput):
            read(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], passphrase)
        with pytest.raises(InvalidInput):
            read(data[:at], passphrase)
    with pytest.raises(InvalidInput):
        read(data + b"\0", passphrase)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([None, SECRET]))
def test_bytes_that_nobody_wrote_are_refused_in_order(data: bytes, passphrase: bytes | None) -> None:
    for begun in (data, b"TORPORSF\x01\x00\x00\x00" + bytes(16) + data):
        with pytest.raises(InvalidInput):
            read(begun, passphrase)


def test_sealed_file_tells_nothing_and_says_what_it_wants(tmp_path: Path) -> None:
    data = written(tmp_path / "file", SECRET)
    assert not any(content in data for _, content in CONTENTS if len(content) > 3)
    with pytest.raises(InvalidInput) as refused:
        read(data, None)
    assert refused.value.code == "passphrase_needed"
    with pytest.raises(InvalidInput) as refused:
        read(data, b"another one")
    assert refused.value.code == "passphrase_wrong"


def test_two_records_of_a_sealed_file_that_changed_places_are_refused(tmp_path: Path) -> None:
    writer = FileWriter(tmp_path / "file", SECRET)
    writer.add(Record.LINES, b"one")
    writer.add(Record.LINES, b"two")
    writer.finish()
    data = (tmp_path / "file").read_bytes()
    head, size = 28, 5 + 3 + 16
    moved = data[:head] + data[head + size : head + 2 * size] + data[head : head + size] + data[head + 2 * size :]
    with pytest.raises(InvalidInput):
        read(moved, SECRET)


def test_writer_that_gives_up_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"older")
    writer = FileWriter(tmp_path / "file", None)
    writer.add(Record.LINES, b"one")
    writer.abandon()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"older"}
