import pytest
import torch
from helpers import ISAS

from revit_fast.ops import _library


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once per instruction set that this machine can execute."""
    if not _library.HAS_EXTENSION:
        yield request.param
        return
    before = _library.cpu_isa()
    torch.ops.revit_fast.select_cpu_isa(request.param)
    yield request.param
    torch.ops.revit_fast.select_cpu_isa(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every `torch.empty` with NaN, so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
