"""What the user says outside of commands: TORPOR_HOME, where snapshots are kept, and which model providers the gateway
may call with which keys.

Providers come from TORPOR_HOME/config.toml, else from the variables that the providers' own clients read. A provider is
taken whole from one of the two, so that a key never goes to an address that was not given together with it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

from torpor.config_file import Family, PriceFields, StoreFields, UpstreamFields, invalid, read_file
from torpor.core.errors import InvalidInput
from torpor.core.idling import Tiers
from torpor.core.money import Price
from torpor.core.pacing import parse_share
from torpor.core.retention import RetentionPolicy
from torpor.core.secret import Secret

FAMILIES: tuple[Family, ...] = ("openai", "anthropic", "gemini")
DEFAULT_BASE_URLS: Mapping[Family, str] = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com",
}
GATEWAY_PORT = 4100
PROXY_PORT = 4101
PRICE_DOLLARS_MAX = 1_000_000
FAKE_KEY = "torpor-keeps-the-real-key-outside"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """A provider's key: itself, or the command that prints it. Nothing at all = no key is sent.

    Attributes:
        environment: the variable that `value` was read from; if it was not set, that is told when a call needs it.
    """

    value: Secret | None = None
    environment: str | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A model provider.

    Attributes:
        base_url: without a slash at its end; for the family "openai" it includes /v1.
        bearer: the key goes into `authorization: Bearer`, else into the family's own header.
        models: patterns (`*`, `?`) of the models that it is asked for; with none it is its family's default.
        path_prefix: what paths begin with that go to it whatever the model; it is taken away before.
        paths, llm_paths: requests of no known dialect that it takes, as "POST /v1/embeddings"; for the second ones a
            model thinks, so a checkpoint fits.
        retries, retry_seconds: how often, and for how long in all, a refused request is sent again within its call.
        stream_usage: a stream that counts its tokens only if asked is asked to, whatever the agent says.
    """

    name: str
    family: Family
    base_url: str
    key: KeySource
    bearer: bool
    models: tuple[str, ...] = ()
    path_prefix: str = ""
    paths: tuple[str, ...] = ()
    llm_paths: tuple[str, ...] = ()
    connect_seconds: float = 10.0
    read_seconds: float = 600.0
    retries: int = 4
    retry_seconds: float = 60.0
    stream_usage: bool = True

    @property
    def is_default(self) -> bool:
        """Whether it takes its family's requests that nothing else is said of."""
        return not self.models and not self.path_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceRule:
    """What the user says that models cost.

    Attributes:
        pattern: of model names (`*`, `?`); the first rule that fits counts.
        output_tokens_max: the longest answer of such a model; None if nothing is said of it.
    """

    pattern: str
    price: Price
    output_tokens_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where snapshots are kept.

    Attributes:
        url: `file:///` and a directory; `s3://BUCKET`, `gs://BUCKET` or `az://ACCOUNT/CONTAINER`, each with a prefix of
            keys behind it if one is wanted.
        endpoint: the address of a store that is not its cloud's own; empty = the cloud's.
        key_id, key: of an object store; without a key, what the cloud's own tools find in the environment.
        request_seconds: how long one request may take.
        retry_seconds: for how long in all a request that fails for now is made again.
        cache_bytes_max: what of an object store's packs is kept on this machine's disk.
    """

    url: str
    endpoint: str = ""
    region: str = ""
    key_id: str = ""
    key: KeySource = KeySource()
    request_seconds: float = 60.0
    retry_seconds: float = 90.0
    cache_bytes_max: int = 2_000_000_000


def torpor_home(environment: Mapping[str, str]) -> Path:
    """Where state lives: TORPOR_HOME, else the user's data directory.

    Raises:
        InvalidInput: it is not an absolute path.
    """
    data_home = environment.get("XDG_DATA_HOME") or f"{environment.get('HOME', '')}/.local/share"
    home = Path(environment.get("TORPOR_HOME") or f"{data_home}/torpor")
    if not home.is_absolute():
        raise InvalidInput(
            "home_not_absolute",
            f"cannot use {str(home)!r} as TORPOR_HOME: it is not an absolute path",
            hint="Set TORPOR_HOME, or HOME.",
        )
    return home


def read_workspace_bytes_max(home: Path) -> int:
    """How large a directory `run` copies without asking.

    Raises:
        InvalidInput: config.toml is malformed.
    """
    return read_file(home).workspace_bytes_max


def read_checkpoint_share(home: Path, given_ppm: int | None) -> int:
    """Millionths of the wall time for checkpoints at turns, unless given. Raises InvalidInput (`share_malformed`)."""
    return parse_share(read_file(home).checkpoint_share) if given_ppm is None else given_ppm


def read_image_cache(home: Path) -> tuple[int, int]:
    """How many bytes of images stopped sessions may keep in memory, and for how many seconds. Raises InvalidInput."""
    said = read_file(home)
    return said.image_cache_bytes_max, said.image_cache_seconds_max


def read_upstreams(home: Path, environment: Mapping[str, str]) -> tuple[Upstream, ...]:
    """The providers that are configured, at most one of each family without models or prefix of its own.

    Raises:
        InvalidInput: config.toml is malformed, says two things at once, or shows a key to other users.
    """
    named = read_file(home).upstreams
    upstreams = [_from_file(name, fields, environment) for name, fields in named.items()]
    _check_unambiguous(upstreams)
    for family in FAMILIES:
        taken = any(upstream.family == family and upstream.is_default for upstream in upstreams)
        if not taken and family not in named:
            upstreams += _from_environment(family, environment)
    return tuple(upstreams)


def read_retention(home: Path) -> RetentionPolicy:
    """Which checkpoints are kept.

    Raises:
        InvalidInput: config.toml is malformed.
    """
    said = read_file(home).retention
    return RetentionPolicy(keep_last=said.keep_last, keep_hourly=said.keep_hourly, keep_daily=said.keep_daily)


def read_grace_seconds(home: Path) -> float:
    """How old garbage has to be to be collected.

    Raises:
        InvalidInput: config.toml is malformed.
    """
    return read_file(home).collect.grace_seconds


def read_starts_max(home: Path) -> int:
    """How many sessions a node daemon begins or wakes at a time. Raises InvalidInput."""
    return read_file(home).starts_max or max(2, os.cpu_count() or 1)


def read_tiers(home: Path) -> Tiers:
    """When a waiting session sleeps, and how fast it can wake for how long. Raises InvalidInput."""
    said = read_file(home).hibernate
    linger = None if said.linger_seconds == "never" else said.linger_seconds
    return Tiers(linger_seconds=linger, paused_seconds=said.paused_seconds, ready_seconds=said.ready_seconds)


def read_prices(home: Path) -> tuple[PriceRule, ...]:
    """The prices that the user gives, in the order of the file.

    Raises:
        InvalidInput: config.toml is malformed, or a price is no amount.
    """
    return tuple(_rule(pattern, fields) for pattern, fields in read_file(home).prices.items())


def read_store(home: Path, environment: Mapping[str, str]) -> StoreSettings:
    """Where snapshots are kept: a directory of TORPOR_HOME unless config.toml says otherwise.

    Raises:
        InvalidInput: config.toml is malformed, or says of the store what does not go together.
    """
    said = read_file(home).store
    key = _key_source("the store", said, environment)
    has_key = key != KeySource()
    url = said.url.rstrip("/") if said.url is not None else f"file://{home / 'store'}"
    if not _STORE_URL.fullmatch(url):
        hint = "It is s3://BUCKET, gs://BUCKET, az://ACCOUNT/CONTAINER, each with /PREFIX or not, or file:///DIRECTORY."
        raise invalid(f"the store's url {url!r} names no store that Torpor knows", hint=hint)
    if url.startswith("file:") and (has_key or said.endpoint or said.region or said.key_id):
        raise invalid("the store is a directory, and has an endpoint, a region or a key")
    if re.search(r"[^!-~]", said.key_id + said.region):  # They go into headers.
        raise invalid("the store's key_id or region holds a character that can't be in one")
    if url.startswith("s3:") and has_key != bool(said.key_id):
        raise invalid("the store's key and key_id come together", hint="key_id is the access key's id; key its secret.")
    return StoreSettings(
        url=url,
        endpoint=_checked_url("of the store", said.endpoint) if said.endpoint else "",
        region=said.region,
        key_id=said.key_id,
        key=key,
        request_seconds=said.request_seconds,
        retry_seconds=said.retry_seconds,
        cache_bytes_max=said.cache_bytes_max,
    )


def _rule(pattern: str, fields: PriceFields) -> PriceRule:
    def or_input(amount: Decimal | None) -> Decimal:
        return fields.input if amount is None else amount

    amounts = (fields.input, fields.output, or_input(fields.cache_read), or_input(fields.cache_write))
    if not all(amount.is_finite() and 0 <= amount <= PRICE_DOLLARS_MAX for amount in amounts):
        raise invalid(f"a price of {pattern!r} is no amount of dollars")
    price = Price(input=amounts[0], output=amounts[1], cache_read=amounts[2], cache_write=amounts[3])
    return PriceRule(pattern=pattern, price=price, output_tokens_max=fields.max_output_tokens)


def _check_unambiguous(upstreams: Sequence[Upstream]) -> None:
    """Refuse two upstreams that the same request would go to."""
    seen: dict[tuple[str, ...], str] = {}
    for upstream in upstreams:
        claims = [("models", upstream.family, pattern) for pattern in upstream.models]
        claims += [("path_prefix", upstream.path_prefix)] if upstream.path_prefix else []
        claims += [("family", upstream.family)] if upstream.is_default else []
        for claim in claims:
            if claim in seen:
                both = f"two upstreams, {seen[claim]!r} and {upstream.name!r},"
                if claim[0] == "family":
                    reason = f"{both} are of the family {upstream.family!r} and have neither models nor a path_prefix"
                else:
                    reason = f"{both} claim {claim[-1]!r} in {claim[0]}"
                raise invalid(reason)
            seen[claim] = upstream.name


def _from_file(name: str, fields: UpstreamFields, environment: Mapping[str, str]) -> Upstream:
    family = fields.family or _family_named(name)
    if family is None:
        hint = "Add " + " or ".join(f'family = "{family}"' for family in FAMILIES) + "."
        raise invalid(f"upstream {name!r} says no family", hint=hint)
    return Upstream(
        name=name,
        family=family,
        base_url=_checked_url(f"of upstream {name!r}", fields.base_url or DEFAULT_BASE_URLS[family]),
        key=_key_source(f"upstream {name!r}", fields, environment),
        bearer=family == "openai" if fields.bearer is None else fields.bearer,
        models=fields.models,
        path_prefix=_checked_prefix(name, fields.path_prefix),
        paths=_checked_paths(name, fields.paths),
        llm_paths=_checked_paths(name, fields.llm_paths),
        connect_seconds=fields.connect_seconds,
        read_seconds=fields.read_seconds,
        retries=fields.retries,
        retry_seconds=fields.retry_seconds,
        stream_usage=family == "openai" if fields.stream_usage is None else fields.stream_usage,
    )


def _key_source(who: str, fields: UpstreamFields | StoreFields, environment: Mapping[str, str]) -> KeySource:
    if sum(source is not None for source in (fields.key, fields.key_env, fields.key_command)) > 1:
        raise invalid(f"{who} has more than one of key, key_env and key_command")
    return KeySource(
        value=_secret(fields.key or (environment.get(fields.key_env) if fields.key_env else None)),
        environment=fields.key_env,
        command=tuple(fields.key_command or ()),
    )


def _family_named(name: str) -> Family | None:
    for family in FAMILIES:
        if family == name:
            return family
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    """What the providers' own clients read; the first key that is set counts."""

    keys: tuple[str, ...]
    base_url: str


_VARIABLES: Mapping[Family, _Variables] = {
    "openai": _Variables(keys=("OPENAI_API_KEY", "OPENAI_AUTH_TOKEN"), base_url="OPENAI_BASE_URL"),
    "anthropic": _Variables(keys=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"), base_url="ANTHROPIC_BASE_URL"),
    "gemini": _Variables(keys=("GOOGLE_API_KEY", "GEMINI_API_KEY"), base_url="GOOGLE_GEMINI_BASE_URL"),
}


def key_variable(family: Family) -> str:
    """The variable to name to somebody who has set none."""
    return f"{family.upper()}_API_KEY"


def _from_environment(family: Family, environment: Mapping[str, str]) -> list[Upstream]:
    variables = _VARIABLES[family]
    key_name = next((name for name in variables.keys if environment.get(name)), None)
    base_url = environment.get(variables.base_url)
    if key_name is None and not base_url:
        return []
    return [
        Upstream(
            name=family,
            family=family,
            base_url=_checked_url(f"of upstream {family!r}", base_url or DEFAULT_BASE_URLS[family]),
            key=_key_from_environment(key_name, environment) if key_name else KeySource(),
            bearer=family == "openai" or key_name == "ANTHROPIC_AUTH_TOKEN",
            stream_usage=family == "openai",
        )
    ]


def _key_from_environment(name: str, environment: Mapping[str, str]) -> KeySource:
    return KeySource(value=_secret(environment[name]), environment=name)


def _secret(text: str | None) -> Secret | None:
    return Secret(text.strip()) if text and text.strip() else None


def _checked_url(whose: str, text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise invalid(f"the address {text!r} {whose} is not http:// or https:// and a host")
    if parts.username is not None:
        raise invalid(f"the address {whose} holds a user name", hint="Say the key apart from it.")
    return text.rstrip("/")


_SEGMENT = r"/[A-Za-z0-9_=-][A-Za-z0-9._=-]*"
_STORE_URL = re.compile(rf"file:///.+|(?:s3|gs)://[a-z0-9._-]+(?:{_SEGMENT})*|az://[a-z0-9]+(?:{_SEGMENT})+")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")
_PREFIXES_TAKEN = ("/v1", "/v1beta", "/v1alpha", "/torpor", "/mcp")
"""What the first segment of a prefix can't be: addresses of the gateway's own."""
_PATH = re.compile(r"(?:[A-Z]+|\*) /[^\s?#\[\]]*")


def _checked_prefix(name: str, text: str) -> str:
    if text and (not _PREFIX.fullmatch(text) or "/" + text.split("/")[1] in _PREFIXES_TAKEN):
        hint = 'Take a word of your own, such as path_prefix = "/ollama".'
        raise invalid(f"the path_prefix {text!r} of upstream {name!r} is no path that is free", hint=hint)
    return text


def _checked_paths(name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if not _PATH.fullmatch(text):
            reason = f"{text!r} in the paths of upstream {name!r} is not a method and a path"
            raise invalid(reason, hint='Write them as "POST /v1/embeddings" or "GET /api/*".')
    return texts


def guest_environment() -> dict[str, str]:
    """What the agent's clients find in their environment: the gateway's address, and keys that open nothing."""
    gateway, proxy = f"http://127.0.0.1:{GATEWAY_PORT}", f"http://127.0.0.1:{PROXY_PORT}"
    direct = "127.0.0.1,localhost"
    return {
        "OPENAI_BASE_URL": f"{gateway}/v1",
        "OPENAI_API_BASE": f"{gateway}/v1",
        "OPENAI_API_KEY": FAKE_KEY,
        "ANTHROPIC_BASE_URL": gateway,
        "ANTHROPIC_API_KEY": FAKE_KEY,
        "GOOGLE_GEMINI_BASE_URL": gateway,
        "GEMINI_API_KEY": FAKE_KEY,
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "NO_PROXY": direct,
        "http_proxy": proxy,
        "https_proxy": proxy,
        "no_proxy": direct,
    }
