"""Programs that images are bound to: kept by their hashes, found by them; and what the processor can do."""

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from torpor.core.pins import RUNSC
from torpor.sandbox.cpu import cpu_features, features_in
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.drivers import GvisorDrivers
from torpor.sandbox.gvisor import Runsc
from torpor.sandbox.rootfs import RootImage
from torpor.sandbox.tools import find_kept, inspect_runsc, keep_runsc
from torpor.testing.clock import FakeClock

CLOCK = FakeClock()


def program(path: Path, version: str) -> Runsc:
    """A program that tells a version as runsc does; images are not its matter here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho runsc version release-{version}\n")
    path.chmod(0o755)
    return inspect_runsc(path, CLOCK)


def test_program_is_kept_once_by_its_hash_and_outlives_its_original(tmp_path: Path) -> None:
    first = program(tmp_path / "usr/runsc", "20240101.0")
    kept = keep_runsc(first, tmp_path / "bin")
    assert kept == keep_runsc(first, tmp_path / "bin")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == first.sha256
    second = program(tmp_path / "usr/runsc", "20250101.0")
    assert keep_runsc(second, tmp_path / "bin") != kept
    found = find_kept(tmp_path / "bin", first.sha256, CLOCK)
    assert found == Runsc(path=kept, version="release-20240101.0", sha256=first.sha256)
    assert sorted(path.name for path in kept.parent.iterdir()) == ["runsc"]


def test_helpers_of_a_release_are_kept_with_it(tmp_path: Path) -> None:
    made = program(tmp_path / "usr/runsc", "20260801.0")
    (tmp_path / "usr/gvisor-bin").mkdir()
    (tmp_path / "usr/gvisor-bin/helper").write_bytes(b"helper")
    assert (keep_runsc(made, tmp_path / "bin").parent / "gvisor-bin/helper").read_bytes() == b"helper"


@pytest.mark.user
def test_what_cannot_be_kept_for_want_of_space_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """Nor does it take the last of the space, which the event log on the same disk needs."""
    made = program(tmp_path / "usr/runsc", "20260801.0")
    (tmp_path / "usr/gvisor-bin").mkdir()
    (tmp_path / "usr/gvisor-bin/helper").write_bytes(bytes(3 << 20))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], check=True)
    try:
        with pytest.raises(OSError, match="No space left"):
            keep_runsc(made, small / "bin")
        assert list((small / "bin").iterdir()) == []
        (tmp_path / "usr/gvisor-bin/helper").write_bytes(bytes(1 << 20))
        assert keep_runsc(made, small / "bin").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_cannot_be_copied_leaves_nothing(tmp_path: Path) -> None:
    made = program(tmp_path / "usr/runsc", "20260801.0")
    (tmp_path / "usr/gvisor-bin").mkdir()
    (tmp_path / "usr/gvisor-bin/helper").symlink_to("nowhere")
    with pytest.raises(OSError, match="helper"):
        keep_runsc(made, tmp_path / "bin")
    assert list((tmp_path / "bin").iterdir()) == []


def test_kept_program_that_was_changed_or_is_gone_is_not_found(tmp_path: Path) -> None:
    made = program(tmp_path / "usr/runsc", "20240101.0")
    kept = keep_runsc(made, tmp_path / "bin")
    kept.write_text("#!/bin/sh\necho runsc version release-20240101.0 # changed\n")
    assert find_kept(tmp_path / "bin", made.sha256, CLOCK) is None
    kept.write_bytes(b"no program")
    assert find_kept(tmp_path / "bin", made.sha256, CLOCK) is None
    shutil.rmtree(kept.parent)
    assert find_kept(tmp_path / "bin", made.sha256, CLOCK) is None


def plan(directory: Path) -> SandboxPlan:
    image = RootImage(name="host", root="/", mounts=(), path="/bin", digest="00")
    return SandboxPlan(
        sandbox_id="x-1", directory=directory, image=image, workspace=directory / "w", init_directory=directory
    )


def test_image_and_sandbox_find_the_driver_that_made_them(tmp_path: Path) -> None:
    old, new = program(tmp_path / "a/runsc", "20240101.0"), program(tmp_path / "b/runsc", "20250101.0")
    keep_runsc(old, tmp_path / "bin")
    drivers = GvisorDrivers(runsc=new, tools_directory=tmp_path / "bin", state_directory=tmp_path / "s", clock=CLOCK)
    assert drivers.present.runsc == new
    assert drivers.for_image({RUNSC: old.sha256}).runsc.sha256 == old.sha256
    assert drivers.for_image({RUNSC: old.sha256}) is drivers.for_image({RUNSC: old.sha256})
    for pins in ({}, {RUNSC: new.sha256}, {RUNSC: "00" * 32}):
        assert drivers.for_image(pins) is drivers.present
    assert drivers.of_sandbox(plan(tmp_path)) is drivers.present
    (tmp_path / "made-by").write_text(old.sha256)
    assert drivers.of_sandbox(plan(tmp_path)).runsc.sha256 == old.sha256


INTEL = "processor\t: 0\nflags\t\t: fpu sse2 avx512f rep_good cpuid ibrs xsave{}\nbugs\t\t: spectre_v1\n"


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (INTEL.format("c") + INTEL.format("c"), "avx512f fpu sse2 xsavec"),
        (INTEL.format("c") + INTEL.format(""), "avx512f fpu sse2"),
        ("Features\t: fp asimd sve\n", "asimd fp sve"),
        ("processor\t: 0\n", ""),
    ],
)
def test_features_are_what_programs_can_execute_on_every_processor(text: str, features: str) -> None:
    assert features_in(text) == features


def test_this_machine_has_features() -> None:
    assert len(cpu_features().split()) > 5


def test_what_a_killed_copier_left_is_swept_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    for name in ("runsc-0123456789abcdef.4711", "runsc-0123456789abcdef.living"):
        (tools / name / "gvisor-bin").mkdir(parents=True)
        (tools / name / "runsc").write_bytes(b"half of a program")
    living = os.open(tools / "runsc-0123456789abcdef.living", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    kept = keep_runsc(program(tmp_path / "runsc", "one"), tools)
    assert sorted(path.name for path in tools.iterdir()) == ["runsc-0123456789abcdef.living", kept.parent.name]
    os.close(living)
    keep_runsc(program(tmp_path / "runsc", "one"), tools)
    assert [path.name for path in tools.iterdir()] == [kept.parent.name]
