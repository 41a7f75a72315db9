"""Where the master key is: a file of this TORPOR_HOME, or the environment. Nothing here knows what it wraps.

The file's names, and what a crash leaves of them, are in docs/keys.md. A key goes from here to memory and nowhere else.
"""

import base64
import binascii
import contextlib
import fcntl
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torpor.core.crash import crash_point
from torpor.core.errors import InvalidInput, MachineUnfit
from torpor.core.ids import KeyId
from torpor.snapshots.atomic import create_atomic, sync_directory, write_atomic
from torpor.snapshots.cipher import KEY_BYTES, Key, key_of, new_key

VARIABLE, NEXT_VARIABLE = "TORPOR_MASTER_KEY", "TORPOR_MASTER_KEY_NEXT"


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterKey:
    """A master key, and what to call the place that it is in."""

    key: Key
    place: str


class MasterKeys:
    """The master keys that can be had."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._file, self._next_file = directory / "master", directory / "master.next"
        self._environment = environment

    @property
    def in_environment(self) -> bool:
        """Whether it is the user's to keep: then there is no file."""
        return bool(self._environment.get(VARIABLE))

    def with_id(self, key_id: KeyId) -> MasterKey:
        """The master key that wrapped what is there.

        Raises:
            MachineUnfit: `master_key_missing`, `master_key_wrong`.
            InvalidInput: `master_key_unusable`.
        """
        found = self._found()
        for master in found:
            if master.key.id == key_id:
                return master
        if not found:
            raise MachineUnfit(
                "master_key_missing",
                f"cannot read the snapshots: the master key {key_id} is not there",
                hint=f"Put your copy of it back to {self._file}, or into {VARIABLE}.",
            )
        raise MachineUnfit(
            "master_key_wrong",
            f"cannot read the snapshots: they take the master key {key_id}, {found[0].place} is {found[0].key.id}",
            hint=f"Put your copy of that one to {self._file}, or into {VARIABLE}.",
        )

    def first(self) -> MasterKey:
        """For a database in which nothing is wrapped yet: the one that is there, else a new one."""
        if not self.in_environment:
            self._make_directory()
            create_atomic(self._file, _text(new_key()))
            crash_point("keys.master_made")
        return self._found()[0]

    def make_next(self, present: MasterKey) -> MasterKey:
        """The one to change to. Hold the lock.

        Raises:
            InvalidInput: `master_key_in_environment`, `master_key_unusable`.
        """
        given = self._environment.get(NEXT_VARIABLE)
        if given:
            following = _parse(given, NEXT_VARIABLE)
            if following.key.id == present.key.id:
                raise _unusable(NEXT_VARIABLE, "it is the present one")
            return following
        if self.in_environment:
            raise InvalidInput(
                "master_key_in_environment",
                f"cannot rotate keys: the master key is in {VARIABLE}, which nobody but you can change",
                hint=f"Give the new one in {NEXT_VARIABLE}, then put it into {VARIABLE}.",
            )
        if present.place == str(self._next_file):
            self.take_next(present)
        following = MasterKey(key=new_key(), place=str(self._next_file))
        self._make_directory()
        write_atomic(self._next_file, _text(following.key))
        crash_point("keys.next_made")
        return following

    def take_next(self, following: MasterKey) -> MasterKey:
        """Everything is wrapped by it: drop the one before. Hold the lock."""
        if following.place == str(self._next_file):
            self._next_file.rename(self._file)
            following = replace(following, place=str(self._file))
        else:
            for file in (self._file, self._next_file):
                file.unlink(missing_ok=True)
        sync_directory(self._directory)
        return following

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """One rotation at a time; let go of by the death of its process too."""
        self._make_directory()
        with (self._directory / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _found(self) -> list[MasterKey]:
        if self.in_environment:
            return [_parse(self._environment[VARIABLE], VARIABLE)]
        return [found for file in (self._file, self._next_file) if (found := _read(file)) is not None]

    def _make_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_directory(self._directory.parent)


def _read(file: Path) -> MasterKey | None:
    try:
        if file.stat().st_mode & 0o077:
            raise _unusable(str(file), "others than its owner may read it", hint=f"chmod 600 {file}")
        text = file.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(str(file), getattr(error, "strerror", None) or "it is no text") from error
    return _parse(text, str(file))


def _parse(text: str, place: str) -> MasterKey:
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _unusable(place, "it is not base64") from error
    if len(secret) != KEY_BYTES:
        raise _unusable(place, f"it has {len(secret)} bytes, not {KEY_BYTES}")
    return MasterKey(key=key_of(secret), place=place)


def _text(key: Key) -> bytes:
    return base64.b64encode(key.secret) + b"\n"


def _unusable(place: str, reason: str, *, hint: str = "") -> InvalidInput:
    return InvalidInput("master_key_unusable", f"cannot use the master key in {place}: {reason}", hint=hint)
