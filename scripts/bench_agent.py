"""The benchmark's agent: a heap of a given size, of which each turn changes a little, and one model call a turn.

Plain standard library, so that the small one is small. A turn replaces 200 entries and 100 strings of the heap, appends
10 KB to its history, writes a 30 KB file and runs a subprocess: what a step does to memory. Entries are records
of text and numbers, as agents hold them, and every eighth string is random bytes, so that about a fifth of the image is
left when it is compressed; with `random` as third argument all entries are random, which nothing compresses.
"""

import http.client
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit


def main() -> None:
    heap_mb, turns = int(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(1)
    words = [chance.randbytes(16).hex() for _ in range(1000)]
    entry = (lambda: chance.randbytes(1024)) if sys.argv[3:] == ["random"] else (lambda: record(chance, words))
    table = {number: entry() for number in range(heap_mb * 512)}
    texts: list[str | bytes] = [
        " ".join(chance.choices(words, k=31)) if number % 8 else chance.randbytes(1024)
        for number in range(heap_mb * 512)
    ]
    history: list[str] = []
    base = urlsplit(os.environ["OPENAI_BASE_URL"])
    for turn in range(turns):
        for _ in range(200 if table else 0):
            table[chance.randrange(len(table))] = entry()
        for _ in range(100 if texts else 0):
            texts[chance.randrange(len(texts))] = " ".join(chance.choices(words, k=31))
        history.append(" ".join(chance.choices(words, k=310)))
        with Path(f"file-{turn}.txt").open("w") as file:
            file.write(json.dumps(history[-3:])[:30_000])
        subprocess.run(["true"], check=True)
        connection = http.client.HTTPConnection(base.hostname or "", base.port or 80)
        message = {"role": "user", "content": f"turn {turn} {history[-1][:200]}"}
        body = json.dumps({"model": "scripted-small", "messages": [message]})
        connection.request("POST", f"{base.path}/chat/completions", body, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        print(f"turn {turn}: {answer['choices'][0]['message']['content'][:40]}", flush=True)


def record(chance: random.Random, words: list[str]) -> dict[str, object]:
    """About one kilobyte of live objects."""
    return {
        "id": chance.getrandbits(40),
        "path": f"src/{chance.choice(words)}/{chance.choice(words)}.py",
        "score": chance.random(),
        "text": " ".join(chance.choices(words, k=14)),
    }


if __name__ == "__main__":
    main()
