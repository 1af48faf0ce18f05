"""OpenAPI's description of the HTTP port, made from the table of its endpoints."""

from __future__ import annotations

import re
from typing import Any

import orjson

from forwardpass import __version__
from forwardpass.protocol import DATATYPES
from forwardpass.transport.rest.endpoints import ENDPOINTS, SPECIALS


def description() -> bytes:
    """The document, as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        _add(paths, endpoint.method, endpoint.path, endpoint.summary, endpoint.rpc)
    for special in SPECIALS:
        _add(paths, special.method, special.path, special.summary, special.name, special.body)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Forwardpass",
            "version": __version__,
            "description": "The Open Inference Protocol v2 over HTTP, with the binary tensor data extension, and "
            "TensorFlow Serving's predict.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }
    return orjson.dumps(document)


def _add(paths: dict[str, dict[str, Any]], method: str, path: str, summary: str, rpc: str, body: str = "") -> None:
    names = re.findall(r"\{(\w+)\}", path)
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": "_".join([rpc, method.lower(), *names]) + str(len(paths)),
        "parameters": [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names],
        "responses": {
            "200": _content("A response.", f"{body}Response" if body else None),
            "default": _content("An error.", "Error"),
        },
    }
    if body:
        operation["requestBody"] = {"required": True} | _content("", f"{body}Request", describe=False)
        operation["parameters"].append(
            {
                "name": "X-Request-Timeout", "in": "header", "schema": {"type": "string"},
                "description": "The deadline: seconds from now, or a number with s, ms or us.",
            }
        )  # fmt: skip
    elif method == "POST":
        operation["requestBody"] = {"content": {"application/json": {"schema": {"type": "object"}}}}
    paths.setdefault(path, {})[method.lower()] = operation


def _content(text: str, schema: str | None, describe: bool = True) -> dict[str, Any]:
    kind = {"type": ["object", "array"]} if schema is None else {"$ref": f"#/components/schemas/{schema}"}
    found: dict[str, Any] = {"content": {"application/json": {"schema": kind}}}
    return {"description": text} | found if describe else found


def _schemas() -> dict[str, Any]:
    parameters = {"type": "object", "additionalProperties": {"type": ["number", "string", "boolean"]}}
    sizes = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    tensor = {
        "name": {"type": "string"},
        "shape": sizes,
        "datatype": {"enum": list(DATATYPES)},
        "parameters": parameters,
        "data": {"type": "array", "description": "The elements, row-major, flat or nested."},
    }
    wanted = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "parameters": parameters},
    }
    rows = {"type": "object", "properties": {"instances": {"type": "array"}, "inputs": {}}}
    return {
        "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
        "InferRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"},
                "parameters": parameters,
                "inputs": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name", "shape", "datatype"], "properties": tensor},
                },
                "outputs": {"type": "array", "items": wanted},
            },
        },
        "InferResponse": {
            "type": "object",
            "required": ["model_name", "outputs"],
            "properties": {
                "id": {"type": "string"},
                "model_name": {"type": "string"},
                "model_version": {"type": "string"},
                "parameters": parameters,
                "outputs": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name", "shape", "datatype"], "properties": tensor},
                },
            },
        },
        "PredictRequest": rows,
        "PredictResponse": {"type": "object", "properties": {"predictions": {"type": "array"}, "outputs": {}}},
    }
