"""The bench of a training update measures what it says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import train_step
from bench.train_step import BOUND, Case, Work, check, document, measure
from revit_fast.train.losses import tlsd_loss

pytestmark = pytest.mark.beside

KWARGS = {"img_size": 28, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
TINY = Case("vit_tiny_patch16_224", KWARGS, 2, 4)


def test_candidates_make_one_update():
    work = Work(TINY)
    differences = check(work)
    assert differences.keys() == work.candidates.keys()
    assert max(differences.values()) <= BOUND, differences
    assert max(differences.values()) < 1e-5, "the bound is far from what a right candidate needs"


def test_a_wrong_gradient_is_seen():
    work = Work(TINY)

    def other_weight(turn):
        tlsd_loss(work.ours(work.batches[turn].images).view(3, 4, -1), work.target, 0.4)[0].backward()

    work.candidates["packed"] = (work.ours, other_weight)
    assert check(work)["packed"] > BOUND


def test_an_update_leaves_the_weights():
    work = Work(TINY)
    before = [p.detach().clone() for p in work.ours.parameters()]
    work.update("packed", 0)
    assert all(torch.equal(a, b) for a, b in zip(before, work.ours.parameters(), strict=True))


def test_memory_is_that_of_an_update():
    code = (
        "from bench.train_step import *; print(peak_memory(Case('vit_tiny_patch16_224', {KWARGS}, 2, {n}), 'one pack'))"
    )
    peaks = []
    for n in (64, 256):
        text = code.replace("{KWARGS}", repr(KWARGS)).replace("{n}", str(n))
        root = Path(__file__).parent.parent
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=root)
        peaks.append(int(done.stdout.split()[-1]))
    # 345 tokens an image, 32 channels, float32: at least the MLP's hidden rows of both blocks.
    assert peaks[1] > 256 * 345 * 4 * 32 * 4
    assert 2.5 < peaks[1] / peaks[0] < 6, peaks


def test_document(monkeypatch):
    monkeypatch.setitem(train_step.CASES, "tiny", TINY)
    monkeypatch.setattr(
        train_step.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout="USDT\n1048576\n")
    )
    result = measure("tiny", 3)
    text = document({"machine": "x"}, [result])
    for row in result["rows"]:
        assert row["peak_bytes"] == 1 << 20
        assert row["ratio"] > 0
        assert f"| {row['candidate']} |" in text
    (baseline,) = [row for row in result["rows"] if row["candidate"] == "timm, a pass for each length"]
    assert baseline["ratio"] == pytest.approx(1.0)
    result["rows"][0]["ratio"] = None
    assert "| wrong |" in document({}, [result])
