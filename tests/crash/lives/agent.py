"""An agent that does everything that lets a session sleep, again and again, and keeps account of what it was told.

A thread beats into the workspace all the while: who watches that from outside sees which incarnation runs. When an
answer is "enough" it prints its account from memory and from a file, which have to agree. Each entry is a request and
its answer, byte for byte, and no two requests of one life are equal: every one names its round.

`agent.py child NAME` is what it begins as a session of its own: one question to the model, one message out.
"""

import http.client
import itertools
import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

account: list[list[str]] = []


def call(path: str, **body: object) -> str:
    """One request, entered into the account; one whose connection broke is made again, as any client would."""
    data = json.dumps(body)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:4100/{path}", data.encode()) as answer:
                told = answer.read().decode()
            break
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    account.append([path, data, told])
    with Path(FILE).open("a") as file:
        file.write(json.dumps(account[-1]) + "\n")
    return told


def beat() -> None:
    """Not often: an agent that is busy is not put to sleep, and in a sandbox this takes a hundredth of a processor."""
    number, file = 0, os.open("beat", os.O_WRONLY | os.O_CREAT)
    while True:
        number += 1
        os.pwrite(file, f"{number:09}".encode(), 0)
        time.sleep(0.1)


def ask_model(name: str, number: int) -> None:
    # Who asks for token counts gets the answer as it is in the log, byte for byte.
    how = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 == 1 else {}
    call("v1/chat/completions", model="m", messages=[{"role": "user", "content": f"{name} {number}"}], **how)


def live(name: str) -> None:
    for number in itertools.count(1):
        said = json.loads(call("torpor/v1/ask", question=f"{name} {number}"))["answer"]
        if said.startswith("enough"):
            return
        call("torpor/v1/receive", timeout_seconds=1_000_000 + number)
        ask_model(name, number)
        call("torpor/v1/send", text=f"{name} {number}")
        call("torpor/v1/sleep", seconds=0.5 + number / 1000)
        if number % 4 == 2:
            spawned = call("torpor/v1/spawn", command=[sys.executable, "agent.py", "child", f"{name}.{number}"])
            call("torpor/v1/wait", waitpoints=[json.loads(spawned)["waitpoint"]])


FILE = "account-of-child" if sys.argv[1] == "child" else "account"
threading.Thread(target=beat, daemon=True).start()
if sys.argv[1] == "child":
    ask_model(sys.argv[2], 0)
    call("torpor/v1/send", text=f"{sys.argv[2]} is done")
else:
    live(sys.argv[1])
print(json.dumps({"memory": account, "file": [json.loads(line) for line in Path(FILE).read_text().splitlines()]}))
