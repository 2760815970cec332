"""Sheets that explain decisions: what is drawn is what the model sees, what is written is what the pipeline does."""

import copy
import functools
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from contrasting import PATCH, photo, pipe_of, spied_texts
from helpers import full
from PIL import Image
from safetensors.torch import save_file
from small_models import GRIDS, make_model

import revit_fast as rf
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli import main, pipelines
from revit_fast.explain import STAGES, draw_grid, explain, png, write, write_html, write_png
from revit_fast.explain.picture import OUTLINE, PICTURE_PX
from revit_fast.io import trace
from revit_fast.streaming.pipeline import AdaptivePipeline

MODEL = "deit_tiny_patch16_224"

pytestmark = pytest.mark.usefixtures("one_thread")
create_model_once = functools.cache(rf.create_model)


def ramps(height, width):
    """Red says where a pixel is from left to right, green from top to bottom; no blue."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


class TestPicture:
    @pytest.mark.parametrize("size", [(200, 300), (300, 200), (256, 256), (40, 56)])
    @pytest.mark.parametrize("grid", GRIDS)
    def test_cells_are_the_patches_that_the_model_gets(self, size, grid):
        """The mean red and green of every packed patch say where it was taken from: the middle of its drawn cell."""
        image = ramps(*size)
        pipe = pipe_of(("fixed", grid))
        prep = AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy="cycle", mean=(0, 0, 0), std=(1, 1, 1))
        place = prep.pack([image], [grid]).data.view(grid, grid, -1, 3).mean(dim=2).numpy()
        (e,) = explain(pipe, [image])
        picture = e.picture
        assert not e.is_cut
        drawn = np.asarray(picture).astype(int)
        is_frame = (drawn == OUTLINE).all(axis=2)
        for axis, n in ((0, picture.width), (1, picture.height)):
            along = is_frame.any(axis=axis).nonzero()[0]
            first, last = along[0], along[-1]
            across = is_frame.any(axis=1 - axis).nonzero()[0]
            # Through the middle of the first cells, where no line runs along.
            at = across[0] + (across[-1] - across[0]) // (2 * grid)
            line = drawn[at, :, 2] if axis == 0 else drawn[:, at, 2]
            inner = (line > 150).nonzero()[0]
            assert len(inner) == grid - 1
            borders = np.array([first, *inner, last])
            cells = (borders[1:] + borders[:-1]) / 2 + 0.5
            seen = place[0, :, 0] if axis == 0 else place[:, 0, 1]
            source_px = (image.shape[1 - axis] - 1) / image.shape[1 - axis]
            expected = seen * n * source_px + 0.5 * n / image.shape[1 - axis]
            np.testing.assert_allclose(cells, expected, atol=2.0)

    def test_what_is_cut_away_is_grey_and_dim(self):
        picture, _ = draw_grid(ramps(200, 300), (60.0, 10.0, 240.0, 190.0), 2)
        drawn = np.asarray(picture).astype(int)
        scale = picture.width / 300
        outside = drawn[:, : int(60 * scale) - 2]
        inside = drawn[int(30 * scale) : int(80 * scale), int(80 * scale) : int(130 * scale)]
        assert (np.ptp(outside, axis=2) == 0).all()
        assert (np.ptp(inside, axis=2) > 0).all()
        assert outside.max() < 140

    @pytest.mark.parametrize("level", [0, 128, 255])
    @pytest.mark.parametrize("grid", [2, 14, 37])
    def test_lines_show_on_any_image(self, level, grid):
        image = np.full((224, 224), level, np.uint8)
        picture, _ = draw_grid(image, (10.0, 10.0, 214.0, 214.0), grid)
        row = np.asarray(picture).astype(int)[picture.height // 2 + 3, :, 1]
        contrast = np.abs(np.diff(row))
        assert (contrast > 45).sum() >= grid - 1 + 4

    def test_very_long_image_is_cut_to_where_its_grid_can_be_seen(self):
        crop = eval_box(31, 1000, 224, 0.9)
        picture, is_cut = draw_grid(ramps(31, 1000), crop, 14)
        assert is_cut
        assert picture.width <= PICTURE_PX[0]
        assert picture.height >= 200
        columns = (np.asarray(picture) == OUTLINE).all(axis=2).any(axis=0).nonzero()[0]
        assert columns[0] + columns[-1] == pytest.approx(picture.width, abs=4)


STREAM = [photo(1), b"not an image", photo(2, 90, 40), photo(3), photo(4), photo(5)]


class TestExplanations:
    @pytest.mark.parametrize(
        ("policy", "said"),
        [
            ("argmax", r"argmax: (\d) × \1 is the most probable label, at 0\.\d{3}\."),
            (("threshold", 0.6), r"threshold: P\(label ≤ (\d) × \1\) = [01]\.\d{3} reaches θ = 0\.600"),
            (("budget", 15), r"budget: .* reaches θ = .* at most 15 patch tokens on average"),
            (("budget", {"mean_gmacs": 1e-3}), r"budget: .* reaches θ = .* at most 0\.001 GMACs on average"),
            (("fixed", 4), r"fixed: every image gets this grid"),
            (("fixed", [2, 2, 4, 6, 2, 4]), r"fixed: this grid was given for image \d"),
            ("cycle", r"cycle: .* place \d in the stream"),
            ("random", r"random: .* place in the stream, \d"),
            ("entropy", r"entropy: its grey values hold \d\.\d{3} bits, (at least|below)"),
            (("cascade", 0.5), r"cascade: the (best class reaches p = 0\.5, with 0\.\d+ at \d|longest; the best)"),
            (("cascade", 0), r"cascade: the best class reaches p = 0, with 0\.\d{3} at 2 × 2\."),
            (("cascade", 1), r"cascade: the longest; .* less than p = 1 \(0\.\d+ at 2 × 2, 0\.\d+ at 4 × 4\)\."),
            (
                ("assigned-cascade", (0.6, 0)),
                r"assigned-cascade: it begins where P\(label ≤ (\d) × \1\) = [01]\.\d{3} reaches θ = 0\.600(; P.* does "
                r"not)?; the best class reaches p = 0, with 0\.\d{3} at \1 × \1\.",
            ),
            (
                ("assigned-cascade", (0.6, 1)),
                r"assigned-cascade: it begins where .*; the longest; (none is longer|the best class has "
                r"less than p = 1 \(0\.\d+ at \d.*\))\.",
            ),
        ],
    )
    def test_are_what_the_pipeline_does(self, policy, said):
        pipe = pipe_of().with_policy(policy)
        explanations, results = explain(pipe, STREAM, top_k=3), list(pipe(STREAM))
        assert len(explanations) == len(results)
        for e, r in zip(explanations, results, strict=True):
            if r.error is not None:
                assert f"{e.name}: {e.error}" == r.error
                continue
            assert (e.chosen.grid, sum(length.n_tokens for length in e.ran)) == (r.grid, r.n_tokens)
            assert f" {r.n_tokens} tokens" in e.decision
            assert e.classes == tuple((entry["label"], entry["score"]) for entry in r.top(3))
            if r.probabilities is not None:
                assert [length.probability for length in e.lengths] == r.probabilities.tolist()
            assert re.search(said, e.reason), e.reason
        assert [e.error is None for e in explanations] == [True, False, True, True, True, True]

    def test_the_reason_is_the_rule(self):
        pipe = pipe_of().with_policy(("threshold", 0.6))
        for e in explain(pipe, [photo(seed) for seed in range(8)]):
            enough = [length for length in e.lengths if length.suffices >= 0.6]
            assert e.chosen is enough[-1]
            assert e.lengths[0].suffices == 1
            assert f"P(label ≤ {e.chosen.side}) = {e.chosen.suffices:.3f}" in e.reason

    def test_a_near_miss_is_written_with_the_digits_that_show_it(self):
        (e,) = explain(pipe_of(), [photo(1)])
        shortest = e.lengths[-1].suffices
        (e,) = explain(pipe_of().with_policy(("threshold", shortest + 2e-5)), [photo(1)])
        assert e.chosen is not e.lengths[-1]
        (missed,) = re.findall(r"= (0\.\d+) does not", e.reason)
        assert float(missed) < shortest + 2e-5
        assert len(missed) > 5

    def test_entropy_is_beside_its_bounds(self):
        pipe = pipe_of().with_policy(("entropy", [5.0, 3.0]))
        flat, rich = np.full((50, 50, 3), 9, np.uint8), np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
        low, high = explain(pipe, [flat, rich])
        assert low.reason == "entropy: its grey values hold 0.000 bits, below 3.000."
        assert "at least 5.000" in high.reason
        assert low.entropy_ranges == [(5.0, 8.0, "≥ 5.00"), (3.0, 5.0, "3.00–5.00"), (0.0, 3.0, "< 3.00")]

    def test_costs_are_those_of_the_model(self):
        (e,) = explain(pipe_of(), [photo(1)])
        assert [(n.grid, n.n_tokens) for n in e.lengths] == [(6, 37), (4, 17), (2, 5)]
        assert [n.macs for n in e.lengths] == list(pipe_of().prep.macs)

    def test_stage_times_are_the_fastest_of_warm_runs_of_each_image(self, monkeypatch):
        decode, clock = AdaptivePreprocessor.decode, SimpleNamespace(now=0.0)
        clock.perf_counter = lambda: clock.now
        seconds = iter([1, 5, 3, 2, 4, 9, *[6] * 6])  # the first run of an image does not count

        def slow(self, source):
            clock.now += next(seconds)
            return decode(self, source)

        monkeypatch.setattr(AdaptivePreprocessor, "decode", slow)
        monkeypatch.setattr(trace, "time", clock)
        first, second = explain(pipe_of(), [STREAM[0], STREAM[2]])
        assert first.stage_ms == dict.fromkeys(STAGES, 0.0) | {"decode": 2000.0}
        assert second.stage_ms["decode"] == 6000.0
        said = "Time: 2000.00 ms, each stage the fastest of 5 warm runs of this image alone, on 1 thread"
        assert replace(first, is_busy=False).time == said
        assert replace(first, is_busy=True).time == f"{said}; the machine was busy, which makes times longer"

    def test_attention_colours_the_patches_that_are_read(self):
        pipe = pipe_of(("fixed", 4))
        (plain,) = explain(pipe, [photo(1)])
        (e,) = explain(pipe, [photo(1)], attention=True)
        assert plain.attention is None
        assert e.attention.size == e.picture.size
        (weights,) = pipe.model.class_attention(pipe.prep.pack([photo(1)], [4]))
        drawn = np.asarray(e.attention).astype(int)
        is_frame = (np.asarray(e.picture) == OUTLINE).all(axis=2)
        (rows,), (columns,) = is_frame.any(axis=1).nonzero(), is_frame.any(axis=0).nonzero()
        cells = drawn[rows[0] : rows[-1], columns[0] : columns[-1]]
        heat = cells[..., 0] - cells[..., 2]  # grey has none
        rows = [np.array_split(row, 4, axis=1) for row in np.array_split(heat, 4)]
        shown = np.array([[np.median(cell) for cell in row] for row in rows])
        mean = weights.mean(0).numpy()
        assert np.corrcoef(shown.flatten(), mean.flatten())[0, 1] > 0.9
        assert (
            f"What the class token reads in the last block, mean of its heads: at most {mean.max():.1%}"
            in e.attention_text
        )

    def test_attention_of_a_module_without_any_is_refused(self):
        pipe = pipe_of()
        other = copy.copy(pipe)
        other.model = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="attention: expected a pipeline of a ReViT, got one of a Linear"):
            explain(other, [photo(1)], attention=True)

    def test_output_that_is_no_number_is_an_error(self):
        model = make_model(patch_size=PATCH, grids=GRIDS)
        with torch.no_grad():
            model.head.bias.fill_(float("nan"))
        pipe = AdaptivePipeline(model, AdaptivePreprocessor.for_model(model, policy="cycle"))
        (e,) = explain(pipe, [photo(1)])
        assert e.error == "the model's output is not a number"


class Page(HTMLParser):
    """Tags that close each other, texts and attributes of a page."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def odd_names(tmp_path):
    """A photograph, one whose name is markup, a file that is none, and a name that would break a line."""
    paths = [tmp_path / name for name in ("a.png", "<b>&.png", "broken <em>\"'.jpg", "line\nbreak.png")]
    for i, path in enumerate(paths):
        Image.fromarray(photo(i)).save(path, format="png")
    paths[2].write_bytes(b"<script>")
    return paths


class TestHtml:
    def test_holds_every_decision_and_error(self, tmp_path, odd_names):
        explanations = explain(pipe_of(("threshold", 0.6)), odd_names, top_k=2)
        write_html(tmp_path / "sheet.html", explanations)
        page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
        text = "\n".join(page.texts)
        for e in explanations:
            assert e.name in page.texts
            if e.error is not None:
                assert f"Error: {e.error}" in page.texts
                continue
            assert e.decision in page.texts
            assert e.reason in page.texts
            assert e.measures in page.texts
            for label, score in e.classes:
                assert label in page.texts
                assert f"{score:.3f}" in page.texts
            for length in e.lengths:
                assert f"{length.suffices:.3f}" in page.texts
            for stage in STAGES:
                assert f"{stage} {e.stage_ms[stage]:.2f} ms" in page.texts
        assert "4 images, 1 failed" in text
        assert "θ = 0.6" in page.texts[page.texts.index("P(label ≤ grid) ") + 1]
        assert len([a for a in page.all("tr") if a.get("class") == "chosen"]) == 3
        assert len(page.all("article")) == 4

    def test_the_mark_is_at_the_threshold(self, tmp_path):
        write_html(tmp_path / "sheet.html", explain(pipe_of(("threshold", 0.6)), [photo(1)]))
        page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
        assert [a["style"] for a in page.all("i")] == ["left:60.00%"] * 3

    def test_names_are_escaped(self, tmp_path, odd_names):
        explanations = explain(pipe_of(), odd_names)
        write_html(tmp_path / "sheet.html", explanations)
        source = (tmp_path / "sheet.html").read_text(encoding="utf-8")
        page = Page(source)
        assert str(odd_names[1]) in page.texts
        assert "<b>&" not in source
        assert str(odd_names[2]) in page.texts
        assert "<em>" not in source
        assert str(tmp_path / r"line\nbreak.png") in page.texts
        assert [image["alt"] for image in page.all("img")] == [e.described for e in explanations if e.error is None]

    def test_nothing_comes_from_elsewhere(self, tmp_path, odd_names):
        write_html(tmp_path / "sheet.html", explain(pipe_of(), odd_names))
        source = (tmp_path / "sheet.html").read_text(encoding="utf-8")
        page = Page(source)
        for _, attributes in page.tags:
            assert not set(attributes) & {"href", "srcset", "action", "data", "poster", "onload", "onclick"}
            assert attributes.get("src", "data:").startswith("data:")
        assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
        for word in ("://", "url(", "@import"):
            assert word not in source
        assert len(page.all("img")) == 3

    def test_pictures_are_those_of_the_explanations(self, tmp_path):
        import base64

        (e,) = explain(pipe_of(), [photo(1)])
        write_html(tmp_path / "sheet.html", [e])
        (image,) = Page((tmp_path / "sheet.html").read_text(encoding="utf-8")).all("img")
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert picture.size == (int(image["width"]), int(image["height"])) == e.picture.size
        difference = np.asarray(picture).astype(int) - np.asarray(e.picture)
        assert np.abs(difference).mean() < 4


@pytest.fixture
def texts(monkeypatch):
    return spied_texts(monkeypatch)


class TestPng:
    def test_shows_every_picture_at_its_size(self, tmp_path, odd_names):
        explanations = explain(pipe_of(("threshold", 0.6)), odd_names)
        write_png(tmp_path / "sheet.png", explanations)
        sheet = Image.open(tmp_path / "sheet.png")
        assert sheet.format == "PNG"
        assert sheet.width == png.WIDTH
        column = np.asarray(sheet)[:, png.MARGIN + png.PAD :]
        y = 0
        for e in explanations:
            if e.error is not None:
                continue
            picture = np.asarray(e.picture)
            height, width = picture.shape[:2]
            starts = (column[y : len(column) - height, :width] == picture[0]).all(axis=(1, 2)).nonzero()[0] + y
            y = next(s for s in starts if (column[s : s + height, :width] == picture).all()) + height
        assert y < sheet.height

    def test_grows_with_its_entries(self, tmp_path):
        explanations = explain(pipe_of(), [photo(1), b"x", photo(2)])
        heights = []
        for n in range(4):
            write_png(tmp_path / "sheet.png", explanations[:n])
            heights.append(Image.open(tmp_path / "sheet.png").height)
        first, failed, last = np.diff(heights)
        assert first == last > explanations[0].picture.height > failed > 0

    @pytest.mark.parametrize("policy", [("threshold", 0.6), "entropy", full("argmax"), "cycle"])
    def test_holds_every_fact(self, tmp_path, odd_names, texts, policy):
        explanations = explain(pipe_of(policy), odd_names, top_k=2)
        write_png(tmp_path / "sheet.png", explanations)
        header, *cards = texts
        assert "4 images, 1 failed" in " ".join(text for text, _ in header)
        for e, card in zip(explanations, cards, strict=True):
            lines = [text for text, _ in card]
            said = [e.name, f"Error: {e.error}"]
            if e.error is None:
                said = [e.name, e.decision, e.reason, e.measures]
                said += [text for label, score in e.classes for text in (label, f"{score:.3f}")]
                said += [text for stage in STAGES for text in (stage, f"{e.stage_ms[stage]:.2f} ms")]
                said += [text for n in e.lengths for text in (f"{n.side}: {n.n_tokens} tokens", n.gmacs)]
                said += [f"{n.suffices:.3f}" for n in e.lengths if e.policy.threshold is not None]
                said += [text for _, _, text in (e.entropy_ranges if e.entropy is not None else ())]
                said += [text for column in e.columns for text in (column.title, column.mark_text)]
            for text in said:
                assert "".join(text.split()) in "".join("".join(lines).split())

    def test_shows_attention(self, tmp_path, texts):
        (e,) = explain(pipe_of(), [photo(1)], attention=True)
        write_png(tmp_path / "sheet.png", [e])
        assert e.attention_text in " ".join(text for text, _ in texts[1])
        sheet, picture = np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(e.attention)
        height, width = picture.shape[:2]
        column = sheet[:, png.LEFT : png.LEFT + width]
        starts = [y for y in range(len(column) - height) if (column[y] == picture[0]).all()]
        assert any((column[y : y + height] == picture).all() for y in starts)

    @pytest.mark.parametrize("policy", [full(("threshold", 0.6)), "entropy", full("argmax"), full("cycle")])
    def test_no_text_leaves_its_place(self, tmp_path, texts, policy):
        """All text lies inside its card, and no two texts overlap, however long and wide a name is."""
        pipe = pipe_of(policy)
        labels = ["W" * 60, "a label of many words, " * 6, *pipe.labels[2:]]
        pipe = AdaptivePipeline(pipe.model, pipe.prep, labels=labels)
        (tmp_path / ("W" * 200 + ".png")).write_bytes(b"x")
        Image.fromarray(photo(4)).save(tmp_path / ("M" * 200 + ".png"))
        sources = [photo(1), b"x" * 3, photo(2, 900, 20), *sorted(tmp_path.iterdir()), tmp_path / ("word " * 100)]
        write_png(tmp_path / "sheet.png", explain(pipe, sources, top_k=40, attention=policy == "argmax"))
        cards = texts
        assert len(cards) == 7
        for card in cards:
            for i, (content, (left, lower, right, upper)) in enumerate(card):
                assert left >= png.MARGIN - 2  # glyphs may reach out of their place by a pixel
                assert right <= png.WIDTH - png.MARGIN, content
                assert lower > 0, content
                for other, box in card[:i]:
                    # The box of a line holds room for accents; lines may share a pixel of it.
                    apart = right <= box[0] or box[2] <= left or lower + 1 >= box[3] or box[1] + 1 >= upper
                    assert apart, (content, other)

    def test_names_are_no_formulas(self, tmp_path, texts):
        write_png(tmp_path / "sheet.png", explain(pipe_of(), [tmp_path / r"$x$ \frac{ 图.jpg"]))
        assert texts[1][0][0].endswith(r"$x$ \frac{ 图.jpg")

    def test_what_a_user_sets_in_matplotlib_changes_nothing_and_stays(self, tmp_path):
        import matplotlib

        explanations = explain(pipe_of(), [photo(1)])
        write_png(tmp_path / "plain.png", explanations)
        own = {"text.usetex": True, "font.size": 40, "image.origin": "lower", "figure.dpi": 30, "backend": "svg"}
        with matplotlib.rc_context(own):
            before = dict(matplotlib.rcParams)
            write_png(tmp_path / "styled.png", explanations)
            assert dict(matplotlib.rcParams) == before
        assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()

    def test_without_matplotlib_it_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r'write_png: it needs matplotlib: pip install "revit-fast\[plot\]"'):
            write(tmp_path / "sheet.png", [])
        assert list(tmp_path.iterdir()) == []

    def test_too_many_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"at most 200 entries, got 201; write \.html"):
            write_png(tmp_path / "sheet.png", explain(pipe_of(), [b"x"]) * 201)
        assert list(tmp_path.iterdir()) == []


def test_writing_fails_without_a_trace(tmp_path, monkeypatch):
    explanations = explain(pipe_of(), [photo(1)])
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.html or \.png, got .*sheet\.pdf"):
        write(tmp_path / "sheet.pdf", explanations)
    (tmp_path / "sheet.png").write_bytes(b"old")

    def fail_half_way(image, path, *args):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "sheet.png", explanations)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("sheet.png", b"old")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An assigner, weights and labels for DeiT-Ti."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    made = TokenLengthAssigner(thumbnail_px=16, widths=(8, 16)).eval()
    made.calibrate([photo(seed) for seed in range(20)])
    made.save(folder / "tla.safetensors")
    save_file(timm.create_model(MODEL).state_dict(), folder / "vit.safetensors")
    (folder / "labels.txt").write_text("".join(f"kind {i}\n" for i in range(1000)))
    return folder


class TestCommand:
    @pytest.fixture(autouse=True)
    def models_are_loaded_once(self, monkeypatch):
        monkeypatch.setattr(pipelines, "create_model", create_model_once)

    def run(self, capsys, *args):
        code = main(["explain", *map(str, args), "--model", MODEL])
        return code, *capsys.readouterr()

    def test_sheet_with_everything(self, capsys, tmp_path, odd_names, files):
        target = tmp_path / "out" / "sheet.html"
        target.parent.mkdir()
        options = ("--assigner", files / "tla.safetensors", "--budget", 100, "--weights", files / "vit.safetensors")
        code, out, err = self.run(
            capsys, *odd_names, *options, "--labels", files / "labels.txt", "--top-k", 2, "--output", target
        )
        assert (code, out) == (1, "")
        assert "error: " in err
        assert f"{target}: 4 images (1 failed)" in err
        page = Page(target.read_text(encoding="utf-8"))
        assert sum(text.startswith("kind ") for text in page.texts) == 6
        assert sum("at most 100 patch tokens" in text for text in page.texts) == 3
        assert list(target.parent.iterdir()) == [target]

    def test_without_weights_no_classes(self, capsys, tmp_path, odd_names):
        code, _, err = self.run(capsys, odd_names[0], "--grid", 10, "--output", tmp_path / "sheet.html")
        assert code == 0
        assert "no classes" in err
        page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
        assert "Best classes" not in page.texts
        assert "fixed: every image gets this grid." in page.texts

    def test_attention(self, capsys, tmp_path, odd_names):
        target = tmp_path / "sheet.html"
        assert self.run(capsys, odd_names[0], "--grid", 7, "--attention", "--output", target)[0] == 0
        page = Page(target.read_text(encoding="utf-8"))
        _, attention = page.all("img")
        assert attention["alt"].startswith("What the class token reads in the last block")
        assert attention["alt"] in page.texts

    def test_png(self, capsys, tmp_path, odd_names):
        assert self.run(capsys, odd_names[0], "--grid", 7, "--output", tmp_path / "sheet.PNG")[0] == 0
        assert Image.open(tmp_path / "sheet.PNG").width == png.WIDTH

    def test_png_without_matplotlib_is_one_line(self, capsys, tmp_path, odd_names, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, out, err = self.run(capsys, odd_names[0], "--grid", 7, "--output", tmp_path / "sheet.png")
        assert (code, out) == (2, "")
        assert err == 'revit-fast: matplotlib is not installed: pip install "revit-fast[plot]"\n'

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--output", "sheet.pdf"], ".html or .png"),
            (["--output", "absent/sheet.html"], "cannot write absent/sheet.html"),
            (["--output", "a.png"], "is one of the images"),
            (["--output", "sheet.html", "--policy", "argmax"], "needs an assigner"),
            (["--output", "sheet.html", "--grid", "13"], "--grid"),
            ([], "--output"),
        ],
    )
    def test_usage(self, capsys, tmp_path, monkeypatch, odd_names, args, said):
        monkeypatch.chdir(tmp_path)
        before = odd_names[0].read_bytes()
        code, out, err = self.run(capsys, ".", *args)
        assert (code, out) == (2, "")
        assert said in err.splitlines()[-1]
        assert sorted(tmp_path.iterdir()) == sorted(odd_names)
        assert odd_names[0].read_bytes() == before
