"""Reference pages made from the code: python -m server.reference docs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from pydantic_core import PydanticUndefined

from model.table import markdown_table
from server.app import DESCRIPTION, routers
from server.errors import every_error
from server.metrics import MODEL_INFO, VERSION, Metrics
from server.openapi import document
from server.settings import PREFIX, Settings

NOTICE = "<!-- Made from the code by: python -m server.reference docs -->\n"
NUMBERED = {"exit", "stage", "code", "python", "torch", *MODEL_INFO}
"""Labels whose values need no list: of a bundle or a machine, or every code."""
BODIES = ("AnswerBody", "Label", "SeenBody", "Timing", "BatchBody", "ErrorBody", "ModelBody")
POLICY_BODIES = ("ExitBody", "PolicyBody", "OperatingPoint", "PolicyChange")
ENGINE_BODIES = ("EngineBody", "LevelBody")
REPOSITORY_BODIES = ("IndexBody",)

Json = dict[str, Any]


def pages() -> dict[str, str]:
    """The text of every reference page, by file name."""
    return {
        "http.md": http_page(http_document()),
        "settings.md": settings_page(),
        "metrics.md": metrics_page(),
        "errors.md": errors_page(),
    }


def http_document() -> Json:
    """The OpenAPI document with every operation in it, of no particular bundle."""
    app = FastAPI(title="Offramp", version=VERSION, description=DESCRIPTION)
    for router in routers(admin=True):
        app.include_router(router)
    return document(app, keys=False)


# --- settings, errors, metrics -------------------------------------------------------------------


def settings_page() -> str:
    """A row for each setting."""
    rows = [
        (
            f"`{PREFIX}{name.upper()}`",
            f"`--{name.replace('_', '-')}`",
            _default(field.default),
            f"{field.description}{_choices(field.annotation)}",
        )
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            NOTICE,
            "# Settings",
            "",
            "A command-line flag goes over the environment, and that over the default. An unknown",
            f"`{PREFIX}` name and a value that cannot be meant stop the start with a message.",
            "",
            markdown_table(("Environment", "Flag", "Default", "Meaning"), rows),
        ]
    )


def errors_page() -> str:
    """A row for each code."""
    rows = [(f"`{k.code}`", k.status, k.sentence) for k in every_error()]
    return "\n".join(
        [
            NOTICE,
            "# Errors",
            "",
            'Every error has the body `{"error": "<sentence>", "code": "<code>", "request_id":',
            '"<id>"}`. The sentence is for people and may say more than below; the code is stable.',
            "The log has the request under its id. In `/classify/batch` an image's error stands in",
            "its place among the results; in an event stream that has begun, the event `error`.",
            "",
            markdown_table(("Code", "Status", "Sentence"), rows),
        ]
    )


def metrics_page() -> str:
    """A row for each metric family."""
    metrics = Metrics(32, 1.0)
    metrics.describe(4, dict.fromkeys(MODEL_INFO, "") | {"model": "default"})
    rows = []
    for family in metrics.registry.collect():
        if family.name.startswith("offramp_"):
            labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
            name = f"{family.name}_total" if family.type == "counter" else family.name
            shown = "; ".join(f"`{label}`{_values(family, label)}" for label in labels)
            rows.append((f"`{name}`", family.type, shown, family.documentation))
    return "\n".join(
        [
            NOTICE,
            "# Metrics",
            "",
            "`/metrics` has these in the Prometheus text format, every series from the start at",
            "zero, beside the usual `process_*` and `python_*`. It never needs a key.",
            "",
            markdown_table(("Name", "Type", "Labels", "Meaning"), rows),
        ]
    )


# --- HTTP ----------------------------------------------------------------------------------------


def http_page(openapi: Json) -> str:
    """A section for each operation, and one for each body."""
    lines = [
        NOTICE,
        "# HTTP reference",
        "",
        "A running server shows the same at `/docs`, and the OpenAPI document at `/openapi.json`.",
        "Every response carries `X-Request-ID`, taken from the request or made; refusals carry",
        "`Retry-After` in seconds, answers of one image `Server-Timing`, and what is traced",
        "`traceresponse`. A `threshold` beside `max_accuracy_loss` is a 422.",
    ]
    for path, item in openapi["paths"].items():
        for method, operation in item.items():
            lines += _operation(method, path, operation)
    schemas = openapi["components"]["schemas"]
    reasons = ", ".join(f"`{reason}`" for reason in schemas["Reason"]["enum"])
    for name in (*BODIES, *POLICY_BODIES, *ENGINE_BODIES, *REPOSITORY_BODIES):
        lines += ["", f"## {name}", "", _one_line(schemas[name]["description"]), ""]
        properties = schemas[name]["properties"].items()
        rows = [(f"`{field}`", _type(one), one["description"]) for field, one in properties]
        lines.append(markdown_table(("Field", "Type", "Meaning"), rows))
    lines += [
        "",
        "## Reason",
        "",
        f"{_one_line(schemas['Reason']['description'])} One of {reasons}.",
    ]
    return "\n".join(lines)


def _operation(method: str, path: str, operation: Json) -> list[str]:
    lines = ["", f"## {method.upper()} {path}", "", f"{operation['summary']}.", ""]
    lines += [operation["description"]]
    samples = [sample["source"] for sample in operation.get("x-codeSamples", ())]
    if samples:
        lines += ["", "```sh", *samples, "```"]
    if "requestBody" in operation and "description" in operation["requestBody"]:
        lines += ["", operation["requestBody"]["description"]]
    if parameters := operation.get("parameters"):
        rows = [(f"`{p['name']}`", _type(p["schema"]), p["description"]) for p in parameters]
        lines += ["", markdown_table(("Parameter", "Type", "Meaning"), rows)]
    statuses = [(code, r["description"]) for code, r in operation["responses"].items()]
    return [*lines, "", markdown_table(("Status", "When"), statuses)]


def _type(schema: Json) -> str:
    """A schema's type and range in a few words."""
    kinds = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    words = [" or ".join(_name(kind) for kind in kinds)]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    words += [f"{sign} {kinds[0][key]:.10g}" for key, sign in signs.items() if key in kinds[0]]
    if schema.get("default") is not None:
        words.append(f"default {str(schema['default']).lower()}")
    return ", ".join(words)


def _name(kind: Json) -> str:
    if "$ref" in kind:
        return str(kind["$ref"]).rpartition("/")[2]
    if "anyOf" in kind:
        return " or ".join(map(_name, kind["anyOf"]))
    if kind.get("type") == "array":
        return f"list of {_name(kind['items'])}"
    return str(kind.get("type", "anything"))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _choices(annotation: Any) -> str:
    """The values that a setting may have, where they are few."""
    given = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f" ({', '.join(f'`{value}`' for value in given)})" if given else ""


def _values(family: Metric, label: str) -> str:
    """The values of a label that every server has."""
    if label in NUMBERED:
        return ""
    given = dict.fromkeys(s.labels[label] for s in family.samples if label in s.labels)
    return f" ({', '.join(given)})"


def _default(value: object) -> str:
    if value is None or value == ():
        return "none"
    assert value is not PydanticUndefined
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def write(folder: Path, made: Mapping[str, str]) -> None:
    """Write the pages."""
    for name, text in made.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m server.reference FOLDER")
    write(Path(sys.argv[1]), pages())
