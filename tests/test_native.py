"""Builds and runs tests/native under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
from helpers import full

pytestmark = pytest.mark.beside

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-fsanitize=address,undefined"]
# What AddressSanitizer reports as well, at twice the time to compile.
FLAGS += ["-fno-sanitize=null,object-size,vptr"]
FLAGS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", f"-I{ROOT / 'csrc'}"]
# Calls in place of inline checks compile faster.
CALLED_CHECKS = ["--param", "asan-instrumentation-with-call-threshold=0"]


def compiler_with_sanitizers(directory: Path) -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    probe = directory / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run([compiler, *FLAGS, probe, "-o", directory / "probe"], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"{compiler} cannot link AddressSanitizer and UBSan: {built.stderr[-200:]}")
    return compiler


def without(sets: set[str], base: str, directory: Path) -> list[str]:
    """A source and linker options that put the kernels of `base` in place of those of other sets."""
    of_type = re.findall(r"namespace (\w+) {\nextern const (\w+) kernels;", (ROOT / "csrc/cpu/kernels.h").read_text())
    source, options = directory / "others.cpp", []
    lines = ['#include "cpu/kernels.h"', "namespace revit::cpu {"]
    for name, kind in of_type:
        if name not in sets:
            continue
        if kind == "Kernels":
            symbols = [f"_ZN5revit3cpu{len(n)}{n}7kernelsE" for n in (name, base)]
            options.append("-Wl,--defsym={}={}".format(*symbols))
        else:
            lines.append(f'namespace {name} {{ const NarrowProducts kernels{{"{name}", &{base}::kernels, 1}}; }}')
    source.write_text("\n".join([*lines, "}\n"]))
    return [str(source), *options]


ONE = "avx2" if "avx2" in helpers.ALL_ISAS else "baseline"


@pytest.mark.timeout(1800)  # compiling with sanitizers takes minutes
@pytest.mark.parametrize("isas", [[ONE], full(helpers.ALL_ISAS)], ids=["one", "all"])
def test_kernels_pass_under_sanitizers(tmp_path, isas):
    """A set takes up to a minute to compile: the quick suite has one, and `make test-full` all that can run here."""
    compiler = compiler_with_sanitizers(tmp_path)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    flags = FLAGS if "clang" in version else FLAGS + CALLED_CHECKS
    units = {path.stem.removeprefix("isa_"): path for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    others = {name for name, path in units.items() if path.stem.startswith("isa_")} - set(isas)
    compiled = [path for name, path in units.items() if name not in others]
    source, *options = without(others, ONE, tmp_path)
    sources = [Path(source), *compiled, *(ROOT / "tests" / "native").glob("*.cpp")]

    def compile_source(source: Path) -> Path:
        target = tmp_path / f"{source.parent.name}_{source.stem}.o"
        built = subprocess.run([compiler, *flags, "-c", source, "-o", target], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    program = tmp_path / "native_tests"
    subprocess.run([compiler, *FLAGS, *objects, *options, "-o", program], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}
    environment.pop("REVIT_FAST_ISA", None)
    run = subprocess.run([program, " ".join(isas)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    print(run.stdout)
