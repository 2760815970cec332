"""The server of the HTTP service over real sockets: malformed, slow, lying and leaving clients, and its end."""

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

for package in ("starlette", "prometheus_client", "python_multipart", "uvicorn", "h11"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "revit-fast[serve]"')

from bench.fuzz import http as fuzz_http  # noqa: E402 (needs h11)
from bench.fuzz.decode import small_pipe  # noqa: E402
from bench.fuzz.http import good_request, serving  # noqa: E402
from bench.fuzz.inputs import real_files  # noqa: E402
from revit_fast.deploy.classifier import Limits, reason_of, without_paths  # noqa: E402
from revit_fast.deploy.server import Server, listening_socket  # noqa: E402
from revit_fast.deploy.service import Service  # noqa: E402

WAIT_S = 60
"""Longest time for anything, on a busy machine."""
IMAGE = real_files()["jpeg"]


@pytest.fixture(scope="module")
def pipe():
    return small_pipe(max_wait_s=0.02)


@pytest.fixture
def serve(pipe):
    """Starts servers in threads of this process: returns the service and its port."""
    running = []

    def start(options=None, **limits):
        service = Service(small_pipe(**options) if options else pipe, Limits(**limits))
        listening, ready = listening_socket("127.0.0.1", 0), threading.Event()
        server = Server(service, ready.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        running.append((server, thread, service))
        assert ready.wait(WAIT_S)
        return service, listening.getsockname()[1]

    yield start
    for server, thread, service in running:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server ends"
        service.close()


def connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


def read_all(connection):
    """All bytes until the server closes."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def exchange(port, sent):
    """All that the server sends until it closes."""
    with connected(port) as connection:
        connection.sendall(sent)
        return read_all(connection)


def is_closed(connection):
    """Whether the server has closed; sends what no server reads, and does not read."""
    try:
        connection.sendall(b"x")
    except OSError:
        return True
    return False


def answers(received):
    """[(status, JSON)] of the answers in some bytes."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        status = int(lines[0].split()[1])
        if status == 100:
            received = rest
            continue
        assert "content-type: application/json" in lines
        (length,) = (int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        found.append((status, json.loads(rest[:length])))
        received = rest[length:]
    return found


def post(body=IMAGE, *headers, target="/", version="1.1", length=None, close=True):
    lines = [f"POST {target} HTTP/{version}", "Host: here", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"] * (length != "")
    lines += ["Connection: close"] * close
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def errors_of(service):
    return {s.labels["kind"]: s.value for m in service.metrics.errors.collect() for s in m.samples if "total" in s.name}


def eventually(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestRequests:
    @pytest.mark.parametrize(
        "sent",
        [
            post(),
            post(version="1.0"),
            post(IMAGE, "Content-Type: IMAGE/JPEG"),
            post(IMAGE, "Content-Type: application/x-www-form-urlencoded"),
            post(IMAGE, "Content-Encoding: identity"),
            post(IMAGE, "Expect: 100-continue"),
            post(IMAGE, "X-Request-Id: \xff", "x-request-timeout-seconds: 0.0001", "x-request-disconnect-disabled: ?1"),
            post(b"%x\r\n%b\r\n0\r\n\r\n" % (len(IMAGE), IMAGE), "Transfer-Encoding: chunked", length=""),
            post().replace(b"Host: here", b"Host: [::1"),
        ],
        ids=["plain", "1.0", "case", "form", "identity", "continue", "unused", "chunked", "host"],
    )
    def test_right_ones_are_answered(self, serve, sent):
        service, port = serve()
        ((status, answer),) = answers(exchange(port, sent))
        assert (status, len(answer["predictions"])) == (200, 5), answer
        assert errors_of(service) == {}

    @pytest.mark.parametrize(
        ("sent", "status", "reason"),
        [
            (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "malformed HTTP"),
            (b"BREW\r\n\r\n", 400, "malformed HTTP"),
            (post(b"ab", "Content-Length: 3"), 400, "Content-Length"),
            (post(length="-1"), 400, "Content-Length"),
            (post(length="9" * 5000), 400, "Content-Length"),
            (post(length="9" * 20), 413, "larger than"),
            (post(b"zz\r\n", "Transfer-Encoding: chunked", length=""), 400, "chunk"),
            (post(b"zz\r\n", "Transfer-Encoding: chunked", "Expect: 100-continue", length=""), 400, "chunk"),
            (post(b"x", "Transfer-Encoding: gzip", length=""), 501, "Transfer-Encoding"),
            (post(b"x", "A: " + "y" * 300000), 431, "malformed HTTP"),
            (post(b"", "Connection: Upgrade", "Upgrade: websocket").replace(b"POST", b"GET"), 405, "POST an image"),
            (post(target="/%ff/" + "a" * 9000), 404, "POST an image to /"),
            (post(target="/?top_k=" + "9" * 5000), 400, "top_k: expected a positive integer"),
            (post(IMAGE, "Content-Encoding: GZIP"), 415, "Content-Encoding 'gzip'"),
            (post(IMAGE, "Content-Type: Multipart/Form-Data; boundary=x"), 400, "malformed form"),
            (post(IMAGE, "Content-Type: multipart/related; boundary=x"), 415, "'multipart/related'"),
            (post(b"9" * 6000, "Content-Type: APPLICATION/JSON; charset=utf-8"), 400, "base64"),
            (post(b"[" * 90000, "Content-Type: application/json"), 400, "base64"),
            (post(b"\xff", "Content-Type: application/json"), 400, "base64"),
            (post(b'{"images":["\\ud800"]}', "Content-Type: application/json"), 400, "base64"),
        ],
    )
    def test_wrong_ones_get_json_and_count(self, serve, sent, status, reason):
        service, port = serve()
        ((got, answer),) = answers(exchange(port, sent))
        assert (got, list(answer)) == (status, ["error"])
        assert reason in answer["error"]
        assert len(answer["error"]) < 300
        assert service.metrics.requests.labels(status)._value.get() == 1
        assert "internal" not in errors_of(service)

    def test_expect_continue(self, serve):
        _, port = serve(body_bytes=len(IMAGE))
        assert exchange(port, post(IMAGE, "Expect: 100-continue")).startswith(b"HTTP/1.1 100 ")
        refused = exchange(port, post(b"", "Expect: 100-continue", length=len(IMAGE) + 1))
        assert refused.startswith(b"HTTP/1.1 413 "), "it is not asked for what is too much"

    def test_head_has_no_body(self, serve):
        _, port = serve()
        assert exchange(port, post(b"").replace(b"POST /", b"HEAD /healthz")).endswith(b"\r\n\r\n")
        malformed = post(b"zz\r\n", "Transfer-Encoding: chunked", length="").replace(b"POST", b"HEAD")
        assert exchange(port, malformed).endswith(b"\r\n\r\n")

    def test_pipelined_ones_are_answered_in_turn(self, serve):
        _, port = serve()
        found = answers(exchange(port, post(close=False) + post(b"no image", close=False) + post()))
        assert [status for status, _ in found] == [200, 422, 200]

    def test_a_body_longer_than_it_says_is_another_request(self, serve):
        _, port = serve()
        found = answers(exchange(port, post(IMAGE + b"more\r\n\r\n", length=len(IMAGE), close=False)))
        assert [status for status, _ in found] == [200, 400]

    def test_a_large_body_that_is_refused_does_not_lose_its_answer(self, serve):
        _, port = serve(body_bytes=1000)
        assert answers(exchange(port, post(bytes(3_000_000))))[0][0] == 413


class TestTime:
    def test_a_body_shorter_than_it_says(self, serve):
        service, port = serve(seconds=0.3)
        ((status, answer),) = answers(exchange(port, post(length=len(IMAGE) + 1)))
        assert (status, answer) == (504, {"error": "took longer than 0.3 s"})
        eventually(lambda: service._n_open == 0)

    @pytest.mark.parametrize("first", [b"", post(close=False)], ids=["first", "kept alive"])
    def test_a_slow_head(self, serve, first):
        service, port = serve(seconds=0.4)
        with connected(port) as connection:
            connection.sendall(first)
            if first:
                connection.recv(65536)
            with suppress(BrokenPipeError, ConnectionResetError):
                for byte in b"POST / HTTP/1.1\r\nA: " + b"b" * 200:
                    connection.sendall(bytes([byte]))
                    if errors_of(service):
                        break
                    time.sleep(0.05)
            ((status, answer),) = answers(read_all(connection))
        assert (status, answer) == (408, {"error": "the request's head took longer than 0.4 s"})
        assert errors_of(service) == {"head": 1}

    def test_a_silent_connection_is_closed(self, serve):
        service, port = serve(seconds=0.2)
        assert exchange(port, b"") == b""
        assert errors_of(service) == {}

    def test_a_client_that_does_not_read(self, serve, monkeypatch):
        service, port = serve(seconds=0.3)

        async def long_text():
            return bytes(20_000_000)

        monkeypatch.setattr(service.classifier, "metrics_text", long_text)
        with connected(port) as connection:
            connection.sendall(post(b"").replace(b"POST /", b"GET /metrics"))
            eventually(lambda: is_closed(connection))

    def test_connections_have_a_number(self, serve):
        service, port = serve(waiting=1)
        with connected(port), connected(port):
            ((status, answer),) = answers(exchange(port, b""))
            assert (status, answer) == (503, {"error": "2 connections are open; try again"})
        assert errors_of(service) == {"overload": 1}


class TestClientsThatLeave:
    @pytest.mark.parametrize("sent", [post()[:-7], post()], ids=["in the body", "before the answer"])
    def test_are_counted_and_no_error(self, serve, sent, caplog):
        service, port = serve({"max_wait_s": 0.5})
        with connected(port) as connection:
            connection.sendall(sent)
            eventually(lambda: service._n_open)
        eventually(lambda: errors_of(service) == {"disconnect": 1})
        eventually(lambda: service._n_open == 0)
        assert answers(exchange(port, post()))[0][0] == 200, "the service goes on"
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class TestUnexpectedErrors:
    @pytest.mark.parametrize(
        ("place", "sent"),
        [
            ("_top_k", post()),
            ("_media_type", post()),
            ("_body", post()),
            ("_images", post(b"{}", "Content-Type: application/json")),
            ("_images", post(b"x", "Content-Type: multipart/form-data; boundary=x")),
            ("_entry", post(b'{"images": [""]}', "Content-Type: application/json")),
            ("_watched", post(b"").replace(b"POST /", b"GET /metrics")),
            ("_watched", post(b"").replace(b"POST /", b"GET /healthz")),
            ("refused", post(b"no image")),
        ],
    )
    @pytest.mark.parametrize("error", [KeyError("/home/me/secret"), MemoryError(), RecursionError("deep")])
    def test_are_json_counted_and_logged_once(self, serve, monkeypatch, caplog, place, sent, error):
        service, port = serve()
        right = getattr(service, place)

        def fail(*args):
            monkeypatch.setattr(service, place, right)
            raise error

        monkeypatch.setattr(service, place, fail)
        ((status, answer),) = answers(exchange(port, sent))
        assert (status, answer) == (500, {"error": "an error of the service; its log has the reason"})
        assert errors_of(service).get("internal") == 1
        assert service.metrics.requests.labels(500)._value.get() == 1
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert record.exc_info[1] is error

    def test_names_that_are_no_utf8_are_none(self, serve, monkeypatch):
        service, port = serve()

        async def named(image, top_k):
            return {"predictions": [{"label": "caf\udce9", "score": 1.0}]}

        monkeypatch.setattr(service.classifier, "classify", named)
        ((_, answer),) = answers(exchange(port, post()))
        assert answer["predictions"][0]["label"] == r"caf\xe9"

    def test_of_the_result_that_is_no_json(self, serve, monkeypatch):
        service, port = serve()

        async def odd(image, top_k):
            return {"predictions": {object()}}

        monkeypatch.setattr(service.classifier, "classify", odd)
        assert answers(exchange(port, post()))[0][0] == 500
        assert errors_of(service) == {"internal": 1}

    def test_of_the_pipeline_name_no_paths(self, serve, monkeypatch, caplog):
        service, port = serve({})

        async def fail(image, top_k):
            raise FileNotFoundError(2, "No such file", "/home/me/model.safetensors")

        monkeypatch.setattr(service.classifier, "classify", fail)
        for _ in range(2):
            ((status, answer),) = answers(exchange(port, post()))
            assert status == 503
            assert "No such file" in answer["error"]
            assert "/home" not in answer["error"]
        assert len([record for record in caplog.records if record.exc_info]) == 1, "logged once"

    def test_of_another_process_say_one_line(self):
        error = RuntimeError("ray::classify()\n  File '/usr/x.py', line 3\nKeyError: 'a'")
        error.cause = KeyError("a")
        assert reason_of(error) == "'a'"
        assert reason_of(MemoryError()) == "MemoryError"

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("No such file: '/a b'", "No such file: '/a b'"),
            ("in /usr/lib/x.py, line 3", "in …, line 3"),
            (r"C:\Users\me\x.pt is bad", "… is bad"),
            ("3 images/s at most 1/2", "3 images/s at most 1/2"),
        ],
    )
    def test_paths_are_taken_out(self, text, shown):
        assert without_paths(text) == shown


def half_sent(port, sent, n):
    connection = connected(port)
    connection.sendall(sent[:n])
    return connection


@contextmanager
def stopped(*options, n_signals=1):
    """A server that has got signals, with connections in all states, before their ends."""
    with serving(options) as (process, port):
        sent = post(close=False)
        head = len(sent) - len(IMAGE)
        states = {
            "in the head": half_sent(port, sent, head - 5),
            "after the head": half_sent(port, sent, head),
            "in the body": half_sent(port, sent, head + 20),
            "never": half_sent(port, sent, head + 30),
            "waiting": half_sent(port, sent, len(sent)),
            "idle": connected(port),
        }
        assert fuzz_http.answer_of(port, good_request(b"x"))[0] == 422, "the server has read the others"
        for _ in range(n_signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        try:
            yield process, port, states, sent
        finally:
            for connection in states.values():
                connection.close()


class TestEnd:
    def test_the_first_signal_keeps_its_promise(self):
        with stopped("--wait-s", "0.5", "--seconds", "8") as (process, port, states, sent):
            for state in ("in the head", "idle"):
                assert read_all(states[state]) == b"", state
            with pytest.raises(OSError):
                connected(port)
            head = len(sent) - len(IMAGE)
            states["after the head"].sendall(sent[head:])
            states["in the body"].sendall(sent[head + 20 :])
            for state in ("after the head", "in the body", "waiting"):
                ((status, answer),) = answers(read_all(states[state]))
                assert (status, len(answer["predictions"])) == (200, 5), state
            assert process.poll() is None, "a body that has not come yet has its time"
            assert answers(read_all(states["never"]))[0][0] == 504
            assert process.wait(WAIT_S) == 0

    def test_a_second_signal_ends_at_once(self):
        with stopped("--seconds", "1000", n_signals=2) as (process, _, states, _):
            assert process.wait(WAIT_S) == 0
            assert answers(read_all(states["in the body"])) == []


def test_random_requests(serve, tmp_path):
    @contextmanager
    def here(options):
        names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
        _, port = serve(**dict(zip(names, map(int, options[1::2]), strict=True)))
        yield SimpleNamespace(poll=lambda: None), port

    found = fuzz_http.fuzz(0, tmp_path, n_inputs=128, serve=here)
    assert found["findings"] == []
    assert found["inputs"] == sum(found["outcomes"].values()) == 128
    assert found["outcomes"]["200"] > 0
