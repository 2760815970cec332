"""The op library: one set of schemas, the fallback without the extension, and the choice of an instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_as_accurate, randn

from revit_fast import ops
from revit_fast.ops import _library

ROOT = Path(__file__).parent.parent

needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh interpreter, which imports the same revit_fast and the tests' helpers."""
    path = os.pathsep.join([str(Path(_library.__file__).parents[2]), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@needs_extension
@pytest.mark.parametrize("schema", _library.SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_schemas_of_extension_and_fallback_are_equal(schema):
    name = schema.split("(")[0]
    parsed = torch._C.parse_schema(f"revit_fast::{schema}")
    assert str(getattr(torch.ops.revit_fast, name).default._schema) == str(parsed)


# Every op forward and backward on one ragged pack with padding; saves inputs' gradients and outputs by name.
OPS = """
import sys
import torch
from helpers import randn
from revit_fast import ops
from revit_fast.ops import _library

def run(dtype):
    cu_seqlens = torch.tensor([0, 5, 5, 12, 31], dtype=torch.int32)
    index = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    x, residual, weight, bias, prefix = (
        randn(n, 20, seed=seed, dtype=dtype).requires_grad_() for seed, n in enumerate((33, 33, 3, 3, 2))
    )
    y, total = ops.tal_layer_norm(x, weight, bias, cu_seqlens, index, residual=residual)
    z = ops.tal_layer_norm(x, weight, bias, cu_seqlens, index, 1e-3)
    rms, rms_total = ops.tal_rms_norm(x, weight, cu_seqlens, index, residual=residual)
    rms_alone = ops.tal_rms_norm(x, weight, cu_seqlens, index, 1e-3)
    tokens = ops.assemble_tokens(x, prefix, residual, torch.tensor([7, 0, 3, 9], dtype=torch.int32), cu_seqlens)
    pooled = ops.mean_pool(x, cu_seqlens, 1)
    cos, (q, k) = residual[:, None, :2].float(), (t.view(33, 5, 4) for t in (x, residual))
    turned_q, turned_k = ops.rotary(q, k, cos, cos + 1, half=True)
    outputs = {"q": turned_q, "k": turned_k, "y": y, "sum": total, "z": z, "tokens": tokens, "pooled": pooled}
    outputs |= {"rms": rms, "rms sum": rms_total, "rms alone": rms_alone}
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias, "prefix": prefix}
    results = {name: out.detach() for name, out in outputs.items()}
    for i, (name, out) in enumerate(outputs.items()):
        grad = randn(*out.shape, seed=10 + i, dtype=dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True, allow_unused=True)
        results |= {f"grad of {leaf} through {name}": g for leaf, g in zip(leaves, grads) if g is not None}
    return results

results = {str(dtype): run(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
torch.save({"isa": _library.cpu_isa(), "results": results}, sys.argv[1])
"""


@pytest.mark.parametrize(
    "op", ["varlen_attention", "tal_layer_norm", "residual", "tal_rms_norm", "assemble_tokens", "mean_pool", "rotary"]
)
def test_gradients_of_gradients_are_refused(op):
    cu_seqlens, zero = torch.tensor([0, 5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    x = randn(5, 8).requires_grad_()
    out = {
        "varlen_attention": lambda: ops.varlen_attention(*[x.unsqueeze(1)] * 3, cu_seqlens),
        "tal_layer_norm": lambda: ops.tal_layer_norm(x, x[:1], x[:1], cu_seqlens, zero),
        "residual": lambda: ops.tal_layer_norm(x, x[:1], x[:1], cu_seqlens, zero, residual=x)[0],
        "tal_rms_norm": lambda: ops.tal_rms_norm(x, x[:1], cu_seqlens, zero),
        "assemble_tokens": lambda: ops.assemble_tokens(x, x[:2], x, zero, cu_seqlens),
        "mean_pool": lambda: ops.mean_pool(x, cu_seqlens),
        "rotary": lambda: ops.rotary(*[x.unsqueeze(1)] * 2, *torch.ones(2, 5, 1, 4))[0],
    }[op]()
    (expected,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(NotImplementedError, match=r"^revit_fast::\w+: gradients of gradients are not implemented"):
        (out.sum() + grad.square().sum()).backward()


@pytest.mark.processes
@needs_extension
def test_fallback_equals_extension(tmp_path):
    saved = []
    for name, environment in (("extension", {}), ("fallback", {"REVIT_FAST_NO_EXTENSION": "1"})):
        run = run_python(OPS, str(tmp_path / name), **environment)
        assert run.returncode == 0, run.stderr
        assert ("C++ extension is not built" in run.stderr) == (name == "fallback"), run.stderr
        saved.append(torch.load(tmp_path / name))
    extension, fallback = saved
    assert extension["isa"] == _library.cpu_isas()[0] or "REVIT_FAST_ISA" in os.environ
    assert fallback["isa"] == "reference"
    truths = extension["results"]["torch.float64"]
    for name, truth in fallback["results"]["torch.float64"].items():
        torch.testing.assert_close(truths[name], truth, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    # bfloat16 inputs are other numbers than the float64 ones: there the two are held to each other's rounding.
    for name, truth in truths.items():
        ours, same = (results["results"]["torch.float32"][name] for results in (extension, fallback))
        assert_as_accurate(ours, same, truth, name)
    for name, ours in extension["results"]["torch.bfloat16"].items():
        same = fallback["results"]["torch.bfloat16"][name]
        assert ours.dtype == same.dtype == torch.bfloat16
        torch.testing.assert_close(ours, same, rtol=0.05, atol=0.1, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.processes
@needs_extension
def test_unknown_isa_is_an_import_error():
    run = run_python("import revit_fast", REVIT_FAST_ISA="sse9")
    assert run.returncode != 0
    assert "ImportError: REVIT_FAST_ISA: 'sse9' cannot be executed here; this machine has" in run.stderr


@needs_extension
def test_unknown_isa_cannot_be_selected():
    before = _library.cpu_isa()
    with pytest.raises(RuntimeError, match="isa 'sse9' cannot be executed here"):
        torch.ops.revit_fast.select_cpu_isa("sse9")
    assert _library.cpu_isa() == before


@pytest.mark.processes
@needs_extension
def test_isa_of_the_environment_is_used():
    run = run_python("from revit_fast.ops import _library; print(_library.cpu_isa())", REVIT_FAST_ISA="baseline")
    assert run.stdout.strip() == "baseline", run.stderr
