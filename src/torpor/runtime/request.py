"""What a person asks for with `torpor run`, and the spec that it becomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torpor.config import guest_environment, read_checkpoint_share
from torpor.core.divergence import OnDivergence
from torpor.core.ladder import OnLost
from torpor.runtime.home import SDK_DIRECTORY, Home
from torpor.runtime.spec import SessionSpec, image_spec, visible_command
from torpor.sandbox import rootfs
from torpor.sandbox.driver import INIT_DIRECTORY

GUEST_PYTHON = f"{INIT_DIRECTORY}/{SDK_DIRECTORY}"
CALLER_VARIABLES_KEPT = ("TERM", "TZ", "LANG", "COLORTERM", "NO_COLOR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a person asks for with `torpor run`."""

    argv: tuple[str, ...]
    name: str | None
    image: str
    workspace: Path
    environment: Mapping[str, str]
    mounts: tuple[Path, ...] = ()
    on_divergence: OnDivergence = OnDivergence.CONTINUE
    budget_nanousd: int | None = None
    checkpoint_share_ppm: int | None = None
    """None: as config.toml says."""
    restarts_max: int = 0
    on_lost: OnLost = OnLost.BOOT
    memory_bytes_max: int | None = None
    any_size: bool = False
    """A workspace of any size may be copied."""


def make_spec(
    request: Request, source: Path, environments: Sequence[Path], caller: Mapping[str, str], home: Home
) -> SessionSpec:
    """Args:
    source: the directory that becomes the workspace.
    environments: the Python environments in use.
    caller: the environment of whoever asks, of which little is kept.
    """
    if request.image == "host":
        image = rootfs.host_image(home.images, environments, request.mounts)
    else:
        image = rootfs.directory_image(Path(request.image), request.mounts)
    environment = {
        "PATH": f"{image.path}:{rootfs.GUEST_COMMANDS}",
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TORPOR_SESSION": "1",
        **{name: caller[name] for name in CALLER_VARIABLES_KEPT if name in caller},
        **guest_environment(),
        **request.environment,
        "PYTHONPATH": ":".join([*([own] if (own := request.environment.get("PYTHONPATH")) else []), GUEST_PYTHON]),
    }
    return SessionSpec(
        argv=(visible_command(request.argv[0], environments), *request.argv[1:]),
        environment=environment,
        cwd="/workspace",
        image=image_spec(image),
        init_directory=str(home.init_directory()),
        workspace_source=str(source),
        on_divergence=request.on_divergence,
        on_lost=request.on_lost,
        memory_bytes_max=request.memory_bytes_max,
        restarts_max=request.restarts_max,
        checkpoint_share_ppm=read_checkpoint_share(home.root, request.checkpoint_share_ppm),
    )
