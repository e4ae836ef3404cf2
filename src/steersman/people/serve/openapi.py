"""What the server answers, as an OpenAPI document: /openapi.json."""

from __future__ import annotations

from typing import Any

from steersman.people.serve.wire import ChatAsk, TextAsk

STATUSES = {
    "400": "what was asked can not be read, or is not known here", "401": "no API key, or a wrong one",
    "403": "the key is none of an admin", "404": "there is no such model", "413": "too large",
    "429": "too many requests, or too many wait", "500": "decoding failed", "502": "no answer from the server behind",
    "504": "no answer in time",
}  # fmt: skip


def document(models: list[str]) -> dict[str, Any]:
    """OpenAPI 3.1; the classes that check requests describe them. `models` are the names that are known, if any."""
    failure = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    refusals = {
        status: {"description": why, "content": {"application/json": {"schema": failure}}}
        for status, why in STATUSES.items()
    }
    schemas: dict[str, Any] = {}

    def body(shape: Any) -> dict[str, Any]:
        schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[shape.__name__] = schema
        if models:
            schema["properties"]["model"]["enum"] = models
        told = {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}
        return {"required": True, "content": {"application/json": told}}

    def answered(kind: str) -> dict[str, Any]:
        return {"200": {"description": "the answer", "content": {kind: {}, "text/event-stream": {}}}, **refusals}

    def got(kind: str) -> dict[str, Any]:
        told = {"200": {"description": "what was asked for", "content": {kind: {}}}}
        return {"responses": told | {k: refusals[k] for k in ("401", "429", "502")}}

    swap = {
        "type": "object", "required": ["path"], "additionalProperties": False,
        "properties": {"path": {"type": "string"}},
    }  # fmt: skip
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    json_kind = "application/json"
    return {
        "openapi": "3.1.0",
        "info": {"title": "steersman serve", "version": "1"},
        "security": [{}, {"key": []}],
        "paths": {
            "/health": {"get": got(json_kind)},
            "/metrics": {"get": got("text/plain")},
            "/v1/models": {"get": got(json_kind)},
            "/v1/chat/completions": {"post": {"requestBody": body(ChatAsk), "responses": answered(json_kind)}},
            "/v1/completions": {"post": {"requestBody": body(TextAsk), "responses": answered(json_kind)}},
            "/admin/models/{name}": {
                "post": {
                    "parameters": [name],
                    "requestBody": {"required": True, "content": {json_kind: {"schema": swap}}},
                    "responses": answered(json_kind),
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
