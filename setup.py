"""Builds `revit_fast/_C` from `csrc/` against the libtorch stable ABI: one binary for every torch >= 2.10.

No file is compiled with `-march`: each `csrc/cpu/isa_*.cpp` raises its own target with a pragma after the
standard headers, so that no inline library function is emitted for an instruction set the machine may lack.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10


def extension():
    """The extension module, or nothing where the sources cannot be compiled (Windows) or should not be."""
    if os.environ.get("REVIT_FAST_NO_EXTENSION") == "1" or sys.platform == "win32":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
    flags += ["-Wno-psabi", "-Wno-unused-parameter", "-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    flags += ["-include", str(ROOT / "csrc/old_glibc.h")]
    module = CppExtension(
        "revit_fast._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=headers,
        extra_compile_args={"cxx": flags},
        extra_link_args=["-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    build = BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}}


class Wheel(bdist_wheel):
    """A wheel for every Python 3: the extension registers operators with torch and calls nothing of Python."""

    def get_tag(self):
        for binary in self.get_finalized_command("build_ext").get_outputs():
            if names := re.findall(rb"\0(_?Py[A-Za-z]*_\w+)(?=\0)", Path(binary).read_bytes()):
                raise RuntimeError(f"{binary} names {names}: a binary that calls Python is no wheel for every Python")
        return "py3", "none", super().get_tag()[2]


options = extension()
setup(**options | {"cmdclass": {"bdist_wheel": Wheel} | options.get("cmdclass", {})})
