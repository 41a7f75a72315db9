"""Claude Code asks a person over MCP, and is answered after a week of which nothing of it was left on the machine."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.crash.witness import check_nothing_left
from tests.e2e.clients.claude_code import ENVIRONMENT, claude_code
from tests.e2e.clients.held_model import ThreadedModel
from tests.e2e.clients.npm import NotInstallable
from tests.e2e.test_hibernation import gone
from tests.stage import REAL_KEY, Stage, stage

from torpor.testing.model_scripts import Answer, Conversation, Say, Try, UseTool

pytestmark = [pytest.mark.runsc, pytest.mark.npm, pytest.mark.timeout(600)]

ASK = "mcp__torpor__torpor_ask_human"
WEEK_NS = 7 * 24 * 3600 * 10**9
SERVERS = {"mcpServers": {"torpor": {"type": "http", "url": "http://127.0.0.1:4100/mcp"}}}


def asking(conversation: Conversation, _this: Try) -> Answer:
    """A model that asks a person before it goes on, and says what it was told."""
    if ASK not in conversation.tools:
        return Answer(parts=(Say(text="A title"),))
    if not conversation.tool_results:
        return Answer(parts=(UseTool(name=ASK, arguments={"question": "Deploy?", "choices": ["yes", "no"]}),))
    return Answer(parts=(Say(text=f"They said: {conversation.tool_results[-1]}"),))


@contextmanager
def claude_stage(directory: Path, runsc: Path) -> Iterator[Stage]:
    model = ThreadedModel(asking, key=REAL_KEY, witness_path=directory / "witness.jsonl")
    with model.running(), stage(directory, runsc) as made:
        made.environment["ANTHROPIC_BASE_URL"] = model.url
        yield made


def let_pass(made: Stage, passed_ns: int, last: int) -> None:
    """As the restored session will see it: its checkpoints up to this number were made so long ago."""
    with sqlite3.connect(made.home / "torpor.db") as database:
        database.execute("UPDATE checkpoint SET wall_ns = wall_ns - ? WHERE number <= ?", (passed_ns, last))


def test_claude_code_is_answered_after_a_week(scratch: Path, runsc: Path) -> None:
    try:
        claude = claude_code()
    except NotInstallable as error:
        pytest.skip(str(error))
    with claude_stage(scratch, runsc) as made:
        made.home.mkdir(exist_ok=True)
        (made.home / "config.toml").write_text(
            "[hibernate]\nlinger_seconds = 1\npaused_seconds = 0\nready_seconds = 0\n"
        )
        (made.project / "mcp.json").write_text(json.dumps(SERVERS))
        options = ["--mount", str(claude.parent)]
        for name, value in ENVIRONMENT.items():
            options += ["--env", f"{name}={value}"]
        command = [str(claude), "-p", "Ask, then deploy.", "--allowedTools", ASK, "--mcp-config", "mcp.json"]
        made.torpor("run", "-d", "--name", "one", *options, "--", *command)
        log = made.follow("one")
        log.wait("waitpoint.created")
        while made.rows("ls")[0]["status"] != "asleep":
            continue
        gone(made)
        made.torpor("down")
        last = max(row["number"] for row in made.rows("checkpoints", "one"))
        let_pass(made, WEEK_NS, last)
        made.torpor("up")
        made.torpor("resolve", "one", "yes")
        ended = log.wait("agent.exited")
        log.close()
        said = made.torpor("output", "one").stdout
        assert "They said:" in said
        assert "yes" in said
        assert ended["data"]["exit_status"] == 0
        kinds = [event["kind"] for event in made.events("one")]
        assert kinds.count("waitpoint.resolved") == 1
        assert not {"call.torn", "call.failed", "stream.reset", "call.diverged"} & set(kinds)
        let_pass(made, -WEEK_NS, last)  # Else the log would tell of the forgery.
        made.torpor("log", "one", "--verify")
        made.torpor("down")
        check_nothing_left(made)
