"""The main job, shown: an agent survives kill -9 of its sandbox, of everything while a tool runs, and of its node.

Nothing in here is part of Torpor: it starts the `torpor` command as a user would, watches `torpor log --follow --json`,
kills processes, and lets `torpor resume` go on. The model is the project's scripted server unless --provider says so.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
TORPOR = ROOT / ".venv/bin/torpor"
PYTHON = ROOT / ".venv/bin/python"
TURNS = 12
SLOW_STEP = 6
COUNTERS = ("memory", "mapped", "sqlite", "subprocess")
TASK = f"""Build a small project in {TURNS} steps, exactly one tool call a step, and say in a few sentences before each
call what you do and why. Steps: 1 write plan.md; 2 start a background process (start_process) that writes a number to
ticks.txt five times a second; 3-6 write small files and run shell commands that append to trail.txt; 7 run the shell
command `sleep 8; echo slow >> trail.txt`; 8-12 note each step in steps.db with query_sqlite and look
around. Then stop."""
PROVIDERS = {
    "openai": ("OPENAI_API_KEY", "https://api.openai.com/v1", "gpt-5-mini"),
    "anthropic": ("ANTHROPIC_API_KEY", "https://api.anthropic.com/v1", "claude-haiku-4-5"),
}
console = Console(highlight=False)


class Log:
    """The session's events as they come, from `torpor log --follow --json`."""

    def __init__(self, session: str, environment: dict[str, str]) -> None:
        self.events: list[dict] = []
        self._arrived = threading.Condition()
        self._process = subprocess.Popen(
            [TORPOR, "log", session, "--follow", "--json"], stdout=subprocess.PIPE, env=environment, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._arrived:
                self.events.append(json.loads(line))
                self._arrived.notify_all()

    def wait(self, kind: str, count: int, *, seconds: float = 300) -> dict:
        """The count-th event of a kind, as soon as it is there."""
        deadline = time.monotonic() + seconds
        with self._arrived:
            while True:
                found = [event for event in self.events if event["kind"] == kind]
                if len(found) >= count:
                    return found[count - 1]
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise SystemExit(f"demo: no {kind} number {count} within {seconds:.0f} s; see `torpor log`")

    def count(self, kind: str) -> int:
        with self._arrived:
            return sum(event["kind"] == kind for event in self.events)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def kill_sandbox(home: Path) -> None:
    """kill -9 of every process of the sandbox."""
    pattern = f"runsc-(sandbox|gofer) .*{home}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def say(text: str) -> None:
    console.print(f"\n[bold magenta]demo[/bold magenta] {text}")


def start(command: list, environment: dict[str, str], workspace: Path) -> subprocess.Popen:
    return subprocess.Popen([TORPOR, *command], env=environment, cwd=workspace)


def kill_node(node: subprocess.Popen) -> None:
    node.kill()
    node.wait()


def perform(environment: dict[str, str], home: Path, workspace: Path) -> tuple[str, int]:
    """Run the session through its three disasters; gives its id and the agent's exit status."""
    node = start(["run", "--name", "demo", "--", str(PYTHON), "agent.py"], environment, workspace)
    while "demo" not in _output(environment, "ls"):
        if node.poll() is not None:
            raise SystemExit("demo: the session did not start")
    log = Log("demo", environment)
    session = log.wait("session.created", 1)["session"]

    log.wait("call.answering", 4)
    say("the model is answering turn 4: [bold red]kill -9 of the sandbox[/bold red]. Its node restores it by itself.")
    kill_sandbox(home)
    log.wait("recovery.chosen", 2)

    log.wait("call.delivered", SLOW_STEP + 1 + 1)
    log.wait("call.completed", SLOW_STEP + 1)
    say("a slow tool is running: [bold red]kill -9 of the node and of the sandbox[/bold red], then `torpor resume`.")
    kill_node(node)
    kill_sandbox(home)
    node = start(["resume", "demo"], environment, workspace)
    log.wait("recovery.chosen", 3)

    answering = log.count("call.answering")
    log.wait("call.answering", answering + 2)
    say("the model is answering: [bold red]kill -9 of the node[/bold red], then `torpor resume`.")
    kill_node(node)
    node = start(["resume", "demo"], environment, workspace)
    log.wait("recovery.chosen", 4)
    status = node.wait()
    log.close()
    return session, status


def report(environment: dict[str, str], witness: Path | None) -> bool:
    """The timeline and the table; True when nothing was lost."""
    say("the session's timeline (`torpor log demo`):")
    subprocess.run([TORPOR, "log", "demo"], env=environment, check=True)
    events = [json.loads(line) for line in _output(environment, "log", "demo", "--json").splitlines()]
    points = [json.loads(line) for line in _output(environment, "checkpoints", "demo", "--json").splitlines()]
    text = _output(environment, "output", "demo")
    last = json.loads(text.rpartition("[report] ")[2].splitlines()[0]) if "[report] " in text else {}
    attempts: dict[str, int] = {}
    for event in events:
        if event["kind"] == "call.sent":
            attempts[event["call"]] = attempts.get(event["call"], 0) + 1
    torn = sum(event["kind"] == "call.torn" for event in events)
    tools = text.count("[tool ")
    once, twice = sum(n == 1 for n in attempts.values()), sum(n == 2 for n in attempts.values())
    restores = [event for event in events if event["kind"] == "recovery.chosen"][1:]
    freezes = sorted(point["freeze_ns"] for point in points if point["freeze_ns"])
    kept = tools > 0 and all(last.get(name) == tools for name in COUNTERS)
    verified = "is whole" in _output(environment, "log", "demo", "--verify")

    table = Table(title="What became of it", show_header=False)
    table.add_row("model calls", str(len(attempts)))
    table.add_row("attempts per call", f"{once} x 1, {twice} x 2 (reported as torn: {torn})")
    if witness:
        lines = [json.loads(line) for line in witness.read_text().splitlines()]
        table.add_row("requests that the model server counted", str(sum(line["event"] == "start" for line in lines)))
    counters = ", ".join(str(last.get(name)) for name in COUNTERS)
    table.add_row("memory, mapped file, SQLite, subprocess", f"{counters} of {tools} tool calls")
    table.add_row(
        "background process",
        "still running at the end" if last.get("background") and None in last["background"].values() else "LOST",
    )
    table.add_row("log", "verified" if verified else "DAMAGED")
    table.add_row("lost", "nothing" if kept and verified else "SOMETHING")
    table.add_row("freeze per checkpoint", f"median {freezes[len(freezes) // 2] / 1e6:.0f} ms of {len(freezes)}")
    for event in restores:
        data = event["data"]
        table.add_row(f"{data['mode']} (checkpoint {data['checkpoint']})", f"{data['took_ns'] / 1e6:.0f} ms")
    console.print(table)
    return kept and verified and twice == torn == 1 and once == len(attempts) - 1


def _output(environment: dict[str, str], *command: str) -> str:
    return subprocess.run([TORPOR, *command], env=environment, capture_output=True, text=True, check=True).stdout


def scripted_model(scratch: Path) -> tuple[subprocess.Popen, str, Path]:
    witness = scratch / "witness.jsonl"
    server = subprocess.Popen(
        [
            *(PYTHON, "-m", "torpor.testing.model_server", "--script", "coding", "--witness", witness),
            *("--turns", str(TURNS), "--slow-step", str(SLOW_STEP), "--slow-seconds", "8"),
            *("--first-byte-seconds", "0.3", "--chunk-seconds", "0.1"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    return server, server.stdout.readline().strip() + "/v1", witness


def main() -> int:
    parser = argparse.ArgumentParser(description="A coding agent survives kill -9 of everything.")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="a real provider; its key is in the environment")
    provider = parser.parse_args().provider
    scratch = Path(tempfile.mkdtemp(prefix="torpor-demo-"))
    home, workspace = scratch / "home", scratch / "project"
    workspace.mkdir()
    shutil.copy(ROOT / "examples/coding_agent/agent.py", workspace)
    environment = {**os.environ, "TORPOR_HOME": str(home), "TORPOR_RUNSC": str(_runsc())}
    server, witness = None, None
    try:
        model = "scripted-large"
        if provider:
            variable, url, model = PROVIDERS[provider]
            if variable not in os.environ:
                raise SystemExit(f"demo: set {variable} to run against {provider}")
            environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": os.environ[variable]}
        else:
            server, url, witness = scripted_model(scratch)
            environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-scripted"}
        (workspace / "task.txt").write_text(TASK)
        (workspace / "model.txt").write_text(model)
        say(f"a coding agent starts under `torpor run` (home {home})")
        session, status = perform(environment, home, workspace)
        good = report(environment, witness) and status == 0
        say(
            "nothing was lost."
            if good
            else f"[red]something went wrong[/red]; look at TORPOR_HOME={home}, session {session}"
        )
    finally:
        if server:
            server.terminate()
            server.wait()
        kill_sandbox(home)
    if good:
        subprocess.run([TORPOR, "rm", "demo"], env=environment, check=True)
        shutil.rmtree(scratch)
    return 0 if good else 1


def _runsc() -> Path:
    """The runsc that set-up found, so that the demo's own TORPOR_HOME need not fetch another."""
    from torpor.config import torpor_home
    from torpor.core.clock import SystemClock
    from torpor.sandbox.tools import find_runsc

    return find_runsc(torpor_home(os.environ) / "bin", os.environ, SystemClock()).path


if __name__ == "__main__":
    sys.exit(main())
