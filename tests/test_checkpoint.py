"""Checkpoints: both formats, plain ViT and ReViT, and what is said when they do not fit."""

import pickle

import pytest
import timm
import torch
from helpers import randn
from safetensors.torch import save_file

import revit_fast as rf

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
