"""The pipeline on streams: the same results as image by image, order, errors, bounds, threads, asyncio."""

import asyncio
import gc
import itertools
import json
import math
import pickle
import re
import sys
import threading
import time
import tracemalloc
import weakref

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_models import drawn
from torch import nn

import revit_fast as rf
from revit_fast.adaptive.policies import suffices
from revit_fast.io.trace import StageTimes, Trace
from revit_fast.models.classes import class_names
from revit_fast.streaming.results import Result
from revit_fast.video import TimeSformer

GRIDS = (4, 3, 2)
PATCH = 4


@pytest.fixture(scope="module")
def model():
    options = dict(grids=GRIDS, patch_size=PATCH, num_classes=11, embed_dim=24, depth=2, num_heads=3, hidden_dim=40)
    return drawn(rf.ReViT(**options))


@pytest.fixture(scope="module")
def tla():
    torch.manual_seed(0)
    tla = rf.TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 8)).eval()
    tla.calibrate([image(i) for i in range(64)])
    return tla


@pytest.fixture
def pipe(model, tla):
    return rf.pipeline(model, tla, policy=("budget", 9), token_budget=64)


def image(seed, height=None, width=None):
    rng = np.random.default_rng(seed)
    shape = (height or int(rng.integers(1, 60)), width or int(rng.integers(1, 60)), 3)
    return rng.integers(0, int(rng.integers(2, 257)), shape, dtype=np.uint8)


class TestResults:
    def test_equal_each_image_alone(self, model, pipe):
        images = [image(i) for i in range(90)]
        results = list(pipe(images))
        assert [r.index for r in results] == list(range(90))
        assert len({r.grid for r in results}) > 1
        for r in results:
            batch, grids = pipe.prep([images[r.index]])
            assert r.grid == grids[0]
            assert torch.equal(r.logits, pipe.model(batch)[0]), "bitwise the same alone and in any pack"
            assert r.n_tokens == r.grid**2 + model.num_prefix_tokens
            assert r.error is None
            assert r.source is images[r.index]
            assert r.ms > 0
            assert r.probabilities.shape == (3,)

    def test_a_plain_model_works_too(self, model, pipe):
        plain = rf.AdaptivePipeline(model, pipe.prep)
        for a, b in zip(plain(image(i) for i in range(9)), pipe(image(i) for i in range(9)), strict=True):
            torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)

    def test_policies_by_place(self, pipe):
        images = [image(i) for i in range(50)]
        assert [r.grid for r in pipe.with_policy("cycle")(images)] == [4, 3, 2] * 16 + [4, 3]
        random = [r.grid for r in pipe.with_policy("random")(images)]
        assert random == [r.grid for r in pipe.with_policy("random")(iter(images))]
        assert len(set(random)) == 3
        assert [r.grid for r in pipe.with_policy(("fixed", 3))(images)] == [3] * 50
        assert [r.grid for r in pipe(images)] != [3] * 50, "with_policy leaves the pipeline as it is"

    @pytest.mark.parametrize("token_budget", [40, 4096])
    def test_cascade(self, model, pipe, token_budget):
        """Each image at the shortest grid whose best class is probable enough, its logits those of that grid alone."""
        images = [image(i) for i in range(40)] + [b"no image"]
        alone = [list(pipe.with_policy(("fixed", grid))(images)) for grid in reversed(pipe.prep.grids)]
        best = [[r.top(1)[0]["score"] for r in results[:-1]] for results in alone]
        bound = float(np.median(best[0]))
        cascade = rf.pipeline(model, policy=("cascade", bound), token_budget=token_budget)
        results = list(cascade(images))
        assert [r.index for r in results] == list(range(41))
        assert results[-1].error is not None
        seen = set()
        for r in results[:-1]:
            tried = next((n for n in range(2) if best[n][r.index] >= bound), 2)
            seen.add(tried)
            ran = alone[: tried + 1]
            assert r.grid == ran[-1][r.index].grid
            assert torch.equal(r.logits, ran[-1][r.index].logits)
            assert r.n_tokens == sum(results[r.index].n_tokens for results in ran)
            assert r.probabilities is None
        assert len(seen) > 1
        part = list(cascade(iter(images[7:]), first_index=7))
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(part[:-1], results[7:-1], strict=True))
        with cascade.session() as session:
            futures = [session.submit(picture) for picture in images]
            assert [f.result().grid for f in futures] == [r.grid for r in results]

    @pytest.mark.parametrize("token_budget", [40, 4096])
    def test_assigned_cascade(self, model, tla, pipe, token_budget):
        """Each image from its assigned grid on, until its best class is probable enough."""
        images = [image(i) for i in range(40)]
        assigned = tla.predict_proba(images, pipe.prep.seen(images)).numpy()
        threshold = float(np.median(suffices(assigned)[:, 2]))
        starts = [r.grid for r in pipe.with_policy(("threshold", threshold)).assign(images)]
        assert len(set(starts)) > 1
        alone = {grid: list(pipe.with_policy(("fixed", grid))(images)) for grid in GRIDS}
        bound = float(np.median([r.top(1)[0]["score"] for r in alone[GRIDS[-1]]]))
        policy = ("assigned-cascade", {"threshold": threshold, "confidence": bound})
        both = rf.pipeline(model, tla, policy=policy, token_budget=token_budget)
        n_passes = []
        for i, (r, p) in enumerate(zip(both(images), assigned, strict=True)):
            grids = GRIDS[GRIDS.index(starts[i]) :: -1]
            tried = next((n for n, g in enumerate(grids) if alone[g][i].top(1)[0]["score"] >= bound), len(grids) - 1)
            ran = [alone[grid][i] for grid in grids[: tried + 1]]
            assert r.grid == ran[-1].grid
            assert torch.equal(r.logits, ran[-1].logits)
            assert r.n_tokens == sum(one.n_tokens for one in ran)
            np.testing.assert_array_equal(r.probabilities, p)
            n_passes.append(len(ran))
        assert len(set(n_passes)) > 1
        with pytest.raises(ValueError, match=r"policy: .*assigned-cascade.* decides by the model's own logits"):
            next(both.assign(images))
        with pytest.raises(ValueError, match="needs an assigner; give tla"):
            rf.pipeline(model, policy=policy)

    @pytest.mark.parametrize(("bound", "grid"), [(0, 2), (1, 4)])
    def test_cascade_ends(self, model, bound, grid):
        images = [image(i) for i in range(5)]
        assert [r.grid for r in rf.pipeline(model, policy=("cascade", bound))(images)] == [grid] * 5

    def test_nothing_decides_for_a_cascade_without_the_model(self, model, pipe):
        cascade = pipe.with_policy(("cascade", 0.5))
        with pytest.raises(ValueError, match=r"policy: .*cascade.* decides by the model's own logits, and assign runs"):
            next(cascade.assign([image(0)]))
        with pytest.raises(ValueError, match="a preprocessor runs no model"):
            cascade.prep([image(0)])
        with pytest.raises(ValueError, match="an assigner runs no model"):
            pipe.prep.tla.assign([image(0)], ("cascade", 0.5))

    def test_top(self, model, pipe):
        labels = [f"class {i}" for i in range(11)]
        named = rf.AdaptivePipeline(pipe.model, pipe.prep, labels=labels)
        [r] = named([image(0)])
        p = r.logits.softmax(0)
        assert [entry["label"] for entry in r.top(3)] == [labels[i] for i in p.argsort(descending=True)[:3]]
        assert r.top(3)[0]["score"] == pytest.approx(p.max().item())
        assert len(r.top(100)) == 11
        [classified] = named.classify([image(0)], top_k=2)
        assert classified == {"predictions": r.top(2), "grid": r.grid, "tokens": r.n_tokens, "error": None}
        [plain] = pipe([image(0)])
        assert plain.top(1)[0]["label"] == p.argmax().item()

    def test_assign_is_the_same_decision(self, pipe):
        sources = [image(i) for i in range(40)] + [b"torn"] + [image(99)]
        assigned, results = list(pipe.assign(sources)), list(pipe(sources))
        assert [(r.index, r.grid, r.error) for r in assigned] == [(r.index, r.grid, r.error) for r in results]
        assert all(r.logits is None for r in assigned)

    def test_odd_images(self, tmp_path, pipe):
        """1x1, thin, grey, sixteen bits, CMYK, animated: answers, each that of its pixels."""
        thin, cmyk = image(1, 3000, 2), Image.fromarray(image(2, 20, 30)).convert("CMYK")
        cmyk.save(tmp_path / "cmyk.jpg")
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "deep.png")
        frames = [Image.fromarray(image(i, 20, 30)) for i in (3, 4)]
        frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
        sources = [image(0, 1, 1), thin, thin[..., 0], tmp_path / "cmyk.jpg", tmp_path / "deep.png"]
        results = list(pipe([*sources, tmp_path / "moving.webp"]))
        assert [r.error for r in results] == [None] * 6
        [first] = pipe([image(3, 20, 30)])
        assert torch.equal(results[5].logits, first.logits), "of an animation the first frame"


class Mean(nn.Module):
    """A model that is no ReViT: logits from the mean of the patch rows of each image."""

    in_chans, num_classes, num_prefix_tokens, grids, patch_size = 3, 5, 3, GRIDS, PATCH

    def __init__(self, input_device="cpu"):
        super().__init__()
        self.input_device = torch.device(input_device)
        self.head = nn.Linear(PATCH * PATCH * 3, self.num_classes)
        self.devices = []

    def forward(self, batch):
        self.devices.append(batch.device)
        if batch.device.type == "meta":  # which has no values
            return torch.zeros(len(batch), self.num_classes)
        return torch.stack([self.head(rows.mean(0)) for rows in batch.split()])


class TestOtherModels:
    """A pipeline asks its model for attributes and not for its class."""

    def test_a_module_that_is_no_revit(self):
        model = drawn(Mean())
        prep = rf.AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy="cycle")
        images = [image(i) for i in range(9)]
        results = list(rf.AdaptivePipeline(model, prep, labels=list("abcde"), token_budget=30)(images))
        for i, r in enumerate(results):
            assert (r.error, r.grid, r.n_tokens) == (None, GRIDS[i % 3], GRIDS[i % 3] ** 2 + 3)
            expected = model(prep.pack([images[i]], [r.grid]))[0]
            torch.testing.assert_close(r.logits, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_a_batch_is_moved_to_where_the_model_expects_it(self, device):
        model = drawn(Mean(device))
        prep = rf.AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy="cycle")
        pipe = rf.AdaptivePipeline(model, prep)
        assert pipe.logits(prep.pack([image(0)], [3])).device.type == "cpu"
        assert model.devices == [torch.device(device)]

    @pytest.mark.parametrize("name", ["grids", "in_chans", "num_classes", "num_prefix_tokens", "patch_size"])
    def test_what_it_lacks_is_named(self, monkeypatch, name):
        model = Mean().eval()
        monkeypatch.delattr(Mean, name)
        prep = rf.AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy="cycle")
        with pytest.raises(TypeError, match=rf"model: expected a ReViT, got Mean, which has no {name}$"):
            rf.AdaptivePipeline(model, prep)

    def test_a_model_of_clips_is_refused(self):
        own = dict(grids=GRIDS, base_grid=(4, 4), patch_size=PATCH, embed_dim=8, depth=1, num_heads=1, num_classes=2)
        model = TimeSformer(num_frames=2, **own).eval()
        prep = rf.AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy="cycle")
        with pytest.raises(TypeError, match=r"model: expected a ReViT, got TimeSformer$"):
            rf.AdaptivePipeline(model, prep)


class TestGrids:
    """The grid of an image is worked out once for each of its passes."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """A list that gets every grid that a preprocessor and, in it, `aspect_grid` work out."""
        grids, grid_hw = [], rf.AdaptivePreprocessor.grid_hw

        def counted(self, picture, grid):
            grids.append(("grid_hw", grid))
            return grid_hw(self, picture, grid)

        def counted_aspect(height, width, max_tokens, patch_size):
            grids.append(("aspect_grid", math.isqrt(max_tokens)))
            return rf.aspect_grid(height, width, max_tokens, patch_size)

        monkeypatch.setattr(rf.AdaptivePreprocessor, "grid_hw", counted)
        monkeypatch.setattr("revit_fast.adaptive.preprocess.aspect_grid", counted_aspect)
        return grids

    @pytest.mark.parametrize("aspect", ["crop", "keep"])
    def test_once_for_each_image(self, model, calls, aspect):
        images, names = [image(i) for i in range(20)], ["grid_hw"] + ["aspect_grid"] * (aspect == "keep")
        pipe = rf.pipeline(model, policy="cycle", aspect=aspect, token_budget=40)
        for run in (pipe, pipe.assign):
            calls.clear()
            results = list(run(images))
            assert sorted(calls) == sorted((name, r.grid) for r in results for name in names)

    @pytest.mark.parametrize("token_budget", [1, 64, 4096])
    def test_once_for_each_pass_of_a_cascade(self, model, calls, token_budget):
        images = [image(i) for i in range(12)]
        pipe = rf.pipeline(model, policy=("cascade", 1), aspect="keep", token_budget=token_budget)
        results = list(pipe(images))
        assert sorted(calls) == sorted((name, g) for g in GRIDS for name in ("aspect_grid", "grid_hw") for _ in images)
        for picture, r in zip(images, results, strict=True):
            sides = [rf.aspect_grid(*picture.shape[:2], g * g, PATCH) for g in GRIDS]
            assert r.grid == GRIDS[0]
            assert r.n_tokens == sum(rows * columns + 1 for rows, columns in sides)


class TestErrors:
    def test_a_bad_image_moves_no_other(self, tmp_path, pipe):
        good = [image(i) for i in range(60)]
        expected = [r.logits for r in pipe(good)]
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "empty.jpg").write_bytes(b"")
        Image.fromarray(image(1, 50, 50)).save(tmp_path / "torn.jpg")
        (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:-300])
        bad = [tmp_path / "folder.jpg", tmp_path / "empty.jpg", tmp_path / "torn.jpg", tmp_path / "absent.png", b"text"]
        bad += [np.zeros((4, 4), np.float32), None]
        sources, at = list(good), {}
        for i, source in enumerate(bad):
            sources.insert(8 * i + 3, source)
            at[8 * i + 3] = source
        results = list(pipe(sources))
        assert [r.index for r in results] == list(range(67))
        assert {r.index for r in results if r.error} == set(at)
        for r in results:
            if r.error:
                assert r.logits is r.grid is r.n_tokens is r.probabilities is None
                assert r.top() == []
            if isinstance(r.source, type(tmp_path)):
                assert str(r.source) in r.error
        for logits, r in zip(expected, (r for r in results if not r.error), strict=True):
            assert torch.equal(logits, r.logits)

    def test_a_decompression_bomb(self, monkeypatch, tmp_path, pipe):
        Image.fromarray(image(0, 60, 60)).save(tmp_path / "x.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        results = list(pipe([tmp_path / "x.png", image(1)]))
        assert "bomb" in results[0].error
        assert results[1].error is None

    def test_not_a_number(self, model, pipe):
        broken = drawn(rf.ReViT(grids=GRIDS, patch_size=PATCH, num_classes=11, embed_dim=24, depth=1, num_heads=3))
        with torch.no_grad():
            broken.head.bias[3] = float("nan")
        results = list(rf.AdaptivePipeline(broken, pipe.prep)([image(0), image(1)]))
        assert ["not a number" in r.error for r in results] == [True, True]

    def test_the_sources_raise(self, pipe):
        def sources():
            yield from (image(i) for i in range(5))
            raise OSError("the disk is gone")

        results = pipe(sources())
        assert [next(results).index for _ in range(5)] == list(range(5)), "what came before is not lost"
        with pytest.raises(OSError, match="the disk is gone"):
            next(results)

    def test_the_model_raises(self, monkeypatch, pipe):
        def forward(x):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(pipe.model, "forward", forward)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(pipe([image(0)]))

    def test_nothing(self, pipe):
        assert list(pipe([])) == []

    def test_nothing_but_errors(self, monkeypatch, pipe):
        monkeypatch.setattr(sys.modules["revit_fast.streaming.pipeline"], "MAX_BEHIND", 5)
        results = list(pipe(itertools.chain([image(0)], (b"" for _ in range(200)), [image(1)])))
        assert [r.error is None for r in results] == [True, *[False] * 200, True]


class TestBounds:
    def test_packs_keep_the_budget_and_are_filled(self, model, pipe):
        times = Trace()
        n = len(list(pipe((image(i) for i in range(300)), times=times)))
        packs = [event["args"] for event in times._events if event["name"] == "forward"]
        assert sum(p["images"] for p in packs) == n == 300
        assert max(p["tokens"] for p in packs) <= 64
        assert np.mean([p["tokens"] for p in packs[:-2]]) > 0.8 * 64

    def test_an_endless_stream_in_constant_memory(self, pipe):
        taken, made, ahead = 0, [], 200

        def endless():
            nonlocal taken
            for taken in itertools.count(1):
                one = image(taken % 50, 59, 59)
                made.append(weakref.ref(one))
                yield one

        results = pipe(endless())
        peaks = []
        tracemalloc.start()
        try:
            for _ in range(3):
                tracemalloc.reset_peak()
                for r in itertools.islice(results, 400):
                    assert taken <= r.index + ahead, "a slow consumer is not run away from"
                peaks.append(tracemalloc.get_traced_memory()[1])
                assert sum(one() is not None for one in made) <= ahead + 1
                assert sum(type(value) is Result for value in gc.get_objects()) <= ahead + 1
        finally:
            tracemalloc.stop()
            results.close()
        # How many images are on their way at a time is chance; 400 more would be twice this.
        assert peaks[2] < peaks[1] + ahead * 59 * 59 * 3

    def test_freed_memory_is_given_back(self, monkeypatch, pipe):
        module, released = sys.modules["revit_fast.streaming.pipeline"], []
        images = [image(i) for i in range(200)]
        monkeypatch.setattr(module, "RELEASE_BYTES", sum(picture.nbytes for picture in images) // 10)
        monkeypatch.setattr(module, "release_freed_pages", lambda: released.append(1))
        list(pipe(images))
        assert 5 <= len(released) <= 10

    def test_a_slow_source_is_not_waited_for(self, model, tla):
        pipe = rf.pipeline(model, tla, max_wait_s=0.02)
        release = threading.Event()

        def sources():
            yield image(0)
            assert release.wait(20), "the first result never came"
            yield image(1)

        results = pipe(sources())
        assert next(results).index == 0
        release.set()
        assert next(results).index == 1

    def test_closing_early_ends_the_threads(self, pipe):
        results = pipe(image(i) for i in itertools.count())
        next(results)
        results.close()
        end = time.perf_counter() + 10
        while any(t.name.startswith("revit-fast") for t in threading.enumerate()):
            assert time.perf_counter() < end
            time.sleep(0.01)


class TestSession:
    def test_many_threads(self, pipe):
        images = [image(i) for i in range(40)]
        expected = [r.logits for r in pipe(images)]
        got = {}
        with pipe.session() as session:

            def submit(i):
                got[i] = session.submit(images[i])

            threads = [threading.Thread(target=submit, args=(i,)) for i in range(40)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert all(torch.equal(got[i].result(0).logits, expected[i]) for i in range(40))
        with pytest.raises(RuntimeError, match="closed"):
            session.submit(images[0])

    def test_errors_and_cancellation(self, pipe):
        with pipe.session() as session:
            futures = [session.submit(source) for source in (image(0), b"", image(1))]
            futures[2].cancel()
            assert futures[1].result(20).error == "<0 bytes>: empty file"
        assert futures[0].result(0).error is None

    def test_a_failed_pipeline_fails_what_waits(self, monkeypatch, pipe):
        def forward(x):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(pipe.model, "forward", forward)
        session = pipe.session()
        with pytest.raises(RuntimeError, match="out of memory"):
            session.submit(image(0)).result(20)
        session.close()
        with pytest.raises(RuntimeError, match="its pipeline failed: out of memory"):
            session.submit(image(0))


class TestAsync:
    def test_stream(self, pipe):
        images = [image(i) for i in range(30)]
        expected = [r.grid for r in pipe(images)]

        async def source():
            for i in images:
                await asyncio.sleep(0)
                yield i

        async def run(sources):
            return [r.grid async for r in pipe.stream(sources)]

        assert asyncio.run(run(source())) == expected
        assert asyncio.run(run(images)) == expected

    def test_the_loop_is_not_blocked_and_breaking_off_cleans_up(self, pipe, monkeypatch):
        """Every pass waits until the loop has had a turn: one that waited for the pass would never have it."""
        turn, logits, turns = threading.Event(), pipe.logits, []

        def after_a_turn(batch):
            turn.clear()
            turns.append(turn.wait(60))
            return logits(batch)

        async def tick():
            while True:
                turn.set()
                await asyncio.sleep(0.001)

        async def run():
            ticking = asyncio.create_task(tick())
            results = pipe.stream(image(i, 59, 59) for i in range(500))
            async for r in results:
                if r.index == 300:
                    break
            await results.aclose()
            ticking.cancel()

        monkeypatch.setattr(pipe, "logits", after_a_turn)
        asyncio.run(run())
        assert len(turns) > 5
        assert all(turns)

    def test_an_error_of_the_source(self, pipe):
        async def source():
            yield image(0)
            raise OSError("gone")

        async def run():
            return [r async for r in pipe.stream(source())]

        with pytest.raises(OSError, match="gone"):
            asyncio.run(run())


class TestTrace:
    def test_spans(self, tmp_path, pipe):
        trace = Trace()
        list(pipe([image(i) for i in range(20)], times=trace))
        trace.save(tmp_path / "t.json")
        events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        spans = [e for e in events if e["ph"] == "X"]
        assert {e["name"] for e in spans} == {"decode", "assign", "pack", "forward"}
        assert sorted(e["args"]["index"] for e in spans if e["name"] == "decode") == list(range(20))
        assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in spans)
        names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
        assert "MainThread" in names
        assert {e["tid"] for e in spans} == set(names.values())
        for name, seconds in trace.seconds.items():
            assert seconds == pytest.approx(sum(e["dur"] for e in spans if e["name"] == name) / 1e6, rel=1e-6)

    def test_bounded(self, tmp_path):
        trace = Trace(max_events=3)
        for _ in range(5):
            with trace.span("x"):
                pass
        trace.save(tmp_path / "t.json")
        content = json.loads((tmp_path / "t.json").read_text())
        assert sum(e["ph"] == "X" for e in content["traceEvents"]) == 3
        assert content["otherData"] == {"dropped": 2}

    def test_a_stage_that_raises_is_counted(self):
        times = StageTimes()
        with pytest.raises(KeyError), times.span("x"):
            raise KeyError
        assert times.seconds["x"] > 0


class TestArguments:
    def test_what_does_not_fit(self, model, pipe, tla):
        with pytest.raises(TypeError, match="model: expected"):
            rf.AdaptivePipeline(torch.nn.Linear(2, 2), pipe.prep)
        with pytest.raises(ValueError, match="eval"):
            rf.AdaptivePipeline(drawn(rf.ReViT(grids=GRIDS, embed_dim=24, depth=1, num_heads=3)).train(), pipe.prep)
        with pytest.raises(ValueError, match=r"grids \(14, 10, 7\).*\(4, 3, 2\)"):
            rf.AdaptivePipeline(model, rf.AdaptivePreprocessor(policy="cycle", patch_size=PATCH))
        with pytest.raises(ValueError, match=r"patch_size 16.* 4"):
            rf.AdaptivePipeline(model, rf.AdaptivePreprocessor(policy="cycle", grids=GRIDS))
        with pytest.raises(ValueError, match="labels: the model has 11 classes, got 2"):
            rf.AdaptivePipeline(model, pipe.prep, labels=["a", "b"])
        with pytest.raises(ValueError, match="n_decoders: expected at least 1, got -1"):
            rf.AdaptivePipeline(model, pipe.prep, n_decoders=-1)
        with pytest.raises(ValueError, match="model: images are read as RGB, but it takes 1 channel"):
            rf.pipeline(rf.ReViT(grids=GRIDS, patch_size=PATCH, in_chans=1, embed_dim=24, depth=1, num_heads=3))
        with pytest.raises(ValueError, match="token_budget"):
            rf.AdaptivePipeline(model, pipe.prep, token_budget=0)
        with pytest.raises(ValueError, match="weights"):
            rf.pipeline(model, weights="x.pth")
        for dtype in ("auto", torch.int8):
            with pytest.raises(ValueError, match=rf"dtype: {dtype} is for an optimised copy; .*optimize=False"):
                rf.pipeline(model, dtype=dtype, optimize=False)
        assert rf.pipeline(model, dtype="auto").model.dtype_used == rf.optimize(model, "auto").dtype_used
        with pytest.raises(FileNotFoundError, match="absent"):
            rf.pipeline(model, "absent.safetensors")
        with pytest.raises(ValueError, match=r"\(14, 10, 7\).*\(4, 3, 2\)"):
            rf.pipeline(model, rf.TokenLengthAssigner().eval())

    @pytest.mark.parametrize(
        "source", [b"x", bytearray(b"x"), np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2))], ids=type
    )
    def test_one_image_is_not_a_stream(self, pipe, source):
        for call in (pipe, pipe.assign, pipe.classify):
            with pytest.raises(TypeError, match="wrap it"):
                call(source)
        with pytest.raises(TypeError, match="wrap it"):
            asyncio.run(anext(pipe.stream(source)))

    def test_one_path_stands_for_the_files_there(self, pipe, tmp_path):
        (tmp_path / "photos").mkdir()
        paths = [str(tmp_path / "photos" / f"{i}.png") for i in range(3)]
        for i, path in enumerate(paths):
            Image.fromarray(image(i)).save(path)
        (tmp_path / "list.txt").write_text("\n".join(paths))
        expected = [r.logits for r in pipe(paths)]
        for named in (f"{tmp_path}/photos", tmp_path / "photos", f"{tmp_path}/photos/*.png", f"@{tmp_path}/list.txt"):
            results = list(pipe(named))
            assert [r.source for r in results] == paths, "sources are paths"
            assert all(torch.equal(r.logits, e) for r, e in zip(results, expected, strict=True))
        assert [r.source for r in pipe.assign(paths[0])] == paths[:1]
        assert len(pipe.classify(f"{tmp_path}/photos")) == 3
        assert asyncio.run(anext(pipe.stream(f"{tmp_path}/photos"))).source == paths[0]
        (missing,) = pipe(f"{tmp_path}/none/*.png")
        assert missing.reason == "no file matches this pattern"

    def test_representations_are_short(self, pipe):
        good, bad = pipe([image(0), b"x"])
        assert re.fullmatch(
            r"Result\(0, '<array [x\d]+>', grid=\d, n_tokens=\d+, top=\d+ at 0\.\d{3}, ms=[\d.]+\)", repr(good)
        )
        assert re.fullmatch(r"Result\(1, '<1 bytes>', error='not an image .*'\)", repr(bad))
        assert len(repr(bad)) < 200
        assert re.fullmatch(
            r"AdaptivePipeline\(OptimizedReViT of grids 4/3/2, 11 classes, float32 on cpu; policy=.*, token_budget=64.",
            repr(pipe),
        )

    def test_names_of_the_classes(self, tmp_path):
        vit = timm.create_model("vit_tiny_patch16_224", depth=1)
        names = rf.pipeline(rf.ReViT.from_timm(vit)).classes
        assert (names[1], names[134], len(set(names))) == ("goldfish, Carassius auratus", "crane (n02012849)", 1000)
        assert rf.pipeline(rf.ReViT.from_timm(vit), labels=range(1000)).classes == tuple(range(1000))
        save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), tmp_path / "x.safetensors")
        assert rf.pipeline("vit_tiny_patch16_224", weights=tmp_path / "x.safetensors").model.num_classes == 5
        with pytest.raises(ValueError, match="they are of 5 classes, the model of 7"):
            rf.create_model("vit_tiny_patch16_224", weights=tmp_path / "x.safetensors", num_classes=7)
        model = rf.ReViT.from_timm(vit)
        model.reset_classifier(1000)
        assert class_names(model) is None, "a new head knows no classes"
        model.pretrained_cfg["label_names"] = [str(i) for i in range(1000)]
        assert class_names(model)[7] == "7"

    def test_pickled_it_gives_the_same(self, pipe):
        images = [image(i) for i in range(20)]
        for before, after in zip(pipe(images), pickle.loads(pickle.dumps(pipe))(images), strict=True):
            assert before.grid == after.grid
            assert torch.equal(before.logits, after.logits)

    def test_by_name(self):
        pipe = rf.pipeline("deit_tiny_patch16_224", policy=("fixed", 7))
        [r] = pipe([image(0)])
        assert r.logits.shape == (1000,)
        assert r.n_tokens == 50
        assert rf.pipeline(rf.create_model("deit_tiny_patch16_224")).prep.policy.spec == ("fixed", 14)
