"""Which requests become calls, and the gateway's own answers to all others.

Pure: an answer of the gateway's own follows from the request and the configuration. It is in no log, and a restored
agent gets the same bytes once more because its request is read and judged once more.
"""

import json
from dataclasses import dataclass
from http import HTTPStatus

from torpor.config import PROXY_PORT
from torpor.core.call import ResponseHead
from torpor.gateway.dialects import dialects_told, likely_dialect
from torpor.gateway.dialects.base import Dialect
from torpor.gateway.request import Headers, RequestLine, Unreadable
from torpor.gateway.routing import Destination, Routing

_NO_LINE = RequestLine(method="GET", target="", http_version="1.1", headers=(), continued=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAnswer:
    """A whole response that no upstream has a part in."""

    head: ResponseHead
    body: bytes


def admit(line: RequestLine, port: int, routing: Routing) -> Destination | LocalAnswer:
    """Judge a request by its line, its headers and the port that it came to."""
    line = line.not_continued()
    if line.http_version not in {"1.0", "1.1"}:
        return refuse(line, 505, "http_version_unsupported", "only HTTP/1.1 is spoken here")
    if port == PROXY_PORT:
        reason = "this session has no rule that lets its agent reach other hosts"
        return refuse(line, 403, "egress_denied", reason)
    if not line.target.startswith("/") or line.target.startswith("//"):
        return refuse(line, 400, "target_refused", "its target is not a path of this gateway")
    if "websocket" in line.header("upgrade").lower():
        reason = "WebSockets are not spoken here, use HTTP"
        return refuse(line, 426, "websocket_refused", reason, headers=(("upgrade", "HTTP/1.1"),))
    if (line.method, line.path) == ("HEAD", "/"):
        return LocalAnswer(head=line.shape(200, "OK", (("content-type", "application/json"),)), body=b"")
    destination = routing.destination(line.method, line.target, dialects_told(header_names(line)))
    if destination is None:
        reason = f"{line.method} {line.path[:200]} is not among the requests that agents may make"
        return refuse(line, 404, "path_unknown", reason)
    return destination


def refuse_unreadable(unreadable: Unreadable) -> LocalAnswer:
    return refuse(unreadable.line or _NO_LINE, unreadable.status, unreadable.code, unreadable.reason)


def refuse(line: RequestLine, status: int, code: str, reason: str, *, headers: Headers = ()) -> LocalAnswer:
    """An error in the shape that the client most likely understands."""
    dialect = likely_dialect(line.path, header_names(line))
    message = f"Torpor cannot take this request: {reason}."
    return error_answer(line, dialect, status=status, code=code, message=message, retry=False, headers=headers)


def error_answer(
    line: RequestLine,
    dialect: Dialect,
    *,
    status: int,
    code: str,
    message: str,
    retry: bool,
    headers: Headers = (),
) -> LocalAnswer:
    """An error of the gateway's own. The providers' SDKs obey `x-should-retry` whatever the status says."""
    shaped = dialect.error(status=status, code=code, message=message)
    fields = (
        ("content-type", "application/json"),
        ("x-should-retry", "true" if retry else "false"),
        ("x-torpor-error", code),
        *headers,
    )
    body = b"" if line.method == "HEAD" else json.dumps(shaped).encode()
    return LocalAnswer(head=line.shape(status, HTTPStatus(status).phrase, fields), body=body)


def header_names(line: RequestLine) -> frozenset[str]:
    return frozenset(name.lower() for name, _ in line.headers)
