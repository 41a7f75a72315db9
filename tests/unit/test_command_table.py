"""The table of commands: it has every command that a module registers, and imports none that is not used."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from torpor import cli
from torpor.cli.commands import COMMANDS, load, registered

TELL = """
import atexit, json, os, sys
atexit.register(lambda: os.write(2, json.dumps(sorted(sys.modules)).encode()))
from torpor.cli.main import main
main()
"""
HEAVY = ("anyio", "cryptography", "genai_prices", "h11", "httpx", "obstore", "pyfastcdc", "zstandard", "pydantic")
OURS = (
    "torpor.gateway", "torpor.sandbox", "torpor.snapshots", "torpor.node", "torpor.wire",
    "torpor.runtime.runtime", "torpor.db.calls",
)  # fmt: skip


def imported_by(tmp_path: Path, *arguments: str, **environment: str) -> tuple[str, list[str]]:
    """What a command prints, and all that was imported by its end."""
    done = subprocess.run(
        [sys.executable, "-c", TELL, *arguments],
        env={**os.environ, "TORPOR_HOME": str(tmp_path / "home"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, json.loads(done.stderr[done.stderr.index("[") :])


def below(modules: list[str], *names: str) -> list[str]:
    return [module for module in modules if any(module == name or module.startswith(f"{name}.") for name in names)]


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_ls_imports_only_what_reads_rows(tmp_path: Path, json_too: list[str]) -> None:
    _, modules = imported_by(tmp_path, "ls", *json_too)
    assert "torpor.runtime.reader" in modules
    assert below(modules, *HEAVY, *OURS, "rich.markdown") == []


def test_help_names_every_command_and_imports_none(tmp_path: Path) -> None:
    shown, modules = imported_by(tmp_path, "--help", TERM="dumb", COLUMNS="200")
    assert {word for line in shown.splitlines() for word in line.split()[1:2]} >= set(COMMANDS)
    assert below(modules, *HEAVY, *OURS, "torpor.db", "torpor.runtime", "asyncio") == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("torpor dif", "diff\ndiff-turns\n"), ("torpor ls --js", "--json\n")],
)
def test_completion_imports_nothing_that_runs(tmp_path: Path, typed: str, offered: str) -> None:
    words = str(len(typed.split(" ")) - 1)
    asked = {"_TORPOR_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": words}
    shown, modules = imported_by(tmp_path, **asked)
    assert shown == offered
    assert below(modules, *HEAVY, *OURS) == []


def test_a_command_that_does_not_exist_is_refused_with_a_guess(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "torpor", "chekpoint"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "checkpoint" in done.stderr


def test_the_table_has_every_command_of_every_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(cli.__path__)}
    with_commands = [
        name for name in sorted(modules) if "\ndef register(" in (Path(cli.__path__[0]) / f"{name}.py").read_text()
    ]
    found = {name: module for module in with_commands for name in registered(module)}
    assert found == {name: entry.module for name, entry in COMMANDS.items()}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_loaded_command_has_the_line_that_help_shows(name: str) -> None:
    command = load(name)
    assert command.name == name
    assert command.short_help == COMMANDS[name].line
    assert command.callback is not None or command.commands  # a group of commands does nothing by itself
