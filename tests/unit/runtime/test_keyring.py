"""Where keys come from, what wraps them, and what a rotation does to them, whatever interrupts it."""

import asyncio
import base64
import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.db.scene import Scene, new_scene

from torpor.core.errors import Conflict, Damaged, InvalidInput, MachineUnfit
from torpor.db import keys, sessions
from torpor.db.database import Database, open_database
from torpor.runtime.keyring import Keyring, open_keyring, rotate
from torpor.runtime.master_key import MasterKeys
from torpor.snapshots.cipher import Key, key_of, new_key
from torpor.testing.clock import FakeClock

ROTATE = "from torpor.cli.main import main; import sys; sys.argv = ['torpor', 'keys', 'rotate']; main()"


def text(key: Key) -> str:
    return base64.b64encode(key.secret).decode()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
    yield opened
    await opened.close()


@pytest.fixture
def masters(tmp_path: Path) -> MasterKeys:
    return MasterKeys(tmp_path / "keys", {})


async def session_with_key(database: Database, masters: MasterKeys) -> tuple[Scene, Key]:
    scene = await new_scene(database)
    key, kept = (await open_keyring(database, masters)).new_session_key(scene.session_id)
    await scene.write(lambda tx: keys.add_session(tx, **scene.owner, key=kept), durable=True)
    return scene, key


async def test_first_opening_makes_the_keys_and_the_next_one_finds_them(
    database: Database, masters: MasterKeys, tmp_path: Path
) -> None:
    first, second = await open_keyring(database, masters), await open_keyring(database, masters)
    assert first.tenant == second.tenant
    file = tmp_path / "keys/master"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert key_of(base64.b64decode(file.read_text())).id == (await database.read(keys.tenant)).master_id
    assert sorted(path.name for path in file.parent.iterdir()) == ["master"]


async def test_openers_that_come_first_together_agree(tmp_path: Path) -> None:
    async def opened() -> Keyring:
        database = await open_database(f"sqlite://{tmp_path}/torpor.db", clock=FakeClock())
        try:
            return await open_keyring(database, MasterKeys(tmp_path / "keys", {}))
        finally:
            await database.close()

    rings = await asyncio.gather(*(opened() for _ in range(5)))
    assert len({ring.tenant for ring in rings}) == 1


async def test_session_key_is_what_was_given_and_in_no_row_as_it_is(
    database: Database, masters: MasterKeys, tmp_path: Path
) -> None:
    scene, key = await session_with_key(database, masters)
    ring = await open_keyring(database, masters)
    assert await ring.session_key(scene.session_id) == key
    await database.settle()
    stored = (tmp_path / "torpor.db").read_bytes()
    master = base64.b64decode((tmp_path / "keys/master").read_text())
    for secret in (key.secret, ring.tenant.secret, master):
        assert secret not in stored
        assert base64.b64encode(secret)[:40] not in stored


async def test_session_without_a_key_is_told(database: Database, masters: MasterKeys) -> None:
    ring = await open_keyring(database, masters)
    scene = await new_scene(database)
    with pytest.raises(Conflict, match="it has no key") as caught:
        await ring.session_key(scene.session_id)
    assert caught.value.code == "session_key_missing"


async def test_row_of_one_session_is_no_key_of_another(database: Database, masters: MasterKeys) -> None:
    one, _ = await session_with_key(database, masters)
    other, _ = await session_with_key(database, masters)
    row = await database.read(lambda tx: keys.of_session(tx, one.session_id))
    seen = {"seen_master_id": row.master_id, "master_id": row.master_id}
    moved = {"session_id": other.session_id, "wrapped": row.wrapped, **seen}
    await database.write(lambda tx: tx.run("key/rewrap_of_session_if_unchanged", **moved), durable=True)
    with pytest.raises(Damaged) as caught:
        await (await open_keyring(database, masters)).session_key(other.session_id)
    assert caught.value.code == "key_damaged"


class TestMasterKey:
    async def test_that_is_lost_is_asked_for_and_not_replaced(self, database: Database, tmp_path: Path) -> None:
        masters = MasterKeys(tmp_path / "keys", {})
        await open_keyring(database, masters)
        (tmp_path / "keys/master").rename(tmp_path / "copy")
        with pytest.raises(MachineUnfit, match="is not there") as caught:
            await open_keyring(database, masters)
        assert caught.value.code == "master_key_missing"
        assert not (tmp_path / "keys/master").exists()
        (tmp_path / "copy").rename(tmp_path / "keys/master")
        await open_keyring(database, masters)

    async def test_that_is_another_is_told_by_its_id(self, database: Database, tmp_path: Path) -> None:
        await open_keyring(database, MasterKeys(tmp_path / "keys", {}))
        right = (await database.read(keys.tenant)).master_id
        other = new_key()
        with pytest.raises(
            MachineUnfit, match=f"take the master key {right}, TORPOR_MASTER_KEY is {other.id}"
        ) as caught:
            await open_keyring(database, MasterKeys(tmp_path / "keys", {"TORPOR_MASTER_KEY": text(other)}))
        assert caught.value.code == "master_key_wrong"
        assert text(other) not in str(caught.value) + caught.value.hint

    async def test_of_the_environment_needs_no_file(self, database: Database, tmp_path: Path) -> None:
        given = {"TORPOR_MASTER_KEY": text(new_key())}
        ring = await open_keyring(database, MasterKeys(tmp_path / "keys", given))
        assert not (tmp_path / "keys").exists()
        (tmp_path / "keys").mkdir()
        (tmp_path / "keys/master").write_text(given["TORPOR_MASTER_KEY"] + "\n")
        (tmp_path / "keys/master").chmod(0o600)
        assert (await open_keyring(database, MasterKeys(tmp_path / "keys", {}))).tenant == ring.tenant

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"no key\n", "not base64"),
            (b"", "0 bytes"),
            (base64.b64encode(b"x" * 31), "31 bytes"),
            (b"\xff", "no text"),
        ],
    )
    async def test_that_is_none_is_refused(
        self, database: Database, masters: MasterKeys, tmp_path: Path, content: bytes, reason: str
    ) -> None:
        (tmp_path / "keys").mkdir()
        (tmp_path / "keys/master").write_bytes(content)
        (tmp_path / "keys/master").chmod(0o600)
        with pytest.raises(InvalidInput, match=reason) as caught:
            await open_keyring(database, masters)
        assert caught.value.code == "master_key_unusable"

    async def test_that_others_may_read_is_refused(
        self, database: Database, masters: MasterKeys, tmp_path: Path
    ) -> None:
        await open_keyring(database, masters)
        (tmp_path / "keys/master").chmod(0o640)
        with pytest.raises(InvalidInput, match="others") as caught:
            await open_keyring(database, masters)
        assert "chmod 600" in caught.value.hint


class TestRotation:
    async def test_keys_stay_and_their_wrapping_changes(
        self, database: Database, masters: MasterKeys, tmp_path: Path
    ) -> None:
        scene, key = await session_with_key(database, masters)
        before = await open_keyring(database, masters)
        old = (tmp_path / "keys/master").read_text()
        done = await rotate(database, masters)
        assert done.wrapped == 2
        assert done.before == key_of(base64.b64decode(old)).id
        assert done.place == str(tmp_path / "keys/master")
        after = await open_keyring(database, masters)
        assert after.tenant == before.tenant
        assert await after.session_key(scene.session_id) == key
        assert (tmp_path / "keys/master").read_text() != old
        assert not (tmp_path / "keys/master.next").exists()
        rows = [await database.read(keys.tenant), *await database.read(keys.list_sessions)]
        assert {row.master_id for row in rows} == {done.after}
        (tmp_path / "keys/master").write_text(old)
        with pytest.raises(MachineUnfit):
            await open_keyring(database, masters)

    async def test_leaves_no_old_row_in_any_file(self, database: Database, masters: MasterKeys, tmp_path: Path) -> None:
        scene, _ = await session_with_key(database, masters)
        old = await database.read(lambda tx: keys.of_session(tx, scene.session_id))
        await rotate(database, masters)
        for file in tmp_path.glob("torpor.db*"):
            assert old.wrapped not in file.read_bytes()

    async def test_whoever_made_a_session_with_the_old_key_in_hand_does_it_again(
        self, database: Database, masters: MasterKeys
    ) -> None:
        stale = await open_keyring(database, masters)
        await rotate(database, masters)
        scene = await new_scene(database)
        _, kept = stale.new_session_key(scene.session_id)
        with pytest.raises(Conflict) as caught:
            await scene.write(lambda tx: keys.add_session(tx, **scene.owner, key=kept))
        assert caught.value.code == "master_key_changed"

    async def test_needs_the_next_key_where_the_present_one_is_in_the_environment(
        self, database: Database, tmp_path: Path
    ) -> None:
        present, following = new_key(), new_key()
        given = {"TORPOR_MASTER_KEY": text(present)}
        scene, key = await session_with_key(database, MasterKeys(tmp_path / "keys", given))
        with pytest.raises(InvalidInput, match="nobody but you") as caught:
            await rotate(database, MasterKeys(tmp_path / "keys", given))
        assert caught.value.code == "master_key_in_environment"
        with pytest.raises(InvalidInput, match="the present one"):
            await rotate(database, MasterKeys(tmp_path / "keys", {**given, "TORPOR_MASTER_KEY_NEXT": text(present)}))
        done = await rotate(
            database, MasterKeys(tmp_path / "keys", {**given, "TORPOR_MASTER_KEY_NEXT": text(following)})
        )
        assert (done.before, done.after) == (present.id, following.id)
        ring = await open_keyring(database, MasterKeys(tmp_path / "keys", {"TORPOR_MASTER_KEY": text(following)}))
        assert await ring.session_key(scene.session_id) == key

    async def test_into_the_environment_removes_the_file(
        self, database: Database, masters: MasterKeys, tmp_path: Path
    ) -> None:
        await open_keyring(database, masters)
        following = new_key()
        await rotate(database, MasterKeys(tmp_path / "keys", {"TORPOR_MASTER_KEY_NEXT": text(following)}))
        assert not (tmp_path / "keys/master").exists()
        await open_keyring(database, MasterKeys(tmp_path / "keys", {"TORPOR_MASTER_KEY": text(following)}))

    async def test_of_a_damaged_row_changes_nothing(
        self, database: Database, masters: MasterKeys, tmp_path: Path
    ) -> None:
        scene, _ = await session_with_key(database, masters)
        row = await database.read(lambda tx: keys.of_session(tx, scene.session_id))
        bad = bytes([row.wrapped[0] ^ 1]) + row.wrapped[1:]
        values = {"session_id": row.whose, "wrapped": bad, "seen_master_id": row.master_id, "master_id": row.master_id}
        await database.write(lambda tx: tx.run("key/rewrap_of_session_if_unchanged", **values), durable=True)
        before = (tmp_path / "keys/master").read_text()
        with pytest.raises(Damaged) as caught:
            await rotate(database, masters)
        assert caught.value.code == "key_damaged"
        assert (tmp_path / "keys/master").read_text() == before
        await open_keyring(database, masters)


@contextlib.asynccontextmanager
async def opened(home: Path) -> AsyncIterator[tuple[Database, MasterKeys]]:
    database = await open_database(f"sqlite://{home}/torpor.db", clock=FakeClock())
    try:
        yield database, MasterKeys(home / "keys", {})
    finally:
        await database.close()


def rotate_in_child(home: Path, crash_at: str = "") -> int:
    environment = {**os.environ, "TORPOR_HOME": str(home), "TORPOR_CRASH_POINT": crash_at}
    done = subprocess.run([sys.executable, "-c", ROTATE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize(
    ("point", "changed"), [("keys.next_made", False), ("keys.rewrapped", True), ("keys.rotated", True)]
)
async def test_killed_rotation_loses_no_key_and_the_next_one_finishes_it(
    tmp_path: Path, point: str, changed: bool
) -> None:
    async with opened(tmp_path) as (database, masters):
        scene, key = await session_with_key(database, masters)
        before = await database.read(keys.tenant)
    assert rotate_in_child(tmp_path, point) == -signal.SIGKILL
    async with opened(tmp_path) as (database, masters):
        after = await database.read(keys.tenant)
        assert (after.master_id != before.master_id) == changed
        assert await (await open_keyring(database, masters)).session_key(scene.session_id) == key
        later, later_key = await session_with_key(database, masters)
    assert rotate_in_child(tmp_path) == 0
    async with opened(tmp_path) as (database, masters):
        ring = await open_keyring(database, masters)
        assert await ring.session_key(scene.session_id) == key
        assert await ring.session_key(later.session_id) == later_key
        assert (await database.read(keys.tenant)).master_id not in (before.master_id, after.master_id)
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["lock", "master"]


async def test_kill_after_the_first_master_key_leaves_one_that_is_taken(tmp_path: Path) -> None:
    assert rotate_in_child(tmp_path, "keys.master_made") == -signal.SIGKILL
    made = (tmp_path / "keys/master").read_text()
    async with opened(tmp_path) as (database, masters):
        assert await database.read(keys.tenant) is None
        await open_keyring(database, masters)
        assert (await database.read(keys.tenant)).master_id == key_of(base64.b64decode(made)).id


async def test_forgotten_session_has_no_key(database: Database, masters: MasterKeys) -> None:
    scene, _ = await session_with_key(database, masters)
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner), durable=True)
    with pytest.raises(Conflict):
        await (await open_keyring(database, masters)).session_key(scene.session_id)
