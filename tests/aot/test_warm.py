"""What `bench.gpu_suite` compiles beforehand is what the launches of its steps ask for, and is found by them."""

from dataclasses import replace
from types import SimpleNamespace

import helpers
import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.gpu_launches import Case, asked_of_compiler, compilations
from bench.gpu_suite import warm
from bench.machine_code import Pointer, compile_launch
from revit_fast.kernels.launch import TARGETS

pytestmark = pytest.mark.beside

SM_90 = GPUTarget("cuda", 90, 32)


@pytest.fixture
def a_driver_without_a_gpu(monkeypatch):
    """What the just-in-time path asks of a driver before it launches; a device of which nothing is kept yet."""
    fake = SimpleNamespace(
        get_current_device=lambda: "fake", get_current_stream=lambda device: 0, get_current_target=lambda: SM_90
    )
    monkeypatch.setattr(driver, "_active", fake)


@pytest.mark.parametrize(
    "case",
    [Case("layer_norm", "fwd", "bf16", 384, variant="residual"), Case("attention", "fwd", "bf16", 64, 50)],
    ids=str,
)
def test_a_launch_finds_what_was_compiled_before(case, tmp_path, monkeypatch, a_driver_without_a_gpu):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    (compilation, *_) = compilations([case], ["sm_90"])
    compile_launch(compilation.launch, TARGETS["sm_90"])
    hits = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    launch = compilation.launch
    arguments = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments.values()]

    def call(**options):
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **options}
        launch.kernel.run(*arguments, grid=launch.grid, warmup=True, **launch.constants, **options)

    call()
    assert hits == [True]
    call(num_warps=16)
    assert hits == [True, False], "another launch is compiled anew"


def keys(launches):
    return {asked_of_compiler(launch): f"{launch.kernel.__name__} {launch.constants}" for launch in launches}


def test_launches_of_many_sequences_and_blocks_are_those_of_few(kernels_on_cpu_tensors):
    """What is compiled for small calls serves the large ones."""
    calls = warm.calls("sm_90")
    warmed = keys(launch for call in calls for launch in call.launches("sm_90"))
    assert len(warmed) > 100
    assert len({call.run for call in calls}) == 4
    for call in calls[:: 20 if helpers.quick else 5]:
        groups = tuple((5, n) for _, n in call.setting.groups)
        launches = keys(replace(call, setting=replace(call.setting, groups=groups, depth=2)).launches("sm_90"))
        assert launches
        missing = launches.keys() - warmed.keys()
        assert not missing, (call, [launches[key] for key in missing])
