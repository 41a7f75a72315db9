"""The outside witness: an append-only record of every request that reached the scripted model, and how it ended.

One JSON line an event, each written with a single append, so the file survives the death of every process, the
server's own included; a new server on the same file goes on counting attempts.
"""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, Self, cast

SHAPE_ONLY = ("stream", "stream_options", "metadata")


def logical_digest(path: str, body: object) -> str:
    """What makes two sendings the same request: path and body, without what only shapes the answer."""
    fields: object = body
    if isinstance(body, dict):
        fields = {key: value for key, value in cast("dict[str, Any]", body).items() if key not in SHAPE_ONLY}
    text = json.dumps([path, fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Witness:
    """Counts in memory, and in a file when there is a path."""

    def __init__(self, path: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._attempts: Counter[str] = Counter()
        self._file: io.FileIO | None = None
        if path is not None:
            if path.exists():
                self._load(path)
            self._file = io.FileIO(path, "a")

    def _load(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            entry = json.loads(line)
            self.lines.append(entry)
            if entry["event"] == "start":
                self._attempts[entry["digest"]] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def start(self, *, digest: str, **facts: Any) -> tuple[int, int]:
        """Record a request as it arrives; gives its number in the file and its attempt number."""
        self._attempts[digest] += 1
        number = sum(1 for line in self.lines if line["event"] == "start") + 1
        attempt = self._attempts[digest]
        self._write({"event": "start", "number": number, "digest": digest, "attempt": attempt, **facts})
        return number, attempt

    def end(self, *, number: int, outcome: str, sent_bytes: int) -> None:
        """Record how it went: "complete", "aborted" (the client left), or the fault's name."""
        self._write({"event": "end", "number": number, "outcome": outcome, "sent_bytes": sent_bytes})

    def _write(self, entry: dict[str, Any]) -> None:
        self.lines.append(entry)
        if self._file is not None:
            self._file.write(json.dumps(entry).encode() + b"\n")

    @property
    def requests(self) -> int:
        return sum(1 for line in self.lines if line["event"] == "start")

    def report(self) -> dict[str, Any]:
        """Every logical request with its tries: what `GET /witness` answers."""
        return report(self.lines)


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    tries: dict[int, dict[str, Any]] = {}
    requests: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["event"] == "start":
            facts = {key: value for key, value in line.items() if key != "event"}
            tries[line["number"]] = {**facts, "outcome": "open", "sent_bytes": 0}
            requests.setdefault(line["digest"], []).append(tries[line["number"]])
        else:
            tries[line["number"]].update(outcome=line["outcome"], sent_bytes=line["sent_bytes"])
    return {
        "total": len(tries),
        "requests": [{"digest": digest, "attempts": len(all_), "tries": all_} for digest, all_ in requests.items()],
    }


def read_witness(path: Path) -> dict[str, Any]:
    """The report of a witness file, for a test whose server is dead."""
    return report([json.loads(line) for line in path.read_bytes().splitlines()])
