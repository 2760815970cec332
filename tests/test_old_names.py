"""Objects and programs of before modules moved into folders: pickles name modules, and programs import old paths.

`tests/pickles/` was written by the code before the move, with `pickle.dumps` of the objects that the tests name. The
models are tiny and their weights random.
"""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import full

import revit_fast as rf
from revit_fast._importing import MOVED

HERE = Path(__file__).parent / "pickles"
GRIDS = (4, 3, 2)
IMAGES = [np.random.default_rng(i).integers(0, 256, (12 + i, 11, 3), dtype=np.uint8) for i in range(4)]
CLIPS = [np.random.default_rng(i).integers(0, 256, (3, 12 + i, 11, 3), dtype=np.uint8) for i in range(2)]


def unpickled(name):
    return pickle.loads((HERE / f"{name}.pkl").read_bytes())  # our own files


def assert_same_results(results, expected):
    assert [(r.grid, r.n_tokens, r.error) for r in results] == [(r.grid, r.n_tokens, r.error) for r in expected]
    for result, old in zip(results, expected, strict=True):
        torch.testing.assert_close(result.logits, old.logits, atol=1e-5, rtol=1e-5)


class TestPickles:
    def test_pipeline_and_its_results(self):
        pipe, expected = unpickled("pipeline"), unpickled("results")
        assert type(pipe) is rf.AdaptivePipeline
        assert len(expected) == len(IMAGES)
        assert_same_results(list(pipe(IMAGES)), expected)

    @pytest.mark.parametrize("name", ["model", "optimized"])
    def test_models_with_preprocessor(self, name):
        model, prep = unpickled(name), unpickled("preprocessor")
        assert isinstance(model, rf.ReViT)
        assert type(prep) is rf.AdaptivePreprocessor
        with torch.no_grad():
            logits = model(prep(IMAGES).batch)
        for row, old in zip(logits, unpickled("results"), strict=True):
            torch.testing.assert_close(row, old.logits, atol=1e-5, rtol=1e-5)

    def test_assigner_and_calibration(self):
        assigner = unpickled("assigner")
        assert type(assigner) is rf.TokenLengthAssigner
        np.testing.assert_array_equal(assigner.calibration.suffices, unpickled("calibration").suffices)
        assert assigner.assign(IMAGES) == [r.grid for r in unpickled("results")]

    def test_policies(self):
        from revit_fast.adaptive.policies import Evidence, make_policy

        calibration = unpickled("calibration")
        evidence = Evidence(np.arange(4), np.random.default_rng(0).dirichlet((1, 1, 1), 4), np.linspace(0, 8, 4))
        policies = unpickled("policies")
        assert len(policies) == 8
        for policy in policies:
            same = make_policy(policy.spec, GRIDS, calibration=calibration, macs=[3.0, 2.0, 1.0])
            np.testing.assert_array_equal(policy.choose(evidence), same.choose(evidence))

    def test_a_pack_and_a_configuration(self):
        from revit_fast.train.config import TrainConfig

        batch = unpickled("batch")
        assert type(batch) is rf.PackedBatch
        assert batch.seqlens == (16, 6)
        config = unpickled("config")
        assert type(config) is TrainConfig
        assert config == TrainConfig()
        assert TrainConfig.from_dict(TrainConfig().as_dict() | {"norms": "tal"}) == TrainConfig(), "a run of before"

    def test_clips(self):
        pipe = unpickled("clip_pipeline")
        assert_same_results(list(pipe(CLIPS)), unpickled("clip_results"))

    def test_what_is_pickled_now_names_the_new_modules(self):
        for name in ("pipeline", "optimized", "assigner", "preprocessor", "policies", "results", "model"):
            text = pickle.dumps(unpickled(name))
            old = [
                f"revit_fast.{module}"
                for module in MOVED
                if f"\x8c{chr(len(module) + 11)}revit_fast.{module}".encode() in text
            ]
            assert old == [], name


class TestImports:
    @pytest.mark.parametrize("name", sorted(MOVED))
    def test_every_old_module_gives_what_the_new_ones_define(self, name):
        old = import_module(f"revit_fast.{name}")
        for home in MOVED[name]:
            pytest.importorskip("prometheus_client") if home == "deploy.http" else None
            module = import_module(f"revit_fast.{home}")
            for defined in _defined(Path(module.__file__)):
                assert getattr(old, defined) is not None
        with pytest.raises(AttributeError, match=f"'revit_fast.{name}' has no attribute 'nonsense'"):
            _ = old.nonsense

    def test_the_function_is_not_hidden_by_the_module_of_its_name(self):
        import_module("revit_fast.pipeline")
        assert callable(rf.pipeline)
        assert rf.engine.optimize is rf.optimize

    def test_a_change_that_would_reach_nobody_is_refused(self):
        message = "revit_fast.tla is an old name .*; set 'BATCH' in revit_fast.adaptive.assigner or revit_fast.adaptive"
        with pytest.raises(AttributeError, match=message):
            sys.modules["revit_fast.tla"].BATCH = 1


def _defined(path: Path) -> list[str]:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return [n.name for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]


class TestLazyRoot:
    def run(self, *lines):
        return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)

    @pytest.mark.processes
    def test_names_load_when_they_are_used(self):
        done = self.run(
            "import sys, revit_fast",
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules",
            "assert set(revit_fast.__all__) <= set(dir(revit_fast))",
            "from revit_fast import *",
            "assert ReViT is revit_fast.ReViT and callable(optimize) and ops.varlen_attention",
            "assert revit_fast.packing.PackedBatch is PackedBatch and revit_fast.video.TimeSformer",
            "assert not hasattr(revit_fast, 'nonsense') and not hasattr(revit_fast, '__wrapped__')",
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.processes
    @pytest.mark.parametrize(
        "lines",
        [
            ("import revit_fast", "import torch"),
            full(("import torch", "import revit_fast")),
            full(("from revit_fast.packing import PackedBatch", "import torch, revit_fast.ops")),
            ("from revit_fast.engine import optimize", "import torch"),
            full(("import revit_fast.timm_models", "import torch")),
            full(("from revit_fast import flash_attn_compat", "import torch")),
        ],
    )
    def test_operators_are_there_whatever_comes_first(self, lines):
        done = self.run(
            *lines, "assert torch.ops.revit_fast.varlen_attention", "import torch.nn", "torch.__spec__.loader"
        )
        assert done.returncode == 0, done.stderr

    def test_static_tools_see_the_same_names(self):
        """The imports that only type checkers read are those that the root makes."""
        tree = ast.parse(Path(rf.__file__).read_text(encoding="utf-8"))
        (block,) = [n for n in tree.body if isinstance(n, ast.If)]
        static = {a.name: n.module for n in block.body for a in n.names if n.module != "revit_fast"}
        assert static == {name: f"revit_fast.{home}" for name, home in rf._HOMES.items()}
        assert set(rf.__all__) == {*rf._HOMES, "__version__", "flash_attn_compat", "ops"}
