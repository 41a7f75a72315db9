"""A copy out of a sandbox writes nothing outside of its place, whatever the sandbox says."""

import os
import struct
from pathlib import Path

import pytest

from torpor.core.errors import Conflict, SandboxFailed
from torpor.runtime.copying import Copied, Incoming, outgoing, place_of
from torpor.sandbox.workers import Record, RecordReader


def entry(kind: bytes, path: bytes, target: bytes = b"", mode: int = 0o644) -> Record:
    return Record(kind=kind, payload=struct.pack("<IqQ", mode, 10**18, 0) + path + b"\0" + target)


TOP = entry(b"D", b"")
END = Record(kind=b"Z")


def content(data: bytes) -> Record:
    return Record(kind=b"B", payload=data)


def take(place: Path, *records: Record) -> Copied:
    with Incoming(place) as incoming:
        for record in records:
            incoming.take(record)
        return incoming.finish()


def test_what_goes_out_comes_in_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/file").write_bytes(bytes(100_000))
    (source / "deep/run").write_text("#!/bin/sh\n")
    (source / "deep/run").chmod(0o755)
    (source / "link").symlink_to("deep/run")
    os.mkfifo(source / "fifo")
    copied, reader = Copied(), RecordReader()
    records = [record for data in outgoing(source, copied) for record in reader.feed(data)]
    taken = take(tmp_path / "target", *records)
    assert (taken.files, taken.data_bytes) == (copied.files, copied.data_bytes) == (2, 100_010)
    assert [path for path, _ in copied.left_out] == ["fifo"]
    assert (tmp_path / "target/deep/er/file").read_bytes() == bytes(100_000)
    assert (tmp_path / "target/deep/run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "target/link").readlink() == Path("deep/run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    "path", [b"..", b"../x", b"a/../../x", b"/etc/x", b"a//x", b"./x", b"a/.", b"x/", b"nowhere/x"]
)
def test_a_path_that_leads_out_is_refused(tmp_path: Path, path: bytes) -> None:
    with pytest.raises(SandboxFailed):
        take(tmp_path / "target", TOP, entry(b"D", b"a"), entry(b"A", path), END)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    for link, below in ((b"../outside", b"l/new"), (b"d", b"l/new"), (b".", b"l/new")):
        with pytest.raises(SandboxFailed):
            take(tmp_path / "target", TOP, entry(b"D", b"d"), entry(b"L", b"l", link), entry(b"A", below), END)
    with pytest.raises(SandboxFailed):
        take(tmp_path / "target", TOP, entry(b"L", b"l", b"x"), entry(b"A", b"l"), END)
    assert sorted(path.name for path in outside.iterdir()) == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]


def test_links_out_of_the_copy_and_special_bits_are_left_out(tmp_path: Path) -> None:
    links = [entry(b"L", b"a", b"/etc/passwd"), entry(b"L", b"b", b"../x"), entry(b"L", b"c", b"d/../../x")]
    copied = take(tmp_path / "target", TOP, *links, entry(b"A", b"f", mode=0o6755), END)
    assert [path for path, _ in copied.left_out] == ["a", "b", "c"]
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["f"]
    assert (tmp_path / "target/f").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "records",
    [
        [content(b"x")],
        [END],
        [entry(b"L", b"", b"x")],
        [entry(b"A", b"x"), END],
        [TOP, TOP],
        [TOP, entry(b"A", b"x"), entry(b"A", b"y")],
        [TOP, entry(b"A", b"x")],
        [entry(b"A", b""), END, entry(b"A", b"x")],
        [Record(kind=b"D", payload=b"short")],
        [],
    ],
)
def test_records_out_of_order_are_refused_and_leave_nothing(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(SandboxFailed):
        take(tmp_path / "target", *records)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_and_a_directory_never(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    for name in ("file", "link"):
        place = place_of(tmp_path / name, "x")
        with pytest.raises(SandboxFailed):
            take(place, entry(b"A", b""), content(b"half"))
        assert place.read_text() in {"old", "mine"}
        take(place, entry(b"A", b""), content(b"new"), END)
        assert place.read_text() == "new"
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / "directory/x").mkdir(parents=True)
    with pytest.raises(Conflict, match="there is something already"):
        place_of(tmp_path / "directory", "x")
    (tmp_path / "directory/x/y").touch()
    with pytest.raises(Conflict):
        take(tmp_path / "directory/x", TOP)
    assert (tmp_path / "directory/x/y").exists()
