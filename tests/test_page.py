"""The page of `revit-fast demo`: what it shows is what the pipeline does, in Python and in a real browser."""

import base64
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import PIL
import pytest
import torch
from contrasting import PATCH, assigner, photo, pipe_of, spied_texts
from network import assert_stayed, spied
from PIL import Image
from small_models import GRIDS, make_model

import revit_fast as rf
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli import main
from revit_fast.explain import draw_grid, explain, write_html, write_png
from revit_fast.explain.page import decide, first_budget, look_at, sheet_html, time_packs, times_html, totals_html
from revit_fast.models.hub import SHIPPED
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.datasets import open_images

BUDGETS = range(4, 37)


def png_of(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


SOURCES = [photo(1), png_of(photo(2, 90, 40)), b"not an image", photo(3), photo(4), photo(5, 30, 200), photo(6)]


@functools.cache
def all_seen():
    return tuple(look_at(pipe_of(), source, f"image {i}", top_k=3) for i, source in enumerate(SOURCES))


class TestDecisions:
    @pytest.mark.parametrize("policy", [("budget", 5), ("budget", 15), ("budget", 30), ("threshold", 0.7), "argmax"])
    def test_are_what_the_pipeline_does(self, policy):
        pipe = pipe_of().with_policy(policy)
        explanations, results = decide(pipe, all_seen()), list(pipe(SOURCES))
        assert len(explanations) == len(results)
        for e, r in zip(explanations, results, strict=True):
            if r.error is not None:
                assert (e.name, e.error) == ("image 2", r.reason)
                continue
            assert e.error is None
            assert e.index == r.index
            assert e.chosen.grid == r.grid
            assert [n.probability for n in e.lengths] == r.probabilities.tolist()
            assert e.classes == tuple((entry["label"], entry["score"]) for entry in r.top(3))
            assert e.reason.startswith(policy if isinstance(policy, str) else policy[0])

    def test_more_budget_never_means_fewer_tokens(self):
        grids = np.array([[e.chosen.grid for e in self.at(tokens) if e.error is None] for tokens in BUDGETS])
        assert (np.diff(grids, axis=0) >= 0).all()
        assert (grids[0] == GRIDS[-1]).all()
        assert len({tuple(row) for row in grids}) > 3

    def test_a_budget_is_kept_on_the_held_out_images(self):
        for tokens in BUDGETS:
            threshold = pipe_of().with_policy(("budget", tokens)).prep.policy.threshold
            assert assigner().calibration.shares(threshold) @ np.array([36, 16, 4]) <= tokens

    def test_nothing_is_decoded_or_run_again(self, monkeypatch):
        seen = all_seen()

        def fail(*_):
            raise AssertionError("ran again")

        for name in ("decode", "assign", "pack"):
            monkeypatch.setattr(AdaptivePreprocessor, name, fail)
        monkeypatch.setattr(AdaptivePipeline, "logits", fail)
        assert len({sheet_html(decide(pipe_of().with_policy(("budget", t)), seen)) for t in (4, 20, 36)}) == 3

    def at(self, tokens):
        return decide(pipe_of().with_policy(("budget", tokens)), all_seen())

    def test_an_output_that_is_no_number_is_an_error(self):
        model = make_model(patch_size=PATCH, grids=GRIDS)
        with torch.no_grad():
            model.head.bias.fill_(float("nan"))
        seen = look_at(AdaptivePipeline(model, AdaptivePreprocessor.for_model(model, assigner())), photo(1), "one")
        assert (seen.name, seen.error, seen.at) == ("one", "the model's output is not a number", ())


class TestShown:
    def test_pictures_have_the_chosen_grid(self):
        for tokens in (4, 20, 36):
            for e, entry in zip(decide(pipe_of().with_policy(("budget", tokens)), all_seen()), all_seen(), strict=True):
                if e.error is None:
                    box = eval_box(*entry.image.shape[:2], e.chosen.grid * PATCH, pipe_of().prep.crop_pct)
                    drawn = draw_grid(entry.image, box, e.chosen.grid).image
                    assert np.array_equal(np.asarray(e.picture), np.asarray(drawn))

    def test_a_bad_image_is_named_among_the_others(self):
        html = sheet_html(decide(pipe_of().with_policy(("budget", 20)), all_seen()))
        assert html.count("<article>") == len(SOURCES) - 1
        assert html.count("<img ") == len(SOURCES) - 1
        failed = re.search(r'<article class="failed">.*?</article>', html, re.DOTALL)[0]
        assert "image 2" in failed
        assert "not an image that Pillow" in failed

    def test_names_are_no_markup(self):
        seen = [look_at(pipe_of(), photo(1), "<b>&\n.png"), look_at(pipe_of(), b"", "<script>")]
        html = sheet_html(decide(pipe_of(), seen))
        assert "&lt;b&gt;&amp;\\n.png" in html
        assert "&lt;script&gt;" in html
        assert "<script" not in html

    def test_totals_are_the_means(self):
        pipe = pipe_of().with_policy(("budget", 20))
        explanations = decide(pipe, all_seen())
        results = [r for r in pipe(SOURCES) if r.error is None]
        html = totals_html(pipe, explanations)
        assert f">{np.mean([r.grid**2 for r in results]):,.1f}<" in html
        assert ">36.0<" in html
        assert f"θ = {pipe.prep.policy.threshold:.4g}" in html
        assert "6 × 6 for all" in html

    def test_without_images_there_is_no_table(self):
        pipe = pipe_of().with_policy(("budget", 20))
        assert "<table" not in totals_html(pipe, [])
        assert "<table" not in totals_html(pipe, decide(pipe, [look_at(pipe, b"", "empty")]))
        assert sheet_html([]) == ""
        assert times_html(pipe, []) == ""

    def test_times_are_of_both_ways(self, monkeypatch):
        pipe, packed, pack = pipe_of().with_policy(("budget", 20)), [], AdaptivePreprocessor.pack

        def spy(self, images, grids):
            packed.append(tuple(grids))
            return pack(self, images, grids)

        monkeypatch.setattr(AdaptivePreprocessor, "pack", spy)
        images = [entry.image for entry in all_seen() if entry.error is None]
        assert all(ms > 0 for ms in time_packs(pipe, images))
        chosen = tuple((e.chosen.grid,) * 2 for e in decide(pipe, all_seen()) if e.error is None)
        assert packed[: len(packed) // 2 * 2] == [chosen, ((6, 6),) * len(images)] * (len(packed) // 2)

    def test_the_time_of_every_length_is_on_sheets(self, tmp_path, monkeypatch):
        """Those of `revit-fast explain`, whose images run at one length, have no such column."""
        (e,) = decide(pipe_of(), all_seen()[:1])
        assert all(n.ms > 0 for n in e.lengths)
        assert sum(e.stage_ms.values()) > e.chosen.ms
        (at_one,) = explain(pipe_of(), SOURCES[:1])
        drawn = spied_texts(monkeypatch)
        for name, entry, n_columns in (("seen", e, 1), ("explained", at_one, 0)):
            write_html(tmp_path / f"{name}.html", [entry])
            write_png(tmp_path / f"{name}.png", [entry])
            text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
            assert text.count('<th scope="col">ms</th>') == n_columns
            assert [text for text, _ in drawn[-1]].count("ms") == n_columns


class TestFirstBudget:
    def test_is_what_the_models_own_threshold_takes(self):
        pipe = pipe_of().with_policy(("threshold", 0.8))
        budget = first_budget(pipe)
        held_out = assigner().calibration
        threshold = pipe.with_policy(("budget", budget)).prep.policy.threshold
        mean = held_out.shares(0.8) @ np.array([36, 16, 4])
        assert mean <= budget < mean + 1
        assert held_out.shares(threshold) @ np.array([36, 16, 4]) >= mean

    def test_is_half_way_where_there_is_no_threshold(self):
        assert first_budget(pipe_of()) == 20

    @pytest.mark.parametrize("made", [None, TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8,)).eval()])
    def test_needs_a_calibrated_assigner(self, made):
        model = make_model(patch_size=PATCH, grids=GRIDS).eval()
        pipe = AdaptivePipeline(model, AdaptivePreprocessor.for_model(model, made, policy=("fixed", 6)))
        with pytest.raises(ValueError, match="needs an assigner"):
            first_budget(pipe)


class TestCommand:
    @pytest.fixture
    def gradio(self):
        return pytest.importorskip("gradio")

    def run(self, capsys, *args):
        code = main(["demo", "--no-browser", *map(str, args)])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err.splitlines()[-1] if err else ""

    def test_says_what_to_install(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        code, said = self.run(capsys)
        assert code == 2
        assert 'gradio is not installed: pip install "revit-fast[page]"' in said

    def test_a_taken_port_is_named(self, capsys, gradio):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, said = self.run(capsys, "--port", port)
        assert code == 2
        assert f"error: --port: cannot listen on 127.0.0.1:{port}" in said
        assert "in use" in said

    def test_it_is_never_shared(self, capsys, gradio, monkeypatch):
        monkeypatch.setenv("GRADIO_SHARE", "True")
        code, said = self.run(capsys)
        assert code == 2
        assert "GRADIO_SHARE" in said
        assert main(["demo", "--share"]) == 2

    def test_needs_an_assigner(self, capsys, gradio):
        code, said = self.run(capsys, "deit_tiny_patch16_224", "--port", free_port())
        assert code == 2
        assert "--assigner" in said
        assert "needs an assigner" in said

    def test_an_unknown_model_is_named(self, capsys, gradio):
        code, said = self.run(capsys, "./absent", "--port", free_port())
        assert code == 2
        assert "absent" in said


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


NAME = "fashion-mnist"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

PROGRAM = "from revit_fast.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_the_spy_sees():
    program = "import socket\ntry: socket.create_connection(('192.0.2.1', 9), timeout=0.01)\nexcept OSError: pass"
    said = subprocess.run(spied(program), capture_output=True, text=True, check=True).stderr
    assert "left the machine for 192.0.2.1" in said
    with pytest.raises(AssertionError):
        assert_stayed(said)


class Served(NamedTuple):
    address: str
    folder: Path
    """Of temporary files."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page of the shipped model. At the end: nothing left the machine, no upload is kept."""
    pytest.importorskip("gradio")
    log = tmp_path_factory.mktemp("served") / "log"
    # A proxy that nobody listens to: whatever asked it would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://192.0.2.1:9")
    own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent), "PYTHONFAULTHANDLER": "1"}
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | nowhere | own
    command = spied(PROGRAM, "demo", "--no-browser", "--port", free_port(), "--threads", 1)
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment)
    try:
        address = None
        while address is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
            found = re.search(r"the page is at (\S+) until", log.read_text())
            address = found and found[1]
        yield Served(address, log.parent)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler writes what every thread does
            code = process.wait()
    said = log.read_text()
    assert code == 0, said
    assert_stayed(said)
    assert "Traceback" not in said, said
    assert [path for path in log.parent.rglob("*") if path.is_file()] == [log]


@pytest.fixture
def browser():
    """A real Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Its sandbox refuses to work for root, as whom containers run.
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1400"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def test_in_a_browser(served, browser, tmp_path):
    """Two images and one that is none are dropped, the slider moves, the grids follow; nothing is asked of others."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    pipe = rf.load(NAME)
    images = open_images(SHIPPED / NAME / "images", "test", pipe.classes)
    pixels = [images.image(i) for i in range(2)]
    files = [tmp_path / name for name in ("first.png", "broken.png", "second.png")]
    for path, data in zip(files, (png_of(pixels[0]), b"no image", png_of(pixels[1])), strict=True):
        path.write_bytes(data)

    def grids_at(tokens):
        return [r.grid for r in pipe.with_policy(("budget", tokens))(pixels)]

    def texts(selector):
        return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]

    def shown():
        return [int(text.split()[0]) for text in texts("#sheet .decision")]

    def pictures():
        sources = [e.get_attribute("src") for e in browser.find_elements(By.CSS_SELECTOR, "#sheet img")]
        return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]

    def wait_for(condition, what):
        WebDriverWait(browser, 60).until(lambda _: condition(), what)

    browser.get(served.address)
    wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#files input[type=file]"), "no room for files")
    browser.find_element(By.CSS_SELECTOR, "#files input[type=file]").send_keys("\n".join(map(str, files)))
    wait_for(lambda: shown() == grids_at(first_budget(pipe)), "no images")
    assert texts("#sheet h2") == [path.name for path in files]
    assert list(served.folder.glob("revit-fast-*/*/first.png"))
    assert texts("#sheet .failed p") == [f"Error: not an image that Pillow {PIL.__version__} reads"]
    wait_for(lambda: texts("#times tbody tr"), "no times")

    slider = browser.find_element(By.CSS_SELECTOR, "#budget input[type=range]")
    assert grids_at(49) == [7, 7]
    assert grids_at(196) == [14, 14]
    for key, tokens in ((Keys.HOME, 49), (Keys.END, 196)):
        slider.send_keys(key)
        wait_for(lambda tokens=tokens: shown() == grids_at(tokens), f"no grids at {tokens} tokens")
        for picture, image, grid in zip(pictures(), pixels, grids_at(tokens), strict=True):
            drawn = draw_grid(image, eval_box(*image.shape[:2], 2 * grid, pipe.prep.crop_pct), grid).image
            assert np.abs(np.asarray(picture).astype(int) - np.asarray(drawn)).mean() < 4  # JPEG
        assert f"{tokens}.0" in texts("#totals tbody tr.chosen")[0]

    browser.find_element(By.CSS_SELECTOR, "#samples").click()
    wait_for(lambda: len(shown()) == 12, "no samples")
    assert texts("#sheet h2")[0] == f"0: {images.classes[images.labels[0]]}"

    assert browser.save_screenshot(str(tmp_path / "page.png"))
    drawn = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert ((drawn == (255, 176, 0)).all(axis=2)).sum() > 500  # outlines of pictures are on the screen
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    sockets = [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    hosts = {urlsplit(url).hostname for url in asked + sockets if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}
    assert len(asked) > 10
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
