"""What the documentation shows runs as it stands."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import make_model
from train_helpers import MODEL_KWARGS, noise_images, write_folders

import revit_fast as rf
from revit_fast.cli import build_parser
from revit_fast.decoding import CHUNK, MORE_SMALL, SMALL_BYTES
from revit_fast.explain.png import MAX_IMAGES
from revit_fast.pipeline import MAX_BEHIND, MAX_BYTES
from revit_fast.policies import POLICIES
from revit_fast.tla import MAX_SHARE
from revit_fast.transformers_import import KINDS

PAGE = Path(__file__).parent.parent / "docs" / "adaptive.md"
TRAINING = PAGE.with_name("training.md")
TIMM = PAGE.with_name("timm.md")
HUGGING_FACE = PAGE.with_name("hugging-face.md")


def blocks(language, page=PAGE):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def photos(tmp_path):
    paths = []
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{seed}.jpg")
        Image.fromarray(coarse).resize((90, 60 + seed), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def test_python_blocks_run_in_turn(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = make_model(grids=(14, 10, 7), patch_size=2)
    names = {
        "model": model,
        "assigner": rf.TokenLengthAssigner.for_model(model).eval(),
        "photos": photos,
        "image": np.asarray(Image.open(photos[0])),
    }
    found = blocks("python")
    assert len(found) > 8
    for block in found:
        # Line numbers of a failure are those of the page.
        line = PAGE.read_text(encoding="utf-8").split(block)[0].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)
    assert all(result.error is None for result in names["results"])
    assert {"trace.json", "sheet.html", "sheet.png", "tla.safetensors"} <= {p.name for p in tmp_path.iterdir()}


def test_commands_are_understood():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(lines) == 6
    lines += [
        f"revit-fast assign x {option}" for option in re.findall(r"`(--[^`]+)`", PAGE.read_text(encoding="utf-8"))
    ]
    assert len(lines) > 10
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "revit-fast"
        build_parser().parse_args(args)


def test_every_policy_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for name in POLICIES:
        assert f'"{name}"' in text


def test_bounds_are_as_written():
    text = PAGE.read_text(encoding="utf-8")
    assert f"at most {MAX_BYTES >> 20} MiB" in text
    assert text.count(f"{MAX_BEHIND:,}") == 2
    assert f"2 * n_decoders + {CHUNK}" in text
    assert f"({MORE_SMALL} more while they are small, of {SMALL_BYTES >> 10} KiB" in text
    assert f"at most {MAX_IMAGES} images" in text
    assert f"at most {MAX_SHARE:.2%}".replace("%", " %") in text


def test_training_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_folders(noise_images(48), tmp_path / "images" / split)
    (block,) = blocks("python", TRAINING)
    exec(compile(block, str(TRAINING), "exec"), {"images": tmp_path / "images", "small": MODEL_KWARGS})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 3
    text = TRAINING.read_text(encoding="utf-8")
    written = {path.name for path in (tmp_path / "runs" / "d").iterdir()} - {"tensorboard"}  # an extra
    assert all(f"`{name}" in text for name in written), written


def test_timm_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), "vit.pth")
    names = {"load_image": lambda: Image.new("RGB", (300, 200))}
    for block in blocks("python", TIMM):
        line = TIMM.read_text(encoding="utf-8").split(block)[0].count("\n")
        exec(compile("\n" * line + block, str(TIMM), "exec"), names)
    text = TIMM.read_text(encoding="utf-8")
    listed = re.findall(r"`(revit_(?!fast)[^`]*)`", text.split("```")[0])
    assert {name for pattern in listed for name in expanded(pattern)} == set(timm.list_models("revit*"))


def test_hugging_face_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = make_model(grids=(14, 10, 7), patch_size=2)
    names = {
        "model": model,
        "assigner": rf.TokenLengthAssigner.for_model(model).eval(),
        "names": [f"class {i}" for i in range(model.num_classes)],
    }
    for block in blocks("python", HUGGING_FACE):
        line = HUGGING_FACE.read_text(encoding="utf-8").split(block)[0].count("\n")
        exec(compile("\n" * line + block, str(HUGGING_FACE), "exec"), names)
    for block in blocks("py", HUGGING_FACE):  # needs the Hub
        ast.parse(block)
    for line in "".join(blocks("sh", HUGGING_FACE)).splitlines():
        build_parser().parse_args(shlex.split(line)[1:])
    text = HUGGING_FACE.read_text(encoding="utf-8")
    assert all(f"`{kind}`" in text for kind in KINDS)


def expanded(pattern):
    """Names that `a_{b,c}` stands for."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    parts = found[1].split(",")
    return [name for part in parts for name in expanded(pattern[: found.start()] + part + pattern[found.end() :])]


def test_training_commands_are_understood(capsys):
    lines = [line for block in blocks("sh", TRAINING) for line in block.splitlines()]
    lines = [line for line in lines if not line.startswith("pip ")]
    commands = [line.split("revit_fast.cli " if "torchrun" in line else "revit-fast ", 1)[1] for line in lines]
    assert len(commands) == 8
    for command in commands:
        build_parser().parse_args(shlex.split(command))
    options = re.findall(r"`(--[a-z-]+)", TRAINING.read_text(encoding="utf-8"))
    assert len(options) > 5
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fit", "--help"])
    known = capsys.readouterr().out
    assert not [option for option in options if option not in known]
