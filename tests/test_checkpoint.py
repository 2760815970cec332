"""Checkpoints: both formats, plain ViT and ReViT, and what is said when they do not fit."""

import io
import os
import pickle
import zipfile
from argparse import Namespace

import pytest
import timm
import torch
from helpers import randn
from safetensors.torch import save, save_file
from small_models import make_model as tiny
from train_helpers import tiny_config

import revit_fast as rf
from revit_fast.adaptive.assigner import FORMAT
from revit_fast.models.weights import state_dict_of
from revit_fast.train.checkpoint import load_state
from revit_fast.train.run import build_model

NAME = "deit_tiny_patch16_224"
SMALL = {"depth": 1, "num_classes": 3}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL).eval()


def assert_same_logits(model, other):
    x = randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_plain_vit_weights(vit, tmp_path, suffix, wrapped):
    path = tmp_path / f"weights{suffix}"
    state = {name: p.contiguous() for name, p in vit.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapped: state, "epoch": 3} if wrapped else state, path)
    assert_same_logits(rf.create_model(NAME, weights=path, **SMALL), vit)


def test_revit_weights_keep_their_lengths(tmp_path):
    model = rf.create_model(NAME, grids=(14, 7), **SMALL)
    torch.nn.init.normal_(model.blocks[0].norm1.weight)
    torch.save(model.state_dict(), tmp_path / "revit.pth")
    loaded = rf.create_model(NAME, grids=(14, 7), weights=tmp_path / "revit.pth", **SMALL)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    of_three = rf.create_model(NAME, weights=tmp_path / "revit.pth", **SMALL)
    assert torch.equal(of_three.blocks[0].norm1.weight, model.blocks[0].norm1.weight[[0, 1, 1]])


def test_position_embeddings_of_another_size_are_resampled(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    larger = rf.create_model(NAME, weights=tmp_path / "vit.pth", img_size=384, **SMALL)
    expected = timm.layers.resample_abs_pos_embed(vit.pos_embed, (24, 24), (14, 14), num_prefix_tokens=1)
    assert torch.allclose(larger.pos_embed, expected, atol=1e-6)


def test_a_mismatch_lists_every_name(vit, tmp_path):
    state = vit.state_dict()
    state["head.weight"] = torch.zeros(4, 192)
    state["extra.weight"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError) as caught:
        rf.create_model(NAME, weights=tmp_path / "vit.pth", **SMALL)
    message = str(caught.value)
    for part in ("1 missing: norm.bias", "1 unexpected: extra.weight", "head.weight (4, 192) instead of (3, 192)"):
        assert part in message


class Malicious:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        rf.create_model(NAME, weights=path, **SMALL)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_broken_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=f"weights: .*{name} cannot be read"):
        rf.create_model(NAME, weights=tmp_path / name, **SMALL)
    with pytest.raises(FileNotFoundError, match=r"weights: there is no file .*absent\.pth"):
        rf.create_model(NAME, weights=tmp_path / "absent.pth", **SMALL)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        rf.create_model(NAME, weights=tmp_path / "list.pth", **SMALL)


def test_a_whole_model_is_refused_with_what_to_save(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"holds other objects.*save the state dict alone") as refused:
        rf.create_model(NAME, weights=tmp_path / "model.pth", **SMALL)
    assert "weights_only" not in str(refused.value), "nobody is told to unpickle it"


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"name: timm knows no model 'deit_huge'; similar: .*deit"):
        rf.create_model("deit_huge")
    with pytest.raises(ValueError, match="similar: deit_small_patch16_224, "):
        rf.create_model("deit_smal_patch16_224")


def test_weights_of_timm_are_not_fetched():
    with pytest.raises(TypeError, match=r"pretrained: not taken.*ReViT\.from_timm\(timm\.create_model\('vit_tiny"):
        rf.create_model("vit_tiny_patch16_224", pretrained=True)


SAVED = {
    "state dict": lambda own: own,
    "state_dict": lambda own: {"state_dict": own, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda own: {"model": own, "args": Namespace(lr=0.1)},
    "model_state_dict": lambda own: {"model_state_dict": own, "loss": 0.5},
    "net": lambda own: {"net": own, "acc": 91.0},
    "ema before model": lambda own: {"model": {n: t + 1 for n, t in own.items()}, "ema": own},
    "ema that is empty": lambda own: {"ema": None, "model_ema": {}, "model": own},
    "ema of lists": lambda own: {"ema": {"shadow_params": [torch.zeros(2)], "decay": 0.9}, "model": own},
    "two deep": lambda own: {"ema": {"state_dict": own, "decay": 0.999}},
    "state_dict_ema": lambda own: {"state_dict": {n: t + 1 for n, t in own.items()}, "state_dict_ema": own},
    "AveragedModel": lambda own: {"ema": {"n_averaged": torch.tensor(4), **before("module.", own)}},
    "module.": lambda own: before("module.", own),
    "module. twice": lambda own: before("module.module.", own),
    "model. of Lightning": lambda own: {"state_dict": before("model.", own)},
    "_orig_mod.": lambda own: before("_orig_mod.", own),
    "_orig_mod.module.": lambda own: {"model": before("_orig_mod.module.", own)},
    "module._orig_mod.": lambda own: before("module._orig_mod.", own),
    "model.module.": lambda own: before("model.module.", own),
    "compiled blocks": lambda own: {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in own.items()},
}


def before(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


@pytest.mark.parametrize("saved", SAVED)
def test_what_training_loops_save(tmp_path, saved):
    model = tiny()
    content = SAVED[saved](model.state_dict())
    torch.save(content, tmp_path / "w.pth")
    for load in (
        lambda other: other.load_checkpoint(tmp_path / "w.pth"),
        lambda other: other.load_weights(content, "w"),
    ):
        other = rf.ReViT.from_config(model.config)
        load(other)
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_weights_of_a_wrapped_model_start_a_training(tmp_path):
    config = tiny_config(weights=str(tmp_path / "w.pth"))
    model, _ = build_model(tiny_config(), 3)
    torch.save({"net": before("module.", model.state_dict())}, tmp_path / "w.pth")
    loaded, head = build_model(config, 3)
    assert head == ", with the head of the weights, which do not name its classes"
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


def test_prefixes_that_are_names_of_the_model_stay():
    inner = {"model.weight": torch.zeros(1), "model.bias": torch.ones(1)}
    assert state_dict_of(inner, "w", own=inner).keys() == inner.keys()
    assert state_dict_of(before("module.", inner), "w", own=inner).keys() == inner.keys()
    assert state_dict_of(inner, "w").keys() == {"weight", "bias"}
    some = {"model.weight": torch.zeros(1), "bias": torch.ones(1)}
    assert state_dict_of(some, "w").keys() == some.keys(), "a prefix of some names alone"
    both = {"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}
    assert state_dict_of(both, "w").keys() == both.keys(), "two names never become one"
    endless = {}
    endless["model"] = endless
    with pytest.raises(ValueError, match=r"holds no state dict of tensors, but model \(dict\)"):
        state_dict_of(endless, "w")


def test_a_misfit_names_five_and_counts_all(tmp_path):
    model = tiny()
    state = {f"strange{i:02}.weight": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError) as refused:
        model.load_weights(state, "w.pth")
    message = str(refused.value)
    assert f"{len(list(model.parameters()))} missing: " in message
    assert "30 unexpected: strange00.weight, strange01.weight" in message
    assert "strange04.weight and 25 more" in message
    assert "strange05.weight" not in message
    assert len(message) < 600


HINTS = {
    "backbone": (lambda own: before("backbone.", own) | {"queue": torch.zeros(1)}, r"after 'backbone\.'"),
    "Lightning": (lambda own: before("net.", own) | {"loss.weight": torch.zeros(1)}, r"after 'net\.'"),
    "CLIP": (lambda own: before("visual.t.", {"a": torch.zeros(1)}), "a CLIP with two towers"),
    "Swin": (lambda own: {"layers.0.blocks.0.norm1.weight": torch.zeros(1)}, "a Swin"),
    "DETR": (lambda own: {"class_embed.weight": torch.zeros(1)}, "a model for detection"),
    "MAE": (lambda own: own | {"mask_token": torch.zeros(1)}, "MAE"),
    "transformers": (lambda own: {"vit.encoder.layer.0.output.dense.bias": torch.zeros(1)}, r"from_transformers"),
    "ResNet": (lambda own: {"layer1.0.conv1.weight": torch.zeros(1)}, "a convolutional network"),
    "a run's state": (lambda own: before("model.", own) | {"optimizer.0": torch.zeros(1)}, "state of a training run"),
    "classes": (lambda own: tiny(num_classes=7).state_dict(), r"of 7 classes, the model of 40; give num_classes=7"),
    "width": (lambda own: tiny(embed_dim=12).state_dict(), "12 channels wide, the model 24"),
    "depth": (lambda own: tiny(depth=3).state_dict(), "they have 3 blocks, the model has 2"),
}


@pytest.mark.parametrize("kind", HINTS)
def test_a_misfit_says_what_it_looks_like(kind):
    make, hint = HINTS[kind]
    model = tiny()
    with pytest.raises(ValueError, match=hint):
        model.load_weights(make(model.state_dict()), "w.pth")


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in files:
            archive.writestr(name, b"x")
    return content.getvalue()


def whole(kind):
    content = io.BytesIO()
    if kind == "pth":
        torch.save(tiny().state_dict(), content)
        return content.getvalue()
    return save(tiny().state_dict())


NO_CHECKPOINTS = {
    "nothing": (lambda: b"", "it is empty"),
    "a page": (lambda: b"\n<!DOCTYPE html>\n<html>404", "it is a page of HTML or XML"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS"),
    "an index": (lambda: b'{"metadata": {}, "weight_map": {}}', "it is JSON text, the index of weights in several"),
    "gzip": (lambda: b"\x1f\x8b\x08\0\0\0", "it is compressed by gzip"),
    "an empty archive": (lambda: zipped([]), "it is a zip archive with nothing in it"),
    "another archive": (lambda: zipped(["photo.jpg"]), "it is a zip archive of other files, such as 'photo.jpg'"),
    "TorchScript": (lambda: zipped(["m/constants.pkl", "m/data.pkl"]), "it is a program of TorchScript"),
    "half a pth": (lambda: whole("pth")[:-2000], "it is a zip archive that is cut off"),
    "half tensors": (lambda: whole("safetensors")[:-4], r"it is cut off: it has [\d,]+ of [\d,]+ bytes"),
    "half a header": (lambda: whole("safetensors")[:100], r"it is cut off: it has 100 of [\d,]+ bytes"),
    "no header": (lambda: (64).to_bytes(8, "little") + b"{" * 64, "its header is no safetensors header"),
    "text": (lambda: b"hello, these are no weights", "it begins with b'hello, these are', as none does"),
    "other objects": (lambda: pickle.dumps({"model": Malicious()}), "it holds other objects"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints_say_what_they_are(tmp_path, kind, suffix):
    make, said = NO_CHECKPOINTS[kind]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=said) as refused:
        tiny().load_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)
    for load in (rf.TokenLengthAssigner.load, load_state):
        with pytest.raises(ValueError, match=r"w\.(pth|safetensors) cannot be read"):
            load(path)


def test_the_content_decides_not_the_suffix(tmp_path):
    model = tiny()
    for kind, name in (("pth", "w.safetensors"), ("safetensors", "w.pth"), ("safetensors", "W.SAFETENSORS")):
        (tmp_path / name).write_bytes(whole(kind))
        other = rf.ReViT.from_config(model.config)
        other.load_checkpoint(tmp_path / name)
        assert torch.equal(other.pos_embed, model.pos_embed)
    with pytest.raises(FileNotFoundError, match="is a folder; give a file in it"):
        model.load_checkpoint(tmp_path)


def test_a_path_that_is_no_utf8(tmp_path):
    for kind in ("pth", "safetensors"):
        path = tmp_path / os.fsdecode(b"w\xff." + kind.encode())
        path.write_bytes(whole(kind))
        other = rf.ReViT.from_config(tiny().config)
        other.load_checkpoint(path)
        assert torch.equal(other.pos_embed, tiny().pos_embed)


def test_an_assigner_with_a_damaged_header_is_named(tmp_path):
    path = tmp_path / "tla.safetensors"
    for settings in ("[1]", '{"grids": [' + "9" * 5000 + "]}", '{"grids": [3, 4]}', "{"):
        path.write_bytes(save({"network.x": torch.zeros(1)}, {"format": FORMAT, "assigner": settings}))
        with pytest.raises(ValueError, match=r"assigner: .*tla\.safetensors cannot be read"):
            rf.TokenLengthAssigner.load(path)
