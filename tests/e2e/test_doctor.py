"""Every point of `torpor doctor` fails when what it looks at is broken for real, and says what to do about it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stage import TORPOR, Stage

from torpor.sandbox.cgroups import CgroupV1, cgroup_for

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(300)]
PRIVATE = ("unshare", "-m", "--propagation", "private", "sh", "-c")


@pytest.fixture
def bare(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A TORPOR_HOME without a model server."""
    (scratch / "project").mkdir()
    environment = {**os.environ, "TORPOR_HOME": str(scratch / "home"), "TORPOR_RUNSC": str(runsc)}
    made = Stage(directory=scratch, environment=environment)
    yield made
    made.close()


def examine(made: Stage, **variables: str) -> tuple[int, dict[str, dict[str, object]]]:
    """Exit status, and the findings by what was looked at."""
    finished = made.torpor("doctor", "--json", check=False, **variables)
    assert "Traceback" not in finished.stderr, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    return finished.returncode, {line["check"]: line for line in lines if "check" in line}


def in_private_mounts(made: Stage, command: str) -> Stage:
    """The same stage where a shell command has changed what is mounted, for nobody else."""
    words = (*PRIVATE, f'{command} && exec "$@"', "sh", *TORPOR)
    return Stage(directory=made.directory, environment=made.environment, command=words)


def wrapped(made: Stage, runsc: Path, broken: str) -> str:
    """The machine's runsc under a version that is driven by commands only, one of which is broken."""
    script = made.directory / "wrapped-runsc"
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo runsc version release-20250101.0; exit 0; }\n'
        f'case " $* " in *" {broken} "*) echo "{broken}: this kernel says no" >&2; exit 128;; esac\n'
        f'exec {runsc} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_fit_machine_passes_every_point(bare: Stage) -> None:
    status, points = examine(bare)
    order = ["snapshot store", "runsc", "privilege", "memory for images", "swap", "memory limits"]
    order += ["boot", "checkpoint", "kill", "restore", "relay"]
    assert (status, list(points)) == (0, order)
    assert [name for name, point in points.items() if not point["ok"] and name != "swap"] == []
    assert list((bare.home).glob("selftest-*")) == list(Path("/dev/shm").glob("torpor-selftest-*")) == []


def test_without_runsc_the_remedy_is_setup_and_the_rest_is_still_looked_at(bare: Stage) -> None:
    status, points = examine(bare, TORPOR_RUNSC="", PATH="/usr/bin")
    assert status == 69
    assert "torpor setup" in str(points["runsc"]["remedy"])
    assert "privilege" in points


def test_debians_2022_runsc_is_refused_in_a_sentence_that_says_why(bare: Stage) -> None:
    old = bare.directory / "old-runsc"
    old.write_text("#!/bin/sh\necho runsc version 0.0~20221219.0\n")
    old.chmod(0o755)
    status, points = examine(bare, TORPOR_RUNSC=str(old))
    assert status == 69
    assert "has no systrap platform" in str(points["runsc"]["detail"])
    assert "torpor setup" in str(points["runsc"]["remedy"])


def test_images_must_be_in_memory(bare: Stage) -> None:
    status, points = examine(in_private_mounts(bare, "mount --bind /usr /dev/shm"))
    assert status == 69
    assert "is not in memory" in str(points["memory for images"]["detail"])
    assert "mount -t tmpfs" in str(points["memory for images"]["remedy"])


def test_images_need_room(bare: Stage) -> None:
    status, points = examine(in_private_mounts(bare, "mount -t tmpfs -o size=64m tmpfs /dev/shm"))
    assert status == 69
    assert "64 MiB free" in str(points["memory for images"]["detail"])
    assert "remount,size=" in str(points["memory for images"]["remedy"])


@pytest.mark.skipif(not isinstance(cgroup_for("probe"), CgroupV1), reason="cgroups of version 1 can't be made here")
def test_it_says_whether_a_cgroup_stops_what_takes_memory_too_fast(bare: Stage) -> None:
    _, points = examine(bare)
    assert "a cgroup (version 1) stops what an agent takes faster" in str(points["memory limits"]["detail"])
    memory = "/sys/fs/cgroup/memory"
    read_only = f"mount --bind {memory} {memory} && mount -o remount,bind,ro {memory}"
    _, points = examine(in_private_mounts(bare, read_only))
    assert "no cgroup holds what an agent takes faster" in str(points["memory limits"]["detail"])
    assert points["memory limits"]["ok"] is True


def test_swap_is_a_warning_and_no_obstacle(bare: Stage) -> None:
    swaps = bare.directory / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n/dev/sdb2 partition 1000 0 -2\n")
    status, points = examine(in_private_mounts(bare, f"mount --bind {swaps} /proc/swaps"))
    assert status == 0
    assert points["swap"]["ok"] is False
    assert "encrypted swap" in str(points["swap"]["remedy"])


@pytest.mark.parametrize(
    ("broken", "point"),
    [("create", "boot"), ("start", "boot"), ("checkpoint", "checkpoint"), ("restore", "restore")],
)
def test_a_refusal_of_runsc_is_told_at_the_point_that_it_broke(
    bare: Stage, runsc: Path, broken: str, point: str
) -> None:
    status, points = examine(bare, TORPOR_RUNSC=wrapped(bare, runsc, broken))
    assert status == 69
    assert list(points)[-1] == point
    assert "this kernel says no" in str(points[point]["detail"])
    assert points[point]["remedy"]
    assert bare.sandbox_pids() == []


def test_a_runsc_that_is_driven_by_commands_alone_passes_too(bare: Stage, runsc: Path) -> None:
    status, points = examine(bare, TORPOR_RUNSC=wrapped(bare, runsc, "nothing"))
    assert (status, list(points)[-1]) == (0, "relay")
    assert "20260330" in str(points["closed watches"]["remedy"])


def test_a_sandbox_that_does_not_relay_is_told_so(bare: Stage, runsc: Path) -> None:
    """It dies in the moment in which it is restored, before it answers what was asked before."""
    script = Path(wrapped(bare, runsc, "nothing"))
    kill = f'pkill -9 -f "runsc-sandbox .*{bare.home}/.*selftest-2-"'
    dies = f'case " $* " in *" restore "*) {runsc} "$@"; status=$?; {kill}; exit $status;; esac'
    lines = script.read_text().splitlines()
    script.write_text("\n".join([*lines[:2], dies, *lines[2:], ""]))
    status, points = examine(bare, TORPOR_RUNSC=str(script))
    assert status == 69
    assert list(points)[-1] in {"restore", "relay"}
    assert points[list(points)[-1]]["remedy"]
