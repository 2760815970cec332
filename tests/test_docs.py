"""What the documentation shows runs as it stands."""

import ast
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from network import assert_stayed, spied
from PIL import Image
from small_models import make_model
from train_helpers import MODEL_KWARGS, noise_images, write_folders

import revit_fast as rf
from bench.experiments import __main__ as experiments
from revit_fast.adaptive.assigner import MAX_SHARE
from revit_fast.adaptive.policies import POLICIES, Evidence, make_policy
from revit_fast.cli import build_parser
from revit_fast.cli.export import check_output
from revit_fast.deploy.export import ONNX_BYTES, OPSET, SETTINGS
from revit_fast.explain.png import MAX_IMAGES
from revit_fast.layers.positions import MAX_EXTRA_GRIDS
from revit_fast.models.from_transformers import KINDS
from revit_fast.streaming.decoding import CHUNK, MORE_SMALL, SMALL_BYTES
from revit_fast.streaming.pipeline import MAX_BEHIND, MAX_BYTES

PAGE = Path(__file__).parent.parent / "docs" / "adaptive.md"
TRAINING = PAGE.with_name("training.md")
TIMM = PAGE.with_name("timm.md")
FAMILY = PAGE.with_name("family.md")
DOCS = PAGE.parent
ROOT = DOCS.parent
PAGES = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "reports").rglob("*.md")]
EXPORT = PAGE.with_name("export.md")
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
    assert len(lines) == 8
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


def test_family_page_runs(photos, capsys):
    torch.manual_seed(0)
    names = {"image": np.asarray(Image.open(photos[0])), "photos": photos}
    found = blocks("python", FAMILY)
    assert len(found) == 4
    for block in found:
        line = FAMILY.read_text(encoding="utf-8").split(block)[0].count("\n")
        exec(compile("\n" * line + block, str(FAMILY), "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["14 188", "14 188", "14 193"]  # class token counted
    assert names["logits"].shape == (2, 1000)
    assert f"of {MAX_EXTRA_GRIDS} more" in FAMILY.read_text(encoding="utf-8")


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
    of_experiments = [line for line in lines if "bench.experiments " in line]
    assert len(of_experiments) == 2
    for line in of_experiments:
        experiments.build_parser().parse_args(shlex.split(line.split("bench.experiments ")[1]))
    lines = [line for line in lines if line not in of_experiments]
    commands = [line.split("revit_fast.cli " if "torchrun" in line else "revit-fast ", 1)[1] for line in lines]
    assert len(commands) == 6
    for command in commands:
        build_parser().parse_args(shlex.split(command))
    options = re.findall(r"`(--[a-z-]+)", TRAINING.read_text(encoding="utf-8"))
    assert len(options) > 5
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fit", "--help"])
    known = capsys.readouterr().out
    assert not [option for option in options if option not in known]


def of_revit_fast(page):
    """Arguments of the lines of a page's shell blocks that call revit-fast."""
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("revit-fast ")]


@pytest.mark.parametrize("name", ["index.md", "how-packing-works.md"])
def test_pages_of_the_site_run(name, capsys):
    names = {}
    for block in blocks("python", DOCS / name):
        exec(compile(block, name, "exec"), names)
    assert len(blocks("python", DOCS / name)) == 2
    assert capsys.readouterr().out


@pytest.mark.parametrize(("name", "n_commands"), [("index.md", 3), ("page.md", 3)])
def test_commands_of_the_site_are_understood(name, n_commands):
    commands = of_revit_fast(DOCS / name)
    assert len(commands) == n_commands
    for command in commands:
        build_parser().parse_args(command)


def files_of(nav):
    """The files of a tree of pages."""
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else files_of(target)


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(files_of(config["nav"]))
    assert len(set(listed)) == len(listed)
    inside = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert inside <= set(listed)
    assert all((ROOT / name).is_file() for name in set(listed) - inside)


def anchors_of(page):
    """What headings of a page are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors_of(to), target


def test_figures_are_what_their_scripts_draw():
    scripts = list((DOCS / "figures").glob("*.py"))
    assert scripts
    for script in scripts:
        drawn = runpy.run_path(str(script))["draw"]()
        assert script.with_suffix(".svg").read_text(encoding="utf-8") == drawn


def test_the_figure_of_packing_is_true():
    figure = runpy.run_path(str(DOCS / "figures" / "packing.py"))
    batch = rf.PackedBatch.from_images([torch.zeros(3, 16 * g, 16 * g) for g in figure["GRIDS"]], patch_size=16)
    layout = batch.layout(figure["N_PREFIX"])
    assert layout.cu_seqlens.tolist() == figure["CU_SEQLENS"]
    starts = sorted(figure["CU_SEQLENS"][sequence] + row for sequence, row, _ in layout.tiles.tolist())
    assert starts == [begin + row for begin, _, row in figure["tile_starts"]()]


def test_the_site_is_built_without_a_network(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    program = "from mkdocs.__main__ import cli\ncli()"
    command = spied(program, "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path / "site")
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stderr
    assert_stayed(built.stderr)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//", text), (
            page
        )
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    shown = [name for name in rf.__all__ if name not in ("__version__", "flash_attn_compat", "ops")]
    for name in [*shown, *(f"ops.{name}" for name in rf.ops.__all__)]:
        assert re.search(rf'id="revit_fast\.[\w.]*\b{name.split(".")[-1]}"', api), name


def test_export_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(grids=(14, 10, 7), patch_size=2)
    programs, rule = blocks("python", EXPORT)
    names = {"model": model, "patch": 2, "classes": [str(i) for i in range(model.num_classes)]}
    exec(compile(programs, str(EXPORT), "exec"), names)
    x = torch.randn(3, 3, 14, 14)
    assert torch.allclose(names["single"](x), model(x), rtol=0, atol=1e-6)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 100).astype(np.float32)
    names = {"probabilities": probabilities, "grids": model.grids, "threshold": 0.6}
    exec(compile(rule, str(EXPORT), "exec"), names)
    policy = make_policy(("threshold", 0.6), model.grids)
    assert names["chosen"].tolist() == policy.choose(Evidence(np.arange(100), probabilities)).tolist()


def test_export_commands_are_understood():
    text = EXPORT.read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", EXPORT) for line in block.splitlines() if line.startswith("revit-fast ")]
    assert len(lines) == 4
    for line in lines:
        args = build_parser().parse_args(shlex.split(line, comments=True)[1:])
        check_output(args)
    assert f"opset {OPSET}" in text
    assert f"`{SETTINGS}`" in text
    assert f"{ONNX_BYTES / (1 << 30):g} GiB" in text
