"""An image and the machine: the runsc that wrote it is found again, and a machine that lacks it says so and waits."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.test_sessions import COUNTERS, RUN_AGENT, report_of
from tests.stage import PATIENCE_SECONDS, SLOWER, Stage, stage

from torpor.core.pins import kept_name

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]


@pytest.fixture
def other_runsc(runsc: Path, scratch: Path) -> Path:
    """The same program with another hash: as a package's upgrade leaves it."""
    other = scratch / "other/runsc"
    other.parent.mkdir()
    other.write_bytes(runsc.read_bytes() + b"\0")
    other.chmod(0o755)
    return other


def kill_everything(made: Stage, node) -> None:
    node.kill()
    node.wait()
    made.kill_sandbox()


def kept_of(made: Stage) -> list[str]:
    return sorted(path.name for path in (made.home / "bin").glob("runsc-*"))


def made_by(made: Stage, incarnation: int) -> str:
    return next((made.home / "sessions").glob(f"*/incarnations/{incarnation}/made-by")).read_text()


def chosen(made: Stage) -> list[dict[str, object]]:
    return [event["data"] for event in made.events("one") if event["kind"] == "recovery.chosen"]


@pytest.fixture
def thoughtful(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A model that thinks for two seconds or more before it answers: a node that dies meanwhile leaves nothing torn."""
    with stage(scratch, runsc, ["--turns", "5", "--first-byte-seconds", f"{2 * SLOWER:.1f}"]) as made:
        yield made


def test_image_is_restored_by_the_runsc_that_wrote_it_though_another_one_is_installed(
    thoughtful: Stage, runsc: Path, other_runsc: Path
) -> None:
    """Adopted, checkpointed and restored by the new node: the sandbox and its images stay the old one's."""
    slow = thoughtful
    node = slow.node(*RUN_AGENT)
    log = slow.follow("one")
    log.wait("call.sent", 2)
    assert len(kept_of(slow)) == 1
    node.kill()
    node.wait()
    node = slow.node("resume", "one", TORPOR_RUNSC=str(other_runsc))
    log.wait("recovery.chosen", 2)
    log.wait("checkpoint.committed", log.count("checkpoint.committed") + 1)
    assert len(kept_of(slow)) == 2
    kill_everything(slow, node)
    node = slow.node("resume", "one", TORPOR_RUNSC=str(other_runsc))
    log.wait("recovery.chosen", 3)
    assert made_by(slow, 2) == hashlib.sha256(runsc.read_bytes()).hexdigest()
    assert node.wait(PATIENCE_SECONDS) == 0
    log.close()
    assert [data["mode"] for data in chosen(slow)] == ["boot", "adopt", "restore"]
    assert report_of(slow) == {**dict.fromkeys(COUNTERS, 5), "background": {"ticker": None}}
    check_nothing_left(slow)


def test_without_that_runsc_the_session_waits_for_it_or_for_a_word_to_give_up_its_memory(
    slow: Stage, other_runsc: Path
) -> None:
    node = slow.node("run", "--on-lost", "replay", *RUN_AGENT[1:])  # This agent does the same again.
    log = slow.follow("one")
    log.wait("call.answering", 3)
    kill_everything(slow, node)
    [kept] = (slow.home / "bin").glob("runsc-*")
    kept.rename(slow.directory / "away")
    before = slow.rows("ls")[0]
    refused = slow.torpor("resume", "one", check=False, TORPOR_RUNSC=str(other_runsc))
    assert refused.returncode == 69
    assert "pins_unmet" in refused.stderr
    assert f"TORPOR_HOME/bin/{kept.name}/runsc" in refused.stderr.replace("\n", " ")
    rejected = [event["data"] for event in slow.events("one") if event["kind"] == "recovery.rejected"]
    assert [data["mode"] for data in rejected] == ["restore"]
    assert "not here" in str(rejected[0]["reason"])
    assert slow.rows("ls")[0]["status"] == "recovering"
    assert before["status"] == "running"
    (slow.directory / "away").rename(kept)
    again = slow.node("resume", "one", TORPOR_RUNSC=str(other_runsc))
    log.wait("recovery.chosen", 2)
    kill_everything(slow, again)
    kept.rename(slow.directory / "away")
    assert slow.torpor("resume", "--boot", "one", TORPOR_RUNSC=str(other_runsc)).returncode == 0
    log.close()
    assert [data["mode"] for data in chosen(slow)] == ["boot", "restore", "boot"]
    assert json.dumps(report_of(slow)["memory"]) == "5"
    check_nothing_left(slow)


def test_name_of_a_kept_runsc_is_its_hash(quick: Stage, runsc: Path) -> None:
    quick.torpor("run", "--", "true")
    assert kept_of(quick) == [kept_name(hashlib.sha256(runsc.read_bytes()).hexdigest())]
