"""Freed memory: kept where a program asks for it, given back to the system on request."""

import ctypes
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import revit_fast
from revit_fast.io.memory import _glibc, release_freed_pages

pytestmark = pytest.mark.processes
needs_glibc = pytest.mark.skipif(_glibc() is None, reason="the allocator is not glibc's")

# What the allocator does is measured. `keeps` takes 30 MB in pieces that are too small to be mapped by themselves,
# writes to them and frees them. It then counts the page faults of doing so again, a few times: none where their 7,300
# pages were kept. Where they were not, a small block above them may still hold some of them back now and then.
# glibc trims what is free beyond 64 MiB at the top of the heap: 30 MB leave room for what imports have freed there.
# `load_memory` loads the module by its path, without the package and without PyTorch.
PROBE = """
import ctypes, importlib.util, json, logging, resource, sys

libc = ctypes.CDLL(None)
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

pieces = (ctypes.c_void_p * 300)()  # a list would grow, and its own memory would come to lie between the pieces

def faults(size=100_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(len(pieces)):
        pieces[i] = libc.malloc(size)
        ctypes.memset(pieces[i], 1, size)
    for i in reversed(range(len(pieces))):
        libc.free(pieces[i])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def keeps():
    end = libc.sbrk(0)
    while libc.malloc(100_000) < end:  # holes that imports have left in the heap are kept in any case: they are filled
        pass
    counts = [faults() for _ in range(4)][1:]
    assert max(counts) < 500 or max(counts) > 6_000, counts
    return max(counts) < 500

def load_memory():
    spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    assert not {"torch", "revit_fast"} & set(sys.modules)
    return memory

said = []
def listen():
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
    logging.getLogger("revit_fast").addHandler(handler)
    logging.getLogger("revit_fast").setLevel(logging.INFO)
"""
SAID = ["INFO", "this process keeps freed memory pages from now on; REVIT_FAST_MALLOC=default prevents it"]


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` after `PROBE` in a process of its own, where REVIT_FAST_MALLOC is unset unless it is given."""
    env = {name: value for name, value in os.environ.items() if name != "REVIT_FAST_MALLOC"} | environment
    folders = Path(revit_fast.__file__).parents[1], Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    # Without this glibc raises its thresholds by itself, by the largest block that an import happens to free.
    env["GLIBC_TUNABLES"] = f"glibc.malloc.trim_threshold={128 << 10}"
    command = [sys.executable, "-c", PROBE + code, inspect.getfile(release_freed_pages), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def printed(code: str, *arguments: str, **environment: str):
    """What `code` prints in its last line, as JSON."""
    done = run(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Each use runs in a fork of one process, which has imported the package and what it loads later, and done nothing else.
USES = """
import multiprocessing, pickle
import numpy as np
import timm.optim, timm.scheduler
import torch
import torch._dynamo
import revit_fast as rf
import revit_fast.video
from revit_fast.cli import main
from revit_fast.train.assigner import train_assigner
from revit_fast.train.data import ArrayImages
from train_helpers import tiny_trainer

torch.set_num_threads(1)
size = dict(grids=(4, 2), patch_size=4, embed_dim=16, depth=1, num_heads=1, num_classes=3)
model = rf.ReViT(**size).eval()
clips = revit_fast.video.TimeSformer(base_grid=(4, 4), num_frames=2, **size).eval()

def bare_ops():
    rf.ops.mean_pool(torch.ones(4, 8), torch.tensor([0, 4], dtype=torch.int32))

def forward_pass():
    model(torch.zeros(1, 3, 16, 16))

def env_command():
    assert main(["env"]) == 0

def optimize():
    return pickle.dumps(rf.optimize(model))

def unpickled():
    pickle.loads(PICKLED)

def pipeline():
    rf.pipeline(model)

def pipeline_of_the_model_itself():
    rf.AdaptivePipeline(model, rf.AdaptivePreprocessor.for_model(model, policy=("fixed", 4)))

def video_optimize():
    revit_fast.video.optimize(clips)

def video_pipeline():
    revit_fast.video.pipeline(clips)

def training():
    tiny_trainer(held_out=False).fit()

def training_of_an_assigner():
    labels = np.array([0, 1] * 4)
    images = ArrayImages(np.zeros((8, 16, 16, 3), np.uint8), labels, ("a", "b"))
    tla = rf.TokenLengthAssigner(grids=(4, 2), thumbnail_px=16, widths=(4,))
    train_assigner(tla, images, labels, epochs=1, batch_size=4)

def command():
    assert main(["predict", "missing.jpg", "--model", "missing"]) == 2

def several():
    for use in (command, optimize, optimize, unpickled, pipeline, video_optimize):
        use()

def outcome(use):
    listen()
    use()
    return keeps(), said

def forked(function, *arguments):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)

PICKLED = forked(optimize)
print(json.dumps({name: forked(outcome, globals()[name]) for name in sys.argv[2:]}))
"""
LEFT_ALONE = ("bare_ops", "forward_pass", "env_command")
KEPT = (
    *("optimize", "unpickled", "pipeline", "pipeline_of_the_model_itself", "video_optimize", "video_pipeline"),
    *("training", "training_of_an_assigner", "command", "several"),
)


@needs_glibc
def test_what_keeps_freed_pages_and_says_so_once():
    expected = {use: [False, []] for use in LEFT_ALONE} | {use: [True, [SAID]] for use in KEPT}
    assert printed(USES, *expected) == expected


@needs_glibc
def test_the_environment_forbids_it():
    assert printed(USES, "several", REVIT_FAST_MALLOC="default") == {"several": [False, []]}


@needs_glibc
def test_the_environment_asks_for_it_at_import():
    code = "listen(); before = keeps(); import revit_fast.ops; print(json.dumps([before, keeps(), said]))"
    assert printed(code, REVIT_FAST_MALLOC="keep") == [False, True, [SAID]]
    assert printed(code, REVIT_FAST_MALLOC="") == [False, False, []]


def test_another_value_is_an_import_error():
    done = run("import revit_fast", REVIT_FAST_MALLOC="always")
    assert done.returncode != 0
    assert "ImportError: REVIT_FAST_MALLOC: 'always' is unknown; it may be 'default'" in done.stderr
    assert "or 'keep'" in done.stderr


STATES = """
listen()
memory = load_memory()
before = memory.allocator_state()
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    answers = set(pool.map(lambda _: memory.keep_freed_pages(), range(100)))
print(json.dumps([*answers, keeps(), before, memory.allocator_state(), said]))
"""


@needs_glibc
def test_concurrent_calls_and_the_state():
    *outcome, before, after, said = printed(STATES)
    assert outcome == [True, True]
    assert before.startswith("unchanged until")
    assert after == "keeps freed pages; REVIT_FAST_MALLOC=default prevents it"
    assert said == [SAID]
    *outcome, before, after, said = printed(STATES, REVIT_FAST_MALLOC="default")
    assert outcome == [False, False]
    assert before == after == "left alone by REVIT_FAST_MALLOC=default; keeps freed pages when that is unset"
    assert said == []


@needs_glibc
def test_nothing_is_printed_by_default():
    done = run("assert load_memory().keep_freed_pages()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_glibc
def test_another_allocator_is_left_alone(tmp_path):
    """One that a program is started with, as with jemalloc: glibc's settings would not reach it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stdlib.h>\n"
        "int posix_memalign(void **p, size_t a, size_t n) { return (*p = aligned_alloc(a, n)) == NULL; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    *outcome, before, after, said = printed(STATES, LD_PRELOAD=str(library))
    assert outcome == [False, False]
    assert before == after == "not glibc's, left alone"
    assert said == []
    assert printed("print(json.dumps(load_memory().release_freed_pages()))", LD_PRELOAD=str(library)) is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_shrinks():
    if not release_freed_pages():
        pytest.skip("the allocator is not glibc's")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def resident_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    size, n = 64 << 10, 1000  # too small to be mapped alone
    pieces = [libc.malloc(size) for _ in range(n)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    full = resident_pages()
    for piece in pieces[:-1]:  # the last one holds the top of the heap
        libc.free(piece)
    assert release_freed_pages()
    assert resident_pages() < full - 0.8 * n * size / 4096
    libc.free(pieces[-1])
