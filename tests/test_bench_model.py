"""`python -m bench.model`: every peer computes what timm does, says its precision, and wrong logits get no time."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import only_on

timm = pytest.importorskip("timm")

from bench import model as bench  # noqa: E402 (needs timm)
from bench import probe  # noqa: E402
from bench.model_peers import PEERS  # noqa: E402
from bench.model_work import (  # noqa: E402
    MODELS,
    TOLERANCES,
    Case,
    Flops,
    ModelShape,
    apportion,
    grids_of,
    grids_up_to,
    random_vit,
    relative_error,
    rounds_for,
    timed,
    true_logits,
)
from bench.peers.common import Kind, Peer, Unsuited  # noqa: E402

pytestmark = [pytest.mark.beside, only_on("cpu", reason="a bench of the CPU")]

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "openvino": ["openvino"],
    "openvino-default": ["openvino"],
    "openvino-int8": ["openvino", "nncf"],
    "onnxruntime": ["onnx", "onnxruntime"],
    "onnxruntime-int8": ["onnx", "onnxruntime"],
    "navit": ["vit_pytorch"],
}

COMPILED = ("compile", "compile-bf16", "compile-tuned", "compile-tuned-bf16", "torchao-int8")


@pytest.fixture(scope="module")
def vit():
    return random_vit("vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=2, num_classes=10)


@pytest.mark.parametrize("mix", ["mix", "random"])
@pytest.mark.parametrize("key", [key for key in PEERS if key not in COMPILED])
def test_a_peer_gives_the_logits_of_timm(vit, key, mix):
    for package in PACKAGES.get(key, []):
        pytest.importorskip(package)
    case = Case(vit, grids_of(mix, 4), open_ended=mix == "random")
    peer = PEERS[key].build(case)
    for turn in (0, 1, 0):
        logits = peer.run(turn)
    error, _, problem = bench.judged(logits, peer, case)
    assert problem is None
    assert (error is None) == (peer.order is None)
    expected = "int8 per tensor" if "int8" in key else "bfloat16" if "bf16" in key else "float32"
    assert peer.precision == expected or key == "openvino-default"
    if error is not None:
        assert (error > TOLERANCES["float32"]) == (peer.precision != "float32"), "the error tells the precision"
    assert (peer.order is None) == (key in ("timm-full", "navit")), "the others share timm's weights"
    assert peer.flops.total >= case.shape.flops(case.seqlens).total or key == "navit"


def test_openvino_leaves_signal_handlers_a_stack():
    """Models of both hints come and go, the process's one core stays, and so does the stack that it set."""
    pytest.importorskip("openvino")
    script = """if True:
        import ctypes, gc, os, signal
        from bench.model_peers import PEERS
        from bench.model_work import Case, grids_of, random_vit

        class Stack(ctypes.Structure):
            _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

        def address():
            gc.collect()
            ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack := Stack()))
            return stack.address

        vit = random_vit("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=1, num_classes=4)
        found = []
        for _ in range(2):
            peer = PEERS["openvino"].build(Case(vit, grids_of("all-7", 2)))
            found.append(address())
            del peer
            found.append(address())
        assert len(set(found)) == 1, found
        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.split()) == (0, ["handled"]), done.stderr[-2000:]


@pytest.mark.parametrize("key", ["timm", "timm-full", "openvino", "onnxruntime", "naflex", "navit"])
def test_peers_of_a_rotary_model(key):
    for package in PACKAGES.get(key, []):
        pytest.importorskip(package)
    vit = random_vit("vit_small_patch16_dinov3", depth=2, embed_dim=64, num_heads=2)
    case = Case(vit, grids_of("mix-16", 4))
    assert sorted(case.grids) == [(8, 8), (12, 12), (12, 12), (16, 16)]
    if key in ("naflex", "navit"):
        with pytest.raises(Unsuited, match="no counterpart of Eva"):
            PEERS[key].build(case)
        return
    peer = PEERS[key].build(case)
    for candidate in (peer, bench.ours(case)) if key == "timm" else (peer,):
        error, _, problem = bench.judged(candidate.run(0), candidate, case)
        assert problem is None
        assert (error is None) == (key == "timm-full")


@pytest.mark.full  # it takes a quarter of a minute; short models in both precisions are among the peers
def test_openvino_at_full_length():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from bench.peers import openvino_

    vit = random_vit("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=2, num_classes=10)
    images = torch.randn(6, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calibration, images = images[:4].split(1), images[4:]
    expected, errors = true_logits(vit, [images]), []
    for samples in (None, calibration):
        model = openvino_.openvino_full_length(vit, len(images), samples)
        compiled = openvino_.openvino_compiled(model, 1, "LATENCY", "f32")
        errors.append(relative_error(torch.from_numpy(compiled((images.numpy(),))[0]), expected))
    assert errors[0] < TOLERANCES["float32"] < errors[1] < TOLERANCES["int8 per tensor"]


# Autotuning is left out: it takes a quarter of a minute for every product.
@pytest.mark.parametrize(
    ("key", "precision"), [("compile", "float32"), ("compile-bf16", "bfloat16"), ("torchao-int8", "int8")]
)
def test_a_compiled_peer_gives_the_logits_of_timm(key, precision):
    if key == "torchao-int8":
        pytest.importorskip("torchao")
    vit = random_vit("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=2, num_classes=10)
    case = Case(vit, grids_of("all-7", 2))
    peer = PEERS[key].build(case)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    logits = [peer.run(turn) for turn in (1, 0)][1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled anew after it was built"
    error, _, problem = bench.judged(logits, peer, case)
    assert problem is None
    assert peer.precision == precision
    assert (error > TOLERANCES["float32"]) == (precision != "float32"), "the error tells the precision"
    torch.compiler.reset()
    with pytest.raises(Unsuited, match="compiled anew"):
        PEERS[key].build(Case(vit, grids_of("random", 2), open_ended=True))


def test_ours_and_its_products(vit):
    case = Case(vit, grids_of("mix", 4))
    peer = bench.ours(case)
    assert bench.judged(peer.run(0), peer, case).problem is None
    assert bench.page_faults(peer.run, calls=1) >= 0
    products, flops = bench.products_alone(case)
    products(0)
    assert 0 < flops < bench.flops_of_ours(case).linear


@pytest.mark.parametrize("kind", bench.OUR_KINDS, ids=lambda kind: kind.name)
def test_ours_at_every_precision(vit, kind):
    case = Case(vit, grids_of("mix", 4))
    peer = kind.build(case)
    error, _, problem = bench.judged(peer.run(0), peer, case)
    assert problem is None
    assert peer.precision == (kind.name.partition(", ")[2] or "float32")
    assert (error > TOLERANCES["float32"]) == (peer.precision != "float32"), "the error tells the precision"


def test_errors_are_to_timm_in_float64(vit):
    case = Case(vit, grids_of("mix", 4))
    assert case.expected.dtype == torch.float64
    assert next(vit.parameters()).dtype == torch.float32, "the model itself stays"
    images = [image[None] for image in case.sets[0]]
    assert relative_error(true_logits(vit, images), case.expected) < 1e-12, "one image at a time"
    assert relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0]).double()) == 0.25


def test_the_tolerance_of_bfloat16_is_twice_the_error_of_autocast():
    case = Case(random_vit(MODELS["deit-ti"]), grids_of("mix", 3))
    peer = PEERS["timm-bf16"].build(case)
    error, _, _ = bench.judged(peer.run(0), peer, case)
    assert TOLERANCES["bfloat16"] / 4 < error < TOLERANCES["bfloat16"] / 2


@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_precision_has_its_tolerance(vit, precision):
    case = Case(vit, grids_of("mix", 4))
    largest, order = case.expected.abs().max(), range(4)

    def judged(factor) -> tuple[float, str | None]:
        logits = case.expected.clone()
        logits[2, 3] += factor * TOLERANCES[precision] * largest
        peer = Peer(lambda turn: logits, order, Flops(1, 1), precision=precision)
        error, _, problem = bench.judged(logits, peer, case)
        return error, problem

    error, problem = judged(0.9)
    assert error == pytest.approx(0.9 * TOLERANCES[precision])
    assert problem is None
    error, problem = judged(1.1)
    assert error == pytest.approx(1.1 * TOLERANCES[precision])
    assert problem.startswith("wrong: differs from timm")
    assert precision in problem
    swapped = Peer(lambda turn: None, [1, 0, 2, 3], Flops(1, 1), precision=precision)
    assert bench.judged(case.expected, swapped, case).problem, "images in the wrong order are no rounding"


def test_flops_of_deit_small_on_the_mix():
    shape = ModelShape(dim=384, depth=12, hidden=1536, patch_values=768, n_classes=1000, n_prefix=1)
    seqlens = [197] * 4 + [101] * 6 + [50] * 6
    nominal, executed = shape.flops(seqlens), shape.flops(seqlens, pooled_last=True)
    assert nominal.total == pytest.approx(77.2e9, rel=1e-3)
    c, n = 384, sum(seqlens)
    left_out = 2 * (n - len(seqlens)) * (2 * c * c + 8 * c * c)  # queries, projection and MLP of unpooled tokens
    assert nominal.linear - executed.linear == pytest.approx(left_out)
    assert nominal.attention - executed.attention == 4 * c * sum(m * m - m for m in seqlens)


def test_grids_of_a_batch():
    assert [apportion(n) for n in (1, 3, 16, 64)] == [[0, 1, 0], [1, 1, 1], [4, 6, 6], [16, 24, 24]]
    assert sorted(grids_of("mix", 3)) == [(7, 7), (10, 10), (14, 14)]
    assert grids_of("all-14", 2) == [(14, 14)] * 2
    grids = grids_of("random", 200)
    assert {side for grid in grids for side in grid} == set(range(7, 15))
    assert any(h != w for h, w in grids)


@pytest.mark.parametrize("n_tokens", [50, 197, 1000, 4000, 200_000])
def test_packs_come_near_the_number_of_tokens(n_tokens):
    got = sum(h * w + 1 for h, w in grids_up_to(n_tokens))
    assert got == n_tokens if n_tokens < 1000 else abs(got - n_tokens) <= 197 // 2


def test_slow_candidates_take_fewer_rounds(monkeypatch):
    assert [rounds_for(s, 9) for s in (0.1, 3.0, 100.0)] == [9, 3, 1]
    monkeypatch.setattr("bench.model_work.SLOW_S", 0.05)
    samples = timed({"slow": lambda turn: time.sleep(0.1), "fast": lambda turn: time.sleep(0.001)}, 5, 0.0)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"slow": 3, "fast": 5}
    assert min(samples["slow"]) >= 0.1
    assert min(samples["fast"]) < 0.1, "of a call, though a turn is several"


def test_wrong_results_get_no_time(vit, monkeypatch):
    def wrong(case):
        return Peer(lambda turn: case.expected + 1, range(len(case.grids)), Flops(1, 1))

    def absent(case):
        raise ImportError("not installed\nsecond line")

    case = Case(vit, grids_of("mix", 3), n_threads=1)
    peers, verdicts = bench.checked(case, {"wrong": wrong, "absent": absent, "right": PEERS["timm"].build})
    assert list(peers) == ["right"]
    assert verdicts["wrong"]["reason"].startswith("wrong: differs from timm")
    assert verdicts["wrong"]["error"] == pytest.approx(1 / case.expected.abs().max().item())
    assert verdicts["absent"] == {
        "precision": None,
        "error": None,
        "agreement": None,
        "reason": "ImportError: not installed",
    }
    assert verdicts["right"]["reason"] is None
    monkeypatch.setattr(bench, "OUR_KINDS", (Kind(bench.OURS, wrong, ""),))
    result = bench.measure(case, ["timm"], rounds=1, pause_s=0)
    ours, timm_, _ = result["candidates"]
    assert "median_ms" not in ours
    assert timm_["ratio_to_ours"] is None
    about = {"model": "deit-ti", "batch": 3, "mix": "mix", "tokens": 1}
    row = next(line for line in bench.case_table(about | result, 1).splitlines() if line.startswith("| ours"))
    assert row.startswith(f"| ours | float32 | {ours['error']:.1e} | 100% | |")


def test_a_wrong_pipeline_gets_no_time():
    pytest.importorskip("torchvision")
    from bench import pipeline

    truth = torch.randn(pipeline.BATCH, 5, generator=torch.Generator().manual_seed(0)).double()
    off = truth + 2e-3 * truth.abs().max()

    def candidate(logits, precision="float32"):
        return pipeline.Candidate(lambda turn: [*logits[:4], logits[4:]], truth, precision)

    candidates = {"ours": candidate(truth), "float32": candidate(off), "bfloat16": candidate(off, "bfloat16")}
    rows = {row["candidate"]: row for row in pipeline.checked_rows("case", candidates, rounds=1, per=1)}
    assert {name: (row["precision"], row["error"]) for name, row in rows.items()} == {
        "ours": ("float32", "0.0e+00"),
        "float32": ("float32", "2.0e-03"),
        "bfloat16": ("bfloat16", "2.0e-03"),
    }
    assert rows["float32"]["ms/image"] == "wrong"
    assert "time / ours" not in rows["float32"]
    assert rows["bfloat16"]["time / ours"] > 0
    with pytest.raises(SystemExit, match="ours is wrong"):
        pipeline.checked_rows("case", {"ours": candidate(off)}, rounds=1, per=1)


def test_the_command_writes_its_tables(monkeypatch, tmp_path, capsys):
    write = bench.write
    monkeypatch.setattr(bench, "write", lambda *args: write(*args, folder=tmp_path))
    arguments = (
        "--models deit-ti --batches 1 --mixes all-7 --peers timm timm-full --rounds 1 --threads 1 --pause 0 "
        "--scaling-model deit-ti --scaling-tokens 50"
    )
    n_threads = torch.get_num_threads()
    try:
        bench.main(arguments.split())
    finally:
        torch.set_num_threads(n_threads)
    content = json.loads((tmp_path / "model.json").read_text())
    rows = {row["candidate"]: row for row in content["results"][0]["candidates"]}
    assert rows["ours"]["ratio_to_ours"] == 1
    assert [rows[name]["precision"] for name in ("ours", "ours, bfloat16", "ours, int8", "timm, full length")] == [
        "float32",
        "bfloat16",
        "int8",
        "float32",
    ]
    assert 0 < rows["ours"]["error"] < 1e-5 < rows["ours, bfloat16"]["error"] < rows["ours, int8"]["error"]
    assert rows["timm, full length"]["error"] is rows[bench.CEILING]["error"] is None
    assert 0 < rows["timm, grouped by length"]["of_peak"] < 1
    assert rows["timm, full length"]["flops"] > rows["ours"]["flops"]
    assert content["scaling"][0]["tokens"] == 50
    table = (tmp_path / "model.md").read_text()
    assert "## DeiT-Ti, batch 1, all 7×7" in table
    assert f"| ours | float32 | {rows['ours']['error']:.1e} | 100% |" in table
    assert rows["ours"]["instruction"] == probe.engine_instruction("float32").name in content["results"][0]["peaks"]
    assert "| timm, full length | float32 | – | – |" in table
    assert bench.case_table(content["results"][0], 1) in capsys.readouterr().out
    assert "## Scaling: DeiT-Ti, ours" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.md"]


def test_the_accuracy_of_low_precision(vit):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from bench import int8_accuracy

    chunks = int8_accuracy.chunks_of(vit, 20, seed=3)
    assert sum(len(images) for _, images in chunks) == 20
    rows = {row["candidate"]: row for row in int8_accuracy.accuracy_rows(vit, chunks, n_threads=1)}
    errors = [rows[name]["error"] for name in ("ours", "ours, bfloat16", "ours, int8")]
    assert errors == sorted(errors)
    assert errors[0] < TOLERANCES["float32"]
    assert rows["ours"]["agreement"] == 1
    nncf = rows["OpenVINO, NNCF int8"]
    assert TOLERANCES["float32"] < nncf["error"] < TOLERANCES["int8 per tensor"], nncf
    assert all(
        line.count("|") == 8
        for line in int8_accuracy.table(
            [{"model": "m", "weights": "random"} | row for row in rows.values()]
        ).splitlines()
    )


def test_outliers(vit):
    from bench import int8_accuracy

    changed = int8_accuracy.with_outliers(vit, seed=0)
    norm, plain = changed.blocks[0].norm1.weight, vit.blocks[0].norm1.weight
    assert sorted((norm / plain).tolist()) == [1.0] * 60 + [10.0] * 4
    ratio = changed.blocks[0].mlp.fc1.weight / vit.blocks[0].mlp.fc1.weight
    assert set(ratio.round(decimals=3).unique().tolist()) == {1.0, 5.0}
    assert 0 < (ratio > 4).float().mean() < 2e-3


@pytest.mark.parametrize("instruction", probe.INSTRUCTIONS, ids=lambda instruction: instruction.name)
def test_the_probe_of_an_instruction(instruction, tmp_path):
    """It compiles anywhere on x86-64, and is refused where the processor has no such instruction."""
    if instruction.needs and platform.machine() != "x86_64":
        pytest.skip("an instruction of x86-64")
    probe.compile_probe(instruction, tmp_path / "peak.so")
    if not instruction.supported:
        with pytest.raises(ValueError, match=f"no {instruction.name}"):
            probe.PeakProbe(instruction, 1)
        return
    for n_threads in (1, 2):
        peak = probe.PeakProbe(instruction, n_threads, seconds=0.001)
        ops = peak.ops
        peak.run(1)
        assert peak.ops == ops > 0


def test_every_precision_is_compared_with_an_instruction_that_is_probed():
    probed = probe.instructions_in_use()
    assert all(instruction.supported for instruction in probed)
    for precision in TOLERANCES:
        assert probe.best_instruction(precision) in probed
    for precision in ("float32", "bfloat16", "int8"):
        assert probe.engine_instruction(precision) in probed


def has(monkeypatch, isa, depths, multiplies_bf16, *names):
    """Pretends a processor that has capabilities `names`, and our kernels on it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    monkeypatch.setattr(probe._library, "cpu_isa", lambda: isa)
    monkeypatch.setattr(probe.linear, "cpu_integer_depths", lambda: depths)
    monkeypatch.setattr(probe.linear, "cpu_multiplies_bf16", lambda: multiplies_bf16)


AVX2, AVX512 = ("avx2", "fma3"), ("avx2", "fma3", "avx512_f", "avx512_bw")
MACHINES = {  # our kernels and the processor's capabilities, then our instructions and the best int8 one
    "avx2": (("avx2", 2, False, *AVX2), (probe.FMA_256, probe.FMA_256, probe.VPMADDWD_256), probe.VPMADDWD_256),
    "avx2, emulating": (
        ("avx2x16", 4, True, *AVX2),
        (probe.FMA_256, probe.FMA_256, probe.VPMADDWD_256),
        probe.VPMADDWD_256,
    ),
    "avxvnni": (
        ("avxvnni", 4, False, *AVX2, "avx_vnni"),
        (probe.FMA_256, probe.FMA_256, probe.VPDPBUSD_256),
        probe.VPDPBUSD_256,
    ),
    "avx512": (("avx512", 2, False, *AVX512), (probe.FMA_512, probe.FMA_512, probe.VPMADDWD_512), probe.VPMADDWD_512),
    "avx512, all": (
        ("avx512_bf16", 4, True, *AVX512, "avx512_bf16", "avx512_vnni"),
        (probe.FMA_512, probe.VDPBF16PS, probe.VPDPBUSD_512),
        probe.VPDPBUSD_512,
    ),
    "avx2 chosen": (
        ("avx2", 2, False, *AVX512, "avx512_bf16", "avx512_vnni"),
        (probe.FMA_256, probe.FMA_256, probe.VPMADDWD_256),
        probe.VPDPBUSD_512,
    ),
    "not x86": (("baseline", 2, False), (probe.FMA,) * 3, probe.FMA),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_instruction_of_our_kernels(monkeypatch, machine):
    described, ours, best = MACHINES[machine]
    has(monkeypatch, *described)
    assert tuple(probe.engine_instruction(precision) for precision in ("float32", "bfloat16", "int8")) == ours
    assert probe.best_instruction("int8 per tensor") == best
    assert probe.has_vnni() == ("vnni" in " ".join(described[3:]))
