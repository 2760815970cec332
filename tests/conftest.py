import contextlib
import os

import helpers
import pytest
import torch

from revit_fast.ops import _library, _triton
from revit_fast.packing import PackedBatch


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "interpreter", "cuda"),
        help="where the ops run: C++ kernels, Triton kernels in Triton's interpreter, or Triton kernels on a GPU",
    )


def pytest_configure(config):
    helpers.device = config.getoption("--device")
    helpers.quick = "not full" in config.option.markexpr
    if (helpers.device == "interpreter") != (os.environ.get("TRITON_INTERPRET") == "1"):
        raise pytest.UsageError("--device=interpreter and TRITON_INTERPRET=1 in the environment go together")
    if helpers.device == "interpreter":
        _triton.register("CPU")


@pytest.fixture
def device():
    """Device of the tensors that a test gives to an op: one test file serves every kind of kernel."""
    return torch.device("cuda" if helpers.device == "cuda" else "cpu")


@pytest.fixture
def on_device(device):
    """Whatever a test creates lies on `device`."""
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield


def pytest_generate_tests(metafunc):
    """The C++ kernels run once per instruction set that this machine can execute.

    Sets that differ in their products of narrow weights alone are for modules with a name `NARROW_PRODUCTS`: their
    tests of a narrow dtype, or "all".
    """
    if "isa" in metafunc.fixturenames:
        isas = helpers.ALL_ISAS if hasattr(metafunc.module, "NARROW_PRODUCTS") else helpers.ISAS
        metafunc.parametrize("isa", isas if helpers.device == "cpu" else [helpers.device], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves out what a set that differs in narrow products alone has in common with another: wide weights.

    Two ways to run are slow, and the quick suite runs some cases of a test in them; other ways run them all. In an
    instruction set that is emulated it runs the first case for each narrow dtype. In Triton's interpreter it runs the
    cases with a value of a parameter that no earlier case had.
    """
    kept, known, seen = [], [], set()
    for item in items:
        values = (getattr(item, "callspec", None) and item.callspec.params) or {}
        isa, dtype = values.get("isa"), values.get("dtype")
        is_narrow = dtype in (torch.bfloat16, torch.int8)
        if isa in helpers.PRODUCTS_ONLY and item.module.NARROW_PRODUCTS != "all" and not is_narrow:
            known.append(item)
            continue
        kept.append(item)
        test = item.nodeid.partition("[")[0]
        if isa in helpers.EMULATED and is_narrow:
            met = {(test, isa, dtype)}
        elif helpers.device == "interpreter" and values:
            met = {(test, name, str(value)) for name, value in values.items()}
        else:
            continue
        if met <= seen:
            item.add_marker(pytest.mark.full)
        elif item.get_closest_marker("full") is None:
            seen |= met
    if known:
        config.hook.pytest_deselected(items=known)
        items[:] = kept


@pytest.fixture
def isa(request):
    """Instruction set of the C++ kernels, which is forced; elsewhere the name of the device."""
    if not _library.HAS_EXTENSION or helpers.device != "cpu":
        yield request.param
        return
    before = _library.cpu_isa()
    torch.ops.revit_fast.select_cpu_isa(request.param)
    yield request.param
    torch.ops.revit_fast.select_cpu_isa(before)


@pytest.fixture
def packs_made(monkeypatch):
    """A list that gets the number of sequences of every `PackedBatch` made from rows."""
    made, from_rows = [], PackedBatch.from_rows

    def counted(data, seqlens, **options):
        made.append(len(seqlens))
        return from_rows(data, seqlens, **options)

    monkeypatch.setattr(PackedBatch, "from_rows", counted)
    return made


@pytest.fixture
def pinned(monkeypatch):
    """A list that gets every pair (tensor, its copy) that `Tensor.pin_memory` makes; the copies are not page-locked."""
    pairs = []

    def pin_memory(tensor):
        pairs.append((tensor, tensor.clone()))
        return pairs[-1][1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return pairs


@pytest.fixture(scope="module")
def one_thread():
    """For batches so small that they gain nothing from threads, which on a busy machine wait for each other instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every `torch.empty` with NaN, so that an element no kernel wrote is seen.

    PyTorch does so in its deterministic mode alone; there a GPU's ops without such a form, as cuBLAS, shall only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=helpers.device == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
