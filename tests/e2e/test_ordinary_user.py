"""The main job for an ordinary user: no root, no group, no helper; a user namespace is all that there is."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from tests.stage import AGENT, REAL_KEY, Stage, model_server

pytestmark = [pytest.mark.runsc, pytest.mark.user, pytest.mark.timeout(600)]
UID = 61234
PYTHON = "/usr/bin/python3"
"""The interpreter of the suite may lie in a home directory that others cannot enter."""
AS_USER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs")


@pytest.fixture
def ordinary(scratch: Path, runsc: Path) -> Iterator[Stage]:
    """A stage whose commands are an ordinary user's, with all that they need where that user can read it."""
    if os.geteuid() != 0:
        pytest.skip("it takes root to become an ordinary user")
    asked = [PYTHON, "-c", "import sys; print(*sys.version_info[:2])"]
    version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout if Path(PYTHON).exists() else ""
    if version.split() != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"{PYTHON} is no Python {sys.version_info[0]}.{sys.version_info[1]} as this one is")
    scratch.chmod(0o755)
    library = scratch / "library"
    for name in ("torpor", "openai"):
        copy_distribution(name, library)
    shutil.copytree(Path(sys.modules["torpor"].__path__[0]), library / "torpor", dirs_exist_ok=True)
    shutil.copy(runsc, scratch / "runsc")
    (scratch / "runsc").chmod(0o755)
    for name in ("home", "user", "project"):
        (scratch / name).mkdir()
        os.chown(scratch / name, UID, UID)
    shutil.copy(AGENT, scratch / "project")
    pace = ["--turns", "5", "--first-byte-seconds", "0.2", "--chunk-seconds", "0.1"]
    with model_server(scratch, pace) as (url, _control):
        environment = {
            "PATH": "/usr/bin:/bin:/usr/sbin",
            "HOME": str(scratch / "user"),
            "TORPOR_HOME": str(scratch / "home"),
            "TORPOR_RUNSC": str(scratch / "runsc"),
            "PYTHONPATH": str(library),
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": REAL_KEY,
        }
        made = Stage(directory=scratch, environment=environment, command=(*AS_USER, PYTHON, "-m", "torpor"))
        try:
            yield made
        finally:
            made.close()


def copy_distribution(name: str, library: Path, done: set[str] | None = None) -> None:
    """Copy what is installed under a name, and what it needs."""
    done = set() if done is None else done
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return  # Needed on other platforms only.
    if found.name in done:
        return
    done.add(found.name)
    for file in found.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (library / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), library / file)
    for needed in found.requires or ():
        if "extra ==" not in needed:
            word = needed.split(";")[0].strip()
            copy_distribution("".join(c if c.isalnum() or c in "-_." else " " for c in word).split()[0], library, done)


def skip_if_forbidden(made: Stage) -> None:
    tried = subprocess.run([*AS_USER, "unshare", "-Urm", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"this machine forbids user namespaces to ordinary users: {tried.stderr.strip()}")


def uid_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nUid:")[2].split()[0])


def test_an_ordinary_users_session_survives_its_sandbox_and_its_node(ordinary: Stage) -> None:
    skip_if_forbidden(ordinary)
    library = str(ordinary.directory / "library")
    seen = ("--mount", library, "--env", f"PYTHONPATH={library}")
    node = ordinary.node("run", "--name", "one", *seen, "--", PYTHON, "agent.py")
    log = ordinary.follow("one")
    log.wait("checkpoint.committed", 2)
    log.wait("call.answering", call=2)
    assert {uid_of(pid) for pid in ordinary.sandbox_pids()} == {UID}
    ordinary.kill_sandbox()
    log.wait("recovery.chosen", 2)
    log.wait("call.answering", call=4)
    node.kill()
    node.wait()
    ordinary.kill_sandbox()
    ordinary.torpor("resume", "one")
    log.close()
    chosen = [event["data"]["mode"] for event in ordinary.events("one") if event["kind"] == "recovery.chosen"]
    assert chosen == ["boot", "restore", "restore"]
    report = json.loads(ordinary.torpor("output", "one").stdout.rpartition("[report] ")[2])
    assert report == {**dict.fromkeys(("memory", "mapped", "sqlite", "subprocess"), 5), "background": {"ticker": None}}
    assert "is whole" in ordinary.torpor("log", "one", "--verify").stdout
    ordinary.torpor("pull", "one")
    assert (ordinary.project / "plan.md").stat().st_uid == UID
    ordinary.torpor("rm", "one")
    assert ordinary.sandbox_pids() == []


def test_doctor_says_that_it_goes_through_a_user_namespace(ordinary: Stage) -> None:
    skip_if_forbidden(ordinary)
    shown = ordinary.torpor("doctor").stdout
    assert f"ok   privilege: ordinary user {UID}, through a user namespace" in shown
    assert "ok   relay" in shown


def test_doctor_says_what_to_do_where_user_namespaces_are_forbidden(ordinary: Stage) -> None:
    """The kernel lets nobody make a user namespace from inside a chroot."""
    root = ordinary.directory / "root"
    root.mkdir()
    inside = f'mount --rbind / {root} && exec chroot {root} "$@"'
    forbidden = Stage(
        directory=ordinary.directory,
        environment=ordinary.environment,
        command=("unshare", "-m", "--propagation", "private", "sh", "-c", inside, "sh", *ordinary.command),
    )
    refused = forbidden.torpor("doctor", check=False)
    assert refused.returncode == 69, refused.stderr
    assert "FAIL privilege: ordinary user" in refused.stdout
    assert "not permitted" in refused.stdout
    assert "run Torpor as root" in refused.stdout
    assert "error machine_unfit" in refused.stderr
