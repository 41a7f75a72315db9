"""Where snapshots are kept as config.toml says it, and the store that comes of it."""

import json
import stat
from pathlib import Path

import pytest

from torpor.config import KeySource, Secret, StoreSettings, read_store
from torpor.core.clock import SystemClock
from torpor.core.errors import InvalidInput, MachineUnfit
from torpor.runtime.runtime import open_runtime
from torpor.runtime.storage import examine_store, open_configured
from torpor.snapshots.backend import LocalDirectory, open_backend
from torpor.snapshots.object_store import ObjectStore

CLOCK = SystemClock()


def write(home: Path, text: str, mode: int = 0o600) -> Path:
    (home / "config.toml").write_text(text)
    (home / "config.toml").chmod(mode)
    return home


def test_snapshots_are_below_the_home_unless_said_otherwise(tmp_path: Path) -> None:
    home = tmp_path / "a home? #1"
    home.mkdir()
    opened = open_backend(read_store(home, {}), lambda: None, clock=CLOCK)
    assert isinstance(opened, LocalDirectory)
    opened.put("packs/aa", b"x")
    assert (home / "store/packs/aa/aa").read_bytes() == b"x"


def test_another_directory_may_be_said(tmp_path: Path) -> None:
    home = write(tmp_path, f'[store]\nurl = "file://{tmp_path}/elsewhere/"\n')
    open_backend(read_store(home, {}), lambda: None, clock=CLOCK).put("packs/aa", b"x")
    assert (tmp_path / "elsewhere/packs/aa/aa").exists()
    assert not (tmp_path / "store").exists()


def test_all_that_is_said_of_an_object_store_is_read(tmp_path: Path) -> None:
    text = """
[store]
url = "s3://bucket/some/prefix/"
endpoint = "http://127.0.0.1:8333/"
region = "eu-west-1"
key_id = "id"
key_env = "SECRET"
request_seconds = 5
retry_seconds = 0
"""
    assert read_store(write(tmp_path, text), {"SECRET": " hush\n"}) == StoreSettings(
        url="s3://bucket/some/prefix",
        endpoint="http://127.0.0.1:8333",
        region="eu-west-1",
        key_id="id",
        key=KeySource(value=Secret("hush"), environment="SECRET"),
        request_seconds=5,
        retry_seconds=0,
    )


@pytest.mark.parametrize(
    "line",
    [
        'url = "bucket"',
        'url = "s3://"',
        'url = "s3://bucket?versioning"',
        'url = "s3://bucket/a//b"',
        'url = "s3://bucket/../other"',
        'url = "az://account"',
        'url = "http://bucket"',
        'url = "file:///"',
        'url = "file://relative"',
        'url = "file:///x"\nregion = "eu-west-1"',
        'url = "file:///x"\nkey = "k"',
        'url = "s3://bucket"\nkey = "k"',
        'url = "s3://bucket"\nkey_id = "i"',
        'url = "s3://bucket"\nkey_id = "i"\nkey = "k"\nkey_env = "K"',
        'url = "s3://bucket"\nkey_id = "i\\n"\nkey = "k"',
        'url = "s3://bucket"\nregion = "eu west"',
        'url = "s3://bucket"\nendpoint = "127.0.0.1:80"',
        'url = "s3://bucket"\nendpoint = "http://user:pass@host"',
        'url = "s3://bucket"\nretry_seconds = -1',
        'url = "s3://bucket"\nbucket = "other"',
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_store(write(tmp_path, f"[store]\n{line}\n"), {})
    assert caught.value.code == "config_invalid"


def test_key_in_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    text = '[store]\nurl = "s3://bucket"\nkey_id = "i"\nkey = "k"\n'
    assert read_store(write(tmp_path, text), {}).key.value == Secret("k")
    with pytest.raises(InvalidInput, match="other users may read it"):
        read_store(write(tmp_path, text, 0o644), {})


@pytest.mark.parametrize(
    "key",
    [
        KeySource(environment="NOT_SET"),
        KeySource(command=("sh", "-c", "echo half-a-key >&2; exit 3")),
        KeySource(command=("no-such-program-anywhere",)),
        KeySource(command=("true",)),
    ],
)
def test_key_that_is_not_there_is_told_of_without_what_the_command_said(key: KeySource) -> None:
    backend = open_configured(StoreSettings(url="s3://bucket", key_id="i", key=key), CLOCK)
    for use in (backend.ready, lambda: backend.get("packs/aa"), lambda: backend.put("packs/aa", b"x")):
        with pytest.raises(MachineUnfit) as caught:
            use()
        assert caught.value.code == "store_key_missing"
        assert "half-a-key" not in str(caught.value)


def test_key_is_read_once_and_when_something_is_first_asked_of_the_store(tmp_path: Path) -> None:
    command = ("sh", "-c", f"echo once >> {tmp_path}/asked; echo secret")
    key = KeySource(command=command)
    settings = StoreSettings(url="s3://bucket", endpoint="http://127.0.0.1:9", key_id="i", key=key, retry_seconds=0)
    backend = open_configured(settings, CLOCK)
    assert not (tmp_path / "asked").exists()
    for _ in range(2):
        with pytest.raises(MachineUnfit, match="refused the connection"):
            backend.get("packs/aa")
    assert (tmp_path / "asked").read_text() == "once\n"


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket", "az://account/container/prefix"])
def test_opening_an_object_store_asks_it_for_nothing(url: str) -> None:
    nowhere = "http://127.0.0.1:9"
    opened = open_backend(StoreSettings(url=url, endpoint=nowhere), lambda: pytest.fail("asked"), clock=CLOCK)
    assert isinstance(opened, ObjectStore)
    assert opened.name == f"{url} at {nowhere}"


def test_key_of_the_wrong_kind_is_refused_and_not_quoted() -> None:
    key = json.dumps("hush hush")
    backend = open_backend(StoreSettings(url="gs://bucket"), lambda: Secret(key), clock=CLOCK)
    with pytest.raises(InvalidInput) as caught:
        backend.ready()
    assert caught.value.code == "config_invalid"
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_large_bodies_of_the_log_stay_beside_it_wherever_snapshots_are(tmp_path: Path) -> None:
    text = '[store]\nurl = "s3://bucket"\nendpoint = "http://127.0.0.1:9"\nkey_id = "i"\nkey = "k"\nretry_seconds = 0\n'
    async with open_runtime({"TORPOR_HOME": str(write(tmp_path, text))}, CLOCK) as runtime:
        blobs = runtime.database.blobs
        assert blobs is not None
        assert blobs.put("blobs/session_ab", b"a large body") is True
        with pytest.raises(MachineUnfit, match="refused the connection"):
            runtime.backend.put("packs/aa", b"a snapshot's")
    assert (tmp_path / "store/blobs/ab/session_ab").read_bytes() == b"a large body"


class TestExamination:
    """What `torpor doctor` says of the store."""

    def test_of_a_directory(self, tmp_path: Path) -> None:
        found = examine_store(StoreSettings(url=f"file://{tmp_path}/store"), CLOCK)
        assert found.ok, found.detail
        assert str(tmp_path) in found.detail
        assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    def test_of_a_directory_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "store").write_text("a file")
        found = examine_store(StoreSettings(url=f"file://{tmp_path}/store"), CLOCK)
        assert (found.ok, found.fatal) == (False, True)
        assert "File exists" in found.detail

    def test_of_a_store_that_is_not_there(self) -> None:
        key = KeySource(value=Secret("k"))
        nowhere = "http://127.0.0.1:9"
        settings = StoreSettings(url="s3://bucket", endpoint=nowhere, key_id="i", key=key, retry_seconds=0)
        found = examine_store(settings, CLOCK)
        assert not found.ok
        assert "refused the connection" in found.detail
        assert found.remedy


def test_directory_is_private_to_the_user(tmp_path: Path) -> None:
    open_configured(StoreSettings(url=f"file://{tmp_path}/store"), CLOCK)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
