"""An object store behind a network that fails: a clear error or success after all, never half an object, none lost.

The server is real (SeaweedFS), and so are the failures: tests/fault_proxy.py stands between.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import obstore
import pytest
from tests.fault_proxy import Fault, FaultProxy, Rule
from tests.seaweedfs import KEY, KEY_ID, OPEN_BUCKET, SeaweedFS
from tests.unit.snapshots.making import IDS, World, pages

from torpor.config import Secret, StoreSettings
from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit, NotFound, TorporError
from torpor.snapshots import object_store
from torpor.snapshots.backend import Backend, open_backend
from torpor.snapshots.store import SnapshotStore

T = TypeVar("T")
NAME = "packs/" + "ab" * 32
OTHER = "packs/" + "cd" * 32
DATA = os.urandom(300_000)
PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture
def path() -> str:
    """A bucket and prefix that no other test uses."""
    return f"faults/{secrets.token_hex(8)}"


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as made:
        yield made


@pytest.fixture
def backend(s3_server: SeaweedFS, proxy: FaultProxy, path: str) -> Iterator[Backend]:
    """The store through the proxy, which it has already shown its promise through."""
    opened = s3_server.backend(path, endpoint=proxy.endpoint)
    opened.ready()
    proxy.requests.clear()
    yield opened
    opened.close()


@pytest.fixture
def impatient(s3_server: SeaweedFS, proxy: FaultProxy, path: str) -> Iterator[Backend]:
    """The same with half a second for an answer and one and a half for all tries."""
    opened = s3_server.backend(path, endpoint=proxy.endpoint, request_seconds=0.5, retry_seconds=1.5)
    opened.ready()
    yield opened
    opened.close()


@pytest.fixture
def direct(s3_server: SeaweedFS, path: str) -> Backend:
    """The same store with nothing in between: what is really there."""
    return s3_server.backend(path)


def failure(work: Callable[[], object]) -> TorporError:
    with pytest.raises(TorporError) as caught:
        work()
    return caught.value


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set as soon as a request has failed for now."""
    failed = threading.Event()
    real = object_store._pause_seconds

    def pause_seconds(number: int) -> float:
        failed.set()
        return real(number)

    monkeypatch.setattr(object_store, "_pause_seconds", pause_seconds)
    return failed


def in_the_background(work: Callable[[], T]) -> "Future[T]":
    pool = ThreadPoolExecutor(1)
    started = pool.submit(work)
    pool.shutdown(wait=False)
    return started


class TestPut:
    """What is written is there whole, once, or not at all."""

    @pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.RESET, Fault.TEAR_UPLOAD, Fault.LOSE_ANSWER, Fault.SLOW])
    def test_succeeds_after_faults_and_knows_that_the_object_is_its_own(
        self, backend: Backend, direct: Backend, proxy: FaultProxy, fault: Fault
    ) -> None:
        proxy.strike(Rule(fault=fault, method="PUT", times=2))
        assert backend.put(NAME, DATA) is True
        assert direct.get(NAME) == DATA
        assert backend.put(NAME, b"other bytes") is False
        assert direct.get(NAME) == DATA

    def test_never_takes_the_object_of_another_for_its_own(
        self, backend: Backend, direct: Backend, proxy: FaultProxy
    ) -> None:
        direct.put(NAME, b"theirs")
        proxy.strike(Rule(fault=Fault.LOSE_ANSWER, method="PUT", times=1))
        assert backend.put(NAME, b"ours") is False
        assert direct.get(NAME) == b"theirs"

    def test_conflict_with_a_writer_that_then_fails_is_not_an_object_that_exists(
        self, backend: Backend, direct: Backend, proxy: FaultProxy
    ) -> None:
        proxy.strike(Rule(fault=Fault.REFUSE, method="PUT", status=409, times=1))
        assert backend.put(NAME, DATA) is True
        assert direct.get(NAME) == DATA

    @pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.RESET, Fault.TEAR_UPLOAD, Fault.SILENT])
    def test_that_fails_for_too_long_says_so_and_leaves_nothing(
        self, impatient: Backend, direct: Backend, proxy: FaultProxy, fault: Fault
    ) -> None:
        proxy.strike(Rule(fault=fault, method="PUT"))
        error = failure(lambda: impatient.put(NAME, DATA))
        assert isinstance(error, MachineUnfit)
        assert error.code == "storage_unreachable"
        assert NAME in str(error)
        assert impatient.name in str(error)
        assert error.hint
        assert not direct.exists(NAME)
        assert direct.list("") == []
        proxy.heal()
        assert impatient.put(NAME, DATA) is True

    def test_into_a_full_store_is_no_space(self, backend: Backend, proxy: FaultProxy) -> None:
        proxy.strike(Rule(fault=Fault.REFUSE, method="PUT", status=507))
        error = failure(lambda: backend.put(NAME, DATA))
        assert (error.code, len(proxy.requests)) == ("no_space", 1)


class TestRead:
    @pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.RESET, Fault.LOSE_ANSWER, Fault.TEAR_ANSWER, Fault.SLOW])
    def test_succeeds_after_faults(self, backend: Backend, direct: Backend, proxy: FaultProxy, fault: Fault) -> None:
        direct.put(NAME, DATA)
        for read, expected in (
            (lambda: backend.get(NAME), DATA),
            (lambda: backend.get_range(NAME, 1000, 200_000), DATA[1000:201_000]),
            (lambda: backend.exists(NAME), True),
            (lambda: backend.list("packs/"), [NAME]),
            (lambda: backend.absent([NAME, OTHER]), {OTHER}),
        ):
            proxy.heal()
            proxy.strike(Rule(fault=fault, times=2))
            assert read() == expected

    def test_that_gets_no_answer_is_asked_again(self, impatient: Backend, direct: Backend, proxy: FaultProxy) -> None:
        direct.put(NAME, DATA)
        proxy.strike(Rule(fault=Fault.SILENT, method="GET", times=1))
        assert impatient.get_range(NAME, 0, 10) == DATA[:10]

    @pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.RESET, Fault.TEAR_ANSWER, Fault.SILENT])
    def test_that_fails_for_too_long_is_unreachable_not_missing(
        self, impatient: Backend, direct: Backend, proxy: FaultProxy, fault: Fault
    ) -> None:
        direct.put(NAME, DATA)
        proxy.strike(Rule(fault=fault))
        for read in (lambda: impatient.get(NAME), lambda: impatient.get_range(NAME, 0, 100_000)):
            assert failure(read).code == "storage_unreachable"
        if fault is not Fault.TEAR_ANSWER:
            assert failure(lambda: impatient.exists(NAME)).code == "storage_unreachable"

    def test_reads_of_several_threads_go_on_at_the_same_time(
        self, backend: Backend, direct: Backend, proxy: FaultProxy
    ) -> None:
        direct.put(NAME, DATA)
        proxy.strike(Rule(fault=Fault.MEET, method="GET", meet=8, times=8))
        with ThreadPoolExecutor(8) as threads:
            pieces = threads.map(lambda start: backend.get_range(NAME, start, 1000), range(0, 32_000, 1000))
        assert b"".join(pieces) == DATA[:32_000]

    def test_packs_are_looked_for_at_the_same_time(self, backend: Backend, proxy: FaultProxy) -> None:
        proxy.strike(Rule(fault=Fault.MEET, method="HEAD", meet=object_store.THREADS, times=object_store.THREADS))
        names = {f"packs/{number:064x}" for number in range(20)}
        assert backend.absent(names) == names


class TestDown:
    """The server is not there at all."""

    def test_put_waits_until_it_is_back(
        self, backend: Backend, direct: Backend, proxy: FaultProxy, pauses: threading.Event
    ) -> None:
        proxy.down()
        put = in_the_background(lambda: backend.put(NAME, DATA))
        assert pauses.wait(PATIENCE_SECONDS)
        proxy.up()
        assert put.result(PATIENCE_SECONDS) is True
        assert direct.get(NAME) == DATA

    def test_for_longer_is_told_and_what_was_stored_is_there_afterwards(
        self, impatient: Backend, proxy: FaultProxy
    ) -> None:
        impatient.put(NAME, DATA)
        proxy.down()
        for use in (lambda: impatient.get(NAME), lambda: impatient.put(OTHER, DATA), lambda: impatient.list("")):
            error = failure(use)
            assert error.code == "storage_unreachable"
            assert "refused the connection" in str(error)
        proxy.up()
        assert impatient.get(NAME) == DATA
        assert impatient.list("") == [NAME]

    @pytest.mark.timeout(300)
    def test_kill_of_the_server_loses_nothing_that_put_returned_for(
        self, s3_server: SeaweedFS, path: str, pauses: threading.Event
    ) -> None:
        backend = s3_server.backend(path, retry_seconds=120)
        backend.put(NAME, DATA)
        s3_server.kill()
        try:
            put = in_the_background(lambda: backend.put(OTHER, DATA))
            assert pauses.wait(PATIENCE_SECONDS)
        finally:
            s3_server.start()
        assert put.result(120) is True
        assert [backend.get(name) for name in (NAME, OTHER)] == [DATA, DATA]

    def test_closing_ends_the_wait(
        self, s3_server: SeaweedFS, path: str, proxy: FaultProxy, pauses: threading.Event
    ) -> None:
        backend = s3_server.backend(path, endpoint=proxy.endpoint, retry_seconds=3600)
        proxy.down()
        put = in_the_background(lambda: backend.put(NAME, DATA))
        assert pauses.wait(PATIENCE_SECONDS)
        backend.close()
        error = put.exception(PATIENCE_SECONDS)
        assert isinstance(error, MachineUnfit)
        assert error.code == "storage_unreachable"


def test_what_others_keep_in_the_bucket_is_not_listed(s3_server: SeaweedFS) -> None:
    bucket = f"shared-{secrets.token_hex(6)}"
    backend = s3_server.backend(bucket)
    backend.put(NAME, DATA)
    for path in ("README", "photos/A Cat.jpg", "packs/deeper/one", "packs/UPPER"):
        obstore.put(backend._clients().writes, path, b"theirs")
    assert backend.list("") == [NAME]
    assert backend.list("packs/") == [NAME]


def test_listing_that_comes_late_decides_nothing(backend: Backend, proxy: FaultProxy) -> None:
    backend.put(NAME, DATA)
    assert backend.list("packs/") == [NAME]
    proxy.strike(Rule(fault=Fault.STALE, method="GET", contains="list-type=2"))
    backend.put(OTHER, DATA)
    backend.delete(NAME)
    assert backend.list("packs/") == [NAME]
    assert (backend.exists(NAME), backend.exists(OTHER)) == (False, True)
    assert backend.absent([NAME, OTHER]) == {NAME}
    assert backend.get(OTHER) == DATA
    assert backend.put(OTHER, b"again") is False
    with pytest.raises(NotFound):
        backend.get(NAME)


class TestRefusals:
    """What no repetition mends is said at once."""

    def test_wrong_key_is_told_without_showing_it(self, s3_server: SeaweedFS, proxy: FaultProxy, path: str) -> None:
        settings = s3_server.settings(path, endpoint=proxy.endpoint)
        backend = open_backend(settings, lambda: Secret("not-the-secret"), clock=SystemClock())
        for use in (backend.ready, lambda: backend.get(NAME), lambda: backend.exists(NAME)):
            proxy.requests.clear()
            error = failure(use)
            assert error.code == "storage_failed"
            assert "access was denied" in str(error)
            assert "key" in error.hint
            assert "not-the-secret" not in "".join(traceback.format_exception(error))
            assert len(proxy.requests) == 1

    def test_what_a_server_quotes_of_the_request_is_not_passed_on(self, backend: Backend, proxy: FaultProxy) -> None:
        quoted = b"<CanonicalRequest>x-amz-security-token:a-session-token</CanonicalRequest>"
        refusal = b"<Error><Code>SignatureDoesNotMatch</Code><Message>No.</Message>%b</Error>" % quoted
        proxy.strike(Rule(fault=Fault.REFUSE, status=403, body=refusal))
        error = failure(lambda: backend.put(NAME, DATA))
        assert "SignatureDoesNotMatch: No." in str(error)
        assert "a-session-token" not in "".join(traceback.format_exception(error))

    def test_missing_bucket_is_no_missing_object(self, s3_server: SeaweedFS) -> None:
        backend = s3_server.backend(f"bucket-{secrets.token_hex(6)}")
        for use in (
            lambda: backend.get(NAME),
            lambda: backend.get_range(NAME, 0, 1),
            lambda: backend.exists(NAME),
            lambda: backend.delete(NAME),
            lambda: backend.list(""),
        ):
            error = failure(use)
            assert error.code == "storage_failed"
            assert "the bucket does not exist" in str(error)

    @pytest.mark.parametrize(("status", "words"), [(307, "elsewhere"), (400, "answered 400"), (405, "answered 405")])
    def test_other_refusals(self, backend: Backend, proxy: FaultProxy, status: int, words: str) -> None:
        proxy.strike(Rule(fault=Fault.REFUSE, status=status))
        error = failure(lambda: backend.put(NAME, DATA))
        assert error.code == "storage_failed"
        assert words in str(error)
        assert len(proxy.requests) == 1


class TestProbe:
    @pytest.fixture
    def unsigned(self, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> StoreSettings:
        """A store that is asked without a signature, which would show that a header was taken away."""
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        url = f"s3://{OPEN_BUCKET}/{secrets.token_hex(8)}"
        return StoreSettings(url=url, endpoint=proxy.endpoint, retry_seconds=20)

    def test_refuses_a_store_that_ignores_the_condition_before_any_object(
        self, unsigned: StoreSettings, proxy: FaultProxy
    ) -> None:
        proxy.strike(Rule(fault=Fault.STRIP_CONDITION, method="PUT"))
        backend = open_backend(unsigned, lambda: None, clock=SystemClock())
        for use in (backend.ready, lambda: backend.put(NAME, DATA), lambda: backend.put(NAME, DATA)):
            error = failure(use)
            assert isinstance(error, MachineUnfit)
            assert error.code == "storage_unsafe"
            assert "a second write" in str(error)
            assert error.hint
        assert backend.list("") == []

    def test_passes_the_same_store_once_it_heeds_the_condition(self, unsigned: StoreSettings) -> None:
        backend = open_backend(unsigned, lambda: None, clock=SystemClock())
        backend.ready()
        assert backend.put(NAME, DATA) is True

    def test_comes_before_the_first_put_and_never_again(
        self, s3_server: SeaweedFS, proxy: FaultProxy, path: str
    ) -> None:
        backend = s3_server.backend(path, endpoint=proxy.endpoint)
        assert (backend.exists(NAME), backend.list("")) == (False, [])
        assert not any("probes/" in request for request in proxy.requests)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda name: backend.put(name, DATA), (NAME, OTHER, "packs/aa", "packs/bb")))
        backend.ready()
        assert sum(request.startswith("PUT") and "probes/" in request for request in proxy.requests) == 2

    def test_of_a_store_that_is_down_does_not_make_people_wait_long(
        self, s3_server: SeaweedFS, proxy: FaultProxy, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_store, "READY_SECONDS", 0.5)
        backend = s3_server.backend(path, endpoint=proxy.endpoint, retry_seconds=3600)
        proxy.down()
        assert failure(backend.ready).code == "storage_unreachable"
        proxy.up()
        backend.ready()

    def test_killed_half_way_leaves_one_object_that_nothing_minds(
        self, s3_server: SeaweedFS, direct: Backend, path: str
    ) -> None:
        program = (
            "import sys; from torpor.config import Secret, StoreSettings; from torpor.core.clock import SystemClock\n"
            "from torpor.snapshots.backend import open_backend\n"
            "settings = StoreSettings(url=sys.argv[1], endpoint=sys.argv[2], key_id=sys.argv[3])\n"
            f"open_backend(settings, lambda: Secret({KEY!r}), clock=SystemClock()).put({NAME!r}, b'x')\n"
        )
        command = [sys.executable, "-c", program, f"s3://{path}", s3_server.endpoint, KEY_ID]
        environment = {**os.environ, "TORPOR_CRASH_POINT": "store.probe_created"}
        killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        (left,) = direct.list("")
        assert left.startswith("probes/")
        subprocess.run(command, check=True)
        assert direct.list("") == [NAME, left]


class TestKey:
    """Whose key it is, and who may change it."""

    @pytest.fixture
    def settings(self, s3_server: SeaweedFS, path: str) -> StoreSettings:
        return StoreSettings(url=f"s3://{path}", endpoint=s3_server.endpoint, retry_seconds=2)

    def test_of_the_environment_is_used_when_none_is_given(
        self, settings: StoreSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
        open_backend(settings, lambda: None, clock=SystemClock()).ready()

    def test_that_is_given_stands_apart_from_the_environment(
        self, s3_server: SeaweedFS, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nowhere = "http://127.0.0.1:9"
        for name, value in {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "else",
            "AWS_SESSION_TOKEN": "of another session",
            "AWS_SKIP_SIGNATURE": "true",
            "AWS_CONDITIONAL_PUT": "disabled",
            "AWS_ENDPOINT_URL_S3": nowhere,
            "AWS_ENDPOINT_URL": nowhere,
            "AWS_REGION": "eu-central-1",
            "HTTP_PROXY": nowhere,
            "ALL_PROXY": nowhere,
        }.items():
            monkeypatch.setenv(name, value)
        s3_server.backend(path, retry_seconds=2).ready()

    def test_that_nobody_has_is_told_at_once(
        self, settings: StoreSettings, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cloud's own service for keys is asked when there is none; here it is a server that knows nothing."""
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", proxy.endpoint)
        proxy.strike(Rule(fault=Fault.REFUSE, status=404))
        error = failure(open_backend(settings, lambda: None, clock=SystemClock()).ready)
        assert error.code == "storage_failed"
        assert "no key is configured" in str(error)


class TestSnapshots:
    """Whole snapshots over such a network."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        made = World(tmp_path)
        made.write_image(pages(range(60)))
        (made.workspace / "file").write_bytes(b"parent")
        return made

    @pytest.mark.parametrize(
        "fault", [Fault.REFUSE, Fault.RESET, Fault.TEAR_UPLOAD, Fault.LOSE_ANSWER, Fault.TEAR_ANSWER]
    )
    def test_are_saved_and_restored_bit_for_bit_through_faults(
        self, world: World, backend: Backend, direct: Backend, proxy: FaultProxy, fault: Fault
    ) -> None:
        store = SnapshotStore(backend, IDS)
        proxy.strike(Rule(fault=fault, method="PUT", times=2), Rule(fault=fault, method="GET", times=2))
        parent = world.save("parent", store=store)
        world.write_image(pages(range(20, 80)))
        proxy.strike(Rule(fault=fault, method="PUT", times=2), Rule(fault=fault, times=3))
        child = world.save("child", parent, store=SnapshotStore(backend, IDS))
        assert child.new_pages == 20
        assert child.parent_problem == ""
        for saved in (parent, child):
            assert SnapshotStore(direct, IDS).verify(saved.ref) == []
        proxy.strike(Rule(fault=fault, method="GET", times=3))
        store.restore_image(child.ref, world.root / "restored")
        assert (world.root / "restored/pages.img").read_bytes() == pages(range(20, 80))

    def test_save_while_the_store_is_down_fails_and_the_next_one_shares_with_the_parent(
        self, world: World, impatient: Backend, direct: Backend, proxy: FaultProxy
    ) -> None:
        store = SnapshotStore(impatient, IDS)
        parent = world.save("parent", store=store)
        world.write_image(pages(range(20, 80)))
        proxy.down()
        assert failure(lambda: world.save("child", parent, store=store)).code == "storage_unreachable"
        error = failure(lambda: store.restore_image(parent.ref, world.root / "not-restored"))
        assert error.code == "storage_unreachable"
        proxy.up()
        assert SnapshotStore(direct, IDS).verify(parent.ref) == []
        child = world.save("child", parent, store=store)
        assert (child.new_pages, child.parent_problem) == (20, "")
