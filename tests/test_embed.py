"""Embeddings: of models and their copies, of pipelines, and in the files of `revit-fast embed`."""

import asyncio
import csv
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import assert_as_accurate, full, only_on
from PIL import Image
from small_models import GRIDS, MIX, PATCH, drawn, images_of, make_model
from torch import nn

import revit_fast as rf
from revit_fast.adaptive.policies import suffices
from revit_fast.cli import main
from revit_fast.inference import cuda_graphs
from revit_fast.inference.cuda_graphs import DirectCalls
from revit_fast.models.create import create_model
from revit_fast.streaming import embedding_files as files
from revit_fast.streaming.bundle import save_bundle
from revit_fast.video import TimeSformer
from revit_fast.video.pipeline import pipeline as clip_pipeline

pytestmark = [only_on("cpu", reason="engines of the CPU, and the pipeline"), pytest.mark.usefixtures("one_thread")]

POOLS = {
    "token": {},
    "registers": {"reg_tokens": 2, "fc_norm": True, "global_pool": "avg"},
    "token_avg": {"global_pool": "token_avg"},
    "map": {"global_pool": "map", "attn_pool": {"heads": 2, "mlp": {"hidden": 40}}},
    "distilled": {"distilled": True},
    "token labels": {"aux_head": True},
    "no class token": {"class_token": False, "global_pool": "avg", "num_classes": 0},
    "no blocks": {"depth": 0},
}
ENGINES = {
    "fused": {},
    "modules": {"engine": "modules"},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.int8},
}


def as_timm(model, x):
    """timm's own composition of an embedding."""
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.fixture(params=POOLS)
def model(request):
    return make_model(**POOLS[request.param])


class TestModels:
    def test_the_embedding_is_what_the_head_reads(self, model):
        x = images_of(MIX)
        with torch.no_grad():
            expected = as_timm(model, x)
            found, tokens = model.forward_embeddings(x, tokens=True)
            assert found.shape == (len(MIX), model.head_hidden_size)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.forward_embeddings(x), expected, rtol=1e-5, atol=1e-5)
            if model.num_classes and not (model.distilled or model.has_aux_head):
                torch.testing.assert_close(model.head(found), model(x), rtol=1e-4, atol=1e-4)
            assert torch.equal(tokens.data, model.forward_features(x).data)
        assert tokens.n_prefix == model.num_prefix_tokens
        assert [len(rows) for rows in tokens.split()] == [image[0].numel() // PATCH**2 + tokens.n_prefix for image in x]

    def test_copies_are_as_accurate_as_the_model(self, model):
        x, double = images_of(MIX), [image.double() for image in images_of(MIX)]
        fast = rf.optimize(model)
        with torch.no_grad():
            eager, eager_tokens = model.forward_embeddings(x, tokens=True)
            truth, true_tokens = rf.optimize(model, engine="modules").double().forward_embeddings(double, tokens=True)
            for copy in (fast, rf.optimize(model, engine="modules")):
                found, tokens = copy.forward_embeddings(x, tokens=True)
                assert_as_accurate(found, eager, truth, "embedding")
                assert_as_accurate(copy.forward_embeddings(x), eager, truth, "embedding alone")
                assert_as_accurate(tokens.data, eager_tokens.data, true_tokens.data, "tokens")

    @pytest.mark.parametrize("engine", ENGINES)
    def test_an_image_has_the_same_bits_alone_and_in_any_pack(self, model, engine):
        x, fast = images_of(MIX), rf.optimize(model, **ENGINES[engine])
        found, tokens = fast.forward_embeddings(x, tokens=True)
        assert torch.equal(fast.forward_embeddings(x), found), "the same whether tokens are asked for or not"
        for i, image in enumerate(x):
            alone, own = fast.forward_embeddings([image], tokens=True)
            assert torch.equal(alone[0], found[i]), f"image {i}"
            assert torch.equal(own.data, tokens.split()[i]), f"tokens of image {i}"
        turned, _ = fast.forward_embeddings(x[::-1], tokens=True)
        assert torch.equal(turned.flip(0), found)

    def test_replayed_graphs_give_them_too(self, model, monkeypatch):
        """Direct calls stand in for capture, see test_graphs.py."""
        monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", DirectCalls)
        x, fast = images_of(MIX), rf.optimize(model)
        with torch.no_grad():
            expected = as_timm(model, x)
            logits, features = model(x), model.forward_features(x).data
        for _ in range(2):  # one graph for each output, and none takes the place of another
            found, tokens = fast.forward_embeddings(x, tokens=True)
            for got, wanted in (
                (found, expected),
                (fast.forward_embeddings(x), expected),
                (tokens.data, features),
                (fast(x), logits),
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            assert {key.output for key in fast._graphs.get(fast).graphs} == {"pooled", "tokens", "logits"}
            assert fast._graphs.get(fast).n_captures == 3
        large = rf.optimize(model, max_rows=8)
        torch.testing.assert_close(large.forward_embeddings(x, tokens=True)[0], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("vit_tiny_patch16_224", {}),
            ("vit_tiny_patch16_224", {"global_pool": "avg", "num_classes": 0}),
            ("vit_base_patch16_siglip_224", {}),  # an attention pool
            ("deit_tiny_distilled_patch16_224", {}),
            full("vit_small_patch14_reg4_dinov2", {}),
        ],
    )
    def test_equal_timms(self, name, options):
        size = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 48, "patch_size": 8, "dynamic_img_size": True}
        vit = drawn(timm.create_model(name, **size | options))
        model = rf.ReViT.from_timm(vit, GRIDS).eval()
        x = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
            for ours in (model, rf.optimize(model), rf.optimize(model, engine="modules")):
                error = (ours.forward_embeddings(x) - expected).abs().max() / expected.abs().max()
                assert error <= 2e-5

    def test_a_model_without_pooling_has_none(self):
        model = make_model(global_pool="")
        with pytest.raises(
            ValueError, match=r'global_pool is "", so it pools no embedding; call model\.forward_features'
        ):
            model.forward_embeddings(images_of(MIX))
        model.reset_classifier(0, "avg")
        assert model.forward_embeddings(images_of(MIX)).shape == (len(MIX), 24)


def picture(seed):
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(4, 40, 2), 3)
    return rng.integers(0, int(rng.integers(2, 257)), shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def tla():
    torch.manual_seed(0)
    tla = rf.TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 8)).eval()
    tla.calibrate([picture(i) for i in range(64)])
    return tla


@pytest.fixture
def pipe(tla):
    """Its policy gives about half of the pictures the shortest grid."""
    pipe, pictures = rf.pipeline(make_model(reg_tokens=2), tla, token_budget=64), [picture(i) for i in range(40)]
    assigned = suffices(tla.predict_proba(pictures, pipe.prep.seen(pictures)).numpy())
    return pipe.with_policy(("threshold", float(np.median(assigned[:, 2]))))


class TestPipeline:
    def test_each_image_at_its_own_grid_in_order(self, pipe):
        images = [picture(i) for i in range(40)]
        images[5] = b"no image"
        results = list(pipe.embed(images, tokens=True))
        assert [r.index for r in results] == list(range(40))
        classified = list(pipe(images))
        assert len({r.grid for r in results if r.error is None}) > 1
        for r, known in zip(results, classified, strict=True):
            assert (r.grid, r.grid_hw, r.n_tokens, r.error) == (known.grid, known.grid_hw, known.n_tokens, known.error)
            assert r.logits is None
            if r.error is not None:
                assert r.index == 5
                assert r.embedding is None
                assert r.tokens is None
                continue
            batch, _ = pipe.prep([images[r.index]])
            pooled, tokens = pipe.model.forward_embeddings(batch, tokens=True)
            assert torch.equal(r.embedding, pooled[0]), "bitwise the same alone and in any pack"
            assert torch.equal(r.tokens, tokens.data)
            assert r.tokens.shape == (r.n_tokens, 24)
            assert r.n_tokens == 3 + r.grid_hw[0] * r.grid_hw[1]
            assert r.embedding.dtype == r.tokens.dtype == torch.float32
            assert known.embedding is None
            assert known.logits is not None

    def test_tokens_are_left_out_unless_asked_for(self, pipe):
        for r in pipe.embed(picture(i) for i in range(3)):
            assert r.tokens is None
            assert "embedding=[24]" in repr(r)

    def test_normalized_embeddings_have_norm_one_and_the_same_bits(self, pipe):
        images = [picture(i) for i in range(20)]
        plain, tokens = list(pipe.embed(images, tokens=True)), list(pipe.embed(images, tokens=True, normalize=True))
        for a, b in zip(plain, tokens, strict=True):
            assert abs(float(a.embedding.norm()) - 1) > 0.1
            torch.testing.assert_close(b.embedding, a.embedding / a.embedding.norm(), rtol=1e-6, atol=1e-7)
            assert torch.equal(a.tokens, b.tokens)
            (alone,) = pipe.embed([images[b.index]], normalize=True)
            assert torch.equal(alone.embedding, b.embedding)

    def test_a_result_keeps_no_other_alive(self, pipe):
        for r in pipe.embed([picture(i) for i in range(9)], tokens=True, normalize=True):
            assert r.embedding.untyped_storage().nbytes() == 4 * 24
            assert r.tokens.untyped_storage().nbytes() == 4 * 24 * r.n_tokens

    def test_policies_are_respected(self, pipe):
        images = [picture(i) for i in range(6)]
        cycle = pipe.with_policy("cycle")
        assert [r.grid for r in cycle.embed(images)] == [6, 4, 2] * 2
        assert [r.grid for r in cycle.embed(images, first_index=1)] == [4, 2, 6] * 2
        changed = pipe.with_embeddings().with_policy(("fixed", 4))
        assert [(r.grid, r.embedding is None) for r in changed(images)] == [(4, False)] * 6

    def test_a_cascade_is_refused(self, pipe):
        message = r"policy: \('cascade', 0.9\) decides by the model's own logits, and embeddings come without logits"
        with pytest.raises(ValueError, match=message):
            pipe.with_policy(("cascade", 0.9)).embed([picture(0)])
        with pytest.raises(ValueError, match=message):
            pipe.with_embeddings().with_policy(("cascade", 0.9))

    def test_without_assigner_and_without_classifier(self):
        model = make_model(num_classes=0, global_pool="avg")
        pipe = rf.pipeline(model)
        images = [picture(i) for i in range(5)]
        for r in pipe.embed(images):
            batch, _ = pipe.prep([images[r.index]])
            torch.testing.assert_close(r.embedding, as_timm(model, batch)[0], rtol=1e-5, atol=1e-5)
            assert r.grid == 6

    @pytest.mark.parametrize("options", [{"optimize": False}, {"dtype": torch.bfloat16}])
    def test_any_model_of_a_pipeline(self, tla, options):
        model = make_model()
        pipe = rf.pipeline(model, tla, policy="cycle", **options)
        images = [picture(i) for i in range(7)]
        for r in pipe.embed(images, tokens=True):
            batch = pipe.prep.pack([images[r.index]], [r.grid])
            with torch.inference_mode():
                expected, tokens = pipe.model.forward_embeddings(batch, tokens=True)
            torch.testing.assert_close(r.embedding, expected[0].float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(r.tokens, tokens.data.float(), rtol=1e-5, atol=1e-5)

    def test_proportions_are_kept(self, tla):
        model = make_model()
        pipe = rf.pipeline(model, tla, policy="cycle", aspect="keep")
        wide = np.zeros((10, 40, 3), np.uint8)
        (r,) = pipe.embed([wide], tokens=True)
        assert r.grid_hw[1] > r.grid_hw[0]
        assert len(r.tokens) == 1 + r.grid_hw[0] * r.grid_hw[1]
        assert r.tokens[1:].unflatten(0, r.grid_hw).shape == (*r.grid_hw, 24)

    def test_sessions_and_streams(self, pipe):
        images = [picture(i) for i in range(12)]
        expected = [r.embedding for r in pipe.embed(images, normalize=True)]
        embedding = pipe.with_embeddings(normalize=True)
        with embedding.session() as session:
            futures = [session.submit(image) for image in images]
            assert all(torch.equal(f.result().embedding, e) for f, e in zip(futures, expected, strict=True))

        async def streamed():
            return [r.embedding async for r in embedding.stream(images)]

        assert all(torch.equal(a, b) for a, b in zip(asyncio.run(streamed()), expected, strict=True))

    @pytest.mark.parametrize("tokens", [False, True])
    def test_values_that_are_no_numbers_are_an_error_of_the_image(self, tokens):
        """A patch of the largest grid is NaN: with class-token pooling of no blocks, only its token shows it."""
        model = make_model(depth=0)
        with torch.no_grad():
            model.pos_embed[0, -1] = torch.nan
        pipe = rf.pipeline(model, policy="cycle", optimize=False)
        found = [r.error for r in pipe.embed([picture(i) for i in range(3)], tokens=tokens)]
        reads_it = found[0] is not None
        assert reads_it == tokens
        assert not tokens or "the model's output is not a number" in found[0]

    def test_other_models_are_refused(self, pipe, tla):
        class Other(nn.Module):
            grids, in_chans, patch_size, num_classes, num_prefix_tokens = GRIDS, 3, PATCH, 4, 1
            input_device = torch.device("cpu")

        other = rf.AdaptivePipeline(Other().eval(), pipe.prep)
        with pytest.raises(
            TypeError, match="model: Other has no method forward_embeddings; make the pipeline with a Re"
        ):
            other.embed([picture(0)])
        size = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_frames": 2}
        clips = clip_pipeline(TimeSformer(grids=(4, 2), num_classes=3, **size).eval())
        with pytest.raises(TypeError, match="TimeSformer has no method forward_embeddings"):
            clips.embed([])
        with pytest.raises(ValueError, match='global_pool is ""'):
            rf.AdaptivePipeline(make_model(global_pool=""), pipe.prep).embed([picture(0)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tla):
    folder = tmp_path_factory.mktemp("bundle") / "m"
    model = make_model(reg_tokens=1, num_classes=3)
    save_bundle(folder, model, tla, classes=("bright", "dark", "middle"), policy="cycle")
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Six images and a file that is none, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(6):
        Image.fromarray(picture(i)).save(f"photos/{i}.png")
    Path("photos/2-none.png").write_bytes(b"no image")
    return sorted(str(path) for path in Path("photos").iterdir())


def run(capsys, bundle, *args):
    code = main(["embed", "photos", "--model", str(bundle), *map(str, args)])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def expected_of(bundle, photos, **options):
    return list(rf.load(str(bundle)).embed(photos, **options))


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class TestCommand:
    def test_npy_and_the_names_of_its_rows(self, capsys, bundle, photos):
        code, err = run(capsys, bundle, "--output", "x.npy")
        assert code == 1
        assert "error: photos/2-none.png: not an image that Pillow" in err
        assert "7 images (1 failed) in " in err
        found, rows = np.load("x.npy"), rows_of("x.csv")
        assert (found.shape, found.dtype) == ((6, 24), np.float32)
        assert list(rows[0]) == ["row", "path", "grid", "tokens", "error"]
        assert [row["path"] for row in rows] == photos
        for row, r in zip(rows, expected_of(bundle, photos), strict=True):
            if r.error is not None:
                assert row | {"error": ""} == {"row": "", "path": r.source, "grid": "", "tokens": "", "error": ""}
                assert row["error"] == r.reason
                continue
            assert (int(row["grid"]), int(row["tokens"]), row["error"]) == (r.grid, r.n_tokens, "")
            np.testing.assert_array_equal(found[int(row["row"])], r.embedding.numpy())
        assert [row["row"] for row in rows if row["row"]] == list("012345")
        assert sorted(os.listdir()) == ["photos", "x.csv", "x.npy"]

    def test_npy_of_tokens(self, capsys, bundle, photos):
        assert run(capsys, bundle, "--output", "x.npy", "--tokens", "--normalize")[0] == 1
        found, tokens = np.load("x.npy"), np.load("x.tokens.npy", mmap_mode="r")
        n_read = 0
        for row, r in zip(rows_of("x.csv"), expected_of(bundle, photos, tokens=True, normalize=True), strict=True):
            if r.error is not None:
                assert set(row.values()) == {"", r.source, r.reason}
                continue
            first, n, prefix = (int(row[name]) for name in ("first_token", "tokens", "prefix_tokens"))
            np.testing.assert_array_equal(tokens[first : first + n], r.tokens.numpy())
            np.testing.assert_array_equal(found[int(row["row"])], r.embedding.numpy())
            assert (prefix, int(row["grid_h"]), int(row["grid_w"])) == (2, *r.grid_hw)
            n_read += n
        assert tokens.shape == (n_read, 24)
        assert tokens.dtype == np.float32

    @pytest.mark.parametrize("tokens", [False, True])
    def test_parquet(self, capsys, bundle, photos, tokens, monkeypatch):
        parquet = pytest.importorskip("pyarrow.parquet")
        monkeypatch.setattr(files, "GROUP_BYTES", 200)
        code, _ = run(capsys, bundle, "--output", "x.parquet", *["--tokens"] * tokens)
        assert code == 1
        assert parquet.read_metadata("x.parquet").num_row_groups > 2, "memory does not grow with the images"
        table = parquet.read_table("x.parquet")
        shaped = ["prefix_tokens", "grid_h", "grid_w", "token_embeddings"] if tokens else []
        assert table.column_names == ["index", "path", "grid", "tokens", "embedding", *shaped, "error"]
        assert str(table.schema.field("embedding").type) == "list<element: float>"
        for row, r in zip(table.to_pylist(), expected_of(bundle, photos, tokens=tokens), strict=True):
            assert (row["index"], row["path"], row["grid"], row["tokens"]) == (r.index, r.source, r.grid, r.n_tokens)
            assert row["error"] == r.reason
            if r.error is not None:
                assert row["embedding"] is None
                continue
            np.testing.assert_array_equal(np.float32(row["embedding"]), r.embedding.numpy())
            if tokens:
                np.testing.assert_array_equal(np.float32(row["token_embeddings"]), r.tokens.numpy())
                assert (row["prefix_tokens"], row["grid_h"], row["grid_w"]) == (2, *r.grid_hw)

    def test_names_that_are_no_text_are_escaped(self, capsys, bundle, photos):
        name = os.fsdecode(b"photos/\xff.png")
        os.rename("photos/0.png", name)
        assert run(capsys, bundle, "--output", "x.npy")[0] == 1
        assert rows_of("x.csv")[-1]["path"] == "photos/\\xff.png"

    def test_no_image_at_all(self, capsys, bundle, photos):
        code = main(["embed", "photos/2-none.png", "--model", str(bundle), "--output", "x.npy", "--tokens"])
        assert code == 1
        assert np.load("x.npy").shape == (0, 24)
        assert np.load("x.tokens.npy").shape == (0, 24)

    def test_a_run_that_ends_early_leaves_the_files_as_they_were(self, capsys, bundle, photos, monkeypatch):
        assert run(capsys, bundle, "--output", "x.npy")[0] == 1
        before = [Path(name).read_bytes() for name in ("x.npy", "x.csv")]
        add, calls = files.NpyRows.add, []

        def interrupted(self, rows):
            calls.append(rows)
            if len(calls) == 3:
                raise KeyboardInterrupt
            add(self, rows)

        monkeypatch.setattr(files.NpyRows, "add", interrupted)
        assert run(capsys, bundle, "--output", "x.npy", "--grid", "2")[0] == 130
        assert [Path(name).read_bytes() for name in ("x.npy", "x.csv")] == before
        assert sorted(os.listdir()) == ["photos", "x.csv", "x.npy"]

    def test_options_are_those_of_predict(self, capsys, bundle, photos):
        code, err = run(capsys, bundle, "--output", "x.npy", "--dtype", "bfloat16", "--trace", "t.json", "--grid", "4")
        assert code == 1
        assert "--dtype bfloat16: weights in bfloat16" in err
        assert {row["grid"] for row in rows_of("x.csv")} == {"4", ""}
        assert "forward" in {event["name"] for event in json.loads(Path("t.json").read_text())["traceEvents"]}
        sixteen = np.load("x.npy")
        assert run(capsys, bundle, "--output", "x.npy", "--grid", "4")[0] == 1, "its own files may be replaced"
        error = np.abs(sixteen - np.load("x.npy")).max() / np.abs(sixteen).max()
        assert 0 < error < 0.05

    def test_a_model_of_timm_without_classifier(self, capsys, photos, monkeypatch):
        def small(name, **options):
            return create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=24, depth=1, num_heads=3, **options)

        monkeypatch.setattr("revit_fast.cli.pipelines.create_model", small)
        code, err = run(capsys, "vit_tiny_patch16_224", "--output", "x.npy", "--grid", "7")
        assert code == 1
        assert "warning: random weights: embeddings are meaningless; give --weights FILE" in err
        assert np.load("x.npy").shape == (6, 24)

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["--output", "x.npz"], "argument --output: expected a name that ends in .npy or .parquet, got 'x.npz'"),
            (["--output", "none/x.npy"], "--output: cannot write none/x.npy"),
            (["--output", "x.npy", "--trace", "none/t.json"], "--trace: cannot write none/t.json"),
            (["--output", "x.npy", "--policy", "cascade:0.9"], "--policy: ('cascade', 0.9) decides by the model's own"),
            (["--output", "mine.npy"], "--output: mine.csv would be replaced, and it holds no rows of embeddings"),
            ([], "the following arguments are required: --output"),
        ],
    )
    def test_what_cannot_work_is_refused_by_name(self, capsys, bundle, photos, args, said):
        Path("mine.csv").write_text("name,label\n")
        code, err = run(capsys, bundle, *args)
        assert code == 2
        assert said in err
        assert sorted(os.listdir()) == ["mine.csv", "photos"]

    def test_a_model_without_pooling_is_refused(self, capsys, photos, tmp_path_factory):
        folder = tmp_path_factory.mktemp("unpooled") / "m"
        save_bundle(folder, make_model(global_pool=""), None, classes=tuple(map(str, range(40))))
        code, err = run(capsys, folder, "--output", "x.npy")
        assert code == 2
        assert '--model: its global_pool is ""' in err


class TestFiles:
    def test_rows_are_not_kept(self, tmp_path):
        """An array of 64 MB is written in 2 MB of memory."""
        block = np.random.default_rng(0).random((1000, 64), dtype=np.float32)
        with open(tmp_path / "x.npy", "wb") as file:
            tracemalloc.start()
            rows = files.NpyRows(file, 64)
            for _ in range(250):
                rows.add(block)
            rows.finish()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2e6
        found = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert found.shape == (250_000, 64)
        np.testing.assert_array_equal(found[-1000:], block)

    @pytest.mark.parametrize("n", [0, 1, 10**6, 10**12, 10**18 - 1])
    def test_the_header_has_one_length_for_any_number_of_rows(self, tmp_path, n):
        with open(tmp_path / "x.npy", "wb") as file:
            rows = files.NpyRows(file, 16384)
            assert file.tell() == 128
            rows.n_rows = n
            rows.finish()
            assert file.tell() == 128

    def test_another_suffix_is_refused(self, tmp_path):
        with (
            pytest.raises(ValueError, match=r"path: expected a name that ends in .npy or .parquet, got 'x.npz'"),
            files.embedding_files("x.npz", 4),
        ):
            pass
