"""What the scripted model says: a script is a function of the conversation so far and the attempt number.

Scripts keep no state: they decide by counting the tool results in the conversation, so any process can go on where
another stopped. Every answer names its attempt and a nonce, so that two attempts of one request never say the same:
with equal answers a torn one that is wrongly continued would go unnoticed.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A request in no dialect.

    Attributes:
        last_text: the newest text of the user's.
        tool_results: contents of the tool results so far, oldest first.
        tools: names of the tools that the agent offers.
        credential: the key that the request came with, for scripts that leak it.
    """

    model: str
    stream: bool
    last_text: str
    tool_results: tuple[str, ...]
    tools: frozenset[str]
    credential: str = ""
    include_usage: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UseTool:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Delays of a streamed answer; an answer in one piece waits for their sum."""

    first_byte_seconds: float = 0.0
    chunk_seconds: float = 0.0
    chunk_characters: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    parts: tuple[Say | UseTool, ...]
    pace: Pace = Pace()


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """Which sending of a logical request this is (`attempt` counts from 1); `nonce` is unique in the server's life."""

    attempt: int
    nonce: str


Script = Callable[[Conversation, Try], Answer]


def plain(conversation: Conversation, this: Try) -> Answer:
    """A sentence, never a tool call."""
    return Answer(parts=(Say(text=f"Hello, this is attempt {this.attempt} ({this.nonce}) of {conversation.model}."),))


def leaky(conversation: Conversation, this: Try) -> Answer:
    """Says the key that it was called with: what must never reach the log or the sandbox."""
    return Answer(parts=(Say(text=f"attempt {this.attempt} key {conversation.credential} end"),))


def long(_conversation: Conversation, this: Try) -> Answer:
    """Some 600 KB of numbered words: more than any window on the way."""
    words = " ".join(f"word{number}" for number in range(60_000))
    return Answer(parts=(Say(text=f"attempt {this.attempt} ({this.nonce}) {words}"),), pace=Pace(chunk_characters=997))


def huge(_conversation: Conversation, this: Try) -> Answer:
    """20 MB of hexadecimal digits, which take half of that at best."""
    digits = random.Random(this.nonce).randbytes(10_000_000).hex()
    return Answer(parts=(Say(text=f"attempt {this.attempt} {digits}"),), pace=Pace(chunk_characters=50_000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of the coding task, in tools of ours, Claude Code's names as the second choice."""

    say: str
    tool: str
    arguments: Mapping[str, Any]


def coding(turns: int = 20, *, slow_step: int = -1, slow_seconds: float = 0) -> Script:
    """The coding task: `turns` tool calls that leave a trail in the workspace, then a closing sentence.

    Step `slow_step` (counted from 0) is a shell command that takes `slow_seconds`.

    Each step appends its number to `trail.txt` once, so a step that ran twice, or never, shows there.
    """

    def script(conversation: Conversation, this: Try) -> Answer:
        done = len(conversation.tool_results)
        mark = f"(attempt {this.attempt}, {this.nonce})"
        if done >= turns or not conversation.tools:
            return Answer(parts=(Say(text=f"The task is done after {done} steps {mark}."),))
        step = coding_step(done, mark)
        if done == slow_step:
            command = f"sleep {slow_seconds}; echo {done} >> trail.txt"
            step = Step(say="I run something slow.", tool="run_shell", arguments={"command": command})
        tool = _offered(step, conversation.tools)
        return Answer(parts=(Say(text=f"Step {done + 1} of {turns} {mark}: {step.say}"), tool))

    return script


def coding_step(number: int, mark: str) -> Step:
    """Step `number`, counted from 0. `mark` goes into what is written, to tell attempts apart."""
    trail = f"echo {number} >> trail.txt"
    if number == 0:
        return Step(
            say="I write the plan.",
            tool="write_file",
            arguments={"path": "plan.md", "content": f"# Plan\nmade {mark}\n"},
        )
    if number == 1:
        loop = "n=0; while :; do n=$((n+1)); echo $n > ticks.txt; sleep 0.2; done"
        return Step(say="I start a ticker.", tool="start_process", arguments={"name": "ticker", "command": loop})
    match number % 4:
        case 0:
            return Step(
                say="I write a module.",
                tool="write_file",
                arguments={"path": f"src/module_{number}.py", "content": f"VALUE = {number}\n"},
            )
        case 1:
            table = "CREATE TABLE IF NOT EXISTS step (number INTEGER PRIMARY KEY)"
            statement = f"{table}; INSERT INTO step (number) VALUES ({number})"  # noqa: S608 - a number of ours
            return Step(
                say="I note it in the database.",
                tool="query_sqlite",
                arguments={"database": "steps.db", "statement": statement},
            )
        case 2:
            return Step(say="I leave a trail.", tool="run_shell", arguments={"command": f"{trail}; wc -l trail.txt"})
        case _:
            return Step(say="I look around.", tool="run_shell", arguments={"command": f"{trail}; ls | sort"})


def _offered(step: Step, tools: frozenset[str]) -> UseTool:
    """The step in the tools that the agent has: ours, Claude Code's, else a shell command."""
    if step.tool in tools:
        return UseTool(name=step.tool, arguments=step.arguments)
    command = as_shell(step)
    if "Bash" in tools:
        return UseTool(name="Bash", arguments={"command": command, "description": step.say})
    return UseTool(name="run_shell", arguments={"command": command})


def as_shell(step: Step) -> str:
    """The same step as one shell command."""
    arguments = step.arguments
    match step.tool:
        case "write_file":
            path, content = str(arguments["path"]), json.dumps(arguments["content"])
            return f"mkdir -p $(dirname {path}) && printf %b {content} > {path}"
        case "start_process":
            return f"setsid sh -c '{arguments['command']}' >/dev/null 2>&1 &"
        case "query_sqlite":
            program = f"import sqlite3; c=sqlite3.connect('{arguments['database']}')"
            return f"python3 -c \"{program}; c.executescript('{arguments['statement']}'); c.commit()\""
        case _:
            return str(arguments["command"])


def paced(script: Script, pace: Pace) -> Script:
    """The same script at another pace."""

    def slower(conversation: Conversation, this: Try) -> Answer:
        answer = script(conversation, this)
        return replace(answer, pace=replace(pace, chunk_characters=answer.pace.chunk_characters))

    return slower


def script_named(name: str, *, turns: int, slow_step: int = -1, slow_seconds: float = 0) -> Script:
    """A script by the name that the command line uses.

    Raises:
        KeyError: there is none.
    """
    task = coding(turns, slow_step=slow_step, slow_seconds=slow_seconds)
    return {"plain": plain, "leaky": leaky, "long": long, "huge": huge, "coding": task}[name]
