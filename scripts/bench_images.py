"""Real successive images for the store's benchmark: an agent in runsc, in Python or for Node, that does one step of
work per line on stdin.

Owns the agents' programs, their bundle and the checkpoints; knows nothing of the store. Each step replaces 200
dict entries and 100 strings, appends 10 KB of history and serialises it all, writes a 30 KB file and runs one
subprocess.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

AGENT = r"""
import json, os, random, string, subprocess, sys
heap_mb, turns_kept, changes = map(int, sys.argv[1:4])
rng = random.Random(7)
words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(4000)]
def text(n):
    return " ".join(rng.choices(words, k=n // 6))[:n]
table, strings, history = {}, [], []
per_entry = 2600
for i in range(heap_mb * 1_000_000 // per_entry):
    table[i] = {"id": i, "name": text(40), "score": rng.random(), "tags": [rng.random() for _ in range(8)]}
    strings.append(text(700) if i % 8 else rng.randbytes(700))
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(changes):
        i = rng.randrange(len(table))
        table[i] = {"id": i, "name": text(40), "score": rng.random(), "tags": [rng.random() for _ in
        range(8)]}
    for _ in range(changes // 2):
        strings[rng.randrange(len(strings))] = text(700)
    history.append({"role": "user", "content": text(10_000)})
    del history[:-turns_kept]
    body = json.dumps(history)
    with open("/workspace/out.txt", "w") as out:
        out.write(text(30_000))
    subprocess.run(["/bin/true"], check=True)
    print("done", len(body), flush=True)
"""

NODE_AGENT = r"""
const fs = require("fs"), {spawnSync} = require("child_process"), {randomBytes} = require("crypto");
const heapMb = Number(process.argv[1]);
let state = 7;
const random = () => (state = (state * 1103515245 + 12345) % 2147483648) / 2147483648;
const below = (n) => Math.floor(random() * n);
const letters = () => Array.from({length: 2 + below(8)}, () => String.fromCharCode(97 + below(26))).join("");
const words = Array.from({length: 4000}, letters);
const text = (n) => Array.from({length: Math.ceil(n / 6)}, () => words[below(words.length)]).join(" ").slice(0, n);
const entry = (i) => ({id: i, name: text(40), score: random(), tags: Array.from({length: 8}, random)});
const table = new Map(), strings = [], history = [];
for (let i = 0; i < heapMb * 1000000 / 2600; i++) {
  table.set(i, entry(i));
  strings.push(i % 8 ? text(700) : randomBytes(700));
}
console.log("ready");
require("readline").createInterface({input: process.stdin}).on("line", () => {
  for (let n = 0; n < 200; n++) { const i = below(table.size); table.set(i, entry(i)); }
  for (let n = 0; n < 100; n++) strings[below(strings.length)] = text(700);
  history.push({role: "user", content: text(10000)});
  const body = JSON.stringify(history);
  fs.writeFileSync("/workspace/out.txt", text(30000));
  spawnSync("/bin/true");
  console.log("done", body.length);
});
"""

COMMANDS = {"python": ["/usr/bin/python3", "-c", AGENT], "node": ["/usr/bin/node", "-e", NODE_AGENT]}

BINDS = ("/usr", "/bin", "/lib", "/lib64")


def _config(workspace: Path, language: str, *numbers: int) -> dict[str, object]:
    mounts = [
        {"destination": path, "type": "bind", "source": str(Path(path).resolve()), "options": ["rbind", "ro"]}
        for path in BINDS
    ]
    mounts.append({"destination": "/workspace", "type": "bind", "source": str(workspace), "options": ["rbind", "rw"]})
    mounts += [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [*COMMANDS[language], *map(str, numbers)],
            "env": ["PATH=/usr/bin:/bin", "HOME=/tmp"],
            "cwd": "/",
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "bench",
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]},
    }


@contextlib.contextmanager
def agent_images(
    runsc: Path,
    scratch: Path,
    heap_mb: int,
    steps: int,
    language: str = "python",
    *,
    turns_kept: int = 1_000_000,
    changes: int = 200,
) -> Iterator[Iterator[tuple[Path, Path]]]:
    """Yield an iterator of (image directory, workspace) after each step; the caller may delete the image.

    Args:
        turns_kept: how much history a Python agent keeps, for images that do not grow for ever.
        changes: how many entries of its heap are new after a step.
    """
    bundle, workspace, state = scratch / "bundle", scratch / "workspace", scratch / "state"
    for path in (bundle / "rootfs", workspace, state):
        path.mkdir(parents=True)
    config = _config(workspace, language, heap_mb, turns_kept, changes)
    (bundle / "config.json").write_text(json.dumps(config))
    name = f"bench-{language}-{heap_mb}"
    common = [
        str(runsc), "--root", str(state), "--platform", "systrap", "--network", "none",
        "--overlay2=root:memory", "--ignore-cgroups", "--host-uds=none",
    ]  # fmt: skip
    agent = subprocess.Popen(
        [*common, "run", "--bundle", str(bundle), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    stdin, stdout = agent.stdin, agent.stdout

    def expect(word: str) -> None:
        line = stdout.readline()
        if not line.startswith(word):
            raise RuntimeError(f"the agent said {line!r}, not {word!r}")

    def images() -> Iterator[tuple[Path, Path]]:
        expect("ready")
        for step in range(steps + 1):
            if step:
                stdin.write("step\n")
                stdin.flush()
                expect("done")
            image = scratch / f"image-{step:04d}"
            command = [
                *common,
                "checkpoint",
                "--image-path",
                str(image),
                "--compression=none",
                "--leave-running",
                name,
            ]
            subprocess.run(command, check=True, capture_output=True)
            yield image, workspace

    try:
        yield images()
    finally:
        agent.kill()
        agent.wait()
        stdin.close()
        stdout.close()
        subprocess.run([*common, "delete", "--force", name], check=False, capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)
