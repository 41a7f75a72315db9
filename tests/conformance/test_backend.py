"""Every `Backend` keeps these promises. One fixture parameter for each implementation."""

import errno
import itertools
import os
import random
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from tests.azurite import CONTAINER, Azurite, azurite
from tests.e2e.clients.npm import NotInstallable
from tests.seaweedfs import SeaweedFS
from tests.unit.snapshots.making import tiny_disk_at

from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit, NotFound
from torpor.snapshots.backend import Backend, LocalDirectory
from torpor.snapshots.object_store import ObjectStore
from torpor.snapshots.object_store_clients import Clients
from torpor.snapshots.probe import probe

KEY = "packs/" + "ab" * 32


def local_directory(request: pytest.FixtureRequest) -> Backend:
    return LocalDirectory(request.getfixturevalue("tmp_path") / "store")


def memory(_: pytest.FixtureRequest) -> Backend:
    store = MemoryStore()
    return ObjectStore(lambda: Clients(store, store), name="memory", clock=SystemClock(), retry_seconds=1)


def s3(request: pytest.FixtureRequest) -> Backend:
    server: SeaweedFS = request.getfixturevalue("s3_server")
    return server.backend(f"conformance/{secrets.token_hex(8)}/below")


def azure(request: pytest.FixtureRequest) -> Backend:
    server: Azurite = request.getfixturevalue("azure_server")
    return server.backend(f"{CONTAINER}/{secrets.token_hex(8)}/below")


@pytest.fixture(scope="module")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    try:
        with azurite(tmp_path_factory.mktemp("azurite")) as server:
            yield server
    except NotInstallable as error:
        pytest.skip(str(error))


IMPLEMENTATIONS = {"local directory": local_directory, "obstore in memory": memory, "SeaweedFS": s3, "Azurite": azure}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.npm if name == "Azurite" else ()) for name in IMPLEMENTATIONS]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    opened = IMPLEMENTATIONS[request.param](request)
    yield opened
    opened.close()


def test_get_returns_what_put_was_given(backend: Backend) -> None:
    assert backend.put(KEY, b"some bytes") is True
    assert backend.get(KEY) == b"some bytes"


def test_empty_object_is_an_object(backend: Backend) -> None:
    backend.put(KEY, b"")
    assert backend.exists(KEY)
    assert backend.get(KEY) == b""


def test_second_put_changes_nothing_and_says_so(backend: Backend) -> None:
    backend.put(KEY, b"first")
    assert backend.put(KEY, b"second") is False
    assert backend.get(KEY) == b"first"


def test_of_many_writers_of_one_key_one_creates_it(backend: Backend) -> None:
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda n: backend.put(KEY, b"writer %d" % n), range(32)))
    assert created.count(True) == 1
    assert backend.get(KEY) == b"writer %d" % created.index(True)


@pytest.mark.parametrize(("start", "length", "expected"), [(0, 3, b"012"), (7, 3, b"789"), (8, 9, b"89"), (12, 1, b"")])
def test_get_range_gives_that_range_or_what_there_is_of_it(
    backend: Backend, start: int, length: int, expected: bytes
) -> None:
    backend.put(KEY, b"0123456789")
    assert backend.get_range(KEY, start, length) == expected


def test_absent_tells_which_keys_do_not_exist(backend: Backend) -> None:
    backend.put(KEY, b"x")
    assert backend.absent([KEY, "packs/one", "manifests/two"]) == {"packs/one", "manifests/two"}
    assert backend.absent([]) == set()


def test_large_object_comes_back_whole(backend: Backend) -> None:
    data = random.Random(1).randbytes(20_000_000)
    backend.put(KEY, data)
    assert backend.get(KEY) == data
    assert backend.get_range(KEY, 17_000_000, 4_000_000) == data[17_000_000:]


def test_store_that_keeps_the_promise_passes_the_probe_and_holds_nothing_of_it(backend: Backend) -> None:
    backend.ready()
    probe(backend)
    assert backend.list("") == []


def test_absent_object_is_not_found(backend: Backend) -> None:
    assert not backend.exists(KEY)
    for read in (lambda: backend.get(KEY), lambda: backend.get_range(KEY, 0, 1)):
        with pytest.raises(NotFound, match=KEY) as caught:
            read()
        assert caught.value.code == "object_not_found"


def test_deleted_object_is_absent_and_deleting_again_is_fine(backend: Backend) -> None:
    backend.put(KEY, b"x")
    backend.delete(KEY)
    backend.delete(KEY)
    assert not backend.exists(KEY)


def test_list_gives_keys_with_the_prefix_in_order(backend: Backend) -> None:
    keys = ["manifests/snp_2", "manifests/snp_1", "packs/00aa", "packs/00bb", "packs/ffaa"]
    for key in keys:
        backend.put(key, b"x")
    assert backend.list("") == sorted(keys)
    assert backend.list("packs/") == ["packs/00aa", "packs/00bb", "packs/ffaa"]
    assert backend.list("packs/00") == ["packs/00aa", "packs/00bb"]
    assert backend.list("pa") == ["packs/00aa", "packs/00bb", "packs/ffaa"]
    assert backend.list("nothing/") == []


@pytest.mark.parametrize(
    "key", ["", "packs", "packs/../x", "../packs/xx", "packs/a/b", "Packs/aa", "partial/aa", "packs/"]
)
def test_malformed_keys_are_refused(backend: Backend, key: str) -> None:
    for use in (lambda: backend.put(key, b"x"), lambda: backend.get(key), lambda: backend.delete(key)):
        with pytest.raises(ValueError, match="malformed"):
            use()


class TestLocalDirectory:
    """Promises of the local directory alone."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path / "store"

    def test_only_the_owner_can_read_it(self, root: Path) -> None:
        LocalDirectory(root).put(KEY, b"memory of a process")
        for path in (root, *root.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    def test_nothing_partial_is_left_after_a_put(self, root: Path) -> None:
        LocalDirectory(root).put(KEY, b"x")
        assert list((root / "partial").iterdir()) == []

    def test_opening_removes_what_a_dead_writer_left(self, root: Path) -> None:
        LocalDirectory(root)
        (root / "partial" / "0123").write_bytes(b"half an obj")
        LocalDirectory(root)
        assert list((root / "partial").iterdir()) == []

    def test_opening_spares_what_a_live_writer_is_writing(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = LocalDirectory(root)
        backend.put("packs/other_ab", b"makes the directories")
        real_fsync = os.fsync

        def fsync_while_another_opens(descriptor: int) -> None:
            monkeypatch.setattr(os, "fsync", real_fsync)
            LocalDirectory(root)
            assert len(list((root / "partial").iterdir())) == 1
            real_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync_while_another_opens)
        backend.put(KEY, b"x")
        assert backend.get(KEY) == b"x"

    def test_object_is_synced_before_it_is_named_and_its_name_before_put_returns(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = LocalDirectory(root)
        backend.put("packs/other_ab", b"makes the directories")
        order: list[str] = []
        real_fsync, real_link = os.fsync, os.link

        def fsync(descriptor: int) -> None:
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            order.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}" if is_directory else "sync bytes")
            real_fsync(descriptor)

        def link(source: Path, target: Path) -> None:
            order.append("name it")
            real_link(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "link", link)
        backend.put(KEY, b"x")
        home = root.resolve()
        assert order == ["sync bytes", "name it", f"sync {home}/packs/ab", f"sync {home}/packs", f"sync {home}"]

    def test_full_disk_is_no_space_and_leaves_nothing(self, tiny_disk: Path) -> None:
        backend = LocalDirectory(tiny_disk / "store")
        backend.put("packs/small", b"x")
        with pytest.raises(MachineUnfit, match="packs/large") as caught:
            backend.put("packs/large", b"x" * 4_000_000)
        assert caught.value.code == "no_space"
        assert caught.value.hint
        assert backend.list("") == ["packs/small"]
        assert list((tiny_disk / "store" / "partial").iterdir()) == []
        backend.put("packs/again", b"x" * 500_000)

    def test_put_leaves_the_spare_bytes_free(self, tiny_disk: Path) -> None:
        free = shutil.disk_usage(tiny_disk).free
        backend = LocalDirectory(tiny_disk / "store", spare_bytes=free - 200_000)
        backend.put("packs/small", b"x" * 50_000)
        with pytest.raises(MachineUnfit) as caught:
            backend.put("packs/large", b"x" * 300_000)
        assert caught.value.code == "no_space"
        assert backend.list("") == ["packs/small"]

    def test_file_size_limit_is_no_space_and_leaves_nothing(self, root: Path) -> None:
        program = f"""
import resource
from pathlib import Path
from torpor.core.errors import MachineUnfit
from torpor.snapshots.backend import LocalDirectory
backend = LocalDirectory(Path({str(root)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    backend.put({KEY!r}, b"x" * 1_000_000)
except MachineUnfit as error:
    print(error.code, backend.list(""))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "no_space []\n"
        assert list((root / "partial").iterdir()) == []

    @pytest.mark.parametrize("call", ["open", "write", "fsync", "link", "mkdir"])
    def test_no_space_at_any_step_of_a_put_leaves_a_whole_object_or_none(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """Each step is refused once, at its first, second, ... pass, until a put comes through."""
        real, refused_at, outcomes = getattr(os, call), itertools.count(1), list[str]()
        while "stored" not in outcomes:
            backend, passes, refused = LocalDirectory(root), itertools.count(1), next(refused_at)

            def refuse(*arguments: object, **named: object) -> object:
                if next(passes) == refused:  # noqa: B023
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **named)

            with monkeypatch.context() as patched:
                patched.setattr(os, call, refuse)
                try:
                    backend.put(KEY, b"all of it")
                    outcomes.append("stored")
                except MachineUnfit as error:
                    outcomes.append(error.code)
            assert list((root / "partial").iterdir()) == []
            assert backend.list("") in ([], [KEY])
            if backend.exists(KEY):
                assert backend.get(KEY) == b"all of it"
            shutil.rmtree(root)
        assert set(outcomes) == {"no_space", "stored"}

    def test_read_only_directory_is_told_of_and_can_be_read(self, tiny_disk: Path, tmp_path: Path) -> None:
        LocalDirectory(tiny_disk / "store").put(KEY, b"x")
        subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
        backend = LocalDirectory(tiny_disk / "store")
        assert backend.get(KEY) == b"x"
        assert backend.list("") == [KEY]
        for use in (
            lambda: backend.put("packs/other", b"y"),
            lambda: backend.delete(KEY),
            lambda: LocalDirectory(tiny_disk / "another store"),
        ):
            with pytest.raises(MachineUnfit, match="Read-only file system") as caught:
                use()
            assert caught.value.code == "storage_failed"
            assert "read-only" in caught.value.hint
        assert backend.get(KEY) == b"x"

    def test_other_refusals_of_the_system_are_storage_failed(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = LocalDirectory(root)

        def fsync(_: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(MachineUnfit, match="Input/output error") as caught:
            backend.put(KEY, b"x")
        assert caught.value.code == "storage_failed"
        assert not backend.exists(KEY)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with tiny_disk_at(tmp_path / "tiny") as disk:
        yield disk
