"""The table of commands: which module has each, and the line that help says of it.

A command's module is imported when the command is used, and not for help or completion: those need its name and its
line, and the modules of all commands take longer than most of them run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MARKUP = "markdown"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of help. `module` is in this package, and has a `register`."""

    module: str
    line: str


COMMANDS: Mapping[str, Entry] = {
    "run": Entry("running", "Run a command as a durable session."),
    "resume": Entry("running", "Go on with a session whose node or sandbox died."),
    "ls": Entry("reading", "List sessions."),
    "show": Entry("reading", "Show one session."),
    "log": Entry("timeline", "The session's timeline, or its events."),
    "output": Entry("reading", "What the agent wrote to stdout and stderr."),
    "checkpoints": Entry("reading", "List a session's checkpoints."),
    "diff": Entry("reading", "What the session changed in its workspace."),
    "pull": Entry("reading", "Bring the session's workspace back."),
    "exec": Entry("inside", "Run a command inside a running session."),
    "cp": Entry("copying", "Copy files into or out of a running session."),
    "waitpoints": Entry("waiting", "List what sessions wait on."),
    "resolve": Entry("waiting", "Answer a session's question, or end its sleep."),
    "send": Entry("waiting", "Send a session a message."),
    "tail": Entry("waiting", "The messages that a session sends out."),
    "fork": Entry("branching", "Make sessions that begin where this one is."),
    "rewind": Entry("branching", "Take a session back to an earlier point."),
    "tree": Entry("branching", "Draw a session's lineage: forks and branches."),
    "turns": Entry("turns", "One line a turn: model, tokens, tools, time."),
    "turn": Entry("turns", "What the model saw in a turn, and what it answered."),
    "diff-turns": Entry("turns", "What changed between the requests of two turns."),
    "search": Entry("search", "Find words in requests, answers, output and events."),
    "cost": Entry("costs", "What a session's calls cost, by model and by call."),
    "budget": Entry("costs", "What a session may spend; raises it."),
    "redact": Entry("trust", "Erase content of a session for good."),
    "head": Entry("trust", "The head of a session's log; sign it, or check a signature."),
    "export": Entry("transfer", "Write a session's context to a file, or as OpenTelemetry spans."),
    "import": Entry("transfer", "Bring an exported session back, to be read."),
    "checkpoint": Entry("lifecycle", "Make a checkpoint now."),
    "kill": Entry("lifecycle", "End a session for good."),
    "up": Entry("daemon", "Start the node daemon: sessions in the background."),
    "down": Entry("daemon", "End the node daemon; its sessions sleep."),
    "status": Entry("daemon", "Show the node daemon and what it runs."),
    "hibernate": Entry("daemon", "Put a waiting session to sleep now."),
    "stop": Entry("lifecycle", "Checkpoint a session and free its sandbox."),
    "rm": Entry("lifecycle", "Forget a session that does not run."),
    "collect": Entry("storing", "Free what no checkpoint needs."),
    "verify": Entry("storing", "Check that every checkpoint would restore."),
    "pin": Entry("storing", "Keep a checkpoint whatever retention says."),
    "unpin": Entry("storing", "Leave a checkpoint to retention again."),
    "snapshot": Entry("snapshot", "A checkpoint as one file, for another machine."),
    "keys": Entry("keys", "The keys of the snapshots, by their ids."),
    "setup": Entry("machine", "Find or fetch runsc, and test it."),
    "doctor": Entry("machine", "Say what this machine lacks, and the remedy."),
}


class CommandTable(TyperGroup):
    """All commands of the table; each is a name with a line until it is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(name, short_help=entry.line)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def load(name: str) -> Any:
    """The command itself, from its module.

    Raises:
        KeyError: its module does not register it.
    """
    command = registered(COMMANDS[name].module)[name]
    command.short_help = COMMANDS[name].line
    return command


def registered(module: str) -> Mapping[str, Any]:
    """The commands that a module registers, by name."""
    group = typer.Typer(rich_markup_mode=MARKUP, pretty_exceptions_enable=False)
    import_module(f"torpor.cli.{module}").register(group)
    return typer.main.get_group(group).commands
