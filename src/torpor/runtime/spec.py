"""What a session is to run, fixed at its creation and stored with it: every later sandbox is made from this alone."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from torpor.core.divergence import OnDivergence
from torpor.core.ids import SessionId
from torpor.core.pacing import SHARE_PPM
from torpor.runtime.home import Home
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.rootfs import Mount, RootImage


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A RootImage as JSON."""

    name: str
    root: str
    mounts: tuple[tuple[str, str], ...]
    path: str
    digest: str


class SessionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The stored spec.

    Attributes:
        argv: the agent's command.
        environment: the agent's, complete; no secret of the host is in it.
        cwd: the agent's, inside the sandbox.
        image: the root and its mounts.
        init_directory: host directory of the torpor-init that the session was made with.
        workspace_source: the host directory that was copied, for people.
        on_divergence: what happens when a restored agent leaves the log's path.
        checkpoint_share_ppm: millionths of the wall time that checkpoints at turns may cost (core/pacing.py).
        changes: of a fork, what is in `environment` and not in its parent's image: it is told when that is restored.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    cwd: str
    image: ImageSpec
    init_directory: str
    workspace_source: str
    on_divergence: OnDivergence = OnDivergence.CONTINUE
    checkpoint_share_ppm: int = SHARE_PPM
    changes: dict[str, str] = {}


def image_spec(image: RootImage) -> ImageSpec:
    mounts = tuple((mount.source, mount.destination) for mount in image.mounts)
    return ImageSpec(name=image.name, root=image.root, mounts=mounts, path=image.path, digest=image.digest)


def root_image(spec: ImageSpec) -> RootImage:
    return RootImage(
        name=spec.name,
        root=spec.root,
        mounts=tuple(Mount(source=source, destination=destination) for source, destination in spec.mounts),
        path=spec.path,
        digest=spec.digest,
    )


def sandbox_id(session_id: SessionId, incarnation: int) -> str:
    """The driver's name for one incarnation; carries the session's, so that orphans can be told."""
    return f"{session_id.removeprefix('ses_')}-{incarnation}"


def session_of_sandbox(sandbox_id: str) -> SessionId:
    """Whose incarnation a driver's name is."""
    return SessionId(f"ses_{sandbox_id.rpartition('-')[0]}")


def sandbox_plan(home: Home, session_id: SessionId, spec: SessionSpec, incarnation: int) -> SandboxPlan:
    """The plan of one incarnation, always the same for the same arguments: a later node finds the sandbox by it."""
    directory = home.incarnation(session_id, incarnation)
    return SandboxPlan(
        sandbox_id=sandbox_id(session_id, incarnation),
        directory=directory,
        image=root_image(spec.image),
        workspace=directory / "workspace",
        init_directory=Path(spec.init_directory),
    )


def visible_command(command: str, environments: Sequence[Path]) -> str:
    """A command given by a path into a Python environment is found there inside, not in the workspace."""
    path = Path(command)
    if "/" in command and not path.is_absolute():
        absolute = Path.cwd() / path
        if any(absolute.is_relative_to(environment) for environment in environments):
            return str(absolute)
    return command
