"""Models that are saved, loaded and brought to the Hugging Face Hub; the Hub itself is played by a folder."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import randn
from safetensors.torch import load_file, save_file
from test_bundle import CLASSES, GRIDS, HERE, IMAGES, PATCH, SETTINGS, edit, make_assigner, make_model

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.models.folder import ASSIGNER, CARD, CONFIG, MODEL
from revit_fast.models.hub import SCHEME, download

hub = pytest.importorskip("huggingface_hub")


def logits_of(model):
    images = [randn(3, PATCH * grid, PATCH * grid, seed=grid) for grid in GRIDS]
    with torch.no_grad():
        return model(images)


def assert_same(a, b):
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert value.dtype == b.state_dict()[name].dtype
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "saved", tla=make_assigner(), classes=CLASSES, settings=SETTINGS)
    return tmp_path / "saved"


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """What was sent to the Hub: (arguments, copy of the folder) of every upload."""
    sent = []

    def create_repo(self, repo_id, **options):
        sent.append(("create", options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, **options):
        copy = tmp_path / f"upload{len(sent)}"
        shutil.copytree(folder_path, copy)
        sent.append((options, copy))
        return "https://huggingface.co/commit"

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    return sent


@pytest.fixture
def cache(tmp_path):
    """A cache of downloads as huggingface_hub keeps it: `me/model` on main, another version of it on v1."""
    repository = tmp_path / "cache" / "models--me--model"
    for revision, commit, depth in (("main", "a" * 40, 2), ("v1", "b" * 40, 1)):
        make_model(depth=depth).save_pretrained(repository / "snapshots" / commit, tla=make_assigner(), classes=CLASSES)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository.parent


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"global_pool": "avg", "init_values": 0.1, "reg_tokens": 2, "head_dim": 10, "base_grid": (5, 3)},
            {"global_pool": "token_avg", "reg_tokens": 2, "no_embed_class": True},
            {"distilled": True, "qkv_bias": False, "act_layer": "gelu_tanh", "drop_path_rate": 0.2, "eps": 1e-12},
            {"class_token": False, "global_pool": "avg", "pre_norm": True, "act_layer": "silu"},
            {"num_classes": 0},
        ],
        ids=lambda options: "-".join(options) or "plain",
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_is_bitwise_equal(self, tmp_path, options, dtype):
        model = make_model(**options).to(dtype)
        assert not torch.equal(model.blocks[0].norm1.weight[0], model.blocks[0].norm1.weight[1])
        model.save_pretrained(tmp_path / "m")
        again = rf.ReViT.from_pretrained(tmp_path / "m")
        assert type(again) is rf.ReViT
        assert not again.training
        assert_same(again, model)
        if dtype == torch.float32:
            assert torch.equal(logits_of(again), logits_of(model))

    def test_names_and_preprocessing_stay_with_the_model(self, folder, tmp_path):
        model = rf.ReViT.from_pretrained(str(folder))
        assert model.pretrained_cfg == SETTINGS | {"label_names": CLASSES}
        model.save_pretrained(tmp_path / "again")
        assert rf.ReViT.from_pretrained(tmp_path / "again").pretrained_cfg == model.pretrained_cfg
        model.reset_classifier(3)
        model.save_pretrained(tmp_path / "again")
        assert rf.load(tmp_path / "again").classes == ("0", "1", "2")

    def test_relative_names_and_shipped_models(self, folder, monkeypatch):
        monkeypatch.chdir(folder.parent)
        assert_same(rf.ReViT.from_pretrained("saved"), make_model())
        assert_same(rf.ReViT.from_pretrained("fashion-mnist"), rf.load("fashion-mnist", optimize=False).model)

    def test_arguments_take_the_place_of_saved_ones(self, folder):
        assert rf.ReViT.from_pretrained(folder, drop_path_rate=0.3).blocks[-1].drop_path1.drop_prob == 0.3
        with pytest.raises(
            ValueError, match=r"saved/model.safetensors does not fit.*head.bias.*; leave out num_classes"
        ):
            rf.ReViT.from_pretrained(folder, num_classes=6)
        with pytest.raises(ValueError, match=r"saved/config.json with gears as given describes no model.*gears"):
            rf.ReViT.from_pretrained(folder, gears=6)

    def test_an_optimised_copy_is_saved_as_the_model(self, tmp_path):
        rf.optimize(make_model()).save_pretrained(tmp_path / "m")
        assert_same(rf.ReViT.from_pretrained(tmp_path / "m"), make_model())


class Scaled(rf.ReViT):
    """A subclass with an argument of its own, which it keeps."""

    def __init__(self, *, scale=1.0, **arguments):
        super().__init__(**arguments)
        self.scale = scale

    @property
    def config(self):
        return super().config | {"scale": self.scale}


class Forgetful(Scaled):
    """One that does not keep it."""

    config = rf.ReViT.config


class TestSubclass:
    def test_keeps_its_arguments(self, tmp_path):
        Scaled(**make_model().config, scale=3.0).save_pretrained(tmp_path / "m")
        again = Scaled.from_pretrained(tmp_path / "m")
        assert type(again) is Scaled
        assert again.scale == 3.0
        assert Scaled.from_pretrained(tmp_path / "m", scale=4.0).scale == 4.0
        with pytest.raises(ValueError, match=r"describes no model of this version.*scale"):
            rf.ReViT.from_pretrained(tmp_path / "m")

    def test_is_not_given_defaults_in_silence(self, tmp_path):
        Forgetful(**make_model().config, scale=3.0).save_pretrained(tmp_path / "m")
        with pytest.raises(ValueError, match=r"m/config.json does not say scale of Forgetful; give it, or save"):
            Forgetful.from_pretrained(tmp_path / "m")
        assert Forgetful.from_pretrained(tmp_path / "m", scale=3.0).scale == 3.0


WITHOUT = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("huggingface_hub", "transformers", "timm"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Absent())
import revit_fast as rf
model = rf.ReViT.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
for call in (
    lambda: model.push_to_hub("me/model"),
    lambda: rf.ReViT.from_pretrained("me/model"),
    lambda: rf.load("hf-hub:me/model"),
    lambda: rf.ReViT.from_transformers(model),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


@pytest.mark.processes
def test_without_huggingface_hub(folder, tmp_path):
    """Folders are read and written; what needs the package says what to install."""
    run = [sys.executable, "-c", WITHOUT, str(folder), str(tmp_path / "again")]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120, env=HERE)
    assert done.stdout.splitlines() == [
        'push_to_hub needs huggingface_hub: pip install "revit-fast[hub]"',
        *[
            f"'{name}' is no folder here, and repositories of the Hub need huggingface_hub: "
            'pip install "revit-fast[hub]"'
            for name in ("me/model", "hf-hub:me/model")
        ],
        'vit: from_transformers needs transformers: pip install "revit-fast[transformers]"',
    ]
    assert_same(rf.ReViT.from_pretrained(tmp_path / "again"), make_model())


def test_the_package_imports_neither():
    code = "import sys, revit_fast; print([m for m in ('huggingface_hub', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=HERE)
    assert done.stdout.strip() == "[]"


class TestPush:
    def test_uploads_a_bundle_in_one_commit(self, uploads):
        model, tla = make_model(), make_assigner()
        options = {"private": True, "commit_message": "First", "branch": "dev", "create_pr": True}
        url = model.push_to_hub(
            "me/model", tla=tla, classes=CLASSES, settings=SETTINGS, policy=("budget", 8), **options
        )
        assert url == "https://huggingface.co/commit"
        (_, created), (sent, copy) = uploads
        assert created == {"private": True, "exist_ok": True}
        assert (sent["repo_id"], sent["repo_type"]) == ("me/model", "model")
        assert (sent["commit_message"], sent["revision"], sent["create_pr"]) == ("First", "dev", True)
        assert sorted(path.name for path in copy.iterdir()) == sorted([CONFIG, MODEL, ASSIGNER, CARD])
        assert_same(rf.ReViT.from_pretrained(copy), model)
        uploaded, own = rf.load(copy), rf.pipeline(model, tla, policy=("budget", 8), **SETTINGS)
        assert uploaded.classes == tuple(CLASSES)
        for ours, expected in zip(uploaded(IMAGES), own(IMAGES), strict=True):
            assert ours.grid == expected.grid
            assert torch.equal(ours.logits, expected.logits)

    def test_card_says_what_the_hub_reads(self, uploads):
        make_model().push_to_hub("me/model", card="## Data\n\nNone.")
        card = hub.ModelCard.load(uploads[-1][1] / CARD)
        assert card.data.library_name == "revit-fast"
        assert card.data.pipeline_tag == "image-classification"
        assert "revit" in card.data.tags
        assert card.text.rstrip().endswith("## Data\n\nNone.")
        make_model(num_classes=0).push_to_hub("me/model")
        assert hub.ModelCard.load(uploads[-1][1] / CARD).data.pipeline_tag == "image-feature-extraction"

    def test_with_a_folder(self, uploads, tmp_path):
        assert make_model().save_pretrained(tmp_path / "m", classes=CLASSES) is None
        assert not uploads
        options = {"push_to_hub": True, "classes": CLASSES, "private": True}
        assert make_model(depth=1).save_pretrained(tmp_path / "m", **options) == "https://huggingface.co/commit"
        sent, copy = uploads[-1]
        assert sent["repo_id"] == "m"
        for name in (CONFIG, MODEL, CARD):
            assert (copy / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
        make_model().save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="me/other")
        assert uploads[-1][0]["repo_id"] == "me/other"

    def test_nothing_is_sent_of_what_does_not_fit(self, uploads, tmp_path):
        model = make_model()
        for options, error, message in (
            ({"config": {}}, TypeError, "config: a bundle has its own"),
            ({"model_card_kwargs": {}}, TypeError, "model_card_kwargs: a bundle has its own"),
            ({"privat": True}, TypeError, "privat"),
            ({"classes": ["a"]}, ValueError, "classes: the model has 5 classes, got 1 names"),
        ):
            with pytest.raises(error, match=message):
                model.push_to_hub("me/model", **options)
        with pytest.raises(TypeError, match=r"options: expected tla, .*got private; an upload needs push_to_hub=True"):
            model.save_pretrained(tmp_path / "m", private=True)
        assert not [sent for sent, _ in uploads if sent != "create"]


class TestDownload:
    def test_revisions_in_a_cache(self, cache):
        options = {"cache_dir": cache, "local_files_only": True}
        assert_same(rf.ReViT.from_pretrained("me/model", **options), make_model())
        for name, revision in (("me/model", "v1"), ("me/model", "b" * 40), ("hf-hub:me/model@v1", None)):
            assert_same(rf.ReViT.from_pretrained(name, revision=revision, **options), make_model(depth=1))
        folder = download("me/model", **options)
        assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, MODEL, ASSIGNER, CARD])

    def test_what_is_asked_of_the_hub(self, monkeypatch, folder):
        asked = []

        def snapshot_download(name, **options):
            asked.append((name, options))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        rf.ReViT.from_pretrained("me/model", token="secret", force_download=True, cache_dir="here")
        rf.load(SCHEME + "me/model@v1")
        own = {"allow_patterns": [CONFIG, MODEL, ASSIGNER, CARD]}
        options = {"cache_dir": "here", "token": "secret", "force_download": True, "local_files_only": False}
        assert asked == [
            ("me/model", {"revision": None} | own | options),
            ("me/model", {"revision": "v1"} | own),
        ]

    def test_commands_take_it(self, monkeypatch, folder, tmp_path, capsys):
        from PIL import Image

        Image.fromarray(IMAGES[0]).save(tmp_path / "photo.png")
        monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(folder))
        results = []
        for model in (f"{folder}", f"{SCHEME}me/model"):
            assert main(["predict", str(tmp_path / "photo.png"), "--model", model, "--format", "json"]) == 0
            results.append(json.loads(capsys.readouterr().out))
            del results[-1][0]["ms"]
        assert results[0] == results[1]
        assert results[0][0]["top"][0]["class"] in CLASSES
        write = ["calibrate", f"{SCHEME}me/model", str(tmp_path), "--budget", "8"]
        assert main(write) == 2
        assert "not changed" in capsys.readouterr().err

    def test_a_saved_folder_is_evaluated(self, tmp_path, capsys):
        """The same accuracies as of the model, with its assigner and without."""
        from PIL import Image

        for i, image in enumerate(IMAGES):
            (tmp_path / "images" / "test" / CLASSES[i % 5]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "images" / "test" / CLASSES[i % 5] / f"{i}.png")
        model = make_model()
        pipe = rf.pipeline(model, policy=("fixed", GRIDS[0]), **SETTINGS)
        right = sum(int(r.logits.argmax()) == i % 5 for i, r in enumerate(pipe(IMAGES)))
        for tla in (make_assigner(), None):
            model.save_pretrained(tmp_path / "m", tla=tla, classes=CLASSES, settings=SETTINGS)
            assert main(["evaluate", str(tmp_path / "m"), str(tmp_path / "images")]) == 0
            rows = capsys.readouterr().out.splitlines()
            (longest,) = [row for row in rows if row.startswith(f"| fixed {GRIDS[0]}x{GRIDS[0]} ")]
            assert longest.split("|")[2].strip() == f"{right / len(IMAGES):.2%}"

    def test_what_the_hub_does_not_give(self, cache):
        options = {"cache_dir": cache, "local_files_only": True}
        for name in ("me/other", "me/model@v9", "./nothing/here", "me/model/deeper"):
            with pytest.raises(OSError, match=f"'{name}' is no folder here, and the Hub gave no such repository: "):
                rf.ReViT.from_pretrained(name, **options)


class TestRefused:
    @pytest.mark.parametrize("name", [CONFIG, MODEL])
    def test_missing_files(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"saved lacks {name}; "):
            rf.ReViT.from_pretrained(folder)

    def test_pickles_are_never_read(self, folder):
        """Neither in the place of the weights nor under their name."""

        class Trap:
            def __reduce__(self):
                return (pytest.fail, ("was unpickled",))

        content = io.BytesIO()
        pickle.dump(Trap(), content)
        (folder / "pytorch_model.bin").write_bytes(content.getvalue())
        (folder / MODEL).unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors"):
            rf.ReViT.from_pretrained(folder)
        (folder / MODEL).write_bytes(content.getvalue())
        edit(folder, files={})
        with pytest.raises(ValueError, match=r"saved/model.safetensors cannot be read.*; copy the whole folder"):
            rf.ReViT.from_pretrained(folder)

    def test_models_of_transformers(self, folder):
        (folder / CONFIG).write_text(json.dumps({"model_type": "vit", "hidden_size": 768}))
        with pytest.raises(ValueError, match=r"config.json is that of a vit of transformers.*ReViT.from_transformers"):
            rf.ReViT.from_pretrained(folder)

    def test_wrong_configs(self, folder):
        good = json.loads((folder / CONFIG).read_text())
        for changes, message in (
            ({"revit": None}, "config.json: revit is no dict; save the bundle again"),
            ({"classes": "abcde"}, "config.json: classes is no list"),
            ({"classes": ["a"]}, "config.json names 1 classes, but its model has 5; save the bundle again"),
            ({"revit": good["revit"] | {"depth": "two"}}, "config.json describes no model of this version"),
            ({"format": "other"}, "config.json has the format 'other'"),
        ):
            edit(folder, **good | changes)
            with pytest.raises(ValueError, match=message):
                rf.ReViT.from_pretrained(folder)

    def test_weights_that_do_not_fit_are_not_made_to(self, folder):
        """A plain ViT's norms are not repeated, nor positions of another grid resampled, where a ReViT is expected."""
        good = load_file(folder / MODEL)
        edit(folder, files={})
        n_prefix = 1
        for name, value in (
            ("blocks.0.norm1.weight", good["blocks.0.norm1.weight"][0].clone()),
            ("pos_embed", good["pos_embed"][:, : n_prefix + 9].clone()),
            ("head.weight", good["head.weight"][:, :5].clone()),
        ):
            save_file(good | {name: value}, folder / MODEL)
            with pytest.raises(
                ValueError, match=rf"saved/model.safetensors does not fit.*{name} .*; copy the whole folder"
            ):
                rf.ReViT.from_pretrained(folder)
        save_file({name: value for name, value in good.items() if name != "head.bias"}, folder / MODEL)
        with pytest.raises(ValueError, match=r"1 missing: head.bias"):
            rf.ReViT.from_pretrained(folder)

    def test_a_model_without_classes_predicts_nothing(self, tmp_path, capsys):
        make_model(num_classes=0).save_pretrained(tmp_path / "m")
        assert main(["predict", str(tmp_path), "--model", str(tmp_path / "m")]) == 2
        assert "has no classifier to predict with" in capsys.readouterr().err
