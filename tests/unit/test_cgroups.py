"""Where a sandbox's cgroup can be made, in copies of what the kernel shows of both versions, and what is read of it."""

import os
from pathlib import Path

import pytest

from torpor.sandbox.cgroups import Cgroup, CgroupV1, CgroupV2, cgroup_at, cgroup_for

SCOPE = "user.slice/user-0.slice/session-1.scope"


def machine(scratch: Path, *mounts: str, own: str) -> Path:
    """A copy of /proc in which file systems are mounted: `kind options [root]`, below `scratch/KIND`."""
    self = scratch / "proc/self"
    self.mkdir(parents=True)
    lines = []
    for mount in mounts:
        kind, options, root = (*mount.split(), "/")[:3]
        (scratch / kind).mkdir(exist_ok=True)
        lines.append(f"30 23 0:26 {root} {scratch / kind} rw,nosuid shared:4 - {kind} {kind} {options}\n")
    (self / "mountinfo").write_text("".join(lines))
    (self / "cgroup").write_text(own)
    return scratch / "proc"


def unified(scratch: Path, own: str, limited: dict[str, str]) -> Path:
    """Version 2, with cgroups down to one's own; `limited` are the controllers that the children of each have."""
    proc = machine(scratch, "cgroup2 rw,nsdelegate", own=f"0::/{own}\n")
    above = scratch / "cgroup2"
    for name in ("", *Path(own).parts):
        above /= name
        above.mkdir(exist_ok=True)
        (above / "cgroup.controllers").write_text("cpu memory pids\n")
        (above / "cgroup.procs").write_text("")
        (above / "cgroup.subtree_control").write_text(limited.get(name, "") + "\n")
        if name:
            (above / "memory.max").write_text("max\n")
    return proc


def test_under_version_1_it_is_made_in_the_nodes_own(scratch: Path) -> None:
    own = "5:pids:/\n4:memory:/jobs/one\n0::/\n"
    proc = machine(scratch, "cgroup2 rw", "cgroup rw,memory", own=own)
    (scratch / "cgroup/jobs/one").mkdir(parents=True)
    assert cgroup_for("x-1", proc) == CgroupV1(path=scratch / "cgroup/jobs/one/torpor-x-1")


def test_under_version_1_in_a_container_the_path_begins_where_the_mount_does(scratch: Path) -> None:
    proc = machine(scratch, "cgroup rw,memory /docker/abc", own="4:memory:/docker/abc/inner\n")
    (scratch / "cgroup/inner").mkdir()
    assert cgroup_for("x-1", proc) == CgroupV1(path=scratch / "cgroup/inner/torpor-x-1")


def test_who_is_not_where_the_hierarchy_is_mounted_from_gets_none(scratch: Path) -> None:
    proc = machine(scratch, "cgroup rw,memory /docker/abc", "cgroup rw,pids", own="4:memory:/elsewhere\n5:pids:/\n")
    assert cgroup_for("x-1", proc) is None


def test_under_version_2_it_is_made_beside_the_nodes_own_where_children_have_limits(scratch: Path) -> None:
    proc = unified(scratch, SCOPE, {"": "cpu memory", "user.slice": "memory pids", "user-0.slice": "memory"})
    made = cgroup_for("x-1", proc)
    assert made == CgroupV2(path=scratch / "cgroup2/user.slice/user-0.slice/torpor-x-1")


def test_under_version_2_the_nearest_may_be_further_up(scratch: Path) -> None:
    proc = unified(scratch, SCOPE, {"": "memory", "user.slice": "memory", "user-0.slice": "pids"})
    made = cgroup_for("x-1", proc)
    assert made == CgroupV2(path=scratch / "cgroup2/user.slice/torpor-x-1")


def test_nothing_is_taken_out_of_a_limit_that_somebody_set(scratch: Path) -> None:
    proc = unified(scratch, SCOPE, {"": "memory", "user.slice": "memory"})
    (scratch / "cgroup2" / SCOPE / "memory.max").write_text("1073741824\n")
    assert cgroup_for("x-1", proc) is None


def test_without_the_controller_there_is_none(scratch: Path) -> None:
    assert cgroup_for("x-1", unified(scratch, SCOPE, {"": "cpu pids", "user.slice": "cpu"})) is None


def test_without_any_hierarchy_there_is_none(scratch: Path) -> None:
    assert cgroup_for("x-1", scratch / "nothing") is None
    assert cgroup_for("x-1", machine(scratch, "tmpfs rw", own="0::/\n")) is None


@pytest.mark.user
def test_who_may_write_nowhere_gets_none(scratch: Path) -> None:
    proc = unified(scratch, SCOPE, {"": "memory", "user.slice": "memory", "user-0.slice": "memory"})
    scratch.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setresuid(61234, 61234, 61234)
        os._exit(0 if cgroup_for("x-1", proc) is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def files(kind: type[Cgroup], scratch: Path, *, events: str, hits: str) -> Cgroup:
    made = kind(path=scratch / "one")
    assert made.make()
    (made.path / made.USED).write_text("1000000\n")
    (made.path / "memory.stat").write_text("anon 700000\nfile 90000\ninactive_file 30000\nactive_file 20000\n")
    (made.path / made.EVENTS).write_text(events)
    (made.path / "memory.failcnt").write_text(hits)
    return made


@pytest.mark.parametrize(
    ("kind", "events", "hits", "killed"),
    [
        (CgroupV1, "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n", "12\n", False),
        (CgroupV1, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", "12\n", True),
        (CgroupV1, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", "0\n", False),
        (CgroupV2, "low 0\nhigh 0\nmax 12\noom 0\noom_kill 0\noom_group_kill 0\n", "", False),
        (CgroupV2, "low 0\nhigh 0\nmax 12\noom 1\noom_kill 9\noom_group_kill 1\n", "", True),
        (CgroupV2, "low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\noom_group_kill 0\n", "", False),
    ],
)
def test_a_kill_counts_if_the_wall_was_reached_and_not_if_the_machine_was_short(
    scratch: Path, kind: type[Cgroup], events: str, hits: str, killed: bool
) -> None:
    made = files(kind, scratch, events=events, hits=hits)
    assert made.has_killed() is killed
    assert made.held_bytes() == 950000
    made.set_wall(5000)
    assert (made.path / made.WALL).read_text() == "5000"
    made.set_wall(None)
    assert (made.path / made.WALL).read_text() == made.NO_WALL


def test_a_noted_one_is_known_by_its_files_and_may_be_gone(scratch: Path) -> None:
    (scratch / "cgroup.controllers").touch()
    assert cgroup_at(scratch) == CgroupV2(path=scratch)
    gone = cgroup_at(scratch / "gone")
    assert (gone.has_killed(), gone.held_bytes(), gone.remove()) == (False, 0, True)
