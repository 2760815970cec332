"""Random and malformed requests to the HTTP service, over sockets of the loopback.

Every connection is expected to end with a complete HTTP response whose body is JSON, unless nothing was sent. A finding
is anything else: no answer, a part of one, a body that is no JSON, a 500, a server that has ended, a good request in
between whose answer is wrong, or an unexpected error in the metrics.
"""

from __future__ import annotations

import base64
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import h11

from bench.fuzz.inputs import damaged, real_files

Serving = Callable[[Sequence[str]], AbstractContextManager[tuple[subprocess.Popen, int]]]

CLIENTS = 8
ANSWER_S = 60.0
"""Longest time, in seconds, for an answer; the service's own limits are far below."""
LIMITS = ("--seconds", "1", "--body-bytes", "200000", "--images", "8", "--image-pixels", "1000000")
METHODS = ("POST", "POST", "POST", "POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW", "post", "")
TARGETS = (
    "/",
    "/",
    "/",
    "/?top_k=3",
    "/?top_k=" + "9" * 5000,
    "/?top_k=%FF&top_k",
    "/healthz",
    "/metrics",
    "/-/routes",
    "/classify",
    "/classify?top_k=2",
    "/openapi.json",
    "/docs",
)
TEXTS = (b"/metrics", b"/docs")
"""Targets whose right answers are no JSON."""
TARGETS += ("/%ff%00", "*", "http://[::1/", "//", "/" + "a" * 20000, "/?" + "&" * 3000, "?", "/ /")
VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/1.", "")
MEDIA_TYPES = ("image/png", "IMAGE/JPEG", "application/json", "Application/JSON; charset=utf-8", "multipart/form-data")
MEDIA_TYPES += ("multipart/form-data; boundary=x", "application/json;", ";", "\xff\xfe", "")
HEADERS = (
    "Expect: 100-continue",
    "Expect: the worst",
    "Content-Encoding: gzip",
    "Transfer-Encoding: gzip, chunked",
    "Connection: close",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13",
    "Host: [::1",
    "X-Request-Id: \xff",
    "x-request-timeout-seconds: 0.0001",
    "X: " + "y" * 20000,
    " folded: line",
    "no colon",
)
DISPOSITIONS = (
    b'form-data; name="image"; filename="x.jpg"',
    b'form-data; name="images"; filename="caf\xe9.jpg"',
    b"form-data; name=image",
    b'form-data; name="images[]"; filename="../../etc/passwd"; filename*=UTF-8\'\'%ff',
    b'form-data; name="top_k"',
    b'form-data; name="colour"',
    b'form-data; name="a\\"b"; filename="' + b"y" * 5000,
    b"attachment",
    b"",
)
PART_HEADERS = (
    b"Content-Type: image/jpeg",
    b"Content-Transfer-Encoding: base64",
    b"X: y\r\n" * 20,
    b"no colon",
    b"\xff: ",
)


@contextmanager
def serving(options: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen, int]]:
    """A running `bench.fuzz.server` and its port; it is killed at the end."""
    command = [sys.executable, "-m", "bench.fuzz.server", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {line!r}, exit code {process.wait()}")
        yield process, int(line.split()[-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def body_of(rng: random.Random, files: dict[str, bytes]) -> tuple[bytes, str | None]:
    """A body and the media type that it should have."""
    image = rng.choice(list(files.values()))
    if rng.random() < 0.5:
        image = damaged(rng, image, rng.choice(list(files.values())))
    kind = rng.random()
    if kind < 0.4:
        return image, None
    if kind < 0.7:
        return form_of(rng, image)
    if kind < 0.8:
        content = {"images": [text_of(rng, image)] * rng.choice((0, 1, 2, 9))}
        if rng.random() < 0.3:
            content = {
                rng.choice(("image", "images", "picture")): text_of(rng, image),
                "top_k": rng.choice((3, "3", 0, {})),
            }
        return json.dumps(content).encode(), "application/json"
    if kind < 0.9:
        values = (
            b"[" * 100000,
            b'{"images":{}}',
            b'{"images":[1]}',
            b"\xff",
            b"9" * 6000,
            b'{"images":["\\ud800"]}',
            b'{"image":"","images":[""]}',
            b"",
        )
        return rng.choice(values), "application/json"
    return rng.randbytes(rng.choice((0, 1, 1000, 300000))), None


def form_of(rng: random.Random, image: bytes) -> tuple[bytes, str]:
    """A form with some parts, right or wrong, and its media type."""
    boundary = rng.choice((b"x", b"----0123456789", b"\xff", b"b" * 70, b"'b b'"))
    body = b""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 9, 300))):
        right = rng.random() < 0.7
        head = b"Content-Disposition: " + (DISPOSITIONS[0] if right else rng.choice(DISPOSITIONS))
        if rng.random() < 0.3:
            head += b"\r\n" + rng.choice(PART_HEADERS)
        content = rng.choice((image, image, image, b"3", b"\r\n--" + boundary[:-1], b""))
        body += b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n"
    body += b"--" + boundary + rng.choice((b"--\r\n", b"--\r\n", b"--\r\n", b"--", b"", b"\r\n", b"--\r\nepilogue"))
    if rng.random() < 0.2:
        body = damaged(rng, body, image)
    return (
        body,
        f"multipart/form-data; boundary={rng.choice((boundary, boundary, boundary, b'other')).decode('latin-1')}",
    )


def text_of(rng: random.Random, image: bytes) -> str:
    """An image as people put it into JSON: base64 or a data URI, right or wrong."""
    text = base64.b64encode(image).decode()
    text = rng.choice(
        (text, text.rstrip("="), text.replace("+", "-").replace("/", "_"), quote(text), f"{text[:9]}\n {text[9:]}")
    )
    return (
        rng.choice(("", "", "data:image/jpeg;base64,", "DATA:;BASE64,", "data:,", "data:", "data%3A%3Bbase64%2C", "%"))
        + text
    )


def request_of(rng: random.Random, files: dict[str, bytes]) -> bytes:
    """The bytes of a request, right or wrong."""
    body, media_type = body_of(rng, files)
    odd = rng.random() < 0.4
    lines = [" ".join(rng.choice(part) for part in (METHODS, TARGETS, VERSIONS)) if odd else "POST / HTTP/1.1"]
    lines += ["Host: fuzz"] * rng.choice((1, 1, 1, 1, 0, 2))
    media_type = media_type if media_type and rng.random() < 0.8 else rng.choice(MEDIA_TYPES)
    lines.append(f"Content-Type: {media_type}")
    if rng.random() < 0.4:
        lines += rng.sample(HEADERS, rng.choice((1, 1, 2)))
    if rng.random() < 0.25:
        lines.append(rng.choice(("Transfer-Encoding: chunked", "transfer-encoding: CHUNKED")))
        half = len(body) // 2
        chunks = [chunk for chunk in (body[:half], body[half:]) if chunk]
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        body += rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"", b"zz\r\n", b"0\r\nA: b\r\n\r\n"))
    if rng.random() < 0.8:
        length = len(body) + rng.choice((0, 0, 0, 0, 0, 0, -1, 1, -len(body), 10**6, 10**30))
        lines += [f"Content-Length: {length}"] * rng.choice((1, 1, 1, 1, 2))
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    sent = head + body
    if rng.random() < 0.1:
        sent += head + body  # pipelined
    return damaged(rng, sent, head) if rng.random() < 0.3 else sent


def answer_of(port: int, sent: bytes, method: str = "POST", *, parts: int = 1) -> tuple[int, bytes] | None:
    """Status and body of the final answer; None if the server closed the connection without any byte.

    Raises:
        OSError, h11.RemoteProtocolError: if there is no complete answer.
    """
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "fuzz"), ("Content-Length", "0")]))
    client.send(h11.EndOfMessage())
    status, body, any_byte = 0, b"", False
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has answered before the end
            step = -(-len(sent) // parts) or 1
            for begin in range(0, len(sent), step):
                connection.sendall(sent[begin : begin + step])
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                data = connection.recv(65536)
                if not data and not any_byte:
                    return None
                any_byte = True
                client.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                return status, body


def judged(port: int, rng: random.Random, sent: bytes) -> tuple[str, str | None]:
    """The outcome of sending a request, and a finding or None."""
    if rng.random() < 0.1:  # a client that goes away
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
            connection.sendall(sent[: rng.randrange(len(sent) + 1)])
        return "gone", None
    method = sent.partition(b" ")[0]
    try:
        answer = answer_of(port, sent, "HEAD" if method == b"HEAD" else "POST", parts=rng.choice((1, 1, 1, 3)))
    except (OSError, h11.RemoteProtocolError) as error:
        return "no answer", f"{type(error).__name__}: {error}"
    if answer is None:
        return "closed", None if not sent.strip() else "closed without an answer"
    status, body = answer
    finding = "an error of the service" if status == 500 else None
    is_text = status == 200 and any(target in sent.partition(b"\r\n")[0] for target in TEXTS)
    if method != b"HEAD" and not is_text:
        try:
            json.loads(body)
        except ValueError:
            finding = f"status {status}: no JSON: {body[:80]!r}"
    return str(status), finding


def good_request(image: bytes) -> bytes:
    """A right request."""
    return b"POST / HTTP/1.1\r\nHost: fuzz\r\nContent-Length: %d\r\n\r\n%b" % (len(image), image)


def fuzz(
    seed: int, out: Path, *, seconds: float = float("inf"), n_inputs: float = float("inf"), serve: Serving = serving
) -> dict:
    """Runs until the time or the number of inputs is reached; keeps the inputs of findings in `out`.

    Args:
        seed: of the requests.
        out: folder for the inputs of findings.
        seconds: time to run.
        n_inputs: number of requests.
        serve: starts a server, see `serving`.

    Returns:
        {"inputs", "outcomes": {status: count}, "findings": [{"finding", "file"}]}
    """
    files, rng = real_files(), random.Random(seed)
    outcomes: Counter[str] = Counter()
    findings: list[dict] = []

    def keep(finding: str, sent: bytes) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"http-{seed}-{len(findings)}.bin"
        path.write_bytes(sent)
        findings.append({"finding": finding, "file": path.name})

    with serve(LIMITS) as (process, port), ThreadPoolExecutor(CLIENTS) as clients:

        def good_answer() -> tuple[int, object]:
            """Status and predictions of a good request; one for which the service has no time is sent again."""
            give_up = time.monotonic() + ANSWER_S
            while True:
                status, body = answer_of(port, good_request(files["jpeg"])) or (0, b"{}")
                if status not in (503, 504) or time.monotonic() > give_up:
                    return status, json.loads(body).get("predictions")

        right, n, end = good_answer(), 0, time.monotonic() + seconds
        while n < n_inputs and time.monotonic() < end and process.poll() is None:
            turn = int(min(8 * CLIENTS, n_inputs - n))
            requests = [request_of(rng, files) for _ in range(turn)]
            draws = [random.Random(rng.random()) for _ in range(turn)]
            for sent, (outcome, finding) in zip(
                requests, clients.map(lambda draw, sent: judged(port, draw, sent), draws, requests), strict=True
            ):
                outcomes[outcome] += 1
                if finding:
                    keep(finding, sent)
            n += turn
            try:
                if (got := good_answer()) != right:
                    keep(f"a good request got another answer: {got}", b"")
            except (OSError, ValueError, h11.RemoteProtocolError) as error:
                keep(f"a good request got no answer: {error}", b"")
        if process.poll() is not None:
            keep(f"the server ended with {process.returncode}", b"")
        else:
            _, text = answer_of(port, b"GET /metrics HTTP/1.1\r\nHost: fuzz\r\n\r\n")
            if b'kind="internal"' in text:
                keep("unexpected errors in the metrics; the server's stderr has them", text)
    return {"inputs": n, "outcomes": dict(sorted(outcomes.items())), "findings": findings}
