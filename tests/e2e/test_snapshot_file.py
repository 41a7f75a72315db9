"""`torpor snapshot`: a session that was cut on one TORPOR_HOME goes on in another one; else it says what that lacks."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.test_sessions import COUNTERS, RUN_AGENT, report_of
from tests.stage import PATIENCE_SECONDS, Stage

from torpor.snapshots.snapshot_file import FileWriter, Record, read_records

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]
assert sys.version_info >= (3, 11)


def cut(made: Stage, calls: int) -> int:
    """A session that was killed amid its work, with its newest checkpoint's number."""
    node = made.node(*RUN_AGENT)
    log = made.follow("one")
    log.wait("checkpoint.committed", calls)
    node.kill()
    node.wait()
    made.kill_what_a_node_left()
    log.close()
    return max(row["number"] for row in made.rows("checkpoints", "one"))


def elsewhere(made: Stage) -> None:
    """The same machine with another TORPOR_HOME: other keys, another store, another database."""
    made.home.rename(made.directory / "old home")
    made.home.mkdir(mode=0o700)
    for config in (made.directory / "old home").glob("config.toml"):
        shutil.copy2(config, made.home)


def test_session_goes_on_in_another_home_from_where_it_was(slow: Stage) -> None:
    number = cut(slow, 4)
    file = slow.directory / "one.snapshot"
    told = json.loads(slow.torpor("snapshot", "export", "one", str(file), "--json").stdout)
    assert (told["checkpoint"], told["sealed"], told["file_bytes"]) == (number, False, file.stat().st_size)
    assert not list((slow.home / "sessions").glob("*/export"))
    elsewhere(slow)
    imported = json.loads(slow.torpor("snapshot", "import", str(file), "--json").stdout)
    assert imported == {"session_id": told["session_id"], "checkpoint": number, "unmet": ""}
    assert [row["number"] for row in slow.rows("checkpoints", "one")] == [number]
    slow.torpor("log", "one", "--verify")
    assert json.loads(slow.torpor("verify", "--read-data", "--json").stdout)["problems"] == []
    again = slow.torpor("snapshot", "import", str(file), "--json", check=False)
    assert json.loads(again.stdout)["error"]["code"] == "session_exists"
    assert slow.node("resume", "one").wait(PATIENCE_SECONDS) == 0
    chosen = [event["data"] for event in slow.events("one") if event["kind"] == "recovery.chosen"]
    assert [data["mode"] for data in chosen] == ["boot", "restore"]
    assert report_of(slow) == {**dict.fromkeys(COUNTERS, 5), "background": {"ticker": None}}
    slow.torpor("log", "one", "--verify")
    check_nothing_left(slow)


def test_machine_that_lacks_the_runsc_refuses_it_and_takes_it_to_be_read(slow: Stage, runsc: Path) -> None:
    cut(slow, 2)
    file, other = slow.directory / "one.snapshot", slow.directory / "other/runsc"
    slow.torpor("snapshot", "export", "one", str(file))
    elsewhere(slow)
    other.parent.mkdir()
    other.write_bytes(runsc.read_bytes() + b"\0")
    other.chmod(0o755)
    refused = slow.torpor("snapshot", "import", str(file), check=False, TORPOR_RUNSC=str(other))
    assert refused.returncode == 69
    assert "that very binary is not here" in " ".join(refused.stderr.split())
    assert slow.rows("ls") == []
    assert not list((slow.home / "sessions").iterdir())
    taken = slow.torpor("snapshot", "import", str(file), "--anyway", "--json", TORPOR_RUNSC=str(other))
    assert "that very binary is not here" in json.loads(taken.stdout)["unmet"]
    slow.torpor("pull", "one", str(slow.directory / "pulled"))
    assert any((slow.directory / "pulled").iterdir())
    resumed = slow.torpor("resume", "one", check=False, TORPOR_RUNSC=str(other))
    assert resumed.returncode == 69
    assert "pins_unmet" in resumed.stderr


def altered(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file as another machine would have written it: what it says of itself is changed, and it is whole."""
    other = file.with_name("altered.snapshot")
    other.unlink(missing_ok=True)
    writer = FileWriter(other, None)
    with file.open("rb") as stream:
        for kind, content in read_records(stream, None):
            if kind == Record.HEAD:
                head = json.loads(content)
                change(head)
                content = json.dumps(head).encode()
            writer.add(kind, content)
    writer.finish()
    return other


def test_machine_whose_cpu_lacks_what_the_image_may_use_refuses_it(slow: Stage) -> None:
    cut(slow, 2)
    file = slow.directory / "one.snapshot"
    slow.torpor("snapshot", "export", "one", str(file))
    elsewhere(slow)

    def of_a_newer_cpu(head: dict[str, Any]) -> None:
        head["pins"]["cpu_features"] += " avx1024 zz_new"

    refused = slow.torpor("snapshot", "import", str(altered(file, of_a_newer_cpu)), check=False)
    assert refused.returncode == 69
    told = " ".join(refused.stderr.split())
    assert "pins_unmet" in told
    assert "its CPU had avx1024 zz_new, which this one lacks" in told
    assert slow.rows("ls") == []

    def of_an_older_cpu(head: dict[str, Any]) -> None:
        head["pins"]["cpu_features"] = " ".join(sorted(head["pins"]["cpu_features"].split())[1:])

    slow.torpor("snapshot", "import", str(altered(file, of_an_older_cpu)))
    assert slow.node("resume", "one").wait(PATIENCE_SECONDS) == 0
    assert report_of(slow) == {**dict.fromkeys(COUNTERS, 5), "background": {"ticker": None}}
    check_nothing_left(slow)


@pytest.mark.parametrize(
    ("pin", "there", "told"),
    [
        ("runsc_sha256", "0" * 64, "that very binary is not here"),
        ("flags", "--platform=kvm", "runsc ran with --platform=kvm"),
        ("machine", "aarch64", "it is of a machine of kind aarch64"),
        ("driver", "firecracker", "the driver firecracker made it"),
    ],
)
def test_machine_that_runs_something_else_refuses_it(slow: Stage, pin: str, there: str, told: str) -> None:
    cut(slow, 1)
    file = slow.directory / "one.snapshot"
    slow.torpor("snapshot", "export", "one", str(file))
    elsewhere(slow)
    other = altered(file, lambda head: head["pins"].update({pin: there}))
    refused = slow.torpor("snapshot", "import", str(other), check=False)
    assert refused.returncode == 69
    assert told in " ".join(refused.stderr.split())
    assert slow.rows("ls") == []


COUNTING = """
import json, os, urllib.request
for number in range(1, 6):
    body = {"model": "scripted", "messages": [{"role": "user", "content": f"question {number}"}]}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
        assert json.load(answer)["choices"]
    print("answer", number, flush=True)
"""


def root_file_system(root: Path, release: str) -> Path:
    """A small one, on which the programs of this machine are mounted."""
    for name in ("dev", "etc", "proc", "sys", "tmp", "run", "root", "usr", "workspace"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/release").write_text(release)
    os.utime(root / "etc/release", (1, 1))
    return root


def test_machine_with_another_root_image_refuses_it_and_one_with_an_equal_one_resumes_it(slow: Stage) -> None:
    """Two real images at one path, as on two machines: the first of them, and another release of it."""
    image = root_file_system(slow.directory / "image", "release 1\n")
    other = root_file_system(slow.directory / "other-image", "release 2 is longer\n")
    (slow.project / "counting.py").write_text(COUNTING)
    node = slow.node(
        "run", "--name", "one", "--image", str(image), "--mount", "/usr", "--", "/usr/bin/python3", "counting.py"
    )
    log = slow.follow("one")
    log.wait("checkpoint.committed", 3)
    node.kill()
    node.wait()
    slow.kill_what_a_node_left()
    log.close()
    file = slow.directory / "one.snapshot"
    slow.torpor("snapshot", "export", "one", str(file))
    elsewhere(slow)
    image.rename(slow.directory / "first-image")
    other.rename(image)
    refused = slow.torpor("snapshot", "import", str(file), check=False)
    assert refused.returncode == 69
    told = " ".join(refused.stderr.split())
    assert "pins_unmet" in told
    assert "its root image differs at /: names, sizes or times of files are not the same" in told
    assert slow.rows("ls") == []
    image.rename(slow.directory / "other-image")
    root_file_system(image, "release 1\n")  # Made anew, as on another machine.
    slow.torpor("snapshot", "import", str(file))
    assert slow.node("resume", "one").wait(PATIENCE_SECONDS) == 0
    assert slow.torpor("output", "one").stdout == "".join(f"answer {number}\n" for number in range(1, 6))
    check_nothing_left(slow)


@pytest.mark.parametrize("point", ["import.stored", "import.committed"])
def test_killed_import_is_done_again_or_was_done(slow: Stage, point: str) -> None:
    cut(slow, 2)
    file = slow.directory / "one.snapshot"
    slow.torpor("snapshot", "export", "one", str(file))
    elsewhere(slow)
    killed = slow.torpor("snapshot", "import", str(file), check=False, TORPOR_CRASH_POINT=point)
    assert killed.returncode == -signal.SIGKILL
    if point == "import.stored":
        assert slow.rows("ls") == []
        slow.torpor("snapshot", "import", str(file))
        freed = json.loads(slow.torpor("collect", "--grace", "0", "--json").stdout)
        assert freed["manifests"] == 1
    assert json.loads(slow.torpor("verify", "--read-data", "--json").stdout)["problems"] == []
    assert slow.node("resume", "one").wait(PATIENCE_SECONDS) == 0
    assert report_of(slow) == {**dict.fromkeys(COUNTERS, 5), "background": {"ticker": None}}
    shutil.rmtree(slow.directory / "old home")
    check_nothing_left(slow)
