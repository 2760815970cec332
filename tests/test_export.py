"""Exported programs beside the model that they were made of: in Python, in C++ without Python, in ONNX Runtime."""

import ctypes
import io
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate, full, randn
from PIL import Image
from small_models import GRIDS, MIX, drawn, images_of, make_model

import revit_fast as rf
from revit_fast.adaptive.policies import smallest_sufficient, suffices
from revit_fast.cli import main
from revit_fast.deploy import export
from revit_fast.models.hub import SHIPPED
from revit_fast.ops import _library
from revit_fast.streaming.bundle import read_bundle
from revit_fast.train.datasets import open_images

pytestmark = pytest.mark.beside

ROOT = Path(__file__).parent.parent
EXTENSION = next((ROOT / "revit_fast").glob("_C*.so"), None)
MIXES = ([6], [2, 2, 2, 4], [6, 4, 2, 6, 6, 2, 4], [(3, 5), 6, (3, 5)], [4] * 33)
OPTIONS = {
    "plain": {},
    "average": {"global_pool": "avg", "class_token": False},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4, "init_values": 0.1, "pre_norm": True, "no_embed_class": True},
    "unpooled": {"global_pool": "", "num_classes": 0, "depth": 1},
    "rms": {"norm_layer": "rms", "pre_norm": True, "global_pool": "avg"},
}
# All but those that reach no operator of an exported model that another has not.
SOME_OPTIONS = [full(o) if name in ("average", "distilled") else o for name, o in OPTIONS.items()]
needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="needs the C++ extension")


@pytest.fixture(scope="module")
def photographs():
    """Photographs that scikit-image ships: of several sizes, portrait and landscape, one of them grey."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png")
    images = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    return [*images, np.ascontiguousarray(images[1].transpose(1, 0, 2))]


def seen_by(model, photographs, mix):
    """A pack of photographs through the package's own preprocessing, each at its grid."""
    prep = rf.AdaptivePreprocessor.for_model(model, policy=("fixed", model.grids[0]))
    return prep.pack(photographs[: len(mix)], mix)


def in_new_process(code, *args):
    """Runs Python code that must not import this package by itself."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd="/")


class TestPackedProgram:
    @pytest.mark.parametrize("optimized", [False, True], ids=["model", "optimised"])
    @pytest.mark.parametrize("options", SOME_OPTIONS, ids=OPTIONS)
    def test_one_program_gives_every_mix_the_models_bits(self, tmp_path, options, optimized):
        model = make_model(**options)
        model = rf.optimize(model) if optimized else model
        program = export.export_packed(model, [*GRIDS, (3, 5)])
        export.save_program(program, tmp_path / "program.pt2", {})
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for mix in MIXES:
            batch = model.pack(images_of(mix))
            assert torch.equal(loaded(batch.data, batch.grid_hw), model(batch)), mix

    def test_photographs(self, photographs):
        model = make_model()
        program = export.export_packed(model).module()
        for mix in ([6, 4, 2, 2, 6, 4], [2, 6], [4]):
            batch = seen_by(model, photographs, mix)
            assert torch.equal(program(batch.data, batch.grid_hw), model(batch)), mix

    @pytest.mark.parametrize("optimized", [False, True], ids=["model", "optimised"])
    def test_a_fixed_mix_takes_its_rows_alone(self, optimized):
        model = rf.optimize(make_model()) if optimized else make_model()
        program = export.export_packed(model, mix=[6, (3, 5), 2, 6]).module()
        batch = model.pack(images_of([6, (3, 5), 2, 6]))
        assert torch.equal(program(batch.data), model(batch))
        with pytest.raises((RuntimeError, AssertionError), match=r"9[12]"):
            program(batch.data[:-1])

    def test_it_does_not_depend_on_what_the_model_has_met(self):
        model = make_model()
        model(images_of([(1, 7), (3, 5)]))
        program = export.export_packed(model).module()
        with pytest.raises(RuntimeError, match="pos_offset of sequence 1 is -1"):
            program(randn(36 + 15, 12), torch.tensor([[6, 6], [3, 5]], dtype=torch.int32))

    def test_rows_that_are_missing_are_an_error(self):
        program = export.export_packed(make_model()).module()
        with pytest.raises(RuntimeError, match="cu_seqlens ends at 40, beyond the 39 rows"):
            program(randn(39, 12), torch.tensor([[6, 6], [2, 2]], dtype=torch.int32))

    def test_an_optimised_copy_is_one_op_and_its_packed_weights(self, tmp_path):
        model = make_model(embed_dim=64, num_heads=2, hidden_dim=256)
        if not _library.HAS_EXTENSION:
            pytest.skip("needs the C++ extension")
        program = export.export_packed(rf.optimize(model))
        ours = [node.target._opname for node in program.graph.nodes if "revit_fast" in str(node.target)]
        assert ours == ["vit_forward", "packed_linear"]
        export.save_program(program, tmp_path / "program.pt2", {})
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        assert (tmp_path / "program.pt2").stat().st_size < 1.5 * n_bytes

    def test_programs_of_before_there_was_rms_norm(self):
        """The schema of the norms' op has changed since: its bias became optional."""
        model = rf.ReViT(grids=(2, 1), patch_size=2, num_classes=3, embed_dim=4, depth=1, num_heads=1, hidden_dim=4)
        batch = drawn(model).pack(images_of([2, 1]))
        program = (Path(__file__).parent / "programs" / "layer_norms.pt2.xz").read_bytes()
        loaded = torch.export.load(io.BytesIO(lzma.decompress(program))).module()
        torch.testing.assert_close(loaded(batch.data, batch.grid_hw), model(batch), atol=1e-6, rtol=1e-6)

    @needs_extension
    def test_a_copy_that_calls_modules_is_exported_as_the_model(self):
        """Compiled code runs plain layers."""
        model = make_model(act_layer=torch.nn.Softsign)
        fast = rf.optimize(model, engine="modules")
        batch = model.pack(images_of(MIX))
        with torch.no_grad():
            fast(batch)
            program = export.export_packed(fast, dict.fromkeys(MIX))
            assert {name for name in program.state_dict if name.startswith("model.")} == {
                f"model.{name}" for name in model.state_dict() if name != "_extra_state"
            }
            torch.testing.assert_close(program.module()(batch.data, batch.grid_hw), model(batch))
            x = torch.stack(images_of([6, 6]))
            single = export.export_single(rf.optimize(make_model(), engine="modules"), 6)
            torch.testing.assert_close(single.module()(x), make_model()(x), atol=1e-5, rtol=1e-5)

    def test_without_the_package_it_needs_the_extension_alone(self, tmp_path):
        model, path = make_model(), tmp_path / "program.pt2"
        export.save_program(export.export_packed(model), path, {"classes": ["a"]})
        batch = model.pack(images_of([6, 2]))
        torch.save(
            {"rows": batch.data, "grid_hw": batch.grid_hw, "logits": model(batch).detach()}, tmp_path / "case.pt"
        )
        code = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
extra = {"revit_fast.json": ""}
program = torch.export.load(sys.argv[2], extra_files=extra).module()
case = torch.load(sys.argv[3], weights_only=True)
assert torch.equal(program(case["rows"], case["grid_hw"]), case["logits"])
assert "revit_fast" not in sys.modules
print(json.loads(extra["revit_fast.json"]))
"""
        done = in_new_process(code, EXTENSION, path, tmp_path / "case.pt")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "{'classes': ['a']}"


class TestSingleProgram:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("grid", [full(2), (3, 5)])
    def test_it_is_as_accurate_as_the_model(self, options, grid):
        model = make_model(**options)
        truth = make_model(**options).double()
        program = export.export_single(model, grid).module()
        for n in (1, 2, 5):
            x = torch.stack(images_of(n * [grid]))
            # Unpooled logits are [B, N, classes] of both.
            assert_as_accurate(program(x), model(x), truth(x.double()), f"logits of {n} images")

    def test_it_consists_of_pytorchs_own_operators(self, tmp_path):
        model, path = make_model(), tmp_path / "program.pt2"
        export.save_program(export.export_single(model, 4), path, {})
        x = torch.stack(images_of([4, 4, 4]))
        torch.save({"x": x, "logits": model(x).detach()}, tmp_path / "case.pt")
        code = """
import sys, torch
case = torch.load(sys.argv[2], weights_only=True)
logits = torch.export.load(sys.argv[1]).module()(case["x"])
assert "revit_fast" not in sys.modules
print((logits - case["logits"]).abs().max().item())
"""
        done = in_new_process(code, path, tmp_path / "case.pt")
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= 1e-6


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: export.export_packed(torch.nn.Linear(2, 2)), TypeError, "expected a revit_fast.ReViT, got Linear"),
            (lambda: export.export_packed(make_model().train()), ValueError, "training mode"),
            (lambda: export.export_single(make_model().to("meta"), 2), ValueError, "expected it on the CPU, got meta"),
            (lambda: export.export_single(make_model(stem_chans=4), 2), ValueError, "has a convolutional stem"),
            (lambda: export.export_packed(make_model(aux_head=True)), ValueError, "has a token-label head"),
            (lambda: export.export_packed(make_model(), []), ValueError, "grids: expected at least one grid"),
            (
                lambda: export.export_packed(make_model(), mix=[2, 0]),
                ValueError,
                "mix: expected positive ints .* got 0",
            ),
            (lambda: export.export_single(make_model(), (2, 3, 4)), ValueError, r"grid: .* got \(2, 3, 4\)"),
            (lambda: export.export_assigner(rf.TokenLengthAssigner(GRIDS)), ValueError, "training mode"),
            (lambda: export.save_program(None, "model.onnx", {}), ValueError, "ends in .pt2, got 'model.onnx'"),
            (lambda: export.compile_package(None, "model", {}), ValueError, "ends in .pt2, got 'model'"),
        ],
    )
    def test_arguments(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--format", "tflite", "--output", "a.pt2"], "invalid choice: 'tflite'"),
            (["--format", "aoti", "--output", "a.onnx"], "--output: expected a name that ends in .pt2, got 'a.onnx'"),
            (["--format", "onnx", "--output", "a.onnx"], "give --grid for one file"),
            (["--format", "onnx", "--output", "no/a.onnx", "--grid", "7"], "--output: cannot write no/a.onnx"),
            (
                ["--format", "torch-export", "--output", "a.pt2", "--grid", "9"],
                r"one of the model's [14, 10, 7], got 9",
            ),
            (["--format", "torch-export", "--output", "a.pt2", "--labels", "no"], "--labels: cannot read no"),
        ],
    )
    def test_usage_errors(self, tmp_path, monkeypatch, capsys, options, message):
        monkeypatch.chdir(tmp_path)
        assert main(["export", "fashion-mnist", *options]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_missing_packages(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        assert main(["export", "fashion-mnist", "--format", "onnx", "--output", str(tmp_path / "onnx")]) == 2
        assert capsys.readouterr().err == (
            'revit-fast: onnxscript is not installed: pip install "revit-fast[export]"\n'
        )

    def test_a_missing_compiler(self, tmp_path, capsys):
        from torch._inductor import config

        path = tmp_path / "model.pt2"
        path.write_bytes(b"as it was")
        with config.patch({"cpp.cxx": ("no-such-compiler",)}):
            assert main(["export", "fashion-mnist", "--format", "aoti", "--output", str(path)]) == 1
        assert "AOTInductor needs a C++ compiler: install g++ or clang++" in capsys.readouterr().err
        assert path.read_bytes() == b"as it was"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_missing_extension(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(_library, "HAS_EXTENSION", False)
        assert main(["export", "fashion-mnist", "--format", "aoti", "--output", str(tmp_path / "model.pt2")]) == 2
        assert "a package of all grids calls the C++ extension" in capsys.readouterr().err

    def test_a_folder_with_other_files_is_left_alone(self, tmp_path, capsys):
        pytest.importorskip("onnxscript")
        (tmp_path / "notes.txt").write_text("mine")
        assert main(["export", "fashion-mnist", "--format", "onnx", "--output", str(tmp_path)]) == 2
        assert "holds other files; give a new folder" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def small():
    """A model whose packages compile quickly, as a bundle would have it."""
    model = make_model(embed_dim=64, num_heads=2, hidden_dim=128, num_classes=7)
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.8}
    return model


@pytest.fixture(scope="module")
def package(small, tmp_path_factory):
    """The package that `revit-fast export` writes of the small model."""
    folder = tmp_path_factory.mktemp("package")
    rf.save_bundle(folder / "bundle", small, None, classes=list("abcdefg"))
    path = folder / "model.pt2"
    assert main(["export", f"{folder}/bundle", "--format", "aoti", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """docs/examples/classify.cpp, compiled as docs/export.md says."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    path, torch_root = tmp_path_factory.mktemp("program") / "classify", Path(torch.__file__).parent
    libraries = f"-L{torch_root}/lib -Wl,--no-as-needed,-rpath,{torch_root}/lib -ltorch -ltorch_cpu -lc10"
    source = [ROOT / "docs" / "examples" / "classify.cpp", f"-I{torch_root}/include"]
    subprocess.run([compiler, "-std=c++20", "-O0", *source, *libraries.split(), "-o", path], check=True)
    return path


@needs_extension
@pytest.mark.timeout(1800)  # compilers take a minute, and several on a busy machine
class TestPackage:
    def test_in_python(self, small, package, photographs):
        loaded, fast = torch._inductor.aoti_load_package(package), rf.optimize(small)
        for mix in MIXES:
            if (3, 5) not in mix:
                batch = small.pack(images_of(mix))
                assert torch.equal(loaded(batch.data, batch.grid_hw), fast(batch)), mix
        batch = seen_by(small, photographs, [6, 4, 2, 2, 6, 4])
        assert torch.equal(loaded(batch.data, batch.grid_hw), fast(batch))
        with pytest.raises(RuntimeError, match="pos_offset of sequence 0 is -1"):
            loaded(randn(15, 12), torch.tensor([[3, 5]], dtype=torch.int32))

    def test_its_settings(self, small, package):
        metadata = torch._inductor.aoti_load_package(package).get_metadata()
        expected = export.model_settings(small, list("abcdefg"))
        assert expected["mean"] == [0.4, 0.5, 0.6]
        assert {name: json.loads(metadata[name]) for name in expected} == expected

    def test_without_python(self, small, package, program, photographs, tmp_path):
        """Files to logits in C++: the resize, the normalisation and the model give the bits that they give here."""
        paths = []
        for i, image in enumerate(photographs):
            paths.append(str(tmp_path / f"{i}.ppm"))
            Image.fromarray(image).save(paths[-1])
        done = subprocess.run([program, EXTENSION, package, "6,2,4", *paths], capture_output=True, text=True, env={})
        assert done.returncode == 0, done.stderr
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        assert [line[:2] for line in lines] == [[p, g] for p, g in zip(paths, "624624", strict=True)]
        expected = rf.optimize(small)(seen_by(small, photographs, [6, 2, 4, 6, 2, 4]))
        assert torch.equal(torch.tensor([[float(value) for value in line[3:]] for line in lines]), expected)
        assert [int(line[2]) for line in lines] == expected.argmax(dim=1).tolist()
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu" in linked
        assert "python3" not in linked.replace(str(Path(torch.__file__).parent), "")

    @pytest.mark.parametrize(
        ("library", "model", "grids", "image", "message"),
        [
            (EXTENSION, None, "3", None, "pos_offset of sequence 0 is -1: its 9 patches"),
            ("/no/_C.so", None, "6", None, "/no/_C.so: cannot open shared object file"),
            (EXTENSION, "/no/model.pt2", "6", None, "Failed to initialize zip archive"),
            (EXTENSION, None, "six", None, "grids: expected one or more such as 14,7, got 'six'"),
            (EXTENSION, None, "6", "/no/image.ppm", "/no/image.ppm: expected a binary PPM file"),
        ],
    )
    def test_what_the_program_says_of_errors(self, package, program, tmp_path, library, model, grids, image, message):
        path = tmp_path / "image.ppm"
        Image.new("RGB", (20, 30)).save(path)
        command = [program, library, model or package, grids, image or path]
        done = subprocess.run(command, capture_output=True, text=True, env={})
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]

    def test_it_names_the_instruction_set_that_it_was_compiled_for(self, small, package):
        others = [isa for isa in _library.cpu_isas() if isa != _library.cpu_isa()]
        if not others:
            pytest.skip("one instruction set")
        batch = small.pack(images_of([6, 2]))
        loaded, before = torch._inductor.aoti_load_package(package), _library.cpu_isa()
        torch.ops.revit_fast.select_cpu_isa("baseline" if "baseline" in others else others[0])
        try:
            with pytest.raises(RuntimeError, match="instruction set"):
                loaded(batch.data, batch.grid_hw)
        finally:
            torch.ops.revit_fast.select_cpu_isa(before)

    @pytest.mark.full  # it compiles; the programs of both kinds are those of TestPackedProgram
    def test_of_the_models_own_modules(self, tmp_path):
        """What is no optimised copy keeps its ops: the package passes their empty lists and optional tensors on."""
        model = make_model(depth=1)
        export.compile_package(export.export_packed(model), tmp_path / "ops.pt2", {})
        loaded = torch._inductor.aoti_load_package(tmp_path / "ops.pt2")
        for mix in ([6], [2, 4, 6, 2]):
            batch = model.pack(images_of(mix))
            assert (loaded(batch.data, batch.grid_hw) - model(batch)).abs().max() <= 1e-6, mix

    @pytest.mark.full  # it compiles what TestSingleProgram loads as a program
    def test_of_one_grid_it_needs_nothing_of_ours(self, tmp_path):
        model = make_model(depth=1)
        export.compile_package(export.export_single(model, 4), tmp_path / "single.pt2", {})
        x = torch.stack(images_of([4, 4, 4]))
        torch.save({"x": x, "logits": model(x).detach()}, tmp_path / "case.pt")
        code = """
import sys, torch
case = torch.load(sys.argv[2], weights_only=True)
loaded = torch._inductor.aoti_load_package(sys.argv[1])
assert "revit_fast" not in sys.modules
print(max((loaded(case["x"][:n]) - case["logits"][:n]).abs().max().item() for n in (1, 2, 3)))
"""
        done = in_new_process(code, tmp_path / "single.pt2", tmp_path / "case.pt")
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= 1e-6


@needs_extension
def test_the_extension_is_a_plain_library():
    """It can be loaded by a program without an interpreter: nothing of Python's is left to resolve."""
    symbols = EXTENSION.read_bytes()
    assert b"PyInit_" not in symbols
    assert b"Py_" not in symbols
    assert ctypes.CDLL(str(EXTENSION)) is not None


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    """The shipped model and its assigner as ONNX."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx") / "fashion-mnist"
    assert main(["export", "fashion-mnist", "--format", "onnx", "--output", str(folder)]) == 0
    return folder


def session(path):
    """An ONNX Runtime session and the settings of its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kept = opened.get_modelmeta().custom_metadata_map
    return opened, {name: json.loads(value) for name, value in kept.items()}


@pytest.mark.timeout(900)
class TestOnnx:
    def test_files(self, onnx_folder):
        import onnx

        bundle = read_bundle("fashion-mnist")
        assert sorted(p.name for p in onnx_folder.iterdir()) == [
            "assigner.onnx",
            "grid-10.onnx",
            "grid-14.onnx",
            "grid-7.onnx",
        ]
        for path in onnx_folder.iterdir():
            model = onnx.load(path)
            onnx.checker.check_model(model, full_check=True)
            assert [(o.domain, o.version) for o in model.opset_import] == [("", export.OPSET)]
        _, settings = session(onnx_folder / "grid-7.onnx")
        assert settings == {**export.model_settings(bundle.model, bundle.classes), "grid": 7}
        assert settings["classes"][9] == "Ankle boot"

    def test_another_runtime_does_the_whole_adaptive_thing(self, onnx_folder, photographs):
        """Garments of the test set and photographs, from the thumbnail to the logits, beside the pipeline."""
        garments = open_images(SHIPPED / "fashion-mnist" / "images", "test", read_bundle("fashion-mnist").classes)
        images = [garments.image(i) for i in range(60)] + photographs
        pipe = rf.load("fashion-mnist", optimize=False)
        results = list(pipe(images))
        assert len({r.grid for r in results}) > 1

        assigner, settings = session(onnx_folder / "assigner.onnx")
        prep = pipe.prep
        thumbnails = prep.tla.images_of(prep.tla.thumbnails(images, prep.seen(images)))
        (probabilities,) = assigner.run(None, {"thumbnails": thumbnails.numpy()})
        assert np.abs(probabilities - prep.tla.predict_proba(images, prep.seen(images)).numpy()).max() <= 1e-5
        chosen = smallest_sufficient(suffices(probabilities), settings["threshold"])
        grids = [settings["grids"][i] for i in chosen]
        assert grids == [r.grid for r in results]

        patch = prep.patch_size
        for grid in sorted(set(grids)):
            model, settings = session(onnx_folder / f"grid-{grid}.onnx")
            side = settings["grid"] * settings["patch_size"]
            own = [i for i, g in enumerate(grids) if g == grid]
            rows = prep.pack([images[i] for i in own], [grid] * len(own)).data
            x = rows.view(len(own), grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side, side)
            (logits,) = model.run(None, {"images": x.numpy()})
            expected = np.stack([results[i].logits for i in own])
            assert np.abs(logits - expected).max() <= 1e-4
            assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()

    @pytest.mark.parametrize("norm", [full("layer"), "rms"])
    def test_one_grid_in_half_the_precision_is_written_in_float32(self, tmp_path, norm):
        pytest.importorskip("onnxruntime")
        model = make_model(distilled=True, norm_layer=norm).bfloat16()
        export.write_single_onnx(model, (3, 5), tmp_path / "one.onnx", {})
        opened, settings = session(tmp_path / "one.onnx")
        assert settings == {"grid": [3, 5]}
        x = torch.stack(images_of(3 * [(3, 5)]))
        for n in (1, 3):
            (logits,) = opened.run(None, {"images": x[:n].numpy()})
            assert np.abs(logits - model.float()(x[:n]).detach().numpy()).max() <= 1e-4

    def test_weights_beyond_one_file_are_refused(self, tmp_path, monkeypatch):
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(export, "ONNX_BYTES", 1 << 12)
        with pytest.raises(ValueError, match="MiB of weights, one ONNX file holds"):
            export.write_single_onnx(make_model(), 2, tmp_path / "one.onnx", {})
        assert not list(tmp_path.iterdir())
