"""What SQLite owes beyond the suite of all databases: private files, other processes, and its errors in our words."""

import asyncio
import os
import re
import resource
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.unit.db.scene import NOW, Scene, new_scene

from torpor.core.errors import Conflict, Damaged, InvalidInput, MachineUnfit
from torpor.core.events import EventDraft, Kind
from torpor.db import log, sessions, sqlite, verify, waitpoints
from torpor.db.database import Database, Transaction, open_database
from torpor.db.sqlite_errors import SYNC_FAILURES, translated
from torpor.db.statements import statements
from torpor.runtime import transfer
from torpor.testing.clock import FakeClock

NOTE = EventDraft(kind=Kind.OUTPUT_DIFFERED, incarnation=0)


async def open_at(directory: Path) -> Database:
    return await open_database(f"sqlite://{directory}/torpor.db", clock=FakeClock())


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await open_at(tmp_path)
    yield opened
    await opened.close()


def append(tx: Transaction, scene: Scene) -> int:
    return log.append(tx, **scene.owner, drafts=[NOTE], wall_ns=NOW)[0].seq


# --- files --------------------------------------------------------------------------------------------------------


async def test_files_and_directories_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        database = await open_at(tmp_path / "new" / "deep")
        await new_scene(database)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"new": 0o700, "deep": 0o700, "torpor.db": 0o600, "torpor.db-wal": 0o600, "torpor.db-shm": 0o600}
    await database.close()


@pytest.mark.parametrize("url", ["postgresql://x/y", "sqlite:relative.db", "sqlite://", "", "/path"])
async def test_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await open_database(url, clock=FakeClock())
    assert refused.value.code == "database_url_unknown"


async def test_path_may_hold_any_character(tmp_path: Path) -> None:
    directory = tmp_path / "a b%20?x=1#'é"
    database = await open_at(directory)
    await database.close()
    assert (directory / "torpor.db").exists()


async def test_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "torpor.db").mkdir()
    for directory in (tmp_path / "file", tmp_path):
        with pytest.raises(MachineUnfit) as refused:
            await open_at(directory)
        assert refused.value.code == "database_unopenable"


# --- schema -------------------------------------------------------------------------------------------------------


async def test_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    await (await open_at(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as connection:
        connection.execute("INSERT INTO migration VALUES (99, '0099_future', 0)")
    with pytest.raises(Conflict) as refused:
        await open_at(tmp_path)
    assert refused.value.code == "schema_newer"


async def test_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE photo (name TEXT)")
    with pytest.raises(InvalidInput) as refused:
        await open_at(tmp_path)
    assert refused.value.code == "database_foreign"


async def test_many_first_openers_agree(tmp_path: Path) -> None:
    opened = await asyncio.gather(*(open_at(tmp_path) for _ in range(8)))
    scene = await new_scene(opened[0])
    for database in opened:
        assert len(await database.read(lambda tx: log.events(tx, scene.session_id))) == 2
        await database.close()


async def test_failed_migration_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torpor.db import migrations

    good = migrations._migrations("sqlite")
    broken = [*good, ("0002_broken", "CREATE TABLE fine (a TEXT);\nCREATE TABLE session (a TEXT);\n")]
    monkeypatch.setattr(migrations, "_migrations", lambda schema: broken)
    with pytest.raises(MachineUnfit):
        await open_at(tmp_path)
    monkeypatch.setattr(migrations, "_migrations", lambda schema: good)
    database = await open_at(tmp_path)
    await new_scene(database)
    await database.close()


async def test_waitpoints_of_an_older_database_are_still_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torpor.db import migrations

    steps = migrations._migrations("sqlite")
    before = [name for name, _ in steps].index("0010_forks")
    monkeypatch.setattr(migrations, "_migrations", lambda schema: steps[:before])
    await (await open_at(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as connection:
        columns = "session_id, status, spec, owner_token, incarnation, head_seq, head_hash, cursor_seq, created_ns"
        connection.execute(
            f"INSERT INTO session ({columns}, updated_ns) VALUES ('s', 'asleep', '{{}}', 0, 0, 0, '', 0, 0, 0)"
        )
        columns = "waitpoint_id, session_id, kind, call_id, data, created_ns, due_ns"
        connection.execute(f"INSERT INTO waitpoint ({columns}) VALUES ('wp_1', 's', 'ask', 'c', '{{}}', 3, 4)")
    monkeypatch.setattr(migrations, "_migrations", lambda schema: steps)
    database = await open_at(tmp_path)
    [point] = await database.read(waitpoints.list_open)
    assert (point.waitpoint_id, point.call_id, point.created_ns, point.due_ns) == ("wp_1", "c", 3, 4)
    await database.close()


def test_each_statement_is_used() -> None:
    folder = Path(sqlite.__file__).parents[1]
    text = "\n".join(file.read_text() for file in folder.rglob("*.py"))
    of_each_table = {f"transfer/{verb}" for table in transfer.TABLES for verb in (f"list_{table}s", f"insert_{table}")}
    assert [name for name in statements() if f'"{name}"' not in text and name not in of_each_table] == []


def test_statements_find_their_rows_by_an_index(database: Database, tmp_path: Path) -> None:
    through_all_sessions = {
        "blob/list_named",
        "budget/list_costs",
        "checkpoint/list_roots",
        "key/list_of_sessions",
        "session/find_by_prefix",
        "session/list_newest",
        "session/list_of_node",
        "waitpoint/list_open",
    }
    # Each goes through what it has found so far.
    recursions = {f"SCAN {name}" for name in ("chain", "ancestor", "relative", "above", "oldest", "family", "kin")}
    with closing(sqlite3.connect(tmp_path / "torpor.db")) as connection:
        for name, text in statements().items():
            if name.startswith("search/"):
                continue  # of the index's own file
            values = dict.fromkeys(re.findall(r":([a-z_][a-z_0-9]*)", text))
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]
            scans = [step for step in plan if "SCAN" in step and step not in recursions]
            assert name in through_all_sessions or scans == [], (name, plan)


# --- errors -------------------------------------------------------------------------------------------------------


async def test_garbage_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "torpor.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Damaged) as refused:
        await open_at(tmp_path)
    assert refused.value.code == "database_damaged"


async def test_overwritten_pages_are_called_damaged(tmp_path: Path) -> None:
    database = await open_at(tmp_path)
    scene = await new_scene(database)
    await database.close()
    with (tmp_path / "torpor.db").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (file.seek(0, os.SEEK_END) - 4096 - file.seek(4096) + 4096))
    with pytest.raises(Damaged):
        database = await open_at(tmp_path)
        try:
            await database.read(lambda tx: log.events(tx, scene.session_id))
        finally:
            await database.close()


@contextmanager
def file_size_limited(bytes_max: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk; what SQLite then says is what a full disk makes it say."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_write_that_the_disk_refuses_leaves_a_usable_database(database: Database, tmp_path: Path) -> None:
    scene = await new_scene(database)
    big = EventDraft(kind=Kind.STREAM_RESET, incarnation=0, data={"text": "x" * 5_000_000})
    with file_size_limited(1_000_000), pytest.raises(MachineUnfit):
        await scene.write(lambda tx: log.append(tx, **scene.owner, drafts=[big], wall_ns=NOW), durable=True)
    assert await scene.write(lambda tx: append(tx, scene), durable=True) == 3
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_lock_that_is_held_too_long_is_called_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0.05)
    database = await open_at(tmp_path)
    scene = await new_scene(database)
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Conflict) as refused:
            await scene.write(lambda tx: append(tx, scene))
        assert refused.value.code == "database_busy"
        assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 2
        other.execute("ROLLBACK")
    assert await scene.write(lambda tx: append(tx, scene)) == 3
    await database.close()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SQLITE_BUSY_SNAPSHOT", "database_busy"),
        ("SQLITE_LOCKED", "database_busy"),
        ("SQLITE_FULL", "no_space"),
        ("SQLITE_CORRUPT", "database_damaged"),
        ("SQLITE_NOTADB", "database_damaged"),
        ("SQLITE_IOERR_WRITE", "database_io_failed"),
        ("SQLITE_CANTOPEN", "database_unopenable"),
        ("SQLITE_READONLY", "database_unopenable"),
        ("SQLITE_CONSTRAINT_UNIQUE", "row_conflict"),
        ("SQLITE_ERROR", "database_failed"),
    ],
)
def test_each_result_code_has_its_word(name: str, code: str) -> None:
    error = sqlite3.OperationalError("said so")
    error.sqlite_errorcode = getattr(sqlite3, name)
    assert translated(error, Path("/x")).code == code


async def test_nothing_is_written_after_a_failed_sync(tmp_path: Path) -> None:
    database = await open_at(tmp_path)
    scene = await new_scene(database)

    def fail(tx: Transaction) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = next(iter(SYNC_FAILURES))
        raise error

    with pytest.raises(MachineUnfit):
        await scene.write(fail, durable=True)
    for durable in (True, False):
        with pytest.raises(MachineUnfit) as refused:
            await scene.write(lambda tx: append(tx, scene), durable=durable)
        assert refused.value.code == "database_io_failed"
    assert (await scene.read(lambda tx: sessions.get(tx, scene.session_id))).head_seq == 2
    await database.close()


# --- threads ------------------------------------------------------------------------------------------------------


async def test_two_slow_readers_do_not_hold_up_the_writer(database: Database) -> None:
    scene = await new_scene(database)
    started, release = threading.Barrier(3), threading.Event()

    def slow(tx: Transaction) -> int:
        before = sessions.get(tx, scene.session_id).head_seq
        started.wait(10)
        assert release.wait(10)
        return before

    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(scene.read(slow)) for _ in range(2)]
        await asyncio.to_thread(started.wait, 10)
        assert await scene.write(lambda tx: append(tx, scene), durable=True) == 3
        release.set()
    assert [reader.result() for reader in readers] == [2, 2]


async def test_a_brief_write_runs_where_it_is_asked_for(database: Database) -> None:
    scene = await new_scene(database)
    threads: list[threading.Thread] = []

    def work(tx: Transaction) -> int:
        threads.append(threading.current_thread())
        return append(tx, scene)

    assert await database.write(work, durable=False, brief=True) == 3
    assert await database.write(work, durable=False) == 4
    assert await database.write(work, durable=True, brief=True) == 5
    assert [thread is threading.current_thread() for thread in threads] == [True, False, False]


async def test_a_brief_write_that_fails_leaves_no_row(database: Database) -> None:
    scene = await new_scene(database)

    def work(tx: Transaction) -> None:
        append(tx, scene)
        raise InvalidInput("code", "no")

    with pytest.raises(InvalidInput):
        await database.write(work, durable=False, brief=True)
    assert await database.write(lambda tx: append(tx, scene), durable=False, brief=True) == 3


async def test_a_brief_write_comes_after_those_that_wait(database: Database) -> None:
    scene = await new_scene(database)
    running, release = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(_: Transaction) -> None:
        running.set()
        assert release.wait(10)
        order.append("slow")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scene.write(slow, durable=True))
        await asyncio.to_thread(running.wait, 10)
        tasks.create_task(scene.write(lambda _: order.append("waiting")))
        await asyncio.sleep(0)
        tasks.create_task(database.write(lambda _: order.append("brief"), durable=False, brief=True))
        await asyncio.sleep(0)
        release.set()
    assert order == ["slow", "waiting", "brief"]


async def test_a_brief_write_does_not_hold_up_the_loop_while_another_process_writes(
    database: Database, tmp_path: Path
) -> None:
    scene = await new_scene(database)
    with closing(sqlite3.connect(tmp_path / "torpor.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(database.write(lambda tx: append(tx, scene), durable=False, brief=True))
            await asyncio.sleep(0)
            assert not writing.done()
            other.execute("ROLLBACK")
    assert writing.result() == 3


async def test_the_wal_is_copied_between_commits(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "COMMITS_PER_COPY", 2)
    scene = await new_scene(database)
    sizes: set[int] = set()
    for number in range(200):
        await database.write(lambda tx: append(tx, scene), durable=number % 50 == 0, brief=True)
        sizes.add((tmp_path / "torpor.db-wal").stat().st_size)
    assert max(sizes) < 40 * 8 * 4096
    await database.settle()
    with closing(sqlite3.connect(tmp_path / "torpor.db")) as other:
        assert other.execute("SELECT COUNT(*) FROM event").fetchone() == (202,)


async def test_no_brief_write_begins_the_wal_anew(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That syncs its header: on the caller's thread a disk would stop the loop."""
    monkeypatch.setattr(sqlite, "COMMITS_PER_COPY", 2)
    scene = await new_scene(database)

    def generation() -> bytes:
        """What the header says of itself."""
        return (tmp_path / "torpor.db-wal").read_bytes()[:32]

    seen: set[bytes] = set()
    for _ in range(20):
        await scene.write(lambda tx: append(tx, scene))
        await asyncio.wrap_future(database._writer_thread.submit(lambda: None))  # type: ignore[attr-defined]
        seen.add(before := generation())
        await database.write(lambda tx: append(tx, scene), durable=False, brief=True)
        assert generation() == before
    assert len(seen) > 5


async def test_reader_cannot_write(database: Database) -> None:
    scene = await new_scene(database)
    with pytest.raises(MachineUnfit):
        await scene.read(lambda tx: append(tx, scene))


async def test_close_waits_for_the_work_under_way(tmp_path: Path) -> None:
    database = await open_at(tmp_path)
    scene = await new_scene(database)
    running, release = threading.Event(), threading.Event()

    def work(tx: Transaction) -> int:
        running.set()
        assert release.wait(10)
        return append(tx, scene)

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(scene.write(work, durable=True))
        await asyncio.to_thread(running.wait, 10)
        closing_ = tasks.create_task(database.close())
        await asyncio.sleep(0)
        release.set()
    assert writing.result() == 3
    assert closing_.done()
    assert not (tmp_path / "torpor.db-wal").exists()
