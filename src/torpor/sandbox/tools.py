"""Finds runsc, or fetches it: the pinned official release, else the distribution's package, unpacked for Torpor alone.

Nothing of the system changes: no source list, no package. A fetched file is used only if its SHA-512 (release) or apt's
own signature check (package) holds. Whether a found runsc works on this kernel is the self-test's to say.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import MachineUnfit
from torpor.core.pins import kept_name
from torpor.sandbox import process
from torpor.sandbox.gvisor import Runsc

RELEASE_URL = "https://storage.googleapis.com/gvisor/releases/release/20260622/x86_64/runsc"
RELEASE_SHA512 = (
    "6df95d09363dbd9ee5d5c889c1549b457e1783b039ff60a8f9f16f8c94c774a2"
    "ca2eef5b1c370e36b863f6b0407b53ba3c69051c6ef051253843dabf89a6de4e"
)
OLDEST_USABLE = 20240101
"""Releases before 2024 lack the systrap platform or restore badly; Debian 12's own is of 2022."""

HELPERS = "gvisor-bin"
SPARE_BYTES = 4 << 20
"""Left free by what is kept, for the event log."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AptSource:
    """Where the machine's own apt gets the distribution from."""

    uri: str
    signed_by: str
    codename: str
    component: str


def find_runsc(tools_directory: Path, environment: Mapping[str, str], clock: Clock) -> Runsc:
    """The runsc to use: TORPOR_RUNSC, then PATH, then Torpor's own directory; the first that is new enough.

    Raises:
        MachineUnfit: `runsc_missing` or `runsc_too_old`.
    """
    given = environment.get("TORPOR_RUNSC")
    if given:
        return inspect_runsc(Path(given), clock)
    on_path = shutil.which("runsc", path=environment.get("PATH"))
    refused: MachineUnfit | None = None
    for candidate in (Path(on_path) if on_path else None, tools_directory / "runsc"):
        if candidate is None or not candidate.exists():
            continue
        try:
            return inspect_runsc(candidate, clock)
        except MachineUnfit as error:
            refused = error
    if refused:
        raise refused
    raise MachineUnfit(
        "runsc_missing",
        "cannot find runsc: neither TORPOR_RUNSC, nor PATH, nor Torpor's own directory has it",
        hint="Run `torpor setup`, which fetches it.",
    )


def inspect_runsc(path: Path, clock: Clock) -> Runsc:
    """Read a binary's version and hash, and refuse one that can't do the work.

    Raises:
        MachineUnfit: `runsc_unusable` or `runsc_too_old`.
    """
    real = path.resolve()
    try:
        finished = process.run_blocking([str(real), "--version"], deadline_seconds=20, clock=clock, check=False)
    except (OSError, MachineUnfit) as error:
        raise MachineUnfit("runsc_unusable", f"cannot run {path}: {error}", hint="Run `torpor setup`.") from error
    version = re.search(r"version (\S+)", finished.stdout.decode(errors="replace"))
    if finished.exit_status != 0 or version is None:
        raise MachineUnfit(
            "runsc_unusable", f"cannot use {path}: it does not tell a version", hint="Run `torpor setup`."
        )
    date = re.search(r"20\d{6}", version[1])
    if date and int(date[0]) < OLDEST_USABLE:
        raise MachineUnfit(
            "runsc_too_old",
            f"cannot use {path}: runsc {version[1]} has no systrap platform and can't run without KVM",
            hint="Run `torpor setup`, which fetches a newer one for Torpor alone, or set TORPOR_RUNSC.",
        )
    with real.open("rb") as binary:
        digest = hashlib.file_digest(binary, "sha256").hexdigest()
    return Runsc(path=real, version=version[1], sha256=digest)


def fetch_runsc(tools_directory: Path, clock: Clock, progress: Progress) -> Runsc:
    """Fetch runsc into Torpor's own directory: the pinned release, else the distribution's package.

    Raises:
        MachineUnfit: `runsc_unavailable`, with what each source said.
    """
    import httpx

    said: list[str] = []
    for source in (_fetch_release, _fetch_package):
        with tempfile.TemporaryDirectory(prefix="torpor-setup-") as scratch:
            try:
                fetched = source(Path(scratch), clock, progress)
                runsc = inspect_runsc(fetched, clock)
                return _install(fetched, runsc, tools_directory)
            except (MachineUnfit, httpx.HTTPError, OSError) as error:
                said.append(f"{source.__name__.removeprefix('_fetch_')}: {error}")
                progress(said[-1])
    raise MachineUnfit(
        "runsc_unavailable",
        f"cannot fetch runsc: {'; '.join(said)}",
        hint="Install gVisor yourself (https://gvisor.dev/docs/user_guide/install/) and set TORPOR_RUNSC to its runsc.",
    )


def _install(fetched: Path, runsc: Runsc, tools_directory: Path) -> Runsc:
    """Keep it as all are kept; `runsc` is a link to the newest."""
    target = keep_runsc(replace(runsc, path=fetched), tools_directory)
    link = tools_directory / "runsc.new"
    link.unlink(missing_ok=True)
    link.symlink_to(target.relative_to(tools_directory))
    link.rename(tools_directory / "runsc")
    return Runsc(path=target, version=runsc.version, sha256=runsc.sha256)


def keep_runsc(runsc: Runsc, tools_directory: Path) -> Path:
    """Keep a binary by its hash, whoever installed it: an image needs the very one that wrote it.

    Newer releases come with a directory of helpers, which have to lie beside it. It is copied, not linked: who writes
    a newer one over the original would change what is kept.

    Raises:
        OSError: it can't be kept, mostly for want of space; nothing is left of the attempt.
    """
    target = tools_directory / kept_name(runsc.sha256) / "runsc"
    _sweep_staged(tools_directory)
    if target.exists():
        return target
    helpers = runsc.path.parent / HELPERS
    tools_directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    _check_room([runsc.path, *helpers.rglob("*")], tools_directory)
    made = Path(tempfile.mkdtemp(prefix=".", dir=tools_directory))
    staged = target.parent.with_name(f"{target.parent.name}{made.name}")
    held = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # For as long as this process lives: by this name it is never without.
        made.chmod(0o755)
        made.rename(staged)
        if helpers.is_dir():
            shutil.copytree(helpers, staged / HELPERS, dirs_exist_ok=True)
        shutil.copyfile(runsc.path, staged / "runsc")
        (staged / "runsc").chmod(0o755)
        try:
            staged.rename(target.parent)
        except OSError:
            if not target.exists():  # Else another node was faster.
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(held)
    return target


def _sweep_staged(tools_directory: Path) -> None:
    """Remove what was being copied when its copier was killed: nobody holds its lock."""
    for staged in tools_directory.glob("runsc-*.*"):
        with contextlib.suppress(OSError):
            held = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(staged)
            finally:
                os.close(held)


def _check_room(files: Iterable[Path], directory: Path) -> None:
    """Refuse before a byte is written: the event log on the same disk needs the last ones more."""
    needed = sum(file.stat().st_size for file in files if file.is_file())
    if shutil.disk_usage(directory).free < needed + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def find_kept(tools_directory: Path, sha256: str, clock: Clock) -> Runsc | None:
    """The binary of that hash, if it is kept and has not been changed."""
    path = tools_directory / kept_name(sha256) / "runsc"
    try:
        kept = inspect_runsc(path, clock) if path.exists() else None
    except MachineUnfit:
        return None
    return kept if kept is not None and kept.sha256 == sha256 else None


def _fetch_release(scratch: Path, _clock: Clock, progress: Progress) -> Path:
    import httpx

    if os.uname().machine != "x86_64":
        raise MachineUnfit("runsc_unavailable", "the pinned release is for x86_64 only")
    progress(f"fetching {RELEASE_URL}")
    target, digest = scratch / "runsc", hashlib.sha512()
    timeout = httpx.Timeout(30, connect=5)
    with httpx.stream("GET", RELEASE_URL, timeout=timeout, follow_redirects=False) as answer, target.open("wb") as file:
        answer.raise_for_status()
        for piece in answer.iter_bytes():
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != RELEASE_SHA512:
        raise MachineUnfit("runsc_unavailable", "the fetched release is not the pinned one: its SHA-512 differs")
    target.chmod(0o755)
    return target


def _fetch_package(scratch: Path, clock: Clock, progress: Progress) -> Path:
    """Let the system's apt, with lists and cache of its own, download the package; unpack it without installing."""
    source = apt_source(Path("/"))
    suites = (f"{source.codename}-backports", source.codename)
    lines = [
        f"deb [signed-by={source.signed_by}] {source.uri} {suite} {source.component}"
        if source.signed_by
        else f"deb {source.uri} {suite} {source.component}"
        for suite in suites
    ]
    for name in ("lists/partial", "archives/partial"):
        (scratch / name).mkdir(parents=True)
    (scratch / "sources.list").write_text("\n".join(lines) + "\n")
    options = [
        f"-oDir::Etc::sourcelist={scratch}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State::Lists={scratch}/lists",
        f"-oDir::Cache={scratch}",
        "-oAPT::Sandbox::User=",
    ]
    progress(f"fetching the runsc package of {suites[0]}")
    _apt(["apt-get", *options, "update"], scratch, clock)
    madison = _apt(["apt-cache", *options, "madison", "runsc"], scratch, clock).decode()
    versions = [line.split("|")[1].strip() for line in madison.splitlines() if line.count("|") >= 2]
    usable = [name for name in versions if (date := re.search(r"20\d{6}", name)) and int(date[0]) >= OLDEST_USABLE]
    if not usable:
        raise MachineUnfit("runsc_unavailable", f"{' and '.join(suites)} offer no runsc of 2024 or later")
    _apt(["apt-get", *options, "download", f"runsc={usable[0]}"], scratch, clock)
    package = next(scratch.glob("runsc_*.deb"))
    _apt(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], scratch, clock)
    return scratch / "unpacked/usr/bin/runsc"


def _apt(argv: list[str], scratch: Path, clock: Clock) -> bytes:
    finished = process.run_blocking(argv, deadline_seconds=300, clock=clock, check=False, cwd=scratch)
    if finished.exit_status != 0:
        last = finished.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise MachineUnfit("runsc_unavailable", f"{argv[0]} failed: {last[0]}")
    return finished.stdout


def apt_source(root: Path) -> AptSource:
    """Read the distribution's mirror and key from the machine's own apt sources, in either of their two formats.

    Raises:
        MachineUnfit: `runsc_unavailable`: no Debian or Ubuntu, or no source of its main suite.
    """
    release: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        pairs = (line.partition("=") for line in (root / "etc/os-release").read_text().splitlines())
        release = {key: value.strip('"') for key, _, value in pairs}
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") not in {"debian", "ubuntu"} or not codename:
        raise MachineUnfit("runsc_unavailable", "this is neither Debian nor Ubuntu, so there is no package to take")
    component = "universe" if release["ID"] == "ubuntu" else "main"
    files = [root / "etc/apt/sources.list", *sorted((root / "etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        entries = (
            _deb822_entries(file.read_text()) if file.suffix == ".sources" else _one_line_entries(file.read_text())
        )
        for uri, suites, signed_by in entries:
            if codename in suites:
                return AptSource(uri=uri, signed_by=signed_by, codename=codename, component=component)
    raise MachineUnfit("runsc_unavailable", f"no apt source of this machine names the suite {codename}")


def _one_line_entries(text: str) -> list[tuple[str, list[str], str]]:
    entries: list[tuple[str, list[str], str]] = []
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)", line)
        if found:
            signed = re.search(r"signed-by=(\S+)", found[1] or "")
            entries.append((found[2], [found[3]], signed[1] if signed else ""))
    return entries


def _deb822_entries(text: str) -> list[tuple[str, list[str], str]]:
    entries: list[tuple[str, list[str], str]] = []
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"(?m)^([A-Za-z-]+):[ \t]*(.*)$", stanza))
        if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes").lower() != "no":
            signed = fields.get("Signed-By", "")
            entries += [
                (uri, fields.get("Suites", "").split(), signed if signed.startswith("/") else "")
                for uri in fields.get("URIs", "").split()
            ]
    return entries
