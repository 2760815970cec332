"""`revit-fast doctor`: every state of a machine or an installation that makes it slow is named, with what mends it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import full

from revit_fast import environment
from revit_fast.cli import doctor, main
from revit_fast.io import memory
from revit_fast.ops import _backends, _library
from revit_fast.ops.linear import cpu_multiplies_bf16


def found(part):
    [finding] = [finding for finding in doctor.findings() if finding.part == part]
    return finding


def states():
    return {finding.part: finding.state for finding in doctor.findings()}


@pytest.fixture(autouse=True)
def good_machine(monkeypatch):
    """A machine on which nothing can be mended, so that each test spoils one part."""
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 2)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: None)
    monkeypatch.setattr(doctor, "huge_pages", lambda: "madvise")
    monkeypatch.setattr(doctor, "matching_decoder", lambda: len)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "CHOICE", None)
    if _library.HAS_EXTENSION:
        best = _library.cpu_isas()[0]
        monkeypatch.setattr(_library, "cpu_isa", lambda: best)


needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built")


class TestOutput:
    @needs_extension
    def test_nothing_to_mend(self, capsys):
        assert main(["doctor"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines if line[0] != " "} <= {"good", "limit"}
        assert any(line.startswith("good  kernels") and _library.cpu_isa() in line for line in lines)

    def test_something_to_mend(self, capsys, monkeypatch):
        monkeypatch.setattr(doctor, "huge_pages", lambda: "never")
        assert main(["doctor", "--json"]) == 1
        [slow] = [f for f in json.loads(capsys.readouterr().out) if f["part"] == "huge pages"]
        assert slow["state"] == "slow"
        assert "sudo tee /sys/kernel/mm/transparent_hugepage/enabled" in slow["fix"]
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "slow  huge pages" in out
        assert max(map(len, out.splitlines())) <= 120

    @pytest.mark.processes
    @needs_extension
    @pytest.mark.parametrize(
        ("variable", "value", "part", "text"),
        [
            full("REVIT_FAST_NO_EXTENSION", "1", "extension", "unset it"),
            ("REVIT_FAST_ISA", "baseline", "kernels", "unset REVIT_FAST_ISA"),
            full("REVIT_FAST_MALLOC", "default", "malloc", "unset REVIT_FAST_MALLOC"),
        ],
    )
    def test_in_a_process_of_its_own(self, variable, value, part, text):
        args = [sys.executable, "-W", "ignore", "-m", "revit_fast.cli", "doctor", "--json"]
        done = subprocess.run(args, env=os.environ | {variable: value}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        [finding] = [f for f in json.loads(done.stdout) if f["part"] == part]
        assert finding["state"] == "slow"
        assert text in finding["fix"]


class TestProcessor:
    @needs_extension
    def test_kernels_that_the_processor_lacks(self, monkeypatch):
        monkeypatch.setattr(_library, "cpu_isa", lambda: "baseline")
        monkeypatch.setattr(_library, "cpu_isas", lambda: ["baseline"])
        assert found("kernels").state == "limit"
        assert "AVX2" in found("kernels").text

    @needs_extension
    @pytest.mark.parametrize(("dtype", "untried"), [("bfloat16", "amx"), ("int8", "avxvnni")])
    def test_precisions(self, monkeypatch, dtype, untried):
        for native in (True, False):
            monkeypatch.setattr(doctor, "cpu_multiplies_bf16", lambda native=native: native)
            monkeypatch.setattr(doctor, "cpu_integer_depths", lambda native=native: 4 if native else 2)
            assert found(dtype).state == ("good" if native else "limit")
        monkeypatch.setattr(doctor, "cpu_multiplies_bf16", lambda: True)
        monkeypatch.setattr(doctor, "cpu_integer_depths", lambda: 4)
        for isa in ("avx512_bf16", untried):
            monkeypatch.setattr(_library, "cpu_isa", lambda isa=isa: isa)
            assert ("emulation" in found(dtype).text) == (isa == untried)

    @needs_extension
    def test_it_says_what_the_kernels_do(self):
        assert (found("bfloat16").state == "good") == cpu_multiplies_bf16()

    @pytest.mark.parametrize(
        ("usable", "quota", "threads", "affinity", "state", "fix"),
        [
            (2, None, 2, None, "good", ""),
            (1, None, 1, "slow", "good", ""),
            (1, None, 2, "slow", "slow", "OMP_NUM_THREADS=1"),
            (2, 1.5, 2, None, "slow", "OMP_NUM_THREADS=1"),
            (2, 0.5, 1, None, "good", ""),
            (2, 4.0, 2, None, "good", ""),
            (2, None, 1, None, "slow", "unset OMP_NUM_THREADS"),
            (2, None, 8, None, "slow", "OMP_NUM_THREADS=2"),
        ],
    )
    def test_threads(self, monkeypatch, usable, quota, threads, affinity, state, fix):
        monkeypatch.setattr(doctor, "usable_cpus", lambda: usable)
        monkeypatch.setattr(doctor, "cpu_quota", lambda: quota)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert states().get("affinity") == affinity
        assert found("threads").state == state
        assert fix in found("threads").fix
        assert bool(fix) == bool(found("threads").fix)

    def test_affinity_is_that_of_the_process(self):
        program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        program += "from revit_fast.environment import usable_cpus; print(usable_cpus())"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout == "1\n"


class TestSystem:
    @pytest.mark.parametrize(
        ("group", "files", "quota"),
        [
            ("0::/a/b", {"a/b/cpu.max": "max 100000"}, None),
            ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
            ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
            ("0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "400000 100000"}, 2.0),
            ("0::/", {"cpu.max": "300000 100000"}, 3.0),
            ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
            ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5),
            ("4:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
            ("", {}, None),
        ],
    )
    def test_quota(self, tmp_path, group, files, quota):
        files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": group}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n" if text else "")
        assert environment.cpu_quota(tmp_path) == quota

    @pytest.mark.parametrize("choice", ["always", "madvise", "never"])
    def test_huge_pages(self, tmp_path, choice):
        assert environment.huge_pages(tmp_path) is None
        file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
        file.parent.mkdir(parents=True)
        file.write_text("always madvise never\n".replace(choice, f"[{choice}]"))
        assert environment.huge_pages(tmp_path) == choice

    @pytest.mark.parametrize(("choice", "state"), [("always", "good"), ("never", "slow"), (None, "limit")])
    def test_huge_pages_are_judged(self, monkeypatch, choice, state):
        monkeypatch.setattr(doctor, "huge_pages", lambda: choice)
        assert found("huge pages").state == state

    def test_another_allocator(self, monkeypatch):
        monkeypatch.setattr(memory, "_glibc", lambda: None)
        assert found("malloc").state == "limit"

    def test_decoder(self, monkeypatch):
        monkeypatch.setattr(doctor, "matching_decoder", lambda: None)
        assert "[jpeg]" in found("JPEG").fix


class TestGpu:
    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
        from revit_fast.kernels import launch

        launch._device_target.cache_clear()
        yield
        launch._device_target.cache_clear()

    @pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
    def test_what_it_can_do(self, monkeypatch, gpu, capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
        assert found("GPU").state == ("good" if capability[0] >= 8 else "limit")
        assert ("sm_90" if capability[0] >= 8 else "compute capability 8.0 or later") in found("GPU").text

    def test_without_triton(self, monkeypatch, gpu):
        def missing():
            raise ImportError("Triton is not installed")

        monkeypatch.setattr(_backends, "require_triton", missing)
        assert (found("GPU").state, found("GPU").fix) == ("slow", 'pip install "triton>=3.6"')

    def test_none(self):
        assert found("GPU").state == "limit"
