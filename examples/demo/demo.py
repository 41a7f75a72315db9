"""The main job, shown: an agent survives kill -9 of its sandbox, of everything while a tool runs, and of its node.

Nothing in here is part of Torpor: it starts the `torpor` command as a user would, watches `torpor log --follow --json`,
kills processes, and lets `torpor resume` go on. The model is the project's scripted server unless --provider says so.
"""

import argparse
import contextlib
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
    """A session's events as they come, from a `torpor log --follow --json` that was started with a pipe as stdout."""

    def __init__(self, process: subprocess.Popen, *, patience_seconds: float = 300) -> None:
        self.events: list[dict] = []
        self._is_over = False
        self._patience_seconds = patience_seconds
        self._arrived = threading.Condition()
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._arrived:
                self.events.append(json.loads(line))
                self._arrived.notify_all()
        with self._arrived:
            self._is_over = True
            self._arrived.notify_all()

    def wait(self, kind: str, count: int = 1, *, call: int | None = None) -> dict:
        """The count-th event of a kind, or of a kind and a call (1 is the agent's first), as soon as it is there."""
        deadline = time.monotonic() + self._patience_seconds
        with self._arrived:
            while True:
                found = [event for event in self._of_call(call) if event["kind"] == kind]
                if len(found) >= count:
                    return found[count - 1]
                if self._is_over or not self._arrived.wait(deadline - time.monotonic()):
                    seen = [event["kind"] for event in self.events]
                    raise TimeoutError(f"no {kind} number {count} (call {call}) came: {seen}")

    def _of_call(self, number: int | None) -> list[dict]:
        """A call is known by the order of `call.intended`: its other events come late, repeated, or among another's."""
        if number is None:
            return self.events
        made = [event["call"] for event in self.events if event["kind"] == "call.intended"]
        return [event for event in self.events if event["call"] in made[number - 1 : number]]

    def count(self, kind: str) -> int:
        with self._arrived:
            return sum(event["kind"] == kind for event in self.events)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()


class Shown:
    """What a node shows of its agent: passed on to the terminal, and waited on."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._text = ""
        self._arrived = threading.Condition()
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            print(line, end="", flush=True)
            with self._arrived:
                self._text += line
                self._arrived.notify_all()

    def wait(self, words: str, count: int) -> None:
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._text.count(words) >= count, timeout=300):
                raise TimeoutError(f"the agent did not write {words!r} {count} times in 300 s")

    def close(self) -> None:
        self._thread.join()
        self._process.stdout.close()


class Stage:
    """One TORPOR_HOME, and every process that is started on it."""

    def __init__(self, home: Path, workspace: Path) -> None:
        self.home = home
        self.workspace = workspace
        self.environment = {**os.environ, "TORPOR_HOME": str(home), "TORPOR_RUNSC": str(_runsc())}
        self._started: list[subprocess.Popen] = []

    def start(self, *command: object) -> subprocess.Popen:
        """Start a program in a session of its own: Ctrl-C is for the demo, which then ends what it has started."""
        with _interrupts_held():
            process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.workspace,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._started.append(process)
        return process

    def node(self, *command: object) -> tuple[subprocess.Popen, Shown]:
        process = self.start(TORPOR, *command)
        return process, Shown(process)

    def output(self, *command: str) -> str:
        process = self.start(TORPOR, *command)
        text, _ = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, text)
        return text

    def kill_sandbox(self, pattern: str = "runsc-(sandbox|gofer) ") -> bool:
        """kill -9 of every process of the sandbox; False when there was none."""
        found = subprocess.run(
            ["pgrep", "-f", f"{pattern}.*{self.home}/"], capture_output=True, text=True, check=False
        ).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return bool(found)

    def close(self) -> None:
        """Leave no process: first the nodes, which would restore a sandbox that died."""
        for process in reversed(self._started):
            process.kill()
            process.wait()
        while self.kill_sandbox("runsc"):
            time.sleep(0.1)

    def remove(self) -> None:
        """Leave nothing in memory or on disk either."""
        subprocess.run([TORPOR, "rm", "demo"], env=self.environment, capture_output=True, check=False)
        shutil.rmtree(self.home.parent)


@contextlib.contextmanager
def _interrupts_held():
    """Ctrl-C comes after this: amid a start it would leave a process that nobody knows of."""
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: came.append(True)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def say(text: str) -> None:
    console.print(f"\n[bold magenta]demo[/bold magenta] {text}")


def kill_node(node: subprocess.Popen, shown: Shown) -> None:
    node.kill()
    node.wait()
    shown.close()


def perform(stage: Stage) -> int:
    """Run the session through its three disasters; gives the agent's exit status."""
    node, shown = stage.node("run", "--name", "demo", "--", PYTHON, "agent.py")
    while "demo" not in stage.output("ls"):
        if node.poll() is not None:
            raise SystemExit("demo: the session did not start")
    log = Log(stage.start(TORPOR, "log", "demo", "--follow", "--json"))

    log.wait("call.answering", call=4)
    say("the model is answering turn 4: [bold red]kill -9 of the sandbox[/bold red]. Its node restores it by itself.")
    stage.kill_sandbox()
    log.wait("recovery.chosen", 2)

    # The answer is on disk and in the agent, which has said so and now runs what it was told to: no call is open.
    log.wait("call.completed", call=SLOW_STEP + 1)
    log.wait("call.delivered", call=SLOW_STEP + 1)
    shown.wait("[model]", SLOW_STEP + 1)
    say("a slow tool is running: [bold red]kill -9 of the node and of the sandbox[/bold red], then `torpor resume`.")
    kill_node(node, shown)
    stage.kill_sandbox()
    node, shown = stage.node("resume", "demo")
    log.wait("recovery.chosen", 3)

    # The call before may be on its way to the disk still while the agent makes its next one.
    log.wait("call.completed", call=SLOW_STEP + 2)
    log.wait("call.answering", call=SLOW_STEP + 3)
    say("the model is answering: [bold red]kill -9 of the node[/bold red], then `torpor resume`.")
    kill_node(node, shown)
    node, shown = stage.node("resume", "demo")
    log.wait("recovery.chosen", 4)
    status = node.wait()
    shown.close()
    log.close()
    return status


def report(stage: Stage, witness: Path | None) -> bool:
    """The timeline and the table; True when nothing was lost."""
    say("the session's timeline (`torpor log demo`):")
    subprocess.run([TORPOR, "log", "demo"], env=stage.environment, check=True)
    events = [json.loads(line) for line in stage.output("log", "demo", "--json").splitlines()]
    points = [json.loads(line) for line in stage.output("checkpoints", "demo", "--json").splitlines()]
    text = stage.output("output", "demo")
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
    verified = "is whole" in stage.output("log", "demo", "--verify")

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


def scripted_model(stage: Stage, witness: Path) -> str:
    server = stage.start(
        *(PYTHON, "-m", "torpor.testing.model_server", "--script", "coding", "--witness", witness),
        *("--turns", str(TURNS), "--slow-step", str(SLOW_STEP), "--slow-seconds", "8"),
        *("--first-byte-seconds", "0.3", "--chunk-seconds", "0.1"),
    )
    return server.stdout.readline().strip() + "/v1"


def main() -> int:
    parser = argparse.ArgumentParser(description="A coding agent survives kill -9 of everything.")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="a real provider; its key is in the environment")
    provider = parser.parse_args().provider
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = Path(tempfile.mkdtemp(prefix="torpor-demo-"))
    stage = Stage(scratch / "home", scratch / "project")
    try:
        good = play(stage, provider)
    except KeyboardInterrupt:
        stage.close()
        stage.remove()
        say("interrupted; nothing is left behind")
        return 130
    except (TimeoutError, subprocess.CalledProcessError) as error:
        good = False
        say(f"[red]it did not go as it should[/red]: {error}")
    finally:
        stage.close()
    if good:
        stage.remove()
    say("nothing was lost." if good else f"[red]something went wrong[/red]; look at TORPOR_HOME={stage.home}")
    return 0 if good else 1


def play(stage: Stage, provider: str | None) -> bool:
    """The session and its report; True when all is as it should be."""
    stage.workspace.mkdir()
    shutil.copy(ROOT / "examples/coding_agent/agent.py", stage.workspace)
    model, witness = "scripted-large", None
    if provider:
        variable, url, model = PROVIDERS[provider]
        if variable not in os.environ:
            raise SystemExit(f"demo: set {variable} to run against {provider}")
        stage.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": os.environ[variable]}
    else:
        witness = stage.home.parent / "witness.jsonl"
        url = scripted_model(stage, witness)
        stage.environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-scripted"}
    (stage.workspace / "task.txt").write_text(TASK)
    (stage.workspace / "model.txt").write_text(model)
    say(f"a coding agent starts under `torpor run` (TORPOR_HOME={stage.home})")
    status = perform(stage)
    return report(stage, witness) and status == 0


def _runsc() -> Path:
    """The runsc that set-up found, so that the demo's own TORPOR_HOME need not fetch another."""
    from torpor.config import torpor_home
    from torpor.core.clock import SystemClock
    from torpor.sandbox.tools import find_runsc

    return find_runsc(torpor_home(os.environ) / "bin", os.environ, SystemClock()).path


if __name__ == "__main__":
    sys.exit(main())
