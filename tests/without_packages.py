"""Runs commands in processes in which a package cannot be imported: `without_packages.py FOLDER` with cases on stdin.

Cases are `{package: [[argument, ...], ...]}` as JSON; answers are `{package: [[code, stdout, stderr], ...]}`. Modules
that need no optional package are imported once. Each package has a process that is forked from there, before anything
is computed.
"""

import contextlib
import io
import json
import os
import sys
import traceback

import torch

import revit_fast.cli.pipelines  # noqa: F401
from revit_fast.cli import main


class Absent:
    """A finder of modules that finds everything but a package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package or name.startswith(f"{self.package}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def answers(package, commands):
    assert package not in sys.modules, f"{package} is imported already"
    sys.meta_path.insert(0, Absent(package))
    torch.set_num_threads(1)
    found = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(command)
            except BaseException:
                code = traceback.format_exc()
        found.append((code, out.getvalue(), err.getvalue()))
    return found


def forked(package, commands):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(answers(package, commands), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    print(json.dumps({package: forked(package, commands) for package, commands in json.load(sys.stdin).items()}))
