"""Without an optional package: what is optional is left out with a word, what needs it is refused before any work."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from train_helpers import MODEL_KWARGS, noise_images, write_folders

import revit_fast as rf
from revit_fast.streaming.bundle import save_bundle
from revit_fast.train.log import STEPS, RunLog

ROOT = Path(__file__).parent.parent
KWARGS = [f"{name}={value}" for name, value in MODEL_KWARGS.items()]
TRAIN = f"data --output out --model vit_tiny_patch16_224 --model-kwargs {' '.join(KWARGS)} --grids 4 3 2 --batch-size 8"
NOT_INSTALLED = 'revit-fast: {} is not installed: pip install "revit-fast[{}]"\n'

REFUSED = {
    "PIL": {
        "predict data/test --model ./m": NOT_INSTALLED.format("PIL", "cli"),
        "evaluate ./m data": "revit-fast: error: images: none of the first 6 images can be read, first .*: decoding "
        r'needs Pillow: pip install "revit-fast\[cli\]"; repair them\n',
    },
    "timm": {
        "predict data/test --model vit_tiny_patch16_224 --weights x": NOT_INSTALLED.format("timm", "cli"),
        f"fit {TRAIN}": r'revit-fast: error: --model: architectures by name need timm: .*"revit-fast\[timm\]"\n',
    },
    "safetensors": {
        f"train {TRAIN}": NOT_INSTALLED.format("safetensors", "cli"),
        "predict data/test --model ./m": r'revit-fast: error: .*safetensors: pip install "revit-fast\[timm\]"\n',
    },
    "scipy": {
        f"fit {TRAIN}": NOT_INSTALLED.format("scipy", "train"),
        f"train {TRAIN}": NOT_INSTALLED.format("scipy", "train"),
        "evaluate ./m data": NOT_INSTALLED.format("scipy", "train"),
    },
    "huggingface_hub": {
        "predict data/test --model hf-hub:a/b": r'revit-fast: error: .* need huggingface_hub: .*"revit-fast\[hub\]"\n'
    },
    "matplotlib": {
        "evaluate ./m data --plot plot.png": NOT_INSTALLED.format("matplotlib", "plot"),
        "explain data/test --model ./m --output sheet.png": NOT_INSTALLED.format("matplotlib", "plot"),
    },
    "gradio": {"demo ./m": NOT_INSTALLED.format("gradio", "page")},
    **{
        package: {"export ./m --format onnx --output out": NOT_INSTALLED.format(package, "export")}
        for package in ("onnx", "onnxscript")
    },
    "pyarrow": {"embed data/test --model ./m --output x.parquet": NOT_INSTALLED.format("pyarrow", "parquet")},
    "ray": {"predict data/test --model ./m --engine ray --output out": NOT_INSTALLED.format("ray", "ray")},
    "starlette": {"serve --model ./m": NOT_INSTALLED.format("starlette", "serve")},
}
"""For every package: commands that need it, and what they answer."""

ELSEWHERE = {
    "av": "test_video_clips",
    "datasets": "test_cli_train",
    "flash_attn": "test_backends",
    "pillow_heif": "test_formats",
    "simplejpeg": "test_jpeg",
    "tensorboard": "test_optional_packages",
    "transformers": "test_transformers_import",
}
"""Packages whose absence another test looks at."""

UNTRIED = {
    "rich": "the bar of a terminal",
    "h11": "of uvicorn",
    "python_multipart": "imported with the service, after starlette",
    "uvicorn": "imported after starlette",
    "prometheus_client": "imported after starlette",
    "skimage": "of the shipped images' script",
    "sklearn": "of the shipped images' script",
    "mlxtend": "of the experiments",
    "statsmodels": "of the experiments",
}

NAMES = {"pillow": "PIL", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def test_every_package_of_an_extra_is_looked_at():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {
        re.split(r"[^\w-]", requirement)[0]
        for extra, requirements in extras.items()
        if extra not in ("bench", "test", "docs", "lint")
        for requirement in requirements
    } - {"revit-fast"}
    modules = {NAMES.get(name, name.replace("-", "_")) for name in needed}
    assert modules <= REFUSED.keys() | ELSEWHERE.keys() | UNTRIED.keys()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What every command answers where its package cannot be imported, by package and command."""
    folder = tmp_path_factory.mktemp("without")
    write_folders(noise_images(24), folder / "data" / "train")
    write_folders(noise_images(6), folder / "data" / "test")
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
    model = rf.ReViT(grids=(4, 3, 2), patch_size=2, num_classes=3, **size).eval()
    save_bundle(folder / "m", model, None, classes=("bright", "dark", "middle"))
    cases = {package: [command.split() for command in commands] for package, commands in REFUSED.items()}
    script = Path(__file__).with_name("without_packages.py")
    run = subprocess.run(
        [sys.executable, str(script), str(folder)],
        input=json.dumps(cases),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    written = sorted({path.name for path in folder.iterdir()} - {"data", "m"})
    return {package: dict(zip(REFUSED[package], rows, strict=True)) for package, rows in found.items()}, written


@pytest.mark.processes
@pytest.mark.parametrize(
    ("package", "command"), [(p, command) for p, commands in REFUSED.items() for command in commands]
)
def test_a_command_that_needs_a_package_is_refused_by_one_line(answers, package, command):
    code, out, err = answers[0][package][command]
    expected = REFUSED[package][command]
    assert (code, out) == (2, ""), err
    assert err == expected or re.fullmatch(expected, err), err


@pytest.mark.processes
def test_refused_commands_write_nothing(answers):
    assert answers[1] == []


def test_training_without_tensorboard_leaves_its_files_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    terminal = io.StringIO()
    log = RunLog(tmp_path, terminal=terminal)
    log.add(STEPS, {"step": 1, "loss": 0.5})
    log.close()
    assert terminal.getvalue() == 'tensorboard/ is left out; it needs tensorboard: pip install "revit-fast[train]"\n'
    assert [path.name for path in tmp_path.iterdir()] == [STEPS]
