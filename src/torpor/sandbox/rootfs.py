"""The read-only root of a sandbox: `host` (a curated view of this machine) or a directory with a root file system.

`host` shows path by path what programs need and nothing that is precious: never the home directory, /root, /var, keys,
sockets or credentials. What it shows is listed in docs/image-host.md; the list here is the only one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import InvalidInput
from torpor.sandbox import process

SYSTEM_DIRECTORIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Shown as they are, read-only; a link (/bin -> usr/bin) stays a link."""

ETC_COPIED = (
    "alternatives",
    "bash.bashrc",
    "ca-certificates.conf",
    "debian_version",
    "fonts",
    "host.conf",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "localtime",
    "login.defs",
    "magic",
    "magic.mime",
    "mime.types",
    "networks",
    "nsswitch.conf",
    "os-release",
    "perl",
    "profile",
    "protocols",
    "python3",
    "python3.11",
    "services",
    "shells",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
)
"""Of /etc, copied once into the image; everything else there stays unseen."""

ETC_WRITTEN = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hostname": "torpor\n",
    "hosts": "127.0.0.1 localhost torpor\n::1 localhost\n",
    "resolv.conf": "# No network in here: use the proxy that HTTP_PROXY names.\n",
}
EMPTY_DIRECTORIES = ("dev", "proc", "sys", "tmp", "run", "run/torpor", "root", "home", "var", "var/tmp", "workspace")
GUEST_COMMANDS = "/run/torpor/bin"
"""Where init puts torpor-guest, whatever the image."""
MASKED_IN_PYTHON = ("pip.conf", "lib/python*/site-packages/*.dist-info/direct_url.json")
"""Files of a Python environment that may hold tokens or point into the home directory: shown empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A host path bound read-only at a path of the sandbox."""

    source: str
    destination: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RootImage:
    """A root file system and the mounts on it.

    Attributes:
        name: "host" or the directory that the user gave.
        root: host directory that is `/` below the writable overlay.
        mounts: in mounting order, parents first.
        path: the agent's PATH.
        digest: SHA-256 (hex) over the root's listing and the mounts.
    """

    name: str
    root: str
    mounts: tuple[Mount, ...]
    path: str
    digest: str


def directory_image(directory: Path, mounts: Sequence[Path] = ()) -> RootImage:
    """The image of a root file system that the user has unpacked.

    Raises:
        InvalidInput: it is no directory with a `bin` or `usr` in it.
    """
    root = directory.resolve()
    if not root.is_dir() or not any((root / name).exists() for name in ("bin", "usr")):
        raise InvalidInput(
            "image_unusable",
            f"cannot use image {str(directory)!r}: it is no root file system (neither bin nor usr in it)",
            hint="Give a directory as `debootstrap` makes it, or `--image host`.",
        )
    binds = tuple(Mount(source=str(path.resolve()), destination=str(path.absolute())) for path in mounts)
    stat = root.stat()
    digest = hashlib.sha256(json.dumps([str(root), stat.st_ino, [(m.source, m.destination) for m in binds]]).encode())
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return RootImage(name=str(root), root=str(root), mounts=binds, path=path, digest=digest.hexdigest())


def host_image(images_directory: Path, python_prefixes: Sequence[Path], mounts: Sequence[Path] = ()) -> RootImage:
    """Build (or find, by content) the curated view of this machine.

    Args:
        images_directory: where built roots are kept, one directory a digest.
        python_prefixes: the Python environments in use, first one first on PATH.
        mounts: further host paths, shown read-only where they are.
    """
    wanted = [path.absolute() for path in (*python_prefixes, *mounts)]
    binds = _outermost(path for path in wanted if not path.is_relative_to("/usr"))
    empty = images_directory / "empty"
    links = _linked()
    shown = [Path("/", name) for name in SYSTEM_DIRECTORIES if name not in links and Path("/", name).is_dir()]
    masked = [file for prefix in python_prefixes for pattern in MASKED_IN_PYTHON for file in prefix.glob(pattern)]
    all_mounts = (
        *(Mount(source=str(path), destination=str(path)) for path in (*shown, *binds)),
        *(Mount(source=str(empty), destination=str(path)) for path in sorted(masked)),
    )
    bins = [str(prefix.absolute() / "bin") for prefix in python_prefixes]
    path = ":".join([*bins, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
    return _host_image(images_directory, all_mounts, path)


def image_here(image: RootImage, images_directory: Path) -> RootImage:
    """What an image of another machine, or of another TORPOR_HOME, is on this one.

    Raises:
        InvalidInput: `image_unusable`, a path that it shows is not here.
    """
    for mount in image.mounts:
        if mount.source == mount.destination and not Path(mount.source).exists():
            raise InvalidInput("image_unusable", f"cannot use image {image.name!r}: there is no {mount.source} here")
    if image.name != "host":
        return directory_image(Path(image.root), [Path(mount.destination) for mount in image.mounts])
    empty = str(images_directory / "empty")
    mounts = (
        mount if mount.source == mount.destination else Mount(source=empty, destination=mount.destination)
        for mount in image.mounts
    )
    return _host_image(images_directory, tuple(mounts), image.path)


def _host_image(images_directory: Path, mounts: tuple[Mount, ...], path: str) -> RootImage:
    links = _linked()
    etc = [name for name in ETC_COPIED if Path("/etc", name).exists()]
    inputs = [ETC_WRITTEN, EMPTY_DIRECTORIES, [(m.source, m.destination) for m in mounts], links, _etc_stamp(etc)]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    root = images_directory / f"host-{digest[:16]}"
    if not root.is_dir():
        images_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        (images_directory / "empty").touch()
        _build_host_root(root, links, etc, mounts)
    return RootImage(name="host", root=str(root), mounts=mounts, path=path, digest=digest)


def _linked() -> list[str]:
    return [name for name in SYSTEM_DIRECTORIES if Path("/", name).is_symlink()]


def python_environments(command: str, environment: Mapping[str, str], clock: Clock) -> list[Path]:
    """The Python environments in use: of the agent's command, of the activated environment, of the `python3` on PATH.

    Each interpreter is asked itself (a shim or a link says little by its path). What lies in /usr is shown anyway.
    """
    search = environment.get("PATH")
    active = environment.get("VIRTUAL_ENV")
    interpreters = [command] if Path(command).name.startswith("python") else []
    interpreters += [str(Path(active, "bin/python"))] if active else []
    interpreters += ["python", "python3"]
    prefixes: list[Path] = []
    for name in interpreters:
        found = shutil.which(name, path=search)
        for prefix in _prefixes_of(found, clock) if found else ():
            if prefix not in prefixes and not prefix.is_relative_to("/usr"):
                prefixes.append(prefix)
    return prefixes


def _prefixes_of(interpreter: str, clock: Clock) -> list[Path]:
    """The environment of an interpreter, and the installation that a virtual one was made from."""
    question = "import sys; print(sys.prefix); print(sys.base_prefix)"
    finished = process.run_blocking([interpreter, "-I", "-c", question], deadline_seconds=20, clock=clock, check=False)
    if finished.exit_status != 0:
        return []
    return [Path(line) for line in finished.stdout.decode(errors="replace").splitlines() if line.startswith("/")]


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Without those that lie inside another one, in mounting order."""
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _etc_stamp(names: Sequence[str]) -> list[tuple[str, int, int]]:
    return [(name, Path("/etc", name).stat().st_mtime_ns, Path("/etc", name).stat().st_size) for name in names]


def _build_host_root(root: Path, links: Sequence[str], etc: Sequence[str], mounts: Sequence[Mount]) -> None:
    """Make the root beside its final place and rename it: half a root is never seen."""
    building = root.with_name(f"{root.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    for name in EMPTY_DIRECTORIES:
        (building / name).mkdir(parents=True, exist_ok=True)
    (building / "tmp").chmod(0o1777)
    (building / "var/tmp").chmod(0o1777)
    for name in links:
        (building / name).symlink_to(Path("/", name).readlink())
    _copy_etc(building / "etc", etc)
    for mount in mounts:
        point = building / mount.destination.lstrip("/")
        if Path(mount.source).is_dir():
            point.mkdir(parents=True, exist_ok=True)
        elif not any(mount.destination.startswith(f"{outer.destination}/") for outer in mounts):
            point.parent.mkdir(parents=True, exist_ok=True)
            point.touch()
    try:
        building.rename(root)
    except OSError:
        # Another process built the same one first; its content is the same by digest.
        shutil.rmtree(building)


def _copy_etc(destination: Path, names: Sequence[str]) -> None:
    destination.mkdir()
    for name in names:
        source, target = Path("/etc", name), destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target, follow_symlinks=not source.is_symlink() or not _stays_visible(source))
    for name, text in ETC_WRITTEN.items():
        (destination / name).write_text(text)


def _stays_visible(link: Path) -> bool:
    """A link into what the image shows anyway can stay a link."""
    return str(link.resolve()).startswith("/usr/")
