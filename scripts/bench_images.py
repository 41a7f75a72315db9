"""Real successive images for the store's benchmark: a Python agent in runsc that does one step of work per
line on stdin.

Owns the agent's program, its bundle and the checkpoints; knows nothing of the store. Each step replaces 200
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

BINDS = ("/usr", "/bin", "/lib", "/lib64")


def _config(workspace: Path, *numbers: int) -> dict[str, object]:
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
            "args": ["/usr/bin/python3", "-c", AGENT, *map(str, numbers)],
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
    runsc: Path, scratch: Path, heap_mb: int, steps: int, turns_kept: int = 1_000_000, changes: int = 200
) -> Iterator[Iterator[tuple[Path, Path]]]:
    """Yield an iterator of (image directory, workspace) after each step; the caller may delete the image.

    Args:
        turns_kept: how much history the agent keeps, for images that do not grow for ever.
        changes: how many entries of its heap are new after a step.
    """
    bundle, workspace, state = scratch / "bundle", scratch / "workspace", scratch / "state"
    for path in (bundle / "rootfs", workspace, state):
        path.mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps(_config(workspace, heap_mb, turns_kept, changes)))
    name = f"bench-{heap_mb}"
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
