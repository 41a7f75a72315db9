"""What went wrong with one request to an object store, from the words that `obstore` has for it.

Its exceptions have no fields, so their text is read here and nowhere else. Only a status, the server's code and
sentence and the operating system's reason are taken over: the rest of the text holds what the server sent back, which
after a wrong signature is our own request, with the credentials of the session in it.
"""

import re
from dataclasses import dataclass

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

_STATUS = re.compile(r"status code: (\d{3})([^:\n]*)")
_CODE = re.compile(r"<Code>([\w.]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})")
_RANGE = re.compile(r"Invalid ?[Rr]ange")
"""Of `obstore` itself, which looks at the range of an answer that has a status of 200 or 206."""
_REASONS = (
    (re.compile(r"dns error"), "its name has no address"),
    (re.compile(r"kind: ConnectionRefused"), "it refused the connection"),
    (re.compile(r"kind: ConnectionReset|kind: BrokenPipe"), "it reset the connection"),
    (re.compile(r"IncompleteBody|IncompleteMessage|UnexpectedEof"), "its answer was cut off"),
    (re.compile(r"TimedOut|kind: Timeout"), "it did not answer in time"),
    (re.compile(r"[Ii]nvalid peer certificate|CertificateError|UnknownIssuer"), "its certificate is not trusted"),
    (re.compile(r"kind: Connect\b"), "no connection"),
    (re.compile(r"hyper::Error|reqwest::Error"), "it does not speak HTTP"),
)
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}
"""Refusals with a status of 400 that say that a request came through damaged or late."""
_BUCKET_MISSING = ("<Code>NoSuchBucket<", "<Code>ContainerNotFound<", "The specified bucket does not exist")
_METADATA_PATHS = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "/metadata/identity/")
"""Where clouds give credentials to their own machines: asked when the environment has none."""

_MEND_KEY = "Check the key: it stands in config.toml, or in the variables that the cloud's own tools read."
_MEND_BUCKET = "Make the bucket, or mend `url` and `endpoint` of [store] in config.toml."
_MEND_ADDRESS = "Check `endpoint` of [store] in config.toml; `torpor doctor` tries it."


class NotSettledError(BaseError):
    """An object that exists and is not there: somebody is about to write it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why a request failed.

    Attributes:
        passes: the same request may succeed later.
        is_absent: the bucket is there and the object is not.
    """

    reason: str
    hint: str = ""
    passes: bool = False
    is_absent: bool = False
    is_full: bool = False
    is_outside: bool = False
    """No byte of the object lies in the range that was asked for."""


def trouble_of(error: BaseException) -> Trouble:
    """Read what `obstore` raised."""
    if isinstance(error, NotSettledError):
        return Trouble(reason="another writer of it did not come to an end", passes=True)
    text = str(error)
    found = _STATUS.search(text)
    status = int(found[1]) if found else 0
    if any(path in text for path in _METADATA_PATHS):
        return Trouble(reason="no key is configured, and the environment has none", hint=_MEND_KEY)
    if any(sign in text for sign in _BUCKET_MISSING):
        return Trouble(reason="the bucket does not exist", hint=_MEND_BUCKET)
    if isinstance(error, FileNotFoundError):
        return Trouble(reason="it does not exist", is_absent=True)
    if status == 416 or _RANGE.search(text):
        return Trouble(reason="it has no such range", is_outside=True)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Trouble(reason=f"access was denied{_in_its_words(text)}", hint=_MEND_KEY)
    if status == 507:
        return Trouble(reason="it is full", is_full=True)
    if found:
        passes = status >= 500 or status in (408, 429) or _code(text) in _PASSING_CODES
        return Trouble(reason=f"it answered {status}{found[2]}{_in_its_words(text)}", passes=passes, hint=_MEND_ADDRESS)
    if "redirect" in text:
        return Trouble(reason="it sends elsewhere", hint="Set `region` of [store] in config.toml to the bucket's.")
    if "builder error" in text or not isinstance(error, BaseError):
        return Trouble(reason=text.splitlines()[0][:200], hint=_MEND_ADDRESS)
    reason = next((words for pattern, words in _REASONS if pattern.search(text)), "it did not answer properly")
    return Trouble(reason=reason, passes=True, hint=_MEND_ADDRESS)


def _code(text: str) -> str:
    found = _CODE.search(text)
    return found[1] if found else ""


def _in_its_words(text: str) -> str:
    message = _MESSAGE.search(text)
    words = [words for words in (_code(text), message[1].strip() if message else "") if words]
    return f" ({': '.join(words)})" if words else ""
