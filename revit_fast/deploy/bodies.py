"""Reads images out of the bodies of requests: forms with files, and JSON with base64 or data URIs.

A form is read while it arrives. Nothing of it is written to a disk, and names of files are not used.

Needs `pip install "revit-fast[serve]"`.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from revit_fast.deploy.classifier import Limits, Refusal
from revit_fast.io.names import SHOWN, shortened

# The answer says what is wrong with a form; strangers must not fill the log.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

FORM = "multipart/form-data"

IMAGE_FIELDS = ("image", "images")
"""Names of fields that hold images, in a form and in JSON."""

PART_HEADERS, PART_HEADER_BYTES = 8, 4 << 10
"""Most headers of a part of a form, and the largest size of one."""

OPTION_BYTES = 64
"""Largest size, in bytes, of a form's field that is no image."""

FORM_HELP = "expected files, as curl -F image=@photo.jpg sends them, and top_k"
JSON_HELP = 'expected {"image": text} or {"images": [text, ...]}, each text base64 or a data URI'

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n\f\v"


class Sent(NamedTuple):
    """What a request holds.

    Attributes:
        images: encoded images, in the order that they were sent in.
        as_list: whether the answer is a list.
        top_k: the number of classes as text; None if the body does not say it.
    """

    images: list[bytes]
    as_list: bool = False
    top_k: str | None = None


class Form:
    """A form that arrives piece by piece.

    A part with a file name, or named `image` or `images`, is an image; `top_k` is an option; others are refused.

    Args:
        content_type: the request's Content-Type, which has the boundary of the parts.
        limits: limits of requests.

    Raises:
        Refusal: if there is no usable boundary.
    """

    def __init__(self, content_type: str, limits: Limits) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        callbacks = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        try:
            if not boundary:
                raise FormParserError("no boundary")
            self._parser = MultipartParser(
                boundary,
                {f"on_{name}": getattr(self, f"_{name}") for name in callbacks},
                max_header_count=PART_HEADERS,
                max_header_size=PART_HEADER_BYTES,
            )
        except FormParserError as error:
            raise _bad(f"Content-Type: {FORM} needs the boundary of its parts; let the HTTP client write it") from error
        self._limit = limits.images
        self._images: list[bytearray] = []
        self._top_k: bytearray | None = None
        self._as_list = self._ended = False

    def write(self, data: bytes) -> None:
        """Reads the next bytes of the body.

        Raises:
            Refusal: if they are malformed, or no part that is expected.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _bad(f"malformed form: {error}") from error

    def close(self) -> Sent:
        """What the form held.

        Raises:
            Refusal: if it has no end or no image.
        """
        if not self._ended:
            raise _bad("malformed form: its last boundary is missing")
        if not self._images:
            raise _bad(f"a form without an image; {FORM_HELP}")
        top_k = None if self._top_k is None else self._top_k.decode("utf-8", "surrogateescape")
        images = [bytes(image) for image in self._images]
        return Sent(images, self._as_list or len(images) > 1, top_k)

    def _part_begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        name = options.get(b"name", b"").decode("utf-8", "surrogateescape").removesuffix("[]")
        coding = self._headers.get(b"content-transfer-encoding", b"binary").decode("latin-1").lower()
        if coding not in ("binary", "8bit", "7bit"):
            raise Refusal(415, "request", f"Content-Transfer-Encoding {shortened(coding)}: send the files as they are")
        if b"filename" in options or name in IMAGE_FIELDS:
            if len(self._images) == self._limit:
                raise _too_many(f"over {self._limit}", self._limit)
            self._as_list = self._as_list or name == "images"
            self._target, self._room = bytearray(), None
            self._images.append(self._target)
        elif name == "top_k" and self._top_k is None:
            self._target, self._room = bytearray(), OPTION_BYTES
            self._top_k = self._target
        else:
            twice = " twice" if name == "top_k" else ""
            raise _bad(f"form field '{name[:SHOWN]}'{twice}: {FORM_HELP}")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._target += data[start:end]
        if self._room is not None and len(self._target) > self._room:
            raise _bad(f"form field 'top_k': expected at most {self._room} bytes")

    def _end(self) -> None:
        self._ended = True


def from_json(body: bytes | bytearray, limits: Limits) -> Sent:
    """The images in a JSON object. The answer is a list if the images are one.

    Raises:
        Refusal: for anything else.
    """
    try:
        content = json.loads(body)
        given = [name for name in IMAGE_FIELDS if name in content] if isinstance(content, dict) else []
        if len(given) != 1:
            raise ValueError(f"it has {' and '.join(given) or 'neither'}")
        texts = content[name := given[0]]
        if not texts or not isinstance(texts, (str, list)):
            raise ValueError(f"no text and no list of images: {shortened(texts)}")
    except (ValueError, RecursionError) as error:
        raise _bad(f"{JSON_HELP}: {error}") from error
    many = isinstance(texts, list)
    if many and len(texts) > limits.images:
        raise _too_many(str(len(texts)), limits.images)
    images = []
    for i, text in enumerate(texts if many else [texts]):
        try:
            images.append(image_of(text))
        except (TypeError, ValueError) as error:
            raise _bad(f"{JSON_HELP}; {name}{f'[{i}]' if many else ''}: {error}") from error
    top_k = content.get("top_k")
    return Sent(images, many, top_k if top_k is None or isinstance(top_k, str) else json.dumps(top_k))


def image_of(text: Any) -> bytes:
    """The bytes that base64 or a data URI (RFC 2397) stands for.

    Base64 may lack its padding, hold white space, be percent-encoded, and have either alphabet of RFC 4648.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got {shortened(text)}")
    text = text.strip()
    if re.match("data%3a", text, re.IGNORECASE):
        text = unquote(text, errors="strict")
    if text[:5].lower() == "data:":
        head, comma, text = text[5:].partition(",")
        if not comma:
            raise ValueError("a data URI without a comma")
        if not head.lower().rstrip().endswith(";base64"):
            return unquote_to_bytes(text)
    digits = unquote_to_bytes(text) if "%" in text else text.encode("ascii")
    digits = digits.translate(_URL_SAFE, _SPACE).rstrip(b"=")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)


def _bad(reason: str) -> Refusal:
    return Refusal(400, "request", reason)


def _too_many(n: str, limit: int) -> Refusal:
    return Refusal(413, "body", f"{n} images in one request, at most {limit} are allowed")
