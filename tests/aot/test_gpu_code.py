"""The command `python -m bench.gpu_code`: the files that it emits and the page that it updates."""

import json
from concurrent.futures import Future

import pytest

from bench import gpu_code
from bench.files import replace_section
from bench.gpu_launches import Case, compilations

pytestmark = pytest.mark.beside


def done(value):
    future = Future()
    future.set_result(value)
    return future


def test_emit_writes_binaries_and_manifest(tmp_path):
    wanted = compilations([Case("layer_norm", "fwd", "bf16", 192), Case("attention", "fwd", "bf16", 64, 50)], ["sm_90"])
    codes = {c: c.compile() for c in wanted}
    gpu_code.emit(tmp_path, {c: done(code) for c, code in codes.items()})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(e["file"] for e in manifest), "manifest.json"])
    entries = {e["kernel"]: e for e in manifest}
    attention = entries["attention_forward_kernel"]
    assert (attention["pass"], attention["target"], attention["dtype"], attention["head_dim"]) == (
        "fwd",
        "sm_90",
        "bf16",
        64,
    )
    assert attention["schedule"] == "short"
    assert attention["options"]["num_warps"] > 0
    assert entries["tal_layer_norm_kernel"]["head_dim"] is None
    for compilation, code in codes.items():
        assert (tmp_path / f"{compilation}.cubin").read_bytes() == code.binary


def test_page_is_replaced_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(gpu_code.MARKS) + "\nafter\n")
    replace_section(page, gpu_code.MARKS, ["new"])
    assert page.read_text() == f"before\n{gpu_code.MARKS[0]}\nnew\n{gpu_code.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the mark"):
        replace_section(page, gpu_code.MARKS, [])
