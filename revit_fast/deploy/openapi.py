"""The description of the HTTP service for programs (OpenAPI 3.1), and a page to try it in a browser."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from revit_fast.deploy.classifier import Limits
from revit_fast.version import __version__

CLASSIFY = ("/", "/classify")
"""Paths that images are sent to."""

HEALTH, METRICS, DESCRIPTION, PAGE = "/healthz", "/metrics", "/openapi.json", "/docs"

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

REFUSALS = {
    400: "malformed HTTP, JSON or form, or a wrong `top_k`",
    404: "there is no such path",
    405: "images are sent by POST",
    408: "the head of the request took too long",
    413: "the body is too large, or has too many images",
    415: "a kind or coding of the body that is not read",
    422: "not an image, or too many pixels",
    431: "the head of the request is too large",
    500: "an error of the service; its log has the reason",
    501: "a coding of the transfer that is not read",
    503: "too many images or connections, the pipeline has failed, or the service stops",
    504: "took too long",
}
"""Statuses of refused requests to classify, and what each means."""


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def _get(summary: str, name: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "operationId": name, "responses": responses}}


def document(limits: Limits) -> dict[str, Any]:
    """The OpenAPI document of a service with these limits."""
    classes = {"type": "integer", "minimum": 1, "default": limits.top_k}
    file, text = {"contentMediaType": "application/octet-stream"}, {"type": "string", "minLength": 1}
    several = {"minItems": 1, "maxItems": limits.images}
    either = {"oneOf": [{"required": ["image"]}, {"required": ["images"]}]}
    form = _object("", image=file, images={"type": "array", "items": file, **several}, top_k=classes)
    sent = _object(
        "",
        image={"oneOf": [text, {"type": "array", "items": text, **several}]},
        images={"oneOf": [text, {"type": "array", "items": text, **several}]},
        top_k=classes,
    )
    schemas = {
        "Error": _object("error", error={"type": "string"}),
        "Prediction": _object(
            "label score",
            label={"type": ["string", "integer"], "description": "the name of a class, or its number without names"},
            score={"type": "number", "minimum": 0, "maximum": 1},
        ),
        "Answer": _object(
            "predictions grid tokens ms",
            predictions={"type": "array", "items": _ref("Prediction"), "description": "the best classes first"},
            grid={"type": "integer", "description": "patches a side that the image got"},
            tokens={"type": "integer"},
            ms={"type": "number", "description": "milliseconds of this image's share of its batch"},
        ),
        "Answers": _object(
            "results",
            results={
                "type": "array",
                "items": {"oneOf": [_ref("Answer"), _ref("Error")]},
                "description": "in the order of the images",
            },
        ),
    }
    right = _json(
        "of one image, or a list if several images, or a list, were sent",
        {"oneOf": [_ref("Answer"), _ref("Answers")]},
    )
    post = {
        "summary": "Classify one image or several",
        "parameters": [{"name": "top_k", "in": "query", "description": "classes to return", "schema": classes}],
        "requestBody": {
            "required": True,
            "description": f"At most {limits.body_bytes} bytes, {limits.images} images; {', '.join(limits.formats)}.",
            "content": {
                "image/*": {"schema": file},
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": sent | either},
            },
        },
        "responses": {"200": right} | {str(n): _json(reason, _ref("Error")) for n, reason in REFUSALS.items()},
    }
    texts = {"type": "string"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "revit-fast",
            "version": __version__,
            "description": "Classifies images, each at the number of tokens that it needs.",
        },
        "paths": {
            path: {"post": post | {"operationId": name}}
            for path, name in zip(CLASSIFY, ("root", "classify"), strict=True)
        }
        | {
            HEALTH: _get(
                "Whether the service can classify",
                "health",
                {"200": _json("it can", _object("status", status={"const": "ok"}))}
                | {"503": _json("it cannot, and why", _ref("Error"))},
            ),
            METRICS: _get(
                "Metrics for Prometheus",
                "metrics",
                {"200": {"description": "the metrics", "content": {PROMETHEUS_TEXT: {"schema": texts}}}},
            ),
            DESCRIPTION: _get("This document", "description", {"200": _json("the document", {"type": "object"})}),
            PAGE: _get(
                "A page to try the service",
                "page",
                {"200": {"description": "the page", "content": {"text/html": {"schema": texts}}}},
            ),
        },
        "components": {"schemas": schemas},
    }


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
form, article { margin: 1rem 0; display: flex; gap: 1rem; flex-wrap: wrap; align-items: start; }
img { width: 10rem; max-height: 10rem; object-fit: contain; }
td { padding: 0 .5rem; } meter { width: 12rem; } pre { overflow-x: auto; }
.error { color: #b42318; }
"""

_SCRIPT = """
const made = (name, text = "") => Object.assign(document.createElement(name), {textContent: text});
const shown = (file, answer) => {
  const entry = made("article"), picture = made("img"), facts = made("div");
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  if (answer.error) facts.append(Object.assign(made("p", answer.error), {className: "error"}));
  else {
    const table = made("table");
    for (const {label, score} of answer.predictions) {
      const row = table.insertRow();
      row.insertCell().textContent = label;
      row.insertCell().append(Object.assign(made("meter"), {value: score}));
      row.insertCell().textContent = score.toFixed(3);
    }
    const {grid, tokens, ms} = answer;
    facts.append(table, made("p", `${grid} × ${grid} patches, ${tokens} tokens, ${ms.toFixed(1)} ms`));
  }
  entry.append(picture, facts);
  return entry;
};
const form = document.querySelector("form"), results = document.querySelector("main");
form.addEventListener("submit", async event => {
  event.preventDefault();
  const files = [...form.elements.images.files];
  results.replaceChildren(made("p", "…"));
  try {
    const answer = await (await fetch("classify", {method: "POST", body: new FormData(form)})).json();
    const answers = answer.results ?? files.map(() => answer);
    results.replaceChildren(...files.map((file, i) => shown(file, answers[i])));
  } catch (error) {
    results.replaceChildren(Object.assign(made("p", `no answer: ${error.message}`), {className: "error"}));
  }
});
"""


def _allowed(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_allowed(_SCRIPT)}; style-src {_allowed(_STYLE)}; "
    "connect-src 'self'; img-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the page: nothing but its own script runs, and it speaks with this service alone."""


def page(limits: Limits) -> str:
    """The page: it lets one choose files and shows the answers; it loads nothing from elsewhere."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>revit-fast</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>revit-fast {__version__}</h1>
<form>
<label>Images <input type="file" name="images" multiple required accept="image/*"></label>
<label>Classes <input type="number" name="top_k" min="1" value="{limits.top_k}"></label>
<button>Classify</button>
</form>
<main></main>
<pre>curl -F image=@photo.jpg http://HOST:PORT/classify</pre>
<p><a href="openapi.json">OpenAPI</a> · <a href="healthz">health</a> · <a href="metrics">metrics</a></p>
<script>{_SCRIPT}</script>
</body>
</html>
"""
