"""Chromium's headless shell from Debian's packages, unpacked below `.tools` when a test first needs it.

Debian keeps one version at a time, so this one is not pinned. The list is of the libraries that a server lacks mostly.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.clients.npm import NotInstallable
from tests.stage import ROOT

PACKAGES = (
    *("chromium-headless-shell", "chromium-common", "libasyncns0", "libdouble-conversion3", "libflac12"),
    *("libharfbuzz-subset0", "libminizip1", "libmp3lame0", "libmpg123-0", "libogg0", "libopenh264-7", "libopenjp2-7"),
    *("libopus0", "libpulse0", "libsndfile1", "libvorbis0a", "libvorbisenc2", "libxnvctrl0"),
)
APT_SECONDS = 240


@dataclass(frozen=True, slots=True)
class Chromium:
    """Where it is unpacked."""

    directory: Path

    @property
    def program(self) -> Path:
        return self.directory / "usr/lib/chromium/chromium-headless-shell"

    @property
    def libraries(self) -> str:
        """For LD_LIBRARY_PATH."""
        [libraries] = self.directory.glob("usr/lib/*-linux-gnu")
        return f"{libraries}:{libraries}/pulseaudio"


def chromium() -> Chromium:
    """The browser, unpacked if need be.

    Raises:
        NotInstallable: there is no apt, or Debian does not give it, or it does not start on this machine.
    """
    made = Chromium(ROOT / ".tools" / "chromium-debian")
    if not made.directory.exists():
        _unpack(made.directory)
    _run([str(made.program), "--version"], LD_LIBRARY_PATH=made.libraries)
    return made


def _unpack(directory: Path) -> None:
    """Unpack beside the final place, then rename: two test runs at once do not meet, half a browser is none."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotInstallable("there is no apt on this machine")
    packed = directory.with_name(f"{directory.name}.{os.getpid()}.packed")
    staged = directory.with_name(f"{directory.name}.{os.getpid()}")
    packed.mkdir(parents=True)
    try:
        _run(["apt-get", "download", *PACKAGES], directory=packed)
        for package in packed.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(package), str(staged)])
        if not directory.exists():
            staged.rename(directory)
    finally:
        shutil.rmtree(packed)
        shutil.rmtree(staged, ignore_errors=True)


def _run(command: Sequence[str], *, directory: Path | None = None, **variables: str) -> None:
    try:
        subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(f"{command[0]} took more than {APT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise NotInstallable(f"{command[0]} failed: {error.stderr.strip()[-300:]}") from error
