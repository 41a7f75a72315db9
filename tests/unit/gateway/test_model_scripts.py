"""The coding task leaves the same trail whichever tools the agent offers."""

import sqlite3
import subprocess
from pathlib import Path

from torpor.testing.model_scripts import Conversation, Try, UseTool, as_shell, coding, coding_step

THIS = Try(attempt=1, nonce="n")


def conversation(done: int, *tools: str) -> Conversation:
    return Conversation(
        model="m", stream=False, last_text="", tool_results=("ok",) * done, tools=frozenset(tools), credential=""
    )


def test_every_step_runs_as_a_plain_shell_command(tmp_path: Path) -> None:
    for number in [0, *range(2, 10)]:
        subprocess.run(as_shell(coding_step(number, "(attempt 1)")), shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "plan.md").read_text() == "# Plan\nmade (attempt 1)\n"
    assert (tmp_path / "trail.txt").read_text().split() == ["2", "3", "6", "7"]
    with sqlite3.connect(tmp_path / "steps.db") as database:
        assert database.execute("SELECT number FROM step ORDER BY 1").fetchall() == [(5,), (9,)]
    database.close()


def test_the_script_uses_the_tools_that_are_offered() -> None:
    script = coding(20)
    names = {
        tools: script(conversation(1, *tools), THIS).parts[1]
        for tools in [("start_process", "run_shell"), ("run_shell",), ("Bash", "Read")]
    }
    assert [part.name for part in names.values() if isinstance(part, UseTool)] == ["start_process", "run_shell", "Bash"]


def test_an_agent_without_tools_gets_words() -> None:
    assert len(coding(20)(conversation(0), THIS).parts) == 1
