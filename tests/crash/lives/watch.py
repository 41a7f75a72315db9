"""The witness outside: which incarnations write into their workspaces at one time."""

import threading
import time
from collections import Counter
from pathlib import Path

LOOK_SECONDS = 0.25
"""Longer than a beat of the agent's takes, so that who runs has beaten between two looks."""


class Witness:
    """Sees which incarnations write into their workspaces, two looks in a row."""

    def __init__(self, sessions: Path) -> None:
        self._sessions = sessions
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.twice: list[str] = []
        self.looks = 0
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen: dict[Path, bytes] = {}
        before: set[Path] = set()
        while not self._over.wait(LOOK_SECONDS):
            began = time.monotonic()
            now = {path: _beat(path) for path in self._sessions.glob("*/incarnations/*/workspace/beat")}
            moved = {path for path, text in now.items() if text and seen.get(path, text) != text}
            running = Counter(path.parents[3].name for path in moved & before)
            self.seen.update(running.keys())
            self.twice += [name for name, count in running.items() if count > 1]
            # In a look that took long one may have died before the other was looked at.
            seen, before = now, moved if time.monotonic() - began < LOOK_SECONDS / 2 else set()
            self.looks += 1


def _beat(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # It goes with its incarnation.
