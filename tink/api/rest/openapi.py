"""The REST API's description in OpenAPI 3.1, made of the forms, the answers and the errors themselves."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

import msgspec

import tink
from tink import errors
from tink.api.refusals import Failure
from tink.api.rest import answers, forms
from tink.api.rest.operations import OPERATIONS, PROMISED, Operation
from tink.errors import TinkError
from tink.limits import MAX_NAME, REST_POLL_HOLD

Schema = dict[str, Any]

# What every call may be answered with beside its result; a job's own failure is 400 or 502.
ERRORS: tuple[type[TinkError], ...] = (
    errors.UserError,
    errors.Unauthorized,
    errors.NotFound,
    errors.TooLarge,
    errors.Overloaded,
    errors.BackendError,
    errors.JournalUnavailable,
)
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a repeat under it is the same job, whatever was killed meanwhile",
    "schema": {"type": "string", "maxLength": MAX_NAME, "pattern": "^[ -~]+$"},
}


@functools.cache
def document() -> Schema:
    """What /openapi.json answers: the paths at the root."""
    kinds: list[type] = [forms.Future, answers.Promise, answers.Pending, Failure, answers.Losses]
    for operation in OPERATIONS.values():
        kinds += [operation.form, operation.answer]
    # Each once, and in the order in which they come here.
    _, schemas = msgspec.json.schema_components(
        dict.fromkeys(kinds), ref_template="#/components/schemas/{name}"
    )
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tink",
            "version": tink.__version__,
            "description": "Training and sampling by plain HTTP. All of it is below /api/v1, too.",
        },
        "security": [{"key": []}, {"bearer": []}, {}],
        "paths": {
            **{f"/{name}": {"post": _waits(name, operation)} for name, operation in OPERATIONS.items()},
            **{f"/{name}": {"post": _promises(name, operation)} for name, operation in PROMISED.items()},
            "/retrieve_future": {"post": _retrieve()},
            "/list_loss_functions": {"get": _reads("list_loss_functions", "The losses", answers.Losses)},
            "/get_server_capabilities": {
                "get": _reads("get_server_capabilities", "The models served here")
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _waits(name: str, operation: Operation) -> Schema:
    return _job(name, operation, f"{operation.summary}, and wait for the result", operation.answer)


def _promises(name: str, operation: Operation) -> Schema:
    return _job(name, operation, f"{operation.summary}, later", answers.Promise)


def _job(name: str, operation: Operation, summary: str, answer: type) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [KEY],
        "requestBody": {"required": True, "content": _json(operation.form)},
        "responses": {"200": {"description": "done", "content": _json(answer)}} | _failures(),
    }


def _retrieve() -> Schema:
    answered = dict.fromkeys(operation.answer for operation in OPERATIONS.values())
    results = {"anyOf": [_ref(kind) for kind in answered]}
    pending = f"it has not ended; said after {REST_POLL_HOLD:g} s"
    return {
        "operationId": "retrieve_future",
        "summary": "What has become of a job: its result, its error, or nothing yet",
        "requestBody": {"required": True, "content": _json(forms.Future)},
        "responses": {
            "200": {"description": "done", "content": {"application/json": {"schema": results}}},
            "202": {"description": pending, "content": _json(answers.Pending)},
        }
        | _failures(),
    }


def _reads(name: str, summary: str, answer: type | None = None) -> Schema:
    content = {"application/json": {}} if answer is None else _json(answer)
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "that", "content": content}} | _failures(),
    }


def _failures() -> Schema:
    said = {str(error.status): str(error.__doc__).partition(".")[0] for error in ERRORS}
    said[str(HTTPStatus.UNSUPPORTED_MEDIA_TYPE.value)] = "The body is not application/json"
    return {
        status: {"description": " ".join(text.split()), "content": _json(Failure)}
        for status, text in sorted(said.items())
    }


def _json(kind: type) -> Schema:
    return {"application/json": {"schema": _ref(kind)}}


def _ref(kind: type) -> Schema:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
