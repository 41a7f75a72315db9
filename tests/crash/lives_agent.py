"""An agent that does everything that lets a session sleep, again and again, and keeps account of what it was told.

A thread beats into the workspace all the while: who watches that from outside sees which incarnation runs. At the end
it prints its account from memory and from a file, which have to agree.
"""

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path


def call(path: str, **body: object) -> dict:
    """One request to Torpor; a connection that broke is made again, as any client would."""
    data = json.dumps(body).encode()
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:4100/{path}", data) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.05)


def beat() -> None:
    number = 0
    while True:
        number += 1
        Path("beat").write_text(str(number))
        time.sleep(0.03)


def main() -> None:
    name, rounds = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=beat, daemon=True).start()
    account: list[str] = []
    for number in range(rounds):
        model = {"model": "m", "messages": [{"role": "user", "content": f"{name} {number}"}]}
        told = [
            call("torpor/v1/ask", question=f"{name} {number}")["answer"],
            call("torpor/v1/receive")["text"],
            call("torpor/v1/sleep", seconds=1 + number % 3)["state"],
            "answered" if call("v1/chat/completions", **model)["choices"] else "",
            str(call("torpor/v1/send", text=f"{name} {number}")["number"]),
        ]
        account.append("|".join(told))
        with Path("account").open("a") as file:
            file.write(account[-1] + "\n")
    print(json.dumps({"memory": account, "file": Path("account").read_text().splitlines()}))


main()
