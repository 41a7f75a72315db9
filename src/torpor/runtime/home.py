"""Where everything lives below TORPOR_HOME. Paths only: whoever needs a file makes it."""

import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from torpor.core.errors import MachineUnfit
from torpor.core.ids import NodeId, SessionId

SDK_DIRECTORY = "python"
"""Beside torpor-init; in the sandbox on PYTHONPATH."""


@dataclass(frozen=True, slots=True)
class Home:
    """TORPOR_HOME's layout."""

    root: Path

    @property
    def database_file(self) -> Path:
        return self.root / "torpor.db"

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.database_file}"

    @property
    def search_index(self) -> Path:
        return self.root / "search.db"

    def drop_search_index(self) -> None:
        """What was erased is in no file of the index either; the next search makes it anew."""
        for suffix in ("-wal", "-shm", ""):
            self.search_index.with_name(self.search_index.name + suffix).unlink(missing_ok=True)

    @property
    def tools(self) -> Path:
        return self.root / "bin"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def shared_indexes(self) -> Path:
        return self.root / "cache/shared"

    @property
    def cached_packs(self) -> Path:
        return self.root / "cache/packs"

    @property
    def store(self) -> Path:
        """Large bodies of the log; and the snapshots, unless they are kept elsewhere."""
        return self.root / "store"

    @property
    def driver_state(self) -> Path:
        return self.root / "runsc"

    @property
    def sessions(self) -> Path:
        return self.root / "sessions"

    def session(self, session_id: SessionId) -> Path:
        return self.sessions / session_id

    def lock(self, session_id: SessionId) -> Path:
        return self.session(session_id) / "lock"

    def incarnation(self, session_id: SessionId, number: int) -> Path:
        return self.session(session_id) / "incarnations" / str(number)

    @property
    def daemon_lock(self) -> Path:
        """Held by the node daemon."""
        return self.root / "run" / "daemon.lock"

    @property
    def daemon_log(self) -> Path:
        return self.root / "daemon.log"

    def socket(self, node_id: NodeId) -> Path:
        return self.root / "run" / f"{node_id[-12:]}.sock"

    def prepare(self) -> None:
        """Make the directories that several parts share, private to this user."""
        for directory in (self.root, self.tools, self.images, self.sessions, self.root / "run"):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def init_directory(self) -> Path:
        """A directory with the torpor-init of this version, kept by its hash: an image maps the very file.

        Beside it is the Python SDK, of the version that runs now: nothing holds on to a module that was imported.

        Raises:
            MachineUnfit: `init_missing`: the C program was not built.
        """
        program = Path(str(resources.files("torpor.sandbox") / "torpor-init"))
        if not program.is_file():
            raise MachineUnfit("init_missing", "cannot find torpor-init: it was not built", hint="Run `make setup`.")
        digest = hashlib.sha256(program.read_bytes()).hexdigest()
        directory = self.tools / f"init-{digest[:16]}"
        target = directory / "torpor-init"
        if not target.exists():
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            put(target, program.read_bytes(), mode=0o755)
        install_sdk(directory)
        return directory

    def sweep_unfinished(self) -> None:
        """Remove what `put` left below `tools` in processes that died."""
        for staged in (*self.tools.glob("init-*/torpor-init.*"), *self.tools.glob(f"init-*/{SDK_DIRECTORY}/*/agent.*")):
            pid = staged.suffix.removeprefix(".")
            if pid.isdigit() and not Path("/proc", pid).exists():
                staged.unlink(missing_ok=True)


def put(target: Path, data: bytes, *, mode: int) -> None:
    """Write a program that is there whole or not at all, under a name that says who does until it has its own."""
    staged = target.with_name(f"{target.name}.{os.getpid()}")
    staged.write_bytes(data)
    staged.chmod(mode)
    staged.rename(target)


def install_sdk(init_directory: Path) -> None:
    """Put `torpor.agent` where the sandbox finds it.

    Its directory has no `__init__.py` and comes last on the path: where the agent's own Python has Torpor installed,
    that is what `import torpor` finds, and not a part of it.
    """
    source = (resources.files("torpor.sdk") / "agent.py").read_bytes()
    target = init_directory / SDK_DIRECTORY / "torpor" / "agent.py"
    if target.is_file() and target.read_bytes() == source:
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    put(target, source, mode=0o644)
