"""The OpenAPI document of the sandbox's own API, made of its table. Pure."""

from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import msgspec

from torpor.gateway.agent_api import CONTEXT_PATH, DOCUMENT_PATH, LOOKUP_PATH, RULES, Lookup, Rule


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the table."""
    paths: dict[str, Any] = {}
    for rule in RULES:
        paths.setdefault(rule.path, {})[rule.method.lower()] = _operation(rule)
    paths[LOOKUP_PATH] = {"post": _lookup()}
    paths[CONTEXT_PATH] = {"get": _context()}
    paths[DOCUMENT_PATH] = {
        "get": {
            "operationId": "openapi",
            "summary": "This document.",
            "responses": {"200": _answer("An OpenAPI document.", {"type": "object"})},
        }
    }
    strings = {name: {"type": "string"} for name in ("code", "message", "hint")}
    error = {"type": "object", "properties": strings, "required": list(strings)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Torpor, for the agent in the sandbox",
            "version": version("torpor"),
            "description": "Every request is a call in the session's log: an agent that is restored and asks again "
            "gets the same answer, and nothing is done twice.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:4100"}],
        "paths": paths,
        "components": {"schemas": {"Error": error}},
    }


def _context() -> dict[str, Any]:
    said = {"type": ["string", "null"]}
    answer = {
        "type": "object",
        "properties": {
            "seq": {"type": ["integer", "null"]},
            "model": said,
            "target": said,
            "request": said,
            "answer": said,
        },
        "required": ["seq", "model", "target", "request", "answer"],
    }
    return {
        "operationId": "context",
        "summary": "What the model saw last.",
        "description": "The newest call to a model that was answered, in full: the conversation that an agent without "
        "memory can go on from. What the log has now; it is never answered as it was before.",
        "responses": {"200": _answer("Request and answer as they were sent; nulls: there is none.", answer)},
    }


def _lookup() -> dict[str, Any]:
    answer = {"type": "object", "properties": {"found": {"type": "boolean"}, "result": {}}, "required": ["found"]}
    error = {"$ref": "#/components/schemas/Error"}
    content = {"application/json": {"schema": msgspec.json.schema_components([Lookup])[1]["Lookup"]}}
    return {
        "operationId": "find_effect",
        "summary": "Look for the result of a step.",
        "description": "What the log has now: this alone is never answered as it was before.",
        "requestBody": {"required": True, "content": content},
        "responses": {"200": _answer("OK", answer), "400": _answer("The request is not what is wanted.", error)},
    }


def _operation(rule: Rule) -> dict[str, Any]:
    responses = {str(rule.status): _answer(HTTPStatus(rule.status).phrase, rule.answer_schema)}
    error = {"$ref": "#/components/schemas/Error"}
    for status, reason in {400: "The request is not what is wanted.", **rule.failures}.items():
        responses[str(status)] = _answer(reason, error)
    described: dict[str, Any] = {
        "operationId": rule.tool,
        "summary": rule.summary,
        "description": rule.description,
        "responses": responses,
    }
    if rule.method == "POST":
        content = {"application/json": {"schema": rule.body_schema}}
        described["requestBody"] = {"required": rule.needs_body, "content": content}
    return described


def _answer(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
