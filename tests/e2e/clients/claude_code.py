"""Claude Code from npm, in its pinned version: installed when a test first needs it, and never part of the project.

Its licence is not an open one, so it is fetched to a directory that git ignores. Version 2.1.197 installs with Node 20;
the program itself is a native one in a package of its own, so no install script has to run.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.stage import ROOT

PACKAGE = "@anthropic-ai/claude-code@2.1.197"
DIRECTORY = ROOT / ".tools" / "claude-code-2.1.197"
NPM_SECONDS = 240
QUIET = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")
ENVIRONMENT = {"DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


class NotInstallable(Exception):
    """Why this machine can't have it."""


def claude_code() -> Path:
    """The program, installed if need be.

    Raises:
        NotInstallable: there is no npm, or the registry does not give it.
    """
    return _program(DIRECTORY) or _install()


def _install() -> Path:
    """Install beside the final place, then rename: two test runs at once do not meet, and half an install is none."""
    npm = shutil.which("npm")
    if npm is None:
        raise NotInstallable("there is no npm on this machine")
    staged = DIRECTORY.with_name(f"{DIRECTORY.name}.{os.getpid()}")
    staged.mkdir(parents=True)
    try:
        finished = subprocess.run(
            [npm, "install", "--prefix", str(staged), *QUIET, PACKAGE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NPM_SECONDS,
            check=False,
        )
        if finished.returncode != 0:
            raise NotInstallable(f"npm can't install {PACKAGE}: {finished.stderr.strip()[-300:]}")
        if _program(staged) is None:
            raise NotInstallable(f"{PACKAGE} has no program for this machine")
        if not DIRECTORY.exists():
            staged.rename(DIRECTORY)
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(f"npm took more than {NPM_SECONDS} s to install {PACKAGE}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    program = _program(DIRECTORY)
    assert program is not None
    return program


def _program(directory: Path) -> Path | None:
    return next(directory.glob("node_modules/@anthropic-ai/claude-code-*/claude"), None)
