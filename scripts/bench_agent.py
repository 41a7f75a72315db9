"""The benchmark's agent: a heap of a given size, of which each turn changes a little, and one model call a turn.

Plain standard library, so that the small one is small. A turn replaces 200 entries and 100 strings of the heap, appends
10 KB to its history, writes a 30 KB file and runs a subprocess: what an agent's step does to memory.
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
    table = {number: chance.randbytes(1024) for number in range(heap_mb * 512)}
    texts = [" ".join(chance.choices(words, k=31)) for _ in range(heap_mb * 512)]
    history: list[str] = []
    base = urlsplit(os.environ["OPENAI_BASE_URL"])
    for turn in range(turns):
        for _ in range(200 if table else 0):
            table[chance.randrange(len(table))] = chance.randbytes(1024)
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


if __name__ == "__main__":
    main()
