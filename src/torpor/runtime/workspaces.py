"""A session's workspace as people see it: seeded from a directory of theirs, brought back, compared.

What is refused and left out at seeding is SECURITY section 2: whatever is in a user's home is precious.
"""

import contextlib
import os
from pathlib import Path

from torpor.core.errors import InvalidInput

CREDENTIAL_FILES = frozenset({b".git-credentials", b".netrc", b".pypirc", b".npmrc"})
CREDENTIAL_PATHS = (b".git/credentials", b".ssh/", b".aws/", b".gnupg/", b".config/gcloud/")


def check_source(source: Path, home_directory: Path, torpor_home: Path) -> Path:
    """Refuse to take what holds far more than a workspace.

    Raises:
        InvalidInput: `workspace_missing` or `workspace_refused`.
    """
    real = source.resolve()
    if not real.is_dir():
        raise InvalidInput("workspace_missing", f"cannot use workspace {str(source)!r}: it is no directory")
    if real in (Path("/"), home_directory.resolve()) or torpor_home.resolve().is_relative_to(real):
        raise InvalidInput(
            "workspace_refused",
            f"cannot use workspace {str(source)!r}: it is the root, the home directory, or holds Torpor's own data",
            hint="Start in a project directory, or name one with --workspace DIR.",
        )
    return real


def check_size(source: Path, environments: tuple[bytes, ...], bytes_max: int) -> None:
    """Refuse a directory that is surely not meant to be copied; looks no further once it is known to be too large.

    Raises:
        InvalidInput: `workspace_needs_consent`.
    """
    size = 0
    directories = [os.fsencode(source)]
    while directories:
        directory = directories.pop()
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if left_out(os.path.relpath(entry.path, os.fsencode(source)), environments):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    size += entry.stat(follow_symlinks=False).st_size
                if size > bytes_max:
                    raise InvalidInput(
                        "workspace_needs_consent",
                        f"cannot copy workspace {str(source)!r} unasked: it has more than {bytes_max / 1e9:.1f} GB",
                        hint="Start in a smaller directory, say --yes, or set workspace_bytes_max in config.toml.",
                    )


def left_out(path: bytes, environments: tuple[bytes, ...]) -> bool:
    """Whether a path below the source is not copied: VCS and cloud credentials, and Python environments in use.

    An environment in use is shown read-only where it lies; a copy of it would not even work.
    """
    name = path.rpartition(b"/")[2]
    if name in CREDENTIAL_FILES or path in environments:
        return True
    return any(part in path + b"/" for part in CREDENTIAL_PATHS)
