"""Puts a session into the deepest sleep: nothing of it is left on the machine but what the store has."""

import itertools
import json
import os

from tests.stage import Log, Stage

DEEPEST = "image_cache_bytes_max = 0\n[hibernate]\nlinger_seconds = {linger}\npaused_seconds = 0\nready_seconds = 0\n"


def sleep_deeply(stage: Stage, *, linger: float | str) -> None:
    """What the stage's sessions keep when they sleep: nothing. `linger` as in config.toml."""
    stage.home.mkdir(exist_ok=True)
    (stage.home / "config.toml").write_text(DEEPEST.format(linger=json.dumps(linger)))


def wait_until_asleep(log: Log) -> None:
    """However often it was kept awake before."""
    changes = itertools.count(1)
    while log.wait("session.status", next(changes))["data"]["to"] != "asleep":
        continue


def forget_all_but_the_store(stage: Stage, session: str) -> None:
    """End the daemon of a sleeping session, and see that there is nothing but its rows and its snapshots."""
    stage.torpor("down")
    assert stage.sandbox_pids() == []
    [row] = [row for row in stage.rows("ls") if row["name"] == session]
    assert (row["status"], row["tier"], row["node"]) == ("asleep", "store", "")
    staged = {name for _, directories, _ in os.walk("/dev/shm") for name in directories}
    assert row["session"] not in staged
