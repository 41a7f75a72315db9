"""The table of the sandbox's own API: its OpenAPI document, its MCP messages, and what becomes a wish."""

import json
from typing import Any

import mcp_types
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from torpor.gateway import agent_api, mcp
from torpor.gateway.agent_api import RULES, Refused, Reply, Wish
from torpor.gateway.openapi import openapi
from torpor.gateway.request import Request, RequestLine

RESULTS: dict[str, type[mcp_types.Result]] = {
    "initialize": mcp_types.InitializeResult,
    "ping": mcp_types.EmptyResult,
    "tools/list": mcp_types.ListToolsResult,
}


def request(method: str, path: str, headers: tuple[tuple[str, str], ...] = ()) -> Request:
    line = RequestLine(method=method, target=path, http_version="1.1", headers=headers, continued=False)
    return Request(line=line, body=b"", length=0)


def rpc(method: str, params: dict[str, Any] | None = None, rpc_id: str | int | None = 7) -> Wish | Reply:
    message = {"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params or {}}
    return mcp.read_wish(request("POST", "/mcp"), json.dumps(message).encode())


def test_the_openapi_document_is_valid_and_has_every_operation() -> None:
    document = json.loads(json.dumps(openapi()))
    OpenAPIV31SpecValidator(document).validate()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(rule.method, rule.path) for rule in RULES} | {
        ("GET", agent_api.DOCUMENT_PATH),
        ("POST", agent_api.LOOKUP_PATH),
        ("GET", agent_api.CONTEXT_PATH),
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.tool)
def test_every_tool_has_schemas_that_mean_what_the_reader_takes(rule: agent_api.Rule) -> None:
    listed = rpc("tools/list")
    assert isinstance(listed, Reply)
    [tool] = [tool for tool in listed.body["result"]["tools"] if tool["name"] == rule.tool]
    for schema in (tool["inputSchema"], tool["outputSchema"]):
        Draft202012Validator.check_schema(schema)
    takes = Draft202012Validator(tool["inputSchema"])
    for arguments in ({}, {"text": "a"}, {"text": ""}, {"text": 1}, {"other": 1}, {"text": "x" * 16_385}):
        wish = rpc("tools/call", {"name": rule.tool, "arguments": arguments})
        assert isinstance(wish, Wish) == takes.is_valid(arguments)


@pytest.mark.parametrize("method", RESULTS)
def test_every_result_is_what_the_official_types_want(method: str) -> None:
    reply = rpc(method, {"protocolVersion": "2025-06-18"})
    assert isinstance(reply, Reply)
    answer = mcp_types.JSONRPCResponse.model_validate(reply.body)
    assert answer.id == 7
    RESULTS[method].model_validate(answer.result)


@pytest.mark.parametrize(
    ("wanted", "given"), [("2024-11-05", "2024-11-05"), ("1999-01-01", mcp.VERSIONS[0]), (None, mcp.VERSIONS[0])]
)
def test_a_version_that_is_not_spoken_is_answered_with_the_newest(wanted: str | None, given: str) -> None:
    reply = rpc("initialize", {"protocolVersion": wanted})
    assert isinstance(reply, Reply)
    assert reply.body["result"]["protocolVersion"] == given


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("server/discover", {}, mcp_types.METHOD_NOT_FOUND),
        ("tools/call", {"name": "rm"}, mcp_types.INVALID_PARAMS),
        ("tools/call", {"name": ["torpor_note"]}, mcp_types.INVALID_PARAMS),
        ("tools/call", {"name": "torpor_note", "arguments": [1]}, mcp_types.INVALID_PARAMS),
    ],
)
def test_what_cannot_be_done_is_an_error_of_the_protocol(method: str, params: dict[str, Any], code: int) -> None:
    reply = rpc(method, params)
    assert isinstance(reply, Reply)
    assert mcp_types.JSONRPCError.model_validate(reply.body).error.code == code


def test_a_notification_is_taken_without_an_answer() -> None:
    reply = rpc("notifications/initialized", rpc_id=None)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body) == (202, {})


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"jsonrpc": 2}', b"\xff", b"[" * 100_000])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        mcp.read_wish(request("POST", "/mcp"), body)
    assert refused.value.reply.status == 400


@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1", "http://127.0.0.1:4100", "http://localhost:8080", "https://localhost"]
)
def test_pages_of_this_very_sandbox_may_ask(origin: str) -> None:
    agent_api.check_origin(request("GET", "/torpor/v1/session", (("origin", origin),)).line)


@pytest.mark.parametrize("origin", ["null", "http://evil", "http://127.0.0.1.evil:80", "http://evil:80/127.0.0.1:1"])
def test_pages_from_elsewhere_may_not(origin: str) -> None:
    with pytest.raises(Refused):
        agent_api.check_origin(request("GET", "/torpor/v1/session", (("origin", origin),)).line)
