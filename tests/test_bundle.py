"""Bundles: whole round trips in a process of its own, saves that are killed, and what is refused."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import drawn
from torch import nn

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.io.atomic import write_json
from revit_fast.models import hub
from revit_fast.models.folder import ASSIGNER, CARD, CONFIG, MODEL
from revit_fast.ops.linear import cpu_multiplies_bf16
from revit_fast.streaming.bundle import read_bundle, save_bundle

GRIDS, PATCH = (4, 3, 2), 4
CLASSES = [f"class {i}" for i in range(5)]
SETTINGS = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "crop_pct": 1.0, "interpolation": "bilinear"}
HERE = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(rf.__file__).parents[1]), str(Path(__file__).parent)])}
IMAGES = [np.random.default_rng(i).integers(0, 40 * i + 9, (20 + i, 33 - i, 3), dtype=np.uint8) for i in range(6)]


def make_model(**options):
    arguments = dict(grids=GRIDS, patch_size=PATCH, num_classes=5, embed_dim=24, depth=2, num_heads=3, hidden_dim=40)
    return drawn(rf.ReViT(**{**arguments, **options}))


def make_assigner(grids=GRIDS):
    torch.manual_seed(0)
    tla = rf.TokenLengthAssigner(grids, thumbnail_px=16, widths=(8, 8)).eval()
    tla.calibrate(IMAGES, [i % len(grids) for i in range(len(IMAGES))])
    return tla


@pytest.fixture
def folder(tmp_path):
    """A saved bundle."""
    path = tmp_path / "bundle"
    save_bundle(path, make_model(), make_assigner(), classes=CLASSES, settings=SETTINGS, policy=("budget", 8))
    return path


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        save_bundle(tmp_path / "b", make_model(), make_assigner(), classes=CLASSES, settings=SETTINGS)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "b").iterdir()} == dict.fromkeys(
        (CONFIG, MODEL, ASSIGNER, CARD), "0o644"
    )


class TestConfig:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"global_pool": "avg", "init_values": 0.1, "reg_tokens": 2, "head_dim": 10, "base_grid": (5, 3)},
            {"distilled": True, "qkv_bias": False, "act_layer": partial(nn.GELU, approximate="tanh")},
            {"class_token": False, "global_pool": "avg", "pre_norm": True, "act_layer": "silu", "final_norm": False},
        ],
    )
    def test_gives_the_model_again(self, options):
        model = make_model(**options)
        again = rf.ReViT.from_config(json.loads(json.dumps(model.config)))
        again.load_state_dict(model.state_dict())
        x = [torch.rand(3, PATCH * g, PATCH * g) for g in (4, 2, 3)]
        with torch.no_grad():
            assert torch.equal(again.eval()(x), model(x))
        assert again.config == model.config

    def test_of_timm_and_of_a_copy(self):
        vit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=7)
        model = rf.ReViT.from_timm(vit, GRIDS)
        assert model.config["base_grid"] == [14, 14]
        again = rf.ReViT.from_config(json.loads(json.dumps(rf.optimize(model).config)))
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}

    def test_follows_reset_classifier(self):
        """The norm stays where it was, whatever the pooling is now."""
        model = make_model()
        model.reset_classifier(9, "avg")
        again = rf.ReViT.from_config(model.config)
        again.load_state_dict(model.state_dict())
        assert (again.num_classes, again.global_pool) == (9, "avg")
        assert isinstance(again.fc_norm, nn.Identity)

    def test_activations(self):
        class Cubic(nn.Module):
            def forward(self, x):
                return x**3

        with pytest.raises(ValueError, match=r"act_layer: Cubic has no name.*gelu, gelu_tanh"):
            _ = make_model(act_layer=Cubic).config
        with pytest.raises(ValueError, match="act_layer: PReLU has parameters"):
            make_model(act_layer=nn.PReLU)
        leaky = make_model(act_layer=partial(nn.LeakyReLU, 0.5))
        again = rf.ReViT.from_config(json.loads(json.dumps(leaky.config)))
        assert again.spec == leaky.spec
        assert again.blocks[1].mlp.act.negative_slope == 0.5
        assert make_model(act_layer=timm.layers.QuickGELU).config["act_layer"] == "quick_gelu"
        with pytest.raises(ValueError, match=r"act_layer: expected a module or one of gelu.*got 'gelou'"):
            make_model(act_layer="gelou")


FRESH = """
import sys, numpy as np, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "PIL", "matplotlib"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Absent())
import revit_fast as rf
pipe = rf.load(sys.argv[1])
images = list(np.load(sys.argv[2]).values())
np.savez(sys.argv[3], *[r.logits.numpy() for r in pipe(images)], grids=[r.grid for r in pipe(images)])
print(*pipe.classes, sep=",")
"""


class TestRoundTrip:
    @pytest.mark.processes
    def test_in_a_fresh_process_without_timm(self, folder, tmp_path):
        """Bitwise the logits of the model that was saved, at the grids that its assigner gave."""
        np.savez(tmp_path / "images.npz", *IMAGES)
        arguments = [str(folder), str(tmp_path / "images.npz"), str(tmp_path / "out.npz")]
        run = [sys.executable, "-c", FRESH, *arguments]
        done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120, env=HERE)
        assert done.stdout.strip() == ",".join(CLASSES)
        pipe = rf.pipeline(make_model(), make_assigner(), policy=("budget", 8), **SETTINGS)
        got = np.load(tmp_path / "out.npz")
        results = list(pipe(IMAGES))
        assert got["grids"].tolist() == [r.grid for r in results]
        assert len(set(got["grids"].tolist())) > 1
        for i, result in enumerate(results):
            np.testing.assert_array_equal(got[f"arr_{i}"], result.logits.numpy())

    def test_files(self, folder):
        assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, MODEL, ASSIGNER, CARD])
        assert [p.name for p in folder.parent.iterdir()] == ["bundle"], "nothing is left beside it"
        card = (folder / CARD).read_text()
        assert "| 4x4 | 16 | 17 |" in card
        assert '`["budget", 8]`' in card

    def test_options(self, folder):
        assert rf.load(folder).prep.policy.spec == ("budget", 8)
        pipe = rf.load(folder, optimize=False, policy=("fixed", 3), token_budget=50)
        assert type(pipe.model) is rf.ReViT
        assert pipe.token_budget == 50
        assert [r.grid for r in pipe(IMAGES)] == [3] * len(IMAGES)
        assert pipe.prep.options["mean"] == SETTINGS["mean"]
        assert pipe.prep.crop_pct == 1.0
        [result] = pipe(IMAGES[:1])
        assert result.top(1)[0]["label"] in CLASSES

    def test_without_an_assigner(self, tmp_path):
        save_bundle(tmp_path / "b", make_model(), None, classes=CLASSES)
        assert rf.load(tmp_path / "b").prep.policy.spec == ("fixed", 4)
        assert read_bundle(tmp_path / "b").tla is None

    def test_bfloat16_weights_stay(self, tmp_path):
        model = make_model().bfloat16()
        save_bundle(tmp_path / "b", model, None, classes=CLASSES)
        read = read_bundle(tmp_path / "b").model
        assert read.pos_embed.dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))

    def test_replacing_keeps_other_files_and_the_card(self, folder):
        (folder / "labels.csv").write_text("mine")
        (folder / "runs").mkdir()
        (folder / "runs" / "log").write_text("also mine")
        save_bundle(folder, make_model(depth=1), None, classes=CLASSES, card="## Data\n\nNone.")
        assert (folder / "labels.csv").read_text() == "mine"
        assert (folder / "runs" / "log").read_text() == "also mine"
        assert not (folder / ASSIGNER).exists()
        assert read_bundle(folder).card == "## Data\n\nNone."
        assert (folder / CARD).read_text().rstrip().endswith("## Data\n\nNone.")


KILLED = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
import test_bundle as t
from revit_fast.streaming.bundle import save_bundle

def count(folder, end=None):
    calls = 0
    def profile(frame, event, argument):
        nonlocal calls
        calls += event == "c_call"
        if calls == end:
            os._exit(9)
    assigner, model = t.make_assigner(), t.make_model(depth=1)
    sys.setprofile(profile)
    try:
        save_bundle(folder, model, assigner, classes=t.CLASSES, settings=t.SETTINGS)
    finally:
        sys.setprofile(None)
    return calls

folders = [Path(sys.argv[1]) / str(i) for i in range(int(sys.argv[2]))]
total = count(folders[0] / "bundle")
for i, folder in enumerate(folders[1:]):
    pid = os.fork()
    if pid == 0:
        count(folder / "bundle", 1 + i * (total - 1) // (len(folders) - 2))
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.processes
def test_a_killed_save_leaves_the_old_bundle(tmp_path):
    """Killed at two dozen places from the first call to the last: there is the old bundle or the new, never another."""
    folders = [tmp_path / str(i) for i in range(25)]
    for f in folders:
        save_bundle(f / "bundle", make_model(), make_assigner(), classes=CLASSES, settings=SETTINGS)
    run = [sys.executable, "-c", KILLED, str(tmp_path), str(len(folders))]
    subprocess.run(run, check=True, timeout=200, env=HERE)
    depths = [len(read_bundle(f / "bundle").model.blocks) for f in folders]
    assert depths[0] == 1, "the one that was not killed"
    assert depths[1] == 2
    assert set(depths) == {1, 2}
    assert depths[1:] == sorted(depths[1:], reverse=True), "once it is there, it stays"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_json(tmp_path / "pipe", [1])
        assert json.loads(read.result(timeout=30)) == [1]
    assert [(p.name, p.is_fifo()) for p in tmp_path.iterdir()] == [("pipe", True)]


class TestRefused:
    @pytest.mark.parametrize("name", [CONFIG, MODEL, ASSIGNER])
    def test_missing_files(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"bundle: .*bundle lacks {name}; "):
            rf.load(folder)

    def test_unknown_names(self, folder, monkeypatch, tmp_path):
        monkeypatch.setattr(hub, "SHIPPED", tmp_path)
        with pytest.raises(FileNotFoundError, match="no model 'mnist'; shipped: bundle; a folder is given with a path"):
            rf.load("mnist")
        assert rf.load("bundle").classes == tuple(CLASSES)
        monkeypatch.setattr(hub, "SHIPPED", tmp_path / "none")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"shipped: none;.*for the folder here, give \./bundle"):
            rf.load("bundle")
        assert rf.load("./bundle").classes == tuple(CLASSES)
        with pytest.raises(FileNotFoundError, match="folder absent does not exist"):
            rf.load("absent/")

    def test_other_versions(self, folder):
        edit(folder, format="revit-fast bundle 99")
        with pytest.raises(ValueError, match=r"config.json has the format 'revit-fast bundle 99', this version reads"):
            rf.load(folder)
        (folder / CONFIG).write_text("{")
        with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
            rf.load(folder)
        (folder / CONFIG).write_text("[1]")
        with pytest.raises(ValueError, match="has the format None"):
            rf.load(folder)

    def test_configs_that_lack_or_add_something(self, folder):
        good = json.loads((folder / CONFIG).read_text())
        edit(folder, revit=good["revit"] | {"gears": 3})
        with pytest.raises(ValueError, match=r"config.json describes no model of this version: .*gears"):
            rf.load(folder)
        edit(folder, revit=good["revit"], dtype="bfloat17")
        with pytest.raises(ValueError, match=r"describes no model.*bfloat17"):
            rf.load(folder)
        edit(folder, dtype="float32", settings={"mean": [0, 0, 0]})
        with pytest.raises(ValueError, match=r"expected settings of mean, std"):
            rf.load(folder)
        edit(folder, settings=good["settings"], policy=["threshold", 7])
        with pytest.raises(ValueError, match=r"config.json: policy: expected .*θ in \[0, 1\]"):
            rf.load(folder)
        edit(folder, policy="argmax", classes=["a"])
        with pytest.raises(ValueError, match="names 1 classes, but its model has 5"):
            rf.load(folder)
        del good["classes"]
        (folder / CONFIG).write_text(json.dumps(good))
        with pytest.raises(ValueError, match="does not say: classes"):
            rf.load(folder)

    def test_weights_that_do_not_fit(self, folder):
        tensors = load_file(folder / MODEL)
        tensors["head.bias"] = torch.zeros(6)
        edit(folder, files={})
        save_file(tensors, folder / MODEL)
        with pytest.raises(ValueError, match=r"model.safetensors does not fit .*head.bias \(6,\) instead of \(5,\)"):
            rf.load(folder)
        (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-50])
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
            rf.load(folder)

    def test_another_assigner(self, folder):
        make_assigner((4, 3)).save(folder / ASSIGNER)
        edit(folder, files={})
        with pytest.raises(ValueError, match=r"assigner.safetensors assigns grids \(4, 3\), the model has \(4, 3, 2\)"):
            rf.load(folder)

    def test_saving_what_does_not_fit(self, tmp_path):
        model = make_model()
        with pytest.raises(ValueError, match="classes: the model has 5 classes, got 1 names"):
            save_bundle(tmp_path / "b", model, None, classes=["a"])
        with pytest.raises(ValueError, match=r"tla: it assigns grids \(4, 3\)"):
            save_bundle(tmp_path / "b", model, make_assigner((4, 3)), classes=CLASSES)
        with pytest.raises(ValueError, match="settings: expected mean, std, crop_pct, interpolation, got size"):
            save_bundle(tmp_path / "b", model, None, classes=CLASSES, settings={"size": 3})
        with pytest.raises(ValueError, match="needs an assigner"):
            save_bundle(tmp_path / "b", model, None, classes=CLASSES, policy="argmax")
        with pytest.raises(ValueError, match=r"policy: .*cannot be kept in a file"):
            save_bundle(tmp_path / "b", model, None, classes=CLASSES, policy=("fixed", np.array([4, 3])))
        assert not (tmp_path / "b").exists()
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match="exists and is no bundle"):
            save_bundle(tmp_path, model, None, classes=CLASSES)
        assert (tmp_path / "thesis.tex").exists()


class TestCommands:
    @pytest.fixture
    def photos(self, tmp_path):
        from PIL import Image

        (tmp_path / "photos").mkdir()
        for i, image in enumerate(IMAGES):
            Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
        return tmp_path / "photos"

    def run(self, capsys, command, *arguments):
        code = main([command, *map(str, arguments), "--format", "json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    def test_predict_takes_everything_of_the_bundle(self, capsys, folder, photos):
        code, records, err = self.run(capsys, "predict", photos, "--model", folder)
        assert code == 0
        assert "random weights" not in err
        for record, result in zip(records, rf.load(folder)(IMAGES), strict=True):
            assert record["grid"] == result.grid
            assert record["top"][0] == {"class": result.top(1)[0]["label"], "probability": result.top(1)[0]["score"]}

    def test_an_assigned_cascade_is_kept_and_runs(self, capsys, folder, photos, tmp_path):
        policy = ("assigned-cascade", {"threshold": 0.5, "confidence": 1.0})
        save_bundle(tmp_path / "both", make_model(), make_assigner(), classes=CLASSES, settings=SETTINGS, policy=policy)
        assert read_bundle(tmp_path / "both").policy == policy
        expected = [(r.grid, r.n_tokens) for r in rf.load(folder, policy=policy)(IMAGES)]
        assert {r.grid for r in rf.load(folder, policy=("threshold", 0.5)).assign(IMAGES)} == {3}
        assert set(expected) == {(4, 10 + 17)}, "the assigned grid, then the next longer one"
        for options in ((tmp_path / "both",), (folder, "--policy", "assigned-cascade:0.5,1")):
            found = self.run(capsys, "predict", photos, "--model", *options)[1]
            assert [(r["grid"], r["tokens"]) for r in found] == expected

    def test_explicit_options_win(self, capsys, folder, photos, tmp_path):
        def grids(*options):
            return [r["grid"] for r in self.run(capsys, "assign", photos, "--model", folder, *options)[1]]

        assert grids() == [r.grid for r in rf.load(folder)(IMAGES)]
        assert grids("--grid", 3) == [3] * 6
        assert grids("--policy", "threshold:1") == [r.grid for r in rf.load(folder, policy=("threshold", 1))(IMAGES)]
        other = make_assigner()
        with torch.no_grad():
            other.network.head.bias += torch.tensor([0.0, 0.0, 99.0])
        other.save(tmp_path / "other.safetensors")
        assert grids("--assigner", tmp_path / "other.safetensors") == [2] * 6, "its own argmax, not the bundle's policy"
        (tmp_path / "names").write_text("\n".join("abcde"))
        records = self.run(capsys, "predict", photos, "--model", folder, "--labels", tmp_path / "names")[1]
        assert {entry["class"] for r in records for entry in r["top"]} == set("abcde")
        another = make_model()
        with torch.no_grad():
            another.head.bias += torch.tensor([0.0, 0.0, 0.0, 0.0, 999.0])
        save_file({n: t.contiguous() for n, t in another.state_dict().items()}, tmp_path / "w.safetensors")
        records = self.run(capsys, "predict", photos, "--model", folder, "--weights", tmp_path / "w.safetensors")[1]
        assert {r["top"][0]["class"] for r in records} == {"class 4"}

    def test_without_an_assigner_the_longest(self, capsys, photos, tmp_path):
        save_bundle(tmp_path / "b", make_model(), None, classes=CLASSES)
        assert [r["grid"] for r in self.run(capsys, "assign", photos, "--model", tmp_path / "b")[1]] == [4] * 6

    def test_what_is_wrong_is_said(self, capsys, folder, photos):
        (folder / MODEL).unlink()
        code, _, err = self.run(capsys, "predict", photos, "--model", folder)
        assert code == 2
        assert "lacks model.safetensors" in err
        code, _, err = self.run(capsys, "predict", photos, "--model", "no_such_model")
        assert code == 2
        assert "no_such_model" in err

    @pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "int8"])
    def test_predict_in_a_dtype(self, isa, capsys, folder, photos, dtype):
        code, records, err = self.run(capsys, "predict", photos, "--model", folder, "--dtype", dtype)
        assert code == 0
        used = ("bfloat16" if cpu_multiplies_bf16() else "float32") if dtype == "auto" else dtype
        assert f"--dtype {dtype}: weights in {used}\n" in err
        pipe = rf.load(folder, dtype=getattr(torch, used))
        for record, result in zip(records, pipe(IMAGES), strict=True):
            assert [(e["class"], e["probability"]) for e in record["top"]] == [
                (e["label"], e["score"]) for e in result.top(5)
            ]

    def test_every_dtype_shows_in_the_classes_and_none_in_the_grids(self, isa, capsys, folder, photos):
        """The assigner runs in float32 whatever the model runs in: so its calibration stays true."""
        found = {}
        for dtype in ("float32", "bfloat16", "int8"):
            records = self.run(capsys, "predict", photos, "--model", folder, "--dtype", dtype)[1]
            found[dtype] = [[r[name] for r in records] for name in ("grid", "lengths", "top")]
        assert found["float32"][:2] == found["bfloat16"][:2] == found["int8"][:2]
        tops = [found[dtype][2] for dtype in found]
        assert all(a != b for a, b in itertools.combinations(tops, 2))

    def test_the_dtype_of_the_bundle_is_the_default(self, capsys, photos, tmp_path):
        records = {}
        for name in ("float32", "bfloat16", "float16"):
            model = make_model().to(getattr(torch, name))
            save_bundle(tmp_path / name, model, make_assigner(), classes=CLASSES, settings=SETTINGS)
        for name in ("float32", "bfloat16"):
            code, default, err = self.run(capsys, "predict", photos, "--model", tmp_path / name)
            _, records[name], _ = self.run(capsys, "predict", photos, "--model", tmp_path / name, "--dtype", name)
            assert (code, [r["top"] for r in default]) == (0, [r["top"] for r in records[name]])
            assert "--dtype" not in err
        assert [r["top"] for r in records["float32"]] != [r["top"] for r in records["bfloat16"]]
        code, _, err = self.run(capsys, "predict", photos, "--model", tmp_path / "float16")
        refusal = "--dtype: float16 is not served on the CPU; use torch.bfloat16 or torch.float32"
        assert (code, err.splitlines()[-1]) == (2, f"revit-fast: error: {refusal}")
        assert self.run(capsys, "predict", photos, "--model", tmp_path / "float16", "--dtype", "auto")[0] == 0

    def test_explain_in_a_dtype(self, capsys, folder, photos, tmp_path, monkeypatch):
        sheets = []
        monkeypatch.setattr("revit_fast.cli.explain.write", lambda path, entries: sheets.append(entries))
        arguments = ["explain", str(photos), "--model", str(folder), "--output", str(tmp_path / "sheet.html")]
        for dtype in ("float32", "int8"):
            assert main([*arguments, "--dtype", dtype]) == 0
            assert f"--dtype {dtype}: weights in {dtype}\n" in capsys.readouterr().err
            results = rf.load(folder, dtype=getattr(torch, dtype))(IMAGES)
            tops = [tuple((e["label"], e["score"]) for e in result.top(5)) for result in results]
            assert [entry.classes for entry in sheets[-1]] == tops
        assert [e.classes for e in sheets[0]] != [e.classes for e in sheets[1]]

    def test_explain(self, capsys, folder, photos, tmp_path):
        code = main(["explain", str(photos), "--model", str(folder), "--output", str(tmp_path / "sheet.html")])
        assert code == 0
        assert "random weights" not in capsys.readouterr().err
        assert "class 1" in (tmp_path / "sheet.html").read_text()
