"""Planted keys of every source: each reaches its own provider, and is nowhere that a sandbox or a reader can see."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zstandard
from tests.crash.witness import check_nothing_left
from tests.e2e.clients.key_search import FRAME_MAGIC, files_with, snapshots_with
from tests.stage import PATIENCE_SECONDS, Stage, model_server, stage

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(600)]

MARK = "-0123456789abcdefghijklmnop"
"""The end of every planted key; nothing else says it."""
VALUE, COMMAND, VARIABLE, HOME_FILE, UNRELATED = (
    f"sk-planted-{name}{MARK}" for name in ("value", "command", "variable", "home", "unrelated")
)
AGENT = """
import json, os, subprocess, sys, time, urllib.error, urllib.request

def ask(url, **headers):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": url}]}
    headers = {"content-type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            print(answer.status, dict(answer.headers), answer.read().decode(), flush=True)
    except urllib.error.HTTPError as error:
        print(error.code, dict(error.headers), error.read().decode(), flush=True)

print(dict(os.environ), flush=True)
command = "cat " + sys.argv[1] + "; grep -rhs sk-planted- /etc /home /root /run /tmp /var; cat /proc/*/environ"
print(subprocess.run(command, shell=True, capture_output=True, text=True, errors="replace"), flush=True)
ask(os.environ["OPENAI_BASE_URL"] + "/chat/completions", authorization="Bearer of-the-agent")
ask(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", **{"x-api-key": "of-the-agent"})
ask(os.environ["OPENAI_BASE_URL"] + "/files")
ask(os.environ["HTTP_PROXY"] + "/v1/chat/completions")
print("asked", flush=True)
while not os.path.exists("/workspace/gate"):
    time.sleep(0.1)
"""


def texts_of(value: object) -> Iterator[bytes]:
    data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else b""
    yield data
    if data.startswith(FRAME_MAGIC):
        yield zstandard.ZstdDecompressor().decompressobj().decompress(data)


def rows_with(secret: str, database: Path) -> list[str]:
    """Tables in which a value holds the secret, as it is or unpacked."""
    found: list[str] = []
    with closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        for table in tables:
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()
            if any(secret.encode() in text for row in rows for value in row for text in texts_of(value)):
                found.append(table)
    return found


def places_with_a_key(made: Stage) -> list[str]:
    """In all that is kept: the home but its config.toml, the node's log, images, snapshots, the database's rows."""
    kept = [path for path in files_with(MARK, made.directory) if path != "home/config.toml"]
    for staged in Path("/dev/shm").glob(f"torpor-*/{made.rows('ls')[0]['session']}"):
        kept += files_with(MARK, staged)
    return kept + rows_with(MARK, made.home / "torpor.db") + snapshots_with(MARK, made.home)


def check_processes(made: Stage) -> None:
    """No process of a sandbox has a key in its environment or its command, or may dump core."""
    pids = made.sandbox_pids()
    assert pids
    for pid in pids:
        process = Path("/proc", str(pid))
        told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        assert MARK.encode() not in told
        [limit] = [line for line in (process / "limits").read_text().splitlines() if "core file" in line]
        assert limit.split()[4] == "0"


@pytest.mark.parametrize("source", ["value", "variable"])
def test_no_planted_key_is_anywhere_but_at_its_provider(
    scratch: Path, tmp_path: Path, runsc: Path, source: str
) -> None:
    mine = {"value": VALUE, "variable": VARIABLE}[source]
    (tmp_path / "anthropic").mkdir()
    (tmp_path / "key").write_text(COMMAND + "\n")
    planted = Path.home() / f".torpor-planted-{os.getpid()}"
    planted.write_text(HOME_FILE)
    try:
        with (
            stage(scratch, runsc, ["--script", "leaky"]) as made,
            model_server(tmp_path / "anthropic", ["--script", "leaky"], key=COMMAND) as (anthropic, _),
            model_server(tmp_path, ["--script", "leaky"], key=mine) as (openai, _),
        ):
            key = f'key = "{VALUE}"' if source == "value" else 'key_env = "PLANTED_VARIABLE"'
            made.home.mkdir(mode=0o700)
            (made.home / "config.toml").write_text(
                f'[upstreams.openai]\nbase_url = "{openai}/v1"\n{key}\n'
                f'[upstreams.anthropic]\nbase_url = "{anthropic}"\nkey_command = ["cat", "{tmp_path / "key"}"]\n'
            )
            (made.home / "config.toml").chmod(0o600)
            variables = {"PLANTED_VARIABLE": VARIABLE, "UNRELATED_TOKEN": UNRELATED}
            (made.project / "snoop.py").write_text(AGENT)
            command = ("-v", "run", "--name", "one", "--", sys.executable, "snoop.py", str(planted))
            node = made.node(*command, **variables)
            log = made.follow("one")
            log.wait("checkpoint.committed", 3)
            log.wait("call.delivered", 2)
            made.torpor("checkpoint", "one")
            check_processes(made)
            assert places_with_a_key(made) == []
            gate = next((made.home / "sessions").glob("*/incarnations/1/workspace")) / "gate"
            gate.write_text("go\n")
            assert node.wait(PATIENCE_SECONDS) == 0
            log.close()
            output = made.torpor("output", "one").stdout
            assert output.count("200 {") == 2, output
            assert output.count("attempt 1 key ") == 2
            assert "path_unknown" in output
            assert "egress_denied" in output
            told = output + made.torpor("log", "one", "--json").stdout + made.torpor("show", "one").stdout
            assert MARK not in told
            assert "of-the-agent" not in made.torpor("log", "one", "--json").stdout
            assert places_with_a_key(made) == []
            check_nothing_left(made)
    finally:
        planted.unlink()


def test_a_node_cannot_be_dumped_or_attached_to() -> None:
    program = """
import ctypes, json, resource
from torpor.node import _harden
_harden()
print(json.dumps([ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)]))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout) == [0, [0, 0]]
