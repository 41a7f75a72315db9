"""kill -9 between a blob and the row that names it, and between a row that is gone and its blob, of the real thing."""

import json
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.stage import PATIENCE_SECONDS, Stage, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

SECRET = "sk-planted-0123456789abcdef"
AGENT = f"""
import hashlib, json, os, random, sys, time, urllib.request

letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
text = "{SECRET} " + "".join(random.Random(5).choices(letters, k=3 << 20))
body = json.dumps({{"model": "m", "messages": [{{"role": "user", "content": text}}], "stream": False}}).encode()
while True:
    try:
        headers = {{"content-type": "application/json"}}
        request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
        break
    except OSError as error:
        print("again:", error, flush=True)
        time.sleep(0.1)
print(hashlib.sha256(body).hexdigest(), hashlib.sha256(content).hexdigest(), flush=True)
while "stay" in sys.argv:
    time.sleep(1)
"""
NAMED = """
    SELECT lower(hex(blob)) FROM block WHERE blob IS NOT NULL
    UNION SELECT lower(hex(blob)) FROM answer WHERE blob IS NOT NULL
"""


def rows(made: Stage, query: str) -> list[object]:
    with closing(sqlite3.connect(made.home / "torpor.db")) as connection:
        return [value for (value,) in connection.execute(query)]


def objects(made: Stage) -> set[str]:
    """The names of the blobs that are in the store, without their session."""
    return {path.name.partition("_")[2] for path in made.home.glob("store/blobs/*/*")}


def chunks(made: Stage) -> int:
    [count] = rows(made, "SELECT COUNT(*) FROM chunk")
    assert isinstance(count, int)
    return count


def check_whole(made: Stage) -> None:
    """The log holds, the store has what it names and nothing else, and no chunk is left of a packed answer."""
    assert "is whole" in made.torpor("log", "one", "--verify").stdout
    assert objects(made) == set(rows(made, NAMED))
    assert chunks(made) == 0


@contextmanager
def a_home(directory: Path, runsc: Path) -> Iterator[Stage]:
    with stage(directory, runsc, ["--script", "huge"]) as made:
        (made.project / "ask.py").write_text(AGENT)
        yield made


RUN = ("run", "--name", "one", "--", sys.executable, "ask.py")

KILLS = {
    # point: objects in the store, those that rows name, whether chunk rows are left, and how often the model is asked
    "blob.stored:1": (1, 0, False, 1),
    # Its request is intended by then as well: the two are one commit where no budget stands between them.
    "call.sent": (1, 1, False, 1),
    "blob.stored:2": (2, 1, True, 2),
    "call.completed": (2, 2, True, 1),
    "chunks.dropped": (2, 2, True, 1),
}


@pytest.mark.parametrize("point", sorted(KILLS))
def test_a_kill_between_a_body_and_its_row_loses_neither(scratch: Path, runsc: Path, point: str) -> None:
    there, named, has_chunks, asked = KILLS[point]
    with a_home(scratch, runsc) as made:
        assert made.node(*RUN, TORPOR_CRASH_POINT=point).wait(PATIENCE_SECONDS) == -9
        assert len(objects(made)) == there
        assert len(rows(made, NAMED)) == named
        assert objects(made) >= set(rows(made, NAMED))
        assert (chunks(made) > 0) == has_chunks
        if rows(made, "SELECT 1 FROM call"):
            assert "is whole" in made.torpor("log", "one", "--verify").stdout
        assert made.node("resume", "one").wait(PATIENCE_SECONDS) == 0
        check_whole(made)
        assert sum(line["event"] == "start" for line in made.witness) == asked
        sent, got = made.torpor("output", "one").stdout.splitlines()[-1].split()
        assert rows(made, "SELECT body_digest FROM request")[-1] == sent
        [ended] = [event for event in made.events("one") if event["kind"] == "call.completed"]
        assert ended["data"]["digest"] == got


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, runsc: Path) -> Path:
    """What an undisturbed session leaves, as a file."""
    directory = tmp_path_factory.mktemp("large")
    with a_home(directory, runsc) as made:
        made.torpor(*RUN)
        check_whole(made)
        made.torpor("export", "one", str(directory / "one.jsonl"))
    return directory / "one.jsonl"


@contextmanager
def a_home_with(export: Path, directory: Path, runsc: Path) -> Iterator[Stage]:
    with a_home(directory, runsc) as made:
        made.torpor("import", str(export))
        check_whole(made)
        assert len(objects(made)) == 2
        yield made


def files_with_the_secret(made: Stage) -> list[str]:
    """The log's files and the store's: what is there of 64 letters in a row is not compressed away."""
    files = [*made.home.glob("torpor.db*"), *made.home.glob("store/blobs/*/*")]
    return [path.name for path in files if SECRET.encode() in _unpacked(path.read_bytes())]


def _unpacked(content: bytes) -> bytes:
    import zstandard

    if not content.startswith(b"\x28\xb5\x2f\xfd"):
        return content
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)


REDACT = ("redact", "one", "--pattern", "sk-planted-[0-9a-f]*", "--yes")


@pytest.mark.parametrize("point", ["redaction.stored", "redaction.committed"])
@pytest.mark.parametrize("again", [REDACT, ("redact", "one", "--pattern", "nothing that is there", "--yes")])
def test_a_killed_redaction_is_whole_or_nothing_and_the_next_one_finishes_it(
    scratch: Path, runsc: Path, export: Path, point: str, again: tuple[str, ...]
) -> None:
    with a_home_with(export, scratch, runsc) as made:
        before = objects(made)
        assert made.torpor(*REDACT, check=False, TORPOR_CRASH_POINT=point).returncode == -9
        assert len(objects(made)) == 3
        assert objects(made) > before
        redacted = [event for event in made.events("one") if event["kind"] == "session.redacted"]
        assert (len(redacted) == 1) == (point == "redaction.committed")
        assert "is whole" in made.torpor("log", "one", "--verify").stdout
        made.torpor(*again)
        check_whole(made)
        if again == REDACT or point == "redaction.committed":
            assert len(objects(made)) == 2
            assert files_with_the_secret(made) == []
            assert b"*" * len(SECRET) in made.torpor("turn", "one", "1", "--raw", "request").stdout.encode()
        else:
            assert objects(made) == before


def test_a_session_that_is_resumed_finishes_what_a_killed_redaction_left(scratch: Path, runsc: Path) -> None:
    with a_home(scratch, runsc) as made:
        node = made.node(*RUN, "stay")
        log = made.follow("one")
        log.wait("call.delivered")
        made.torpor("stop", "one")
        assert node.wait(PATIENCE_SECONDS) == 79
        assert made.torpor(*REDACT, check=False, TORPOR_CRASH_POINT="redaction.committed").returncode == -9
        assert len(objects(made)) == 3
        resumed = made.node("resume", "one")
        log.wait("recovery.chosen", 2)
        assert len(objects(made)) == 2
        made.torpor("kill", "one")
        resumed.wait(PATIENCE_SECONDS)
        log.close()
        check_whole(made)
        assert files_with_the_secret(made) == []


def test_a_killed_removal_leaves_objects_that_no_row_names(scratch: Path, runsc: Path, export: Path) -> None:
    with a_home_with(export, scratch, runsc) as made:
        there = objects(made)
        assert made.torpor("rm", "one", check=False, TORPOR_CRASH_POINT="session.forgotten").returncode == -9
        assert made.rows("ls") == []
        assert objects(made) == there
        assert rows(made, NAMED) == []


def test_a_removed_session_has_no_object(scratch: Path, runsc: Path, export: Path) -> None:
    with a_home_with(export, scratch, runsc) as made:
        made.torpor("rm", "one")
        assert objects(made) == set()
        assert made.rows("ls") == []


@pytest.mark.parametrize("point", ["blob.stored:1", "blob.stored:2"])
def test_a_killed_import_leaves_nothing_that_is_read_and_the_next_one_takes_it_up(
    scratch: Path, runsc: Path, export: Path, point: str
) -> None:
    with a_home(scratch, runsc) as made:
        killed = made.torpor("import", str(export), check=False, TORPOR_CRASH_POINT=point)
        assert killed.returncode == -9
        assert len(objects(made)) == int(point[-1])
        assert made.rows("ls") == []
        made.torpor("import", str(export))
        check_whole(made)
        assert len(objects(made)) == 2


@pytest.mark.parametrize("damage", ["flipped", "vanished"])
def test_a_damaged_object_is_listed_and_told_and_the_rest_is_read(
    scratch: Path, runsc: Path, export: Path, damage: str
) -> None:
    with a_home_with(export, scratch, runsc) as made:
        [answer] = rows(made, "SELECT lower(hex(blob)) FROM answer WHERE blob IS NOT NULL")
        [path] = made.home.glob(f"store/blobs/*/*_{answer}")
        if damage == "vanished":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(content)
        verified = made.torpor("log", "one", "--verify", check=False)
        assert verified.returncode == 74
        assert re.search(rf"its\s+blob\s+{answer}", verified.stderr)
        refused = made.torpor("turn", "one", "1", "--json", check=False)
        assert refused.returncode == 74
        assert json.loads(refused.stderr or refused.stdout)["error"]["code"] == "answer_damaged"
        [turn] = made.rows("turns", "one")
        assert answer in turn["damage"]
        assert made.torpor("export", "one", os.devnull, check=False).returncode == 74
        assert made.torpor("search", "call.completed", "--session", "one").returncode == 0
