"""A small but real coding agent: the public openai SDK, a tool loop, and state of every kind that a crash would lose.

It knows nothing of Torpor. It keeps a list of what it did in memory, a counter in a mapped file, a journal of its steps
in an open SQLite connection, a process that counts at the end of a pipe, and whatever the model asked it to start.
"""

import json
import mmap
import os
import sqlite3
import subprocess
import sys

from openai import OpenAI

TASK = "Build the little project step by step, using the tools, until it is done."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {field: {"type": "string"} for field in fields},
                "required": fields,
            },
        },
    }
    for name, description, fields in [
        ("run_shell", "Run a shell command and get its output.", ["command"]),
        ("write_file", "Write a file.", ["path", "content"]),
        ("start_process", "Start a command in the background.", ["name", "command"]),
        ("query_sqlite", "Run SQL statements on a database file.", ["database", "statement"]),
    ]
]


def read(path: str, otherwise: str) -> str:
    """The content of a file of the workspace, if it is there."""
    return open(path).read().strip() if os.path.exists(path) else otherwise


class Agent:
    """The conversation, the tools, and the state that must survive."""

    def __init__(self) -> None:
        self.client = OpenAI()
        self.model = read("model.txt", "scripted-large")
        self.messages: list[dict] = [{"role": "user", "content": read("task.txt", TASK)}]
        self.done: list[str] = []
        self.background: dict[str, subprocess.Popen] = {}
        self.journal = sqlite3.connect("journal.db", isolation_level=None)
        self.journal.execute("PRAGMA journal_mode=WAL")
        self.journal.execute("CREATE TABLE IF NOT EXISTS step (number INTEGER PRIMARY KEY, tool TEXT)")
        with open("counter.bin", "wb") as file:
            file.write(bytes(8))
        with open("counter.bin", "r+b") as file:
            self.mapped = mmap.mmap(file.fileno(), 8)
        counter = "import sys\nn = 0\nfor _ in sys.stdin:\n    n += 1\n    print(n, flush=True)\n"
        self.counter = subprocess.Popen(
            [sys.executable, "-c", counter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self) -> None:
        while True:
            text, calls = self.ask()
            print(f"[model] {text}", flush=True)
            if not calls:
                break
            for call in calls:
                self.use(call)
        self.counter.stdin.close()
        ticks = {name: process.poll() for name, process in self.background.items()}
        for process in self.background.values():
            process.terminate()
        steps = self.journal.execute("SELECT count(*) FROM step").fetchone()[0]
        mapped = int.from_bytes(self.mapped[:], "little")
        report = {"memory": len(self.done), "mapped": mapped, "sqlite": steps, "subprocess": self.count}
        report["background"] = ticks
        print(f"[report] {json.dumps(report)}", flush=True)

    def ask(self) -> tuple[str, list[dict]]:
        """One streamed answer of the model."""
        stream = self.client.chat.completions.create(model=self.model, messages=self.messages, tools=TOOLS, stream=True)
        text, calls = "", []
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                for piece in choice.delta.tool_calls or []:
                    while len(calls) <= piece.index:
                        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
                    call = calls[piece.index]
                    call["id"] += piece.id or ""
                    call["function"]["name"] += piece.function.name or ""
                    call["function"]["arguments"] += piece.function.arguments or ""
        message = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)
        return text, calls

    def use(self, call: dict) -> None:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        result = getattr(self, name)(**arguments)
        self.done.append(name)
        self.journal.execute("INSERT INTO step VALUES (?, ?)", (len(self.done), name))
        self.mapped[:] = len(self.done).to_bytes(8, "little")
        self.counter.stdin.write("one more\n")
        self.counter.stdin.flush()
        self.count = int(self.counter.stdout.readline())
        print(f"[tool {len(self.done)}] {name}: {result.strip()[:60]}", flush=True)
        self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def run_shell(self, command: str) -> str:
        finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False)
        return f"{finished.stdout}{finished.stderr}exit status {finished.returncode}"

    def write_file(self, path: str, content: str) -> str:
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(content)
        return f"wrote {len(content)} characters to {path}"

    def start_process(self, name: str, command: str) -> str:
        self.background[name] = subprocess.Popen(["bash", "-c", command], start_new_session=True)
        return f"started {name} as process {self.background[name].pid}"

    def query_sqlite(self, database: str, statement: str) -> str:
        with sqlite3.connect(database) as connection:
            connection.executescript(statement)
        connection.close()
        return "done"


if __name__ == "__main__":
    Agent().run()
