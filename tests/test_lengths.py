"""Weights meet a model of other lengths, base grids or classes: each row goes to what it was trained for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_helpers import MODEL_KWARGS, noise_images, tiny_config, tiny_trainer

import revit_fast as rf
from revit_fast.grids import rows_of_lengths
from revit_fast.models.loading import MadeFor
from revit_fast.models.weights import EXTRA_STATE, named_classes
from revit_fast.streaming.bundle import save_bundle
from revit_fast.train.checkpoint import save_weights
from revit_fast.train.data import ArrayImages
from revit_fast.train.run import build_model
from revit_fast.video.checkpoints import read_folder, save_folder
from revit_fast.video.model import TimeSformer

SMALL = {"patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def different_norms(model):
    """The model with norms that tell every length from the others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def revit(grids, **kwargs):
    return different_norms(rf.ReViT(grids=grids, **SMALL | {"base_grid": (4, 4)} | kwargs))


def timesformer(grids):
    kwargs = {name: value for name, value in SMALL.items() if name != "num_classes"}
    return different_norms(TimeSformer(grids=grids, base_grid=(4, 4), num_frames=2, num_classes=3, **kwargs))


def image(grid):
    return torch.randn(3, 2 * grid, 2 * grid, generator=torch.Generator().manual_seed(grid))


def assert_same_at(a, b, grids):
    """Both models give the same logits for an image of each grid."""
    for grid in grids:
        with torch.no_grad():
            assert torch.equal(a([image(grid)]), b([image(grid)])), grid


@pytest.mark.parametrize(
    ("saved", "own", "rows"),
    [
        ((4, 3, 2), (5, 4, 3), [0, 0, 1]),
        ((4, 3, 2), (4, 3, 2), [0, 1, 2]),
        ((4, 3, 2), (3,), [1]),
        ((7,), (14, 7), [0, 0]),
        ((7, 1), (5,), [0]),  # 25 patches are 24 from either: the longer
        ((14, 10, 7), (28, 20, 14), [0, 0, 0]),
    ],
)
def test_rows_follow_the_length_that_is_nearest(saved, own, rows):
    assert rows_of_lengths(saved, own) == rows


def test_scaled_lengths_are_a_choice_that_is_named():
    assert rows_of_lengths((14, 10, 7), (28, 20, 14), "order") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"by order, 3 grids \(14, 10, 7\) cannot give 2 grids \(28, 14\)"):
        rows_of_lengths((14, 10, 7), (28, 14), "order")
    with pytest.raises(ValueError, match="match_norms: expected one of length, order, got 'place'"):
        rows_of_lengths((14, 10, 7), (28, 14), "place")


def from_pretrained(model, new, folder):
    model.save_pretrained(folder)
    return rf.ReViT.from_pretrained(folder, grids=new.grids)


def from_pretrained_of_before(model, new, folder):
    """Its file does not name the grids; its configuration does."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights[EXTRA_STATE]
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("files", None)
    (folder / "config.json").write_text(json.dumps(config))
    return rf.ReViT.from_pretrained(folder, grids=new.grids)


def by_load_state_dict(model, new, folder):
    new.load_state_dict(model.state_dict())
    return new


def by_load_state_dict_inside_another_module(model, new, folder):
    outer, other = torch.nn.Sequential(new), torch.nn.Sequential(model)
    outer.load_state_dict(other.state_dict())
    return outer[0]


def by_assigning(model, new, folder):
    new.load_state_dict(model.state_dict(), assign=True)
    return new


def from_pth(model, new, folder):
    torch.save({"state_dict": model.state_dict()}, folder.with_suffix(".pth"))
    new.load_checkpoint(folder.with_suffix(".pth"))
    return new


def from_safetensors(model, new, folder):
    save_weights(folder.with_suffix(".safetensors"), model.state_dict())
    new.load_checkpoint(folder.with_suffix(".safetensors"))
    return new


def with_grids_as_given(model, new, folder):
    weights = {name: value for name, value in model.state_dict().items() if name != EXTRA_STATE}
    new.load_weights(weights, "weights", grids=model.grids)
    return new


def through_an_optimised_copy(model, new, folder):
    fast = rf.optimize(new)
    fast.load_state_dict(model.state_dict())
    return fast


WAYS = [
    from_pretrained,
    from_pretrained_of_before,
    by_load_state_dict,
    by_load_state_dict_inside_another_module,
    by_assigning,
    from_pth,
    from_safetensors,
    with_grids_as_given,
    through_an_optimised_copy,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("grids", [(5, 4, 3), (3,), (4, 3, 2)], ids=str)
def test_lengths_that_stay_keep_their_norms(way, grids, tmp_path):
    model = revit((4, 3, 2))
    new = way(model, revit(grids), tmp_path / "model").eval()
    assert new.grids == grids
    stay = [grid for grid in grids if grid in model.grids]
    assert_same_at(rf.optimize(model) if way is through_an_optimised_copy else model, new, stay)
    for grid in set(grids) - set(model.grids):  # a new length has the norms of the nearest
        row, nearest = grids.index(grid), rows_of_lengths(model.grids, [grid])[0]
        assert torch.equal(new.norm.weight[row], model.norm.weight[nearest])


def test_scaled_lengths_keep_their_order(tmp_path):
    model = revit((4, 3, 2))
    model.save_pretrained(tmp_path / "model")
    scaled = rf.ReViT.from_pretrained(tmp_path / "model", grids=(8, 6, 4), match_norms="order")
    assert torch.equal(scaled.blocks[1].norm2.bias, model.blocks[1].norm2.bias)
    with pytest.raises(ValueError, match="by order, 3 grids"):
        rf.ReViT.from_pretrained(tmp_path / "model", grids=(8, 4), match_norms="order")


def test_timesformer_follows_lengths(tmp_path):
    model, new = timesformer((4, 3, 2)), timesformer((5, 4, 3))
    new.load_state_dict(model.state_dict())
    clip = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model([clip]), new([clip]))
    save_folder(tmp_path / "clips", model)
    config = json.loads((tmp_path / "clips" / "config.json").read_text())
    weights = load_file(tmp_path / "clips" / "model.safetensors")
    for state_dict in (weights, {name: value for name, value in weights.items() if name != EXTRA_STATE}):
        new = TimeSformer.from_state_dict(state_dict, config, (5, 4, 3))
        with torch.no_grad():
            assert torch.equal(model([clip]), new([clip]))
    assert read_folder(tmp_path / "clips").model.grids == (4, 3, 2)


@pytest.mark.parametrize("factorized", [False, True])
def test_positions_follow_their_grid_and_not_their_count(factorized):
    kind = {"pos_factorized": factorized}
    model, new = revit((4,), base_grid=(2, 8), **kind), revit((4,), base_grid=(8, 2), **kind)
    assert model.pos_embed.shape == new.pos_embed.shape
    torch.nn.init.normal_(model.pos_embed)
    new.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model.resampling.resampled(model.pos_embed[0, 1:], (8, 2))
        got = new.resampling.resampled(new.pos_embed[0, 1:], (8, 2))
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(new.pos_embed, model.pos_embed)


def test_plain_state_dicts_load_strictly_and_averages_name_the_grids():
    model, new = revit((4, 3, 2)), revit((5, 4, 3))
    plain = {name: value for name, value in model.state_dict().items() if name != EXTRA_STATE}
    new.load_state_dict(plain)  # it names no grids: by order, as they cannot be known
    assert torch.equal(new.norm.weight, model.norm.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        new.load_state_dict({name: value for name, value in plain.items() if name != "head.bias"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_averaged_scaled_and_summed_state_dicts_still_name_the_grids(dtype):
    model, new = revit((4, 3, 2)).to(dtype), revit((5, 4, 3)).to(dtype)
    weights = model.state_dict()
    for changed in (
        {name: 0.3 * value + 0.7 * value for name, value in weights.items()},
        {name: 1.5 * value for name, value in weights.items()},
        {name: value + value for name, value in weights.items()},
    ):
        assert MadeFor.of(changed) == MadeFor((4, 4), (4, 3, 2))
        new.load_state_dict(changed)
        assert torch.equal(new.norm.weight[1], changed["norm.weight"][0])
    for unreadable in (0 * weights[EXTRA_STATE], torch.randn(6), weights[EXTRA_STATE] * torch.nan):
        new.load_state_dict(weights | {EXTRA_STATE: unreadable})  # as if it named none
        assert torch.equal(new.norm.weight, model.norm.weight)


def head_of(folder, names, data_classes):
    """The head that a training on `data_classes` begins with, that of the weights, and the phrase about it."""
    torch.manual_seed(0)
    source = rf.create_model("vit_tiny_patch16_224", (4, 3, 2), num_classes=len(names), **MODEL_KWARGS)
    torch.nn.init.normal_(source.head.weight)
    save_bundle(folder, source, classes=names)
    config = tiny_config(weights=str(folder / "model.safetensors"))
    model, text = build_model(config, len(data_classes), data_classes)
    return model.head.weight.detach(), source.head.weight.detach(), text


def test_a_head_follows_the_names_of_its_classes(tmp_path):
    new, old, text = head_of(tmp_path / "a", ("cat", "dog", "owl"), ("dog", "owl", "cat"))
    assert torch.equal(new, old[[1, 2, 0]])
    assert text == ""
    new, old, text = head_of(tmp_path / "b", ("cat", "dog", "owl"), ("ant", "bee", "fly"))
    assert not any(torch.equal(row, other) for row in new for other in old)
    assert text == ", with a new head"
    new, old, text = head_of(tmp_path / "c", ("cat", "dog", "owl"), ("ant", "dog", "fly", "cat"))
    assert torch.equal(new[[1, 3]], old[[1, 0]])
    assert text == ", with the head's rows of 2 of 4 classes"


def test_weights_that_name_no_classes_say_so(tmp_path):
    model = rf.create_model("vit_tiny_patch16_224", (4, 3, 2), num_classes=3, **MODEL_KWARGS)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = tiny_config(weights=str(tmp_path / "weights.pth"))
    new, text = build_model(config, 3, ("a", "b", "c"))
    assert torch.equal(new.head.weight, model.head.weight)
    assert text == ", with the head of the weights, which do not name its classes"


def test_a_training_names_the_classes_in_its_weights(tmp_path):
    trainer = tiny_trainer(tiny_config(epochs=1), folder=tmp_path)
    trainer.fit()
    for name in ("best.safetensors", "model.safetensors"):
        assert named_classes(tmp_path / name) == ("dark", "middle", "bright")
    # The next training has as many classes of other names, and other grids.
    images = noise_images()
    other = ArrayImages([images.image(i) for i in range(len(images))], images.labels, ("bright", "odd", "dark"))
    config = tiny_config(weights=str(tmp_path / "model.safetensors"), grids=(5, 4, 3))
    new, text = build_model(config, 3, other.classes)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(new.head.weight[[0, 2]], weights["head.weight"][[2, 0]])
    assert torch.equal(new.norm.weight, weights["norm.weight"][[0, 0, 1]])
    assert "2 of 3 classes" in text


def test_a_new_head_has_no_names(tmp_path):
    model = revit((4, 3, 2))
    save_bundle(tmp_path / "named", model, classes=("cat", "dog", "owl"))
    model = rf.ReViT.from_pretrained(tmp_path / "named")
    model.reset_classifier(3)
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["classes"] == ["0", "1", "2"]


def test_an_assigners_outputs_are_its_grids():
    tla = rf.TokenLengthAssigner((4, 3, 2))
    other = rf.TokenLengthAssigner((5, 4, 3))
    with pytest.raises(RuntimeError, match=r"the weights assign grids \(4, 3, 2\), this assigner \(5, 4, 3\)"):
        other.load_state_dict(tla.state_dict())
    again = rf.TokenLengthAssigner((4, 3, 2))
    again.load_state_dict({name: 2 * value for name, value in tla.state_dict().items()})
    again.load_state_dict({name: value for name, value in tla.state_dict().items() if name != EXTRA_STATE})


def test_a_bundle_moved_without_its_configuration_still_names_its_grids(tmp_path):
    model = revit((4, 3, 2))
    model.save_pretrained(tmp_path / "model")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "alone.safetensors")
    new = revit((5, 4, 3))
    new.load_checkpoint(tmp_path / "alone.safetensors")
    assert_same_at(model, new.eval(), (4, 3))
