"""The clients of the matrix: how each is installed, started in front of a task, and what it writes.

Versions are pinned: what was measured is what is tested. Nothing of them is part of the project; they are installed
below `.tools` when a test first needs them.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.clients.claude_code import ENVIRONMENT as CLAUDE_ENVIRONMENT
from tests.e2e.clients.claude_code import claude_code
from tests.e2e.clients.npm import NotInstallable, NpmProgram
from tests.stage import ROOT

CODEX = NpmProgram(package="@openai/codex", version="0.169.0", pattern="@openai/codex-*/vendor/*/bin/codex")
PYTHON_PACKAGES = (
    "openai==3.54.0",
    "anthropic==2.12.0",
    "openai-agents==0.24.0",
    "pydantic-ai-slim[openai,anthropic]==2.68.0",
    "langchain-openai==1.7.3",
)
PYTHON_DIRECTORY = ROOT / ".tools" / "matrix-python"
PIP_SECONDS = 300
SDK_AGENT = ROOT / "tests/e2e/clients/agents/sdk_agent.py"
FRAMEWORK_AGENT = Path(__file__).parent / "agents/framework_agent.py"
TASK = "Build it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A client's command line, with what it needs around it."""

    command: Sequence[str]
    variables: dict[str, str]
    mounts: Sequence[Path]
    files: Sequence[Path] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One column of the matrix.

    Attributes:
        start: installs it and gives the command; takes the base URL of the gateway.
        texts: the model's words in its output, one string for each answer that it shows.
        shows_all: it writes every answer, not only the last one.
    """

    name: str
    start: Callable[[str], Started]
    texts: Callable[[str], list[str]]
    shows_all: bool = True


def python_client(name: str, agent: Path, *arguments: str) -> Client:
    def start(_url: str) -> Started:
        command = [str(python_with_packages()), agent.name, *arguments, TASK]
        return Started(command=command, variables={}, mounts=[PYTHON_DIRECTORY], files=[agent])

    return Client(name=name, start=start, texts=_lines)


def _lines(output: str) -> list[str]:
    return output.partition("[report] ")[0].splitlines()


def _start_codex(url: str) -> Started:
    program = CODEX.path()
    provider = f'{{name="matrix",base_url="{url}/v1",env_key="OPENAI_API_KEY",wire_api="responses"'
    # Its own limits are some thirty requests over half a minute.
    provider += ",request_max_retries=1,stream_max_retries=2}"
    settings = [f"model_providers.matrix={provider}", 'model_provider="matrix"', 'model="scripted-large"']
    options = [word for setting in settings for word in ("-c", setting)]
    command = [str(program), "exec", "--json", "--skip-git-repo-check", "-s", "danger-full-access", *options, TASK]
    return Started(command=command, variables={}, mounts=[program.parents[1]])


def _codex_texts(output: str) -> list[str]:
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in items if item["type"] == "agent_message"]


def _start_claude(_url: str) -> Started:
    program = claude_code()
    command = [str(program), "-p", TASK, "--allowedTools", "Bash"]
    return Started(command=command, variables=CLAUDE_ENVIRONMENT, mounts=[program.parent])


CLIENTS = (
    python_client("openai-sync", SDK_AGENT, "openai", "sync", "stream"),
    python_client("openai-async", SDK_AGENT, "openai", "async", "stream"),
    python_client("anthropic-sync", SDK_AGENT, "anthropic", "sync", "stream"),
    python_client("anthropic-async", SDK_AGENT, "anthropic", "async", "stream"),
    python_client("openai-agents", FRAMEWORK_AGENT, "openai-agents"),
    python_client("pydantic-ai-openai", FRAMEWORK_AGENT, "pydantic-openai"),
    python_client("pydantic-ai-anthropic", FRAMEWORK_AGENT, "pydantic-anthropic"),
    python_client("langchain-openai", FRAMEWORK_AGENT, "langchain"),
    Client(name="codex", start=_start_codex, texts=_codex_texts),
    Client(name="claude-code", start=_start_claude, texts=_lines, shows_all=False),
)


def python_with_packages() -> Path:
    """A Python with the clients' packages, in an environment of its own.

    Raises:
        NotInstallable: the package index does not give them.
    """
    done, program = PYTHON_DIRECTORY / "installed.txt", PYTHON_DIRECTORY / "bin/python"
    wanted = "\n".join(PYTHON_PACKAGES)
    PYTHON_DIRECTORY.parent.mkdir(exist_ok=True)
    # A virtual environment can't be renamed into its place, so others wait here.
    with PYTHON_DIRECTORY.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != wanted:
            shutil.rmtree(PYTHON_DIRECTORY, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(PYTHON_DIRECTORY)])
            _run([str(program), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PYTHON_PACKAGES])
            done.write_text(wanted)
    return program


def _run(command: Sequence[str]) -> None:
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(f"{command[:4]} took more than {PIP_SECONDS} s") from error
    if finished.returncode != 0:
        raise NotInstallable(f"the clients' packages can't be installed: {finished.stderr.strip()[-300:]}")
