"""config.toml of TORPOR_HOME, as it is written. What it means together with the environment is `config`'s to say."""

import stat
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from torpor.core.errors import InvalidInput
from torpor.core.idling import LINGER_SECONDS, PAUSED_SECONDS, READY_SECONDS
from torpor.core.pacing import SHARE_PPM, share_text

Family = Literal["openai", "anthropic", "gemini"]
"""Which dialects an upstream speaks, and where its key goes."""


class UpstreamFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One [upstreams.NAME] table, as it is written."""

    family: Family | None = None
    base_url: str | None = None
    key: str | None = None
    key_env: str | None = None
    key_command: list[str] | None = None
    bearer: bool | None = None
    models: tuple[str, ...] = ()
    path_prefix: str = ""
    paths: tuple[str, ...] = ()
    llm_paths: tuple[str, ...] = ()
    connect_seconds: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    read_seconds: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 4
    retry_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    stream_usage: bool | None = None


class PriceFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One [prices."PATTERN"] table, as it is written: dollars for a million tokens, as strings."""

    input: Decimal
    output: Decimal
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(gt=0)] | None = None


class StoreFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The [store] table, as it is written."""

    url: str | None = None
    endpoint: str = ""
    region: str = ""
    key_id: str = ""
    key: str | None = None
    key_env: str | None = None
    key_command: list[str] | None = None
    request_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    retry_seconds: Annotated[float, msgspec.Meta(ge=0)] = 90.0
    cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 2_000_000_000


class RetentionFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The [retention] table, as it is written."""

    keep_last: Annotated[int, msgspec.Meta(ge=1)] = 100
    keep_hourly: Annotated[int, msgspec.Meta(ge=0)] = 24
    keep_daily: Annotated[int, msgspec.Meta(ge=0)] = 30


class CollectFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The [collect] table, as it is written."""

    grace_seconds: Annotated[float, msgspec.Meta(ge=0)] = 3600.0


class HibernateFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The [hibernate] table, as it is written."""

    linger_seconds: Annotated[float, msgspec.Meta(gt=0)] | Literal["never"] = LINGER_SECONDS
    paused_seconds: Annotated[float, msgspec.Meta(ge=0)] = PAUSED_SECONDS
    ready_seconds: Annotated[float, msgspec.Meta(ge=0)] = READY_SECONDS


class FileFields(msgspec.Struct, frozen=True):
    """The whole file."""

    workspace_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 1_000_000_000
    checkpoint_share: str = share_text(SHARE_PPM)
    image_cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 1_000_000_000
    image_cache_seconds_max: Annotated[int, msgspec.Meta(ge=0)] = 3600
    starts_max: Annotated[int, msgspec.Meta(ge=1)] | None = None
    store: StoreFields = StoreFields()
    retention: RetentionFields = RetentionFields()
    collect: CollectFields = CollectFields()
    hibernate: HibernateFields = HibernateFields()
    upstreams: dict[str, UpstreamFields] = msgspec.field(default_factory=dict[str, UpstreamFields])
    prices: dict[str, PriceFields] = msgspec.field(default_factory=dict[str, PriceFields])


def read_file(home: Path) -> FileFields:
    """What TORPOR_HOME's config.toml says; without one, what holds without one.

    Raises:
        InvalidInput: it is malformed, or holds a key that other users may read.
    """
    path = home / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except FileNotFoundError:
        return FileFields()
    except (OSError, UnicodeDecodeError) as error:
        raise invalid(str(error)) from error
    try:
        said = msgspec.convert(tomllib.loads(text), FileFields)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise invalid(str(error)) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and any(fields.key for fields in (said.store, *said.upstreams.values())):
        raise invalid("it holds a key, and other users may read it", hint="chmod 600 config.toml, or use key_command.")
    return said


def invalid(reason: str, *, hint: str = "") -> InvalidInput:
    """Why the configuration can't be used."""
    return InvalidInput("config_invalid", f"cannot read the configuration: {reason}", hint=hint)
