"""Makes `obstore`'s clients from what the user says of a store.

`obstore` mixes what it is given with what the environment has. Here the two are kept apart: a key that is given goes to
the address that was given with it, and no variable adds to it.
"""

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from torpor.config import Secret, StoreSettings
from torpor.core.errors import InvalidInput

if TYPE_CHECKING:
    from obstore.store import (
        AzureConfig,
        ClientConfig,
        GCSConfig,
        ObjectStore,
        RetryConfig,
        S3Config,
        S3Credential,
    )

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 20.0
"""How long a store may send nothing amid an answer. Not for writes: it answers them when it has everything."""
S3_REGION = "us-east-1"
NOWHERE = "http://127.0.0.1:9"


class Clients(NamedTuple):
    """Two clients of the same bucket and prefix, which send every request once."""

    reads: "ObjectStore"
    writes: "ObjectStore"


def make_clients(settings: StoreSettings, key: Secret | None) -> Clients:
    """Nothing is asked of the store yet.

    Raises:
        InvalidInput: `config_invalid`.
    """
    return Clients(
        reads=_client(settings, key, silence_seconds=SILENCE_SECONDS),
        writes=_client(settings, key, silence_seconds=None),
    )


def _client(settings: StoreSettings, key: Secret | None, *, silence_seconds: float | None) -> "ObjectStore":
    parts = urlsplit(settings.url)
    options = _options(settings, silence_seconds)
    once: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=settings.request_seconds)}
    make = {"s3": _s3, "gs": _gcs, "az": _azure}[parts.scheme]
    try:
        return make(settings, key, parts.netloc, parts.path.strip("/"), options, once)
    except (BaseError, ValueError, OSError) as error:
        # What it says of a malformed key may quote it.
        reason = f"{type(error).__name__}, which its key, endpoint or region may explain"
        raise InvalidInput("config_invalid", f"cannot use store {settings.url}: {reason}") from None


def _options(settings: StoreSettings, silence_seconds: float | None) -> "ClientConfig":
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=min(CONNECT_SECONDS, settings.request_seconds)),
        "timeout": timedelta(seconds=settings.request_seconds),
        "user_agent": "torpor",
    }
    if silence_seconds is not None:
        options["read_timeout"] = timedelta(seconds=min(silence_seconds, settings.request_seconds))
    endpoint = urlsplit(settings.endpoint)
    if endpoint.scheme == "http" and endpoint.hostname:
        # Nothing goes through a proxy unencrypted. Only naming one keeps those of the environment out.
        options |= {"allow_http": True, "proxy_url": NOWHERE, "proxy_excludes": endpoint.hostname}
    return options


def _s3(
    settings: StoreSettings,
    key: Secret | None,
    bucket: str,
    prefix: str,
    options: "ClientConfig",
    once: "RetryConfig",
) -> S3Store:
    config: S3Config = {"conditional_put": "etag", "disable_bulk_delete": True}
    region = settings.region or (S3_REGION if key else "")
    if region:
        config["region"] = region
    if key is not None:
        config |= {"skip_signature": False, "unsigned_payload": False}
    endpoint = settings.endpoint or (f"https://s3.{region}.amazonaws.com" if key else "")
    if endpoint:
        config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint, "virtual_hosted_style_request": False}
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options=options,
        retry_config=once,
        credential_provider=None if key is None else lambda: _s3_pair(settings.key_id, key),
    )


def _s3_pair(key_id: str, key: Secret) -> "S3Credential":
    return {"access_key_id": key_id, "secret_access_key": key.reveal(), "token": None, "expires_at": None}


def _gcs(
    settings: StoreSettings,
    key: Secret | None,
    bucket: str,
    prefix: str,
    options: "ClientConfig",
    once: "RetryConfig",
) -> GCSStore:
    config: GCSConfig = {}
    if settings.endpoint:
        config["base_url"] = settings.endpoint
    if key is not None:
        config |= {"service_account_key": key.reveal(), "skip_signature": False}
    return GCSStore(bucket, prefix=prefix or None, config=config, client_options=options, retry_config=once)


def _azure(
    settings: StoreSettings,
    key: Secret | None,
    account: str,
    path: str,
    options: "ClientConfig",
    once: "RetryConfig",
) -> AzureStore:
    container, _, prefix = path.partition("/")
    config: AzureConfig = {"account_name": account}
    if settings.endpoint:
        config["endpoint"] = settings.endpoint
    if key is not None:
        config["skip_signature"] = False
    return AzureStore(
        container,
        prefix=prefix or None,
        config=config,
        client_options=options,
        retry_config=once,
        credential_provider=None if key is None else lambda: {"access_key": key.reveal(), "expires_at": None},
    )
