"""Names and text of the outside world: files and classes whose bytes are no UTF-8, text files of any origin.

Python holds a byte of a file name that is no UTF-8 as a lone surrogate, U+DCFF for 0xff. UTF-8 files, safetensors,
Arrow, protobuf and HTTP take no surrogates. So everything that the package writes holds `to_text` of a name, and
everything that it reads goes through `from_text`. There is one rule, and it is reversible:

| in the name | in the text |
| --- | --- |
| the byte 0xff, if it is no UTF-8 | `\\xff` |
| another lone surrogate | `\\ud800` |
| a backslash that would begin one of these texts | `\\x5c` |

All other names are written as they are. The module imports neither torch nor NumPy.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

_TAIL = r"x(?:[89a-f][0-9a-f]|5c)|ud[89a-f][0-9a-f]{2}"
_ESCAPED = re.compile(rf"\\({_TAIL})")
_TO_ESCAPE = re.compile(rf"[\ud800-\udfff]|\\(?={_TAIL})")

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the codecs that take them away."""

MOST_DIGITS = 18
"""Digits of the largest whole number that is read from outside; every number of so many digits fits into 64 bits."""

SHOWN = 60
"""Most characters of a wrong value that a message shows."""


def to_text(name: str) -> str:
    """A name as text that every UTF-8 reader takes; `from_text` gives the name back."""
    return _TO_ESCAPE.sub(_escape, name)


def from_text(text: str) -> str:
    """The name that `to_text` wrote as this text."""
    return _ESCAPED.sub(_unescape, text)


def _escape(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code & 0xFF:02x}" if code == ord("\\") or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _unescape(match: re.Match) -> str:
    kind, code = match.group(1)[0], int(match.group(1)[1:], 16)
    return chr(0xDC00 + code if kind == "x" and code != ord("\\") else code)


def on_one_line(text: str) -> str:
    """`to_text`, with control characters escaped too: a name must not break a line or control the terminal."""
    text = to_text(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(value: Any) -> str:
    """The representation of a wrong value for a message, cut after `SHOWN` characters."""
    if isinstance(value, int) and value.bit_length() > 3 * SHOWN:  # `repr` refuses more than 4,300 digits
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes; characters that the stream's encoding lacks are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def say(terminal: TextIO | None, text: str) -> None:
    """Writes a line of progress; nothing without a terminal."""
    if terminal is not None:
        write(terminal, f"{text}\n")


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """JSON values with every text changed, keys too: `to_text` before they are written, `from_text` after reading."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {mapped(key, change): mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` of a value whose texts may be names."""
    return json.dumps(mapped(value, to_text), **options)


def loads(content: bytes | str) -> Any:
    """The value that `dumps` wrote.

    Raises:
        ValueError: for anything else: other text, another encoding, numbers of over 64 bits, endless nesting.
    """
    text = decoded(content) if isinstance(content, bytes) else content
    try:
        return mapped(json.loads(text, parse_int=_whole), from_text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS + 2:
        raise ValueError(f"a whole number of {len(digits)} digits is too large")
    return int(digits)


def decoded(content: bytes) -> str:
    """The text of a file. A byte order mark gives the encoding and is left out; without one, it is UTF-8.

    Raises:
        ValueError: for another encoding; the message names the place and the fix.
    """
    encoding = next((name for bom, name in _BOMS if content.startswith(bom)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is no {encoding.removesuffix('-sig').upper()} text (byte {content[error.start]:#04x}); save "
            "the file as UTF-8, and write a byte of a name that is none as \\xff"
        ) from None
    if "\0" in text:
        raise ValueError("it holds NUL bytes, as binary files and UTF-16 without a mark do; save the file as UTF-8")
    return text


def read_names(path: str | PathLike) -> list[str]:
    """The names in a text file, one a line, whatever its line ends.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no text, see `decoded`.
    """
    lines = re.split(r"\r\n|\n|\r", decoded(Path(path).read_bytes()))
    return [from_text(line) for line in (lines if lines[-1] else lines[:-1])]


def csv_line(values: Iterable[Any]) -> str:
    """A line of CSV, whose texts may be names with any characters."""
    line = io.StringIO()
    # Before Python 3.13 the writer quotes a line end in a value only if the line's own end has the same characters.
    csv.writer(line, lineterminator="\r\n").writerow([to_text(v) if isinstance(v, str) else v for v in values])
    return line.getvalue().removesuffix("\r\n") + "\n"


def whole_number(text: str) -> int | None:
    """The whole number that digits stand for, at most 10 to the power of `MOST_DIGITS`; None for other text.

    `int` would refuse more than 4,300 digits, with an exception.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= MOST_DIGITS else 10**MOST_DIGITS
