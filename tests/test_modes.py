"""PyTorch's modes around a call: default dtypes and devices, inference mode, autocast. Results are as without them."""

import ast
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import only_on, randn
from small_models import GRIDS, PATCH, drawn, images_of, make_model
from torch.utils._device import _device_constructors
from train_helpers import noise_images, tiny_config, write_folders

import revit_fast as rf
from revit_fast.deploy import export
from revit_fast.models.vit import ReViT
from revit_fast.streaming.bundle import read_bundle
from revit_fast.train.assigner import train_assigner
from revit_fast.train.run import train
from revit_fast.train.trainer import Trainer
from revit_fast.video.checkpoints import read_folder, save_folder
from revit_fast.video.model import TimeSformer

pytestmark = [only_on("cpu", reason="modes of the host"), pytest.mark.usefixtures("one_thread")]
PACKAGE = Path(rf.__file__).parent


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def flushing_denormals():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "flush": flushing_denormals,
}
SIXTEEN_BITS = ("bfloat16", "float16")
in_every_mode = pytest.mark.parametrize("mode", MODES)


def small_assigner(grids=GRIDS):
    torch.manual_seed(0)
    return rf.TokenLengthAssigner(grids, thumbnail_px=16, widths=(8, 16)).eval()


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30 + 4 * i, 40, 3), dtype=np.uint8) for i in range(4)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    tla = small_assigner()
    tla.calibrate(photos, [0, 1, 2, 1])
    rf.save_bundle(folder, make_model(), tla, policy=("threshold", 0.5))
    return folder


def answers(pipe, photos):
    results = list(pipe(photos))
    assert [r.error for r in results] == [None] * len(photos)
    return [(r.grid, r.logits.tolist(), r.probabilities.tolist()) for r in results]


def every_tensor(module):
    return {name: (t.dtype, t.device.type, t.is_inference()) for name, t in module.state_dict(keep_vars=True).items()}


@in_every_mode
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_loaded_pipeline(bundle, photos, mode, dtype):
    expected = answers(rf.load(bundle, dtype=dtype), photos)
    before = rf.load(bundle, dtype=dtype)  # used for the first time in the mode
    with MODES[mode]():
        pipe = rf.load(bundle, dtype=dtype)
        assert answers(pipe, photos) == expected
        assert answers(before, photos) == expected
    assert answers(pipe, photos) == answers(before, photos) == expected  # nothing kept belongs to the mode


@in_every_mode
def test_what_is_read_from_files(bundle, mode, tmp_path):
    clips = TimeSformer(
        grids=(2,), base_grid=(2, 2), num_frames=2, patch_size=2, num_classes=4, embed_dim=12, depth=1, num_heads=2
    )
    save_folder(tmp_path / "clips", clips)
    expected = [every_tensor(module) for module in (*read_bundle(bundle)[:2], clips)]
    with MODES[mode]():
        found = read_bundle(bundle)
        again = ReViT.from_pretrained(bundle)
        assert [every_tensor(m) for m in (found.model, found.tla, read_folder(tmp_path / "clips").model)] == expected
        assert every_tensor(again) == expected[0]
    images = images_of(GRIDS)
    again(images).sum().backward()  # it can be trained
    assert torch.equal(found.model(images), rf.ReViT.from_pretrained(bundle)(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_has_the_default_dtype_and_a_loaded_one_that_of_its_file(dtype, tmp_path):
    with default_dtype(dtype):
        made = drawn(make_model())
        rf.save_bundle(tmp_path / "bundle", made, small_assigner())
    assert {p.dtype for p in made.parameters()} == {dtype}
    read = read_bundle(tmp_path / "bundle")
    assert {p.dtype for m in (read.model, read.tla) for p in m.parameters()} == {dtype}
    assert torch.equal(read.model(images_of(GRIDS)), made(images_of(GRIDS)))
    assert read.tla.predict_proba([np.zeros((20, 20, 3), np.uint8)]).shape == (1, len(GRIDS))


@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_autocast_leaves_no_tables_of_16_bits(engine):
    """Tables of position embeddings and packed weights outlive the call that made them."""
    model, images = make_model(), images_of([6, (3, 5)])
    expected = rf.optimize(model, engine=engine)(images)
    fast = rf.optimize(model, engine=engine)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first = fast(images)
        model(images)
    assert torch.equal(fast(images), expected)
    assert engine == "modules" or torch.equal(first, expected)
    with torch.no_grad():
        fresh = make_model()(images)
        assert torch.equal(model(images), fresh)


def test_position_tables_keep_their_precision_under_autocast():
    model, images = make_model(depth=0), images_of([(3, 5)])
    tables = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tables.append(model._inputs(images).pos_table)
    assert torch.equal(*tables)


@in_every_mode
def test_calibrated_int8(mode):
    images = images_of(GRIDS)
    expected = rf.optimize(make_model(), torch.int8, calibrate=[images])(images)
    model = make_model()
    with MODES[mode]():
        assert torch.equal(rf.optimize(model, torch.int8, calibrate=[images])(images), expected)


def test_exported_programs():
    """In several modes at once: a trace takes a second."""
    model, tla = make_model(depth=1), small_assigner()
    x, thumbnails = model.pack(images_of([4, 2])).data, randn(2, 3, 16, 16)
    with contextlib.ExitStack() as modes:
        for mode in ("float64", "meta", "inference mode", "autocast"):
            modes.enter_context(MODES[mode]())
        program, assigner = export.export_packed(model, mix=[4, 2]), export.export_assigner(tla)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(images_of([4, 2])))
        assert torch.equal(assigner.module()(thumbnails), tla(thumbnails).softmax(1))


def losses_of_training(folder):
    config = tiny_config(
        data=str(folder / "data"), held_out_share=0.25, epochs=1, augment={"preset": "light", "pad": 1}
    )
    run = folder / f"run{len(list(folder.iterdir()))}"
    accuracy = train(config, run)
    return accuracy.loss, read_bundle(run / "bundle").model


def trained_assigner():
    tla = small_assigner((4, 3, 2))
    images = noise_images(24)
    history = train_assigner(tla, images, images.labels, epochs=1, batch_size=8, balanced=True)
    return history.epochs[-1].held_out_loss


@pytest.fixture(scope="module")
def plainly_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_folders(noise_images(24), folder / "data")
    return folder, losses_of_training(folder)[0], trained_assigner()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "anomaly"])
def test_training(plainly_trained, mode):
    folder, losses, assigner_loss = plainly_trained
    with MODES[mode]():
        if mode in SIXTEEN_BITS:
            for run in (lambda: losses_of_training(folder), trained_assigner):
                with pytest.raises(ValueError, match=r"^torch.set_default_dtype: .* for training, got torch.*float16;"):
                    run()
            return
        found, model = losses_of_training(folder)
    if mode == "float64":  # other draws: a double takes more random bits
        assert model.pos_embed.dtype == torch.float64
        assert found == pytest.approx(losses, abs=0.2)
    else:
        assert found == losses
        assert model.pos_embed.dtype == torch.float32
    if mode not in ("meta", "inference mode"):  # these make an assigner that cannot be trained
        with MODES[mode]():
            assert trained_assigner() == pytest.approx(assigner_loss, abs=0.2 if mode == "float64" else 0)


@pytest.mark.parametrize(
    ("mode", "message"), [("meta", "has no values, it is on the meta device"), ("inference mode", "inference_mode")]
)
def test_what_cannot_be_trained_is_refused(mode, message):
    config = tiny_config()
    with MODES[mode]():
        model, tla = rf.ReViT(grids=config.grids, patch_size=2, num_classes=3, embed_dim=24, depth=1), small_assigner()
    with pytest.raises(ValueError, match=message):
        Trainer(model, noise_images(), config)
    with pytest.raises(ValueError, match=message):
        train_assigner(tla, noise_images(), noise_images().labels)


@in_every_mode
def test_from_timm_makes_the_model_where_the_weights_are(mode):
    timm = pytest.importorskip("timm")
    options = {"img_size": 8, "patch_size": PATCH, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **options).eval()
    expected = ReViT.from_timm(vit, grids=(4, 2))
    with MODES[mode]():
        model = ReViT.from_timm(vit, grids=(4, 2))
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def factory_calls():
    """Every call of PyTorch's functions that make a tensor, except of parameters, which follow the defaults."""
    names = {function.__name__ for function in _device_constructors()}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_parameters = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Parameter"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            function = getattr(node, "func", None)
            if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
                continue
            if function.value.id == "torch" and function.attr in names and id(node) not in of_parameters:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} torch.{function.attr}", {k.arg for k in node.keywords}


def test_every_new_tensor_says_its_dtype_and_its_device():
    """Otherwise both depend on what the caller has set as default."""
    silent = [place for place, given in factory_calls() if not given >= {"dtype", "device"}]
    assert silent == []
