"""The benches from JPEG files: what they compare is the same, and tables say whose ratio a number is."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from bench import decode, pipeline, pipeline_peers
from bench.photos import encoded, jpeg, real_photo

pytestmark = pytest.mark.beside


def test_ratios_are_to_ours_in_each_precision():
    truth = torch.randn(pipeline.BATCH, 5, generator=torch.Generator().manual_seed(0)).double()
    off = truth + 2e-3 * truth.abs().max()

    def candidate(logits, precision, note=""):
        return pipeline.Candidate(lambda turn: [logits], truth, precision, note)

    candidates = {
        "ours, float32": candidate(truth, "float32"),
        "ours, int8": candidate(off, "int8"),
        "ours, wrong": candidate(off, "float32"),
        "another": candidate(off, "int8 per tensor", "LATENCY hint"),
    }
    rows = {row["candidate"]: row for row in pipeline.checked_rows("case", candidates, rounds=3, per=1)}
    assert rows["ours, wrong"]["ms/image"] == "wrong"
    for name in ("ours, float32", "ours, int8", "another"):
        ratios = {column for column in rows[name] if column.startswith("time / ")}
        assert ratios == {"time / ours, float32", "time / ours, int8"}
    assert rows["ours, float32"]["time / ours, float32"] == rows["ours, int8"]["time / ours, int8"] == 1.0
    assert (rows["another"]["precision"], rows["another"]["note"]) == ("int8 per tensor", "LATENCY hint")


@pytest.mark.parametrize("seed", range(3))
def test_all_pipelines_prepare_the_same_image(seed):
    file = jpeg(seed)
    expected = pipeline_peers.timm_load(file)
    of_a_pixel = 1 / 255 / 0.224
    for load in pipeline_peers.LOADS.values():
        difference = (load(file) - expected).abs()
        assert difference.mean() < 0.5 * of_a_pixel
        assert difference.max() < 12 * of_a_pixel


def test_photographs_differ_and_have_the_size_asked_for():
    photographs = [np.asarray(real_photo(seed, 64, 48)) for seed in range(6)]
    assert {p.shape for p in photographs} == {(48, 64, 3)}
    assert len({p.tobytes() for p in photographs}) == 6


def test_decoders_are_compared_with_pillow(monkeypatch):
    def other(file):
        pixels = decode.by_pillow(file)
        pixels[0, 0, 0] ^= 1
        return pixels

    found = decode.decoders()
    assert [*found][:2] == ["Pillow, numpy.array", "ours, Pillow"]
    monkeypatch.setattr(decode, "decoders", lambda: found | {"other": other})
    files = [encoded(Image.fromarray(np.full((9, 7, 3), 200, np.uint8))), encoded(real_photo(0, 30, 20))]
    rows = {row["decoder"]: row for row in decode.rows_of("case", files, rounds=2)}
    assert rows.pop("other")["pixels"] == "differ"
    assert {row["pixels"] for row in rows.values()} == {"equal"}
    np.testing.assert_array_equal(decode.ours_by_pillow(files[1]), np.asarray(Image.open(io.BytesIO(files[1]))))
