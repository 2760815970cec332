"""The HTTP service: its answers, batches and limits without a server, and the whole command on loopback."""

import ast
import asyncio
import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.models.classes import class_names

pytest.importorskip("starlette", reason='needs starlette: pip install "revit-fast[serve]"')
pytest.importorskip("prometheus_client", reason='needs prometheus-client: pip install "revit-fast[serve]"')
pytest.importorskip("python_multipart", reason='needs python-multipart: pip install "revit-fast[serve]"')

from prometheus_client.parser import text_string_to_metric_families
from small_models import make_model
from starlette.requests import Request

from revit_fast.deploy import bodies, classifier
from revit_fast.deploy import server as server_module
from revit_fast.deploy import service as service_module
from revit_fast.deploy.bodies import image_of
from revit_fast.deploy.http import Limits, Service
from revit_fast.deploy.openapi import CLASSIFY, DESCRIPTION, PAGE
from revit_fast.io.formats import SERVED
from revit_fast.io.names import from_text

BUDGET = 100
MODEL = "deit_tiny_patch16_224"
WAIT_S = 300


def png(seed, height=30, width=40):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model():
    return rf.optimize(make_model(patch_size=4))


def pipe_of(model, **options):
    prep = rf.AdaptivePreprocessor.for_model(model, policy=("entropy", [5.0, 2.0]))
    return rf.AdaptivePipeline(model, prep, token_budget=BUDGET, **{"max_wait_s": 0.05, **options})


@pytest.fixture
def serve(model):
    """Makes services, which are closed at the end."""
    made = []

    def make(pipe=None, **limits):
        made.append(Service(pipe or pipe_of(model), Limits(**limits)))
        return made[-1]

    yield make
    for service in made:
        service.close()


async def respond(service, body=b"", content_type="", path="/", method="POST", query=b"", chunks=None, **headers):
    """The answer of a service to a request."""
    headers |= {"content_type": content_type} if content_type else {}
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks or [body]]
    messages[-1]["more_body"] = False
    arriving = iter(messages)

    async def receive():
        return next(arriving)

    names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": names}
    scope |= {"server": ("localhost", 80), "scheme": "http", "root_path": ""}
    return await service(Request(scope, receive))


async def ask(service, *args, path="/", **kwargs):
    """Status and JSON of an answer; as text where it is none."""
    response = await respond(service, *args, path=path, **kwargs)
    content = bytes(response.body).decode()
    return response.status_code, content if path in ("/metrics", "/docs") else json.loads(content)


def ask_once(service, *args, **kwargs):
    return asyncio.run(ask(service, *args, **kwargs))


def samples(text):
    """{(name, labels): value} of Prometheus text."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metrics_of(service):
    status, text = ask_once(service, path="/metrics", method="GET")
    assert status == 200
    return samples(text)


def without_ms(answer):
    assert answer["ms"] > 0
    return {name: value for name, value in answer.items() if name != "ms"}


def expected(pipe, images, top_k=5):
    results = list(pipe(images))
    return [{"predictions": r.top(top_k), "grid": r.grid, "tokens": r.n_tokens} for r in results]


class TestAnswers:
    def test_equal_the_pipeline(self, serve, model):
        service = serve()
        images = [png(i, 20 + i, 60 - i) for i in range(6)]
        images[2] = _flat()
        wanted = expected(pipe_of(model), images, top_k=3)
        assert len({w["grid"] for w in wanted}) > 1, "images must get different grids"
        for image, want in zip(images, wanted, strict=True):
            status, answer = ask_once(service, image, query=b"top_k=3")
            assert status == 200
            assert without_ms(answer) == want

    def test_several_images_in_one_request(self, serve, model):
        images = [png(0), b"no image", png(1)]
        body = json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()
        status, answer = ask_once(serve(), body, content_type="application/json; charset=utf-8")
        assert status == 200
        first, bad, last = answer["results"]
        assert bad == {"error": f"not an image; expected one of {', '.join(SERVED)}"}
        assert [without_ms(first), without_ms(last)] == expected(pipe_of(model), [images[0], images[2]])

    @pytest.mark.parametrize("path", ["/", "/classify"])
    def test_forms(self, serve, model, path):
        service, images = serve(), [png(i) for i in range(3)]
        wanted = expected(pipe_of(model), images, top_k=2)
        status, answer = ask_once(service, *form(images[0]), path=path, query=b"top_k=2")
        assert (status, without_ms(answer)) == (200, wanted[0])
        body, media = form(*images[:2], b"no image", images[2], top_k=b"2")
        status, answer = ask_once(
            service, body, media, path=path, chunks=[body[i : i + 50] for i in range(0, len(body), 50)]
        )
        first, second, bad, last = answer["results"]
        assert bad == {"error": f"not an image; expected one of {', '.join(SERVED)}"}
        assert [without_ms(a) for a in (first, second, last)] == wanted
        status, answer = ask_once(service, *form(b"no image"))
        assert (status, list(answer)) == (422, ["error"])
        status, answer = ask_once(service, *form(images[0], name="images"))
        assert len(answer["results"]) == 1

    @pytest.mark.parametrize(
        "written",
        [
            lambda text: text,
            lambda text: text.rstrip("="),
            lambda text: text.replace("+", "-").replace("/", "_"),
            lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n",
            lambda text: f"data:image/png;base64,{text}",
            lambda text: f" DATA:;Base64, {text} ",
            lambda text: f"data:image/png;base64,{quote(text, safe='')}",
            lambda text: quote(f"data:image/png;base64,{text.rstrip('=')}", safe=""),
            lambda text: f"data:image/png,{quote(base64.b64decode(text))}",
        ],
        ids=["plain", "unpadded", "url-safe", "lines", "uri", "case", "percent", "all percent", "no base64"],
    )
    def test_base64_as_people_send_it(self, written):
        image = png(3)
        text = written(base64.b64encode(image).decode())
        assert image_of(text) == image

    def test_one_image_as_json(self, serve, model):
        text = base64.b64encode(png(0)).decode()
        (wanted,) = expected(pipe_of(model), [png(0)], top_k=2)
        service = serve()
        for content in ({"image": text, "top_k": 2}, {"images": f"data:image/png;base64,{text}", "top_k": "2"}):
            _, answer = ask_once(service, json.dumps(content).encode(), content_type="application/json")
            assert without_ms(answer) == wanted
        body = json.dumps({"image": [text], "top_k": 2}).encode()
        _, answer = ask_once(service, body, content_type="application/json")
        assert [without_ms(a) for a in answer["results"]] == [wanted]

    def test_class_names_that_are_no_utf8(self, serve, model):
        prep = rf.AdaptivePreprocessor.for_model(model, policy=("fixed", 6))
        names = [os.fsdecode(b"caf\xe9%d" % i) for i in range(40)]
        service = serve(rf.AdaptivePipeline(model, prep, labels=names, max_wait_s=0.05))
        status, answer = ask_once(service, png(0), query=b"top_k=40")
        assert status == 200
        labels = [entry["label"] for entry in answer["predictions"]]
        assert all(label.startswith(r"caf\xe9") for label in labels)
        assert sorted(map(from_text, labels)) == sorted(names)

    def test_requests_at_a_time_share_batches_within_the_budget(self, serve, model):
        service = serve(pipe_of(model, max_wait_s=0.3))
        images = [png(i) if i % 3 else _flat() for i in range(40)]

        async def all_at_once():
            return await asyncio.gather(*(ask(service, image) for image in images))

        answers = asyncio.run(all_at_once())
        assert [without_ms(answer) for _, answer in answers] == expected(pipe_of(model), images)
        found = metrics_of(service)
        n_batches = found["revit_fast_batch_tokens_count", ()]
        n_tokens = sum(answer["tokens"] for _, answer in answers)
        assert found["revit_fast_batch_tokens_sum", ()] == n_tokens
        assert -(-n_tokens // BUDGET) <= n_batches < 20, "40 requests, batched"
        assert found["revit_fast_batch_tokens_bucket", (f"{BUDGET:.1f}",)] == n_batches, "a batch beyond the budget"
        assert found["revit_fast_requests_total", ("200",)] == 40
        assert found["revit_fast_request_seconds_count", ()] == 40
        assert found["revit_fast_waiting_images", ()] == 0


def form(*images, name="image", boundary=b"--x", end=b"--\r\n", headers=b"", **fields):
    """A form with files, and its media type as a keyword of `ask`."""
    parts = [(b'; name="%s"; filename="caf\xe9.png"%s' % (name.encode(), headers), image) for image in images]
    parts += [(b'; name="%s"' % os.fsencode(field), value) for field, value in fields.items()]
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data%s\r\n\r\n%s\r\n" % (boundary, head, content) for head, content in parts
    )
    return body + b"--" + boundary + end, f"Multipart/Form-Data; boundary={boundary.decode('latin-1')}"


def refused(*args, **kwargs):
    body, media = form(*args, **kwargs)
    return {"body": body, "content_type": media}


class TestForms:
    @pytest.mark.parametrize(
        ("request_", "status", "reason"),
        [
            (refused(b"x", colour=b"red"), 400, "form field 'colour': expected files, as curl -F image=@photo.jpg"),
            (refused(b"x", **{"\udcff": b"red"}), 400, r"form field '\xff': expected"),
            (refused(b"x", top_k=b"0"), 400, "top_k: expected a positive integer, got '0'"),
            (refused(b"x", top_k=b"1" * 65), 400, "'top_k': expected at most 64 bytes"),
            (refused(top_k=b"1"), 400, "a form without an image"),
            (refused(), 400, "a form without an image"),
            (refused(b"x", b"", b"x"), 413, "over 2 images in one request, at most 2"),
            (refused(b"x", end=b""), 400, "its last boundary is missing"),
            (refused(b"x" * 2000), 413, "larger than 2000 bytes"),
            (refused(b"x", headers=b"\r\nA: b" * 9), 400, "malformed form: Maximum header count"),
            (refused(b"x", headers=b"\r\nA:" + b"b" * 5000), 413, "larger than 2000 bytes"),
            (
                refused(b"x", headers=b"\r\nContent-Transfer-Encoding: base64"),
                415,
                "Content-Transfer-Encoding 'base64'",
            ),
            ({"body": b"x", "content_type": "multipart/form-data"}, 400, "needs the boundary"),
            ({"body": b"x", "content_type": "multipart/form-data; boundary="}, 400, "needs the boundary"),
            ({"body": b"x", "content_type": "multipart/form-data; boundary=" + "y" * 999}, 400, "needs the boundary"),
            ({"body": b"x", "content_type": "multipart/form-data; boundary=y"}, 400, "malformed form"),
            ({"body": b"x", "content_type": "multipart/mixed; boundary=y"}, 415, "send multipart/form-data"),
        ],
    )
    def test_wrong_ones_are_refused_by_name(self, serve, request_, status, reason):
        got, answer = ask_once(serve(body_bytes=2000, images=2), **request_)
        assert (got, list(answer)) == (status, ["error"])
        assert reason in answer["error"]

    def test_a_header_that_is_too_long_is_refused_before_its_end(self, serve):
        body, media = form(b"x", headers=b"\r\nA:" + b"b" * 100_000)
        parts = iter([{"type": "http.request", "body": body[:6000], "more_body": True}])

        async def receive():
            return next(parts)  # no more is asked for

        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
        scope |= {"headers": [(b"content-type", media.encode())], "server": ("localhost", 80), "scheme": "http"}
        assert asyncio.run(serve()(Request(scope, receive))).status_code == 400


def refusals_in_code():
    """Statuses of every `Refusal` that the service and its server can raise, read from their code."""
    found = set()
    for module in (bodies, classifier, server_module, service_module):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "Refusal"
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(node.args[0].value)
    return found


class TestDescription:
    def test_has_every_route_and_refusal(self, serve):
        service = serve()
        _, document = ask_once(service, path="/openapi.json", method="GET")
        for path, kinds in document["paths"].items():
            for method in kinds:
                status, _ = ask_once(service, png(0), path=path, method=method.upper())
                assert status == 200, path
        routes = {*CLASSIFY, *service_module.WATCHED, DESCRIPTION, PAGE}
        assert document["paths"].keys() == routes
        for path in CLASSIFY:
            answers = {int(status) for status in document["paths"][path]["post"]["responses"]}
            # 408, 431 and 501 are h11's hints and the server's
            assert answers == {200, 431, 501} | refusals_in_code()

    def test_answers_are_as_it_says(self, serve):
        jsonschema = pytest.importorskip("jsonschema", reason="comes with Ray")
        service = serve()
        _, document = ask_once(service, path="/openapi.json", method="GET")

        def check(value, *place):
            schema = document
            for key in place:
                schema = schema[key]
            jsonschema.Draft202012Validator.check_schema(schema)
            jsonschema.validate(value, {**schema, "components": document["components"]})

        for request in ({"body": png(0)}, {"body": form(png(0), b"x")[0], "content_type": form()[1]}, {"body": b"no"}):
            status, answer = ask_once(service, **request)
            responses = "paths", "/classify", "post", "responses", str(status), "content", "application/json", "schema"
            check(answer, *responses)
            with pytest.raises(jsonschema.ValidationError):
                check({"other": answer}, *responses)
        sent = "paths", "/classify", "post", "requestBody", "content", "application/json", "schema"
        for content in ({"image": "AAAA", "top_k": 2}, {"images": ["AAAA"]}, {"image": ["AAAA"]}):
            check(content, *sent)
        for content in ({}, {"image": "AAAA", "images": ["AAAA"]}, {"images": []}, {"image": "AAAA", "top_k": 0}):
            with pytest.raises(jsonschema.ValidationError):
                check(content, *sent)

    def test_the_page_loads_nothing_and_runs_only_its_own_script(self, serve):
        response = asyncio.run(respond(serve(), path="/docs", method="GET"))
        text = response.body.decode()
        assert not re.search(r"(src|href)=\"(?!openapi.json|healthz|metrics)", text)
        assert "://" not in text.replace("http://HOST:PORT", "")
        policy = response.headers["content-security-policy"]
        for tag in ("script", "style"):
            (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
        assert 'name="images"' in text
        assert 'fetch("classify"' in text


def _flat():
    """An image of no entropy."""
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    return file.getvalue()


class TestLimits:
    @pytest.mark.parametrize(
        ("request_", "status", "kind", "reason"),
        [
            ({"body": b"x" * 2001}, 413, "body", "larger than 2000 bytes"),
            ({"body": b"", "content_length": "2001"}, 413, "body", "larger than 2000 bytes"),
            ({"chunks": [b"x" * 1000] * 3}, 413, "body", "larger than 2000 bytes"),
            ({"body": b""}, 422, "image", "empty file"),
            ({"body": b"no image"}, 422, "image", "not an image; expected one of JPEG, PNG"),
            ({"body": png(0)[:100]}, 422, "image", ""),
            ({"body": png(0), "query": b"top_k=0"}, 400, "request", "top_k: expected a positive integer, got '0'"),
            ({"body": png(0), "query": b"top_k=" + b"9" * 5000}, 400, "request", "top_k: expected a positive integer"),
            ({"body": png(0), "query": b"top_k=%C2%B2"}, 400, "request", "top_k: expected a positive integer"),
            ({"body": b"", "content_length": "9" * 5000}, 413, "body", "larger than 2000 bytes"),
            ({"body": png(0), "path": "/predict"}, 404, "request", "there is no /predict"),
            ({"body": png(0), "path": "/\udcff"}, 404, "request", r"there is no /\xff"),
            ({"method": "GET"}, 405, "request", "POST an image"),
            ({"body": b"{", "content_type": "application/json"}, 400, "request", "base64"),
            ({"body": b'{"images": []}', "content_type": "application/json"}, 400, "request", "no list"),
            ({"body": b'{"images": []}', "content_type": "Application/JSON ; q"}, 400, "request", "no list"),
            ({"body": b"9" * 1990, "content_type": "application/json"}, 400, "request", "base64"),
            ({"body": b'{"images": ["?"]}', "content_type": "application/json"}, 400, "request", "base64"),
            ({"body": b'{"images": ["", "", ""]}', "content_type": "application/json"}, 413, "body", "at most 2"),
        ],
    )
    def test_have_their_status(self, serve, request_, status, kind, reason):
        service = serve(body_bytes=2000, images=2)
        got, answer = ask_once(service, **request_)
        assert (got, list(answer)) == (status, ["error"])
        assert reason in answer["error"]
        found = metrics_of(service)
        assert found["revit_fast_errors_total", (kind,)] == 1
        assert found["revit_fast_requests_total", (str(status),)] == 1

    def test_a_bomb_is_refused_before_it_is_decoded(self, serve):
        file = io.BytesIO()
        Image.new("1", (3000, 3000)).save(file, "PNG")
        assert len(file.getvalue()) < 10_000
        service = serve(image_pixels=8_000_000)
        status, answer = ask_once(service, file.getvalue())
        assert (status, answer["error"]) == (422, "the image has 3000x3000 pixels, at most 8000000 are allowed")
        assert service.classifier.metrics.seconds["decode"] == 0

    @pytest.mark.parametrize("kind", ["EPS", "TIFF", "ICO", "PPM", "TGA"])
    def test_formats_that_no_browser_shows_are_refused_before_they_are_decoded(self, serve, kind):
        service, file = serve(), io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(file, kind)
        status, answer = ask_once(service, file.getvalue())
        assert status == 422
        assert answer["error"].endswith(f"; expected one of {', '.join(SERVED)}")
        assert kind == "TGA" or answer["error"].startswith(f"of the format {kind}, which may not be read here")
        assert service.classifier.metrics.seconds["decode"] == 0

    def test_formats_that_browsers_show_and_those_asked_for(self, serve):
        files = {}
        for kind in ("GIF", "BMP", "WEBP", "JPEG", "TIFF"):
            files[kind] = io.BytesIO()
            Image.new("RGB", (32, 32), "red").save(files[kind], kind)
        service, other = serve(), serve(formats=("tiff",))
        assert [ask_once(service, file.getvalue())[0] for file in files.values()] == [200, 200, 200, 200, 422]
        assert [ask_once(other, file.getvalue())[0] for file in files.values()] == [422, 422, 422, 422, 200]
        with pytest.raises(ValueError, match="formats: expected some of"):
            Limits(formats=("JPG",))

    def test_time(self, serve, model):
        service = serve(pipe_of(model, max_wait_s=2.0), seconds=0.2)
        begin = time.monotonic()
        status, answer = ask_once(service, png(0))
        assert (status, answer) == (504, {"error": "took longer than 0.2 s"})
        assert time.monotonic() - begin < 1.5

    def test_time_counts_a_body_that_does_not_come(self, serve):
        async def stalled():
            async def receive():
                await asyncio.sleep(5)

            scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
            scope |= {"server": ("localhost", 80), "scheme": "http"}
            return await serve(seconds=0.1)(Request(scope, receive))

        assert asyncio.run(stalled()).status_code == 504

    def test_a_client_that_goes_away_is_counted(self, serve):
        async def gone():
            async def receive():
                return {"type": "http.disconnect"}

            scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
            scope |= {"server": ("localhost", 80), "scheme": "http"}
            await service(Request(scope, receive))

        service = serve()
        asyncio.run(gone())
        assert metrics_of(service)["revit_fast_errors_total", ("disconnect",)] == 1

    def test_images_that_wait(self, serve, model):
        service = serve(pipe_of(model, max_wait_s=0.5), waiting=3)

        async def at_once():
            return await asyncio.gather(*(ask(service, _flat()) for _ in range(5)))

        answers = asyncio.run(at_once())
        assert sorted(status for status, _ in answers) == [200, 200, 200, 503, 503]
        assert "3 images are waiting" in next(answer["error"] for status, answer in answers if status == 503)

    @pytest.mark.parametrize("name", ["body_bytes", "image_pixels", "images", "seconds", "waiting", "top_k"])
    def test_must_be_positive(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
            Limits(**{name: 0})


class TestHealth:
    def test_follows_the_pipeline(self, serve, model, monkeypatch):
        pipe = pipe_of(model)
        service = serve(pipe)
        assert ask_once(service, path="/healthz", method="GET") == (200, {"status": "ok"})

        def fail(*_):
            raise MemoryError("none left")

        monkeypatch.setattr(pipe.prep, "pack", fail)
        for _ in range(2):  # the request that the pipeline fails at, and one after it
            status, answer = ask_once(service, png(0))
            assert status == 503
            assert "none left" in answer["error"]
        assert ask_once(service, path="/healthz", method="GET")[0] == 503

    def test_draining_answers_what_has_come_and_refuses_the_rest(self, serve, model):
        service = serve(pipe_of(model, max_wait_s=30.0))

        async def drained():
            early = asyncio.create_task(ask(service, png(0)))
            await asyncio.sleep(0.1)
            await asyncio.wait_for(service.drain(), 5)
            assert early.done()
            return await early, await ask(service, png(0))

        (status, _), (late, answer) = asyncio.run(drained())
        assert status == 200
        assert (late, answer) == (503, {"error": "the service stops"})


@pytest.fixture
def server(tmp_path):
    """A running `revit-fast serve`: its process, URL and weights."""
    pytest.importorskip("ray.serve", reason='needs Ray Serve: pip install "revit-fast[serve]"')
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = rf.create_model(MODEL).state_dict()
    weights = str(tmp_path / "revit.safetensors")
    save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}, weights)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(rf.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    arguments = ["--model", MODEL, "--weights", weights, "--policy", "entropy", "--batch-tokens", "500"]
    arguments += ["--dtype", "bfloat16"]
    arguments += ["--port", str(port), "--max-body-mb", "1", "--max-megapixels", "1", "--max-wait-ms", "2000"]
    log = open(tmp_path / "log", "w+")  # noqa: SIM115, a pipe that nobody reads would block Ray's processes
    command = [sys.executable, "-m", "revit_fast.cli", "serve", *arguments]
    running = subprocess.Popen(command, cwd=root, env=env, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_S
        while "listening on" not in Path(log.name).read_text():
            assert running.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.1)
        assert Path(log.name).read_text().startswith("--dtype bfloat16: weights in bfloat16\n")
        yield running, f"http://127.0.0.1:{port}", weights
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGINT)
            running.wait(timeout=WAIT_S)
        log.close()


def fetch(url, data=None):
    """Status and text, as a client gets them on loopback."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, {"Content-Type": "image/png"}), timeout=30
        ) as got:
            return got.status, got.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class TestCommand:
    def test_on_loopback_until_sigterm(self, server, tmp_path):
        running, url, weights = server
        fast = rf.optimize(rf.create_model(MODEL, weights=weights).eval(), torch.bfloat16)
        prep = rf.AdaptivePreprocessor.for_model(fast, policy="entropy")
        images = [png(i, 60 + i, 90 - i) for i in range(23)] + [_flat()]
        wanted = expected(rf.AdaptivePipeline(fast, prep, labels=class_names(fast)), images)
        assert len({w["grid"] for w in wanted}) > 1

        assert fetch(f"{url}/healthz") == (200, '{"status":"ok"}')
        with ThreadPoolExecutor(len(images)) as clients:
            answers = list(clients.map(lambda image: fetch(f"{url}/", image), images))
        assert [status for status, _ in answers] == [200] * len(images)
        assert [without_ms(json.loads(text)) for _, text in answers] == wanted
        assert fetch(f"{url}/", b"no image") == (
            422,
            f'{{"error":"not an image; expected one of {", ".join(SERVED)}"}}',
        )
        bomb = io.BytesIO()
        Image.new("1", (1200, 1200)).save(bomb, "PNG")
        assert fetch(f"{url}/", bomb.getvalue())[0] == 422
        assert fetch(f"{url}/", b"x" * ((1 << 20) + 1))[0] == 413
        status, text = fetch(f"{url}/metrics")
        found = samples(text)
        assert status == 200
        assert found["revit_fast_model_info", ("bfloat16",)] == 1
        assert found["revit_fast_batch_images_sum", ()] == len(images)
        assert found["revit_fast_batch_images_count", ()] < len(images), "requests at a time share batches"
        assert found["revit_fast_batch_tokens_bucket", ("500.0",)] == found["revit_fast_batch_tokens_count", ()]

        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
        pids = [int(pid) for pid in children.stdout.split()]
        assert pids, "Ray's processes"
        with ThreadPoolExecutor(1) as client:
            late = client.submit(fetch, f"{url}/", images[0])
            half = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=WAIT_S)
            half.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(images[1]))
            time.sleep(0.5)  # they wait for others, up to --max-wait-ms
            running.send_signal(signal.SIGTERM)
            assert late.result()[0] == 200, "what has come is answered"
            with half:
                with pytest.raises(OSError):
                    fetch(f"{url}/healthz")  # nobody else gets in
                half.sendall(images[1])
                assert half.recv(65536).startswith(b"HTTP/1.1 200 "), "what comes now too"
        assert running.wait(timeout=WAIT_S) == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        said = [
            "--dtype bfloat16: weights in bfloat16",
            f"listening on {url}; {url}/docs is a page to try it; Ctrl-C stops it",
            "stopped",
        ]
        assert (tmp_path / "log").read_text().splitlines() == said, "nothing of Ray's"
        with pytest.raises(OSError):
            fetch(f"{url}/healthz")

    def test_a_port_in_use_is_a_usage_error(self, capsys):
        pytest.importorskip("ray.serve", reason='needs Ray Serve: pip install "revit-fast[serve]"')
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            assert main(["serve", "--model", MODEL, "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
