"""Machine-code tests compile for GPUs that need not be present. They need Triton's compiler, not its interpreter."""

import importlib.util
import os
from collections import Counter

import helpers
import pytest
import torch

from revit_fast.inference import cuda_graphs
from revit_fast.ops import _triton

COMPILES = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"

collect_ignore_glob = [] if COMPILES else ["test_*.py"]

if COMPILES:
    from bench import gpu_launches

    def _is_sample(case: gpu_launches.Case) -> bool:
        """A bf16 case of every kernel and schedule, and one in fp32."""
        if case.variant == "rms":
            return case.dtype == "bf16" and case.size == 384
        if case.op == "rotary":
            return (case.dtype, case.size) == ("bf16", 64) and case.variant != "learned"
        if case.variant:
            return case.variant == "derived" and case.direction == "fwd" and case.dtype == "bf16"
        if case.dtype == "fp32":
            return case.op == "attention" and case.direction == "fwd" and (case.size, case.seqlen) == (64, 50)
        return case.dtype == "bf16" and case.size in (64, 384) and case.seqlen in (50, 197, 577)

    def _sample() -> list[gpu_launches.Compilation]:
        """All of the cases on one chip of each vendor; on the others attention, whose tiles differ, and rotary."""
        return [
            c
            for c in gpu_launches.compilations(filter(_is_sample, gpu_launches.cases()))
            if c.target in ("sm_90", "gfx942")
            or c.case.op == "rotary"
            or (c.case.op == "attention" and c.case.seqlen == 197)
        ]

    def pytest_generate_tests(metafunc):
        """Makes one test per launch and target: of the sample, and on request of all others, marked `full`."""
        if "compilation" not in metafunc.fixturenames:
            return
        sample = _sample()
        found = [pytest.param(c, id=str(c)) for c in sample]
        if not helpers.quick:
            keys = {(c.target, gpu_launches.asked_of_compiler(c.launch)) for c in sample}
            for c in gpu_launches.compilations(gpu_launches.cases()):
                if (c.target, gpu_launches.asked_of_compiler(c.launch)) not in keys:
                    found.append(pytest.param(c, id=str(c), marks=pytest.mark.full))
        metafunc.parametrize("compilation", found)


@pytest.fixture
def kernels_on_cpu_tensors(monkeypatch):
    """The ops reach the Triton launchers, whose launches a test records."""
    with torch.library._scoped_library("revit_fast", "IMPL") as library:
        _triton.register("CPU", library)
        monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", cuda_graphs.DirectCalls)
        yield


@pytest.fixture(scope="session")
def compiling(request):
    """Starts to compile every selected launch on all cores. A test takes the future of its own launch."""
    wanted = [
        item.callspec.params["compilation"]
        for item in request.session.items
        if "compilation" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    with gpu_launches.pool() as pool:
        futures = gpu_launches.submit(pool, wanted)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture
def code(compilation, compiling):
    """Machine code of the test's launch."""
    return compiling.pop(compilation).result()


def pytest_terminal_summary(terminalreporter):
    """Writes how many cases were compiled per target."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key)]
    ids = [r.nodeid.partition("[")[2] for r in reports if "test_machine_code.py::test_code[" in r.nodeid]
    if ids:
        per_target = Counter(name.split("-")[0] for name in ids)
        counts = ", ".join(f"{n} for {target}" for target, n in per_target.items())
        terminalreporter.write_line(f"machine code: {len(ids)} cases ({counts})")
