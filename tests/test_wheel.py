"""The tag that lets one wheel serve every Python; `make wheel` has auditwheel judge the C library that it needs."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.parent


def tag(binary, monkeypatch):
    """The tag of a wheel with one binary."""
    monkeypatch.setenv("REVIT_FAST_NO_EXTENSION", "1")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    wheel = runpy.run_path(str(ROOT / "setup.py"))["Wheel"](setuptools.Distribution())
    monkeypatch.setattr(wheel, "get_finalized_command", lambda name: SimpleNamespace(get_outputs=lambda: [str(binary)]))
    monkeypatch.setattr(bdist_wheel, "get_tag", lambda self: ("cp311", "cp311", "linux_x86_64"))
    return wheel.get_tag()


def test_a_binary_that_calls_python_is_no_wheel_for_every_python(tmp_path, monkeypatch):
    binary = tmp_path / "_C.so"
    binary.write_bytes(b"\0exp2\0Py\0PyTorch\0")
    assert tag(binary, monkeypatch) == ("py3", "none", "linux_x86_64")
    binary.write_bytes(b"\0exp2\0PyObject_Call\0_Py_Dealloc\0")
    with pytest.raises(RuntimeError, match=r"PyObject_Call.*_Py_Dealloc"):
        tag(binary, monkeypatch)
