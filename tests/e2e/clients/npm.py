"""A program from npm in its pinned version: installed when a test first needs it, and never part of the project.

It goes to a directory that git ignores. Only programs that are whole without an install script come this way.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.stage import ROOT

NPM_SECONDS = 240
QUIET = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")


class NotInstallable(Exception):
    """Why this machine can't have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NpmProgram:
    """A package with its version, and the pattern below `node_modules` that finds its native program."""

    package: str
    version: str
    pattern: str

    @property
    def directory(self) -> Path:
        return ROOT / ".tools" / f"{self.package.rpartition('/')[2]}-{self.version}"

    def path(self) -> Path:
        """The program, installed if need be.

        Raises:
            NotInstallable: there is no npm, or the registry does not give it.
        """
        return self._found(self.directory) or self._install()

    def _install(self) -> Path:
        """Install beside the final place, then rename: two test runs at once do not meet, half an install is none."""
        npm = shutil.which("npm")
        if npm is None:
            raise NotInstallable("there is no npm on this machine")
        named = f"{self.package}@{self.version}"
        staged = self.directory.with_name(f"{self.directory.name}.{os.getpid()}")
        staged.mkdir(parents=True)
        try:
            finished = subprocess.run(
                [npm, "install", "--prefix", str(staged), *QUIET, named],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=NPM_SECONDS,
                check=False,
            )
            if finished.returncode != 0:
                raise NotInstallable(f"npm can't install {named}: {finished.stderr.strip()[-300:]}")
            if self._found(staged) is None:
                raise NotInstallable(f"{named} has no program for this machine")
            if not self.directory.exists():
                staged.rename(self.directory)
        except subprocess.TimeoutExpired as error:
            raise NotInstallable(f"npm took more than {NPM_SECONDS} s to install {named}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        program = self._found(self.directory)
        assert program is not None
        return program

    def _found(self, directory: Path) -> Path | None:
        return next(directory.glob(f"node_modules/{self.pattern}"), None)
