"""What the command line imports: nothing heavy for help and usage errors, and no circles."""

import argparse
import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import revit_fast.cli
from revit_fast.cli import build_parser

FOLDER = Path(revit_fast.cli.__file__).parent
HEAVY = {"PIL", "numpy", "rich", "safetensors", "timm", "torch", "torchvision", "triton"}

[SUBPARSERS] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
COMMANDS = {parser.get_default("command") for parser in SUBPARSERS.choices.values()}

PROGRAM = """
import contextlib, io, json, sys
from revit_fast.cli import main

found = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(argv)
    found.append((code, sorted({name.split(".")[0] for name in sys.modules})))
print(json.dumps(found))
"""


def test_help_and_usage_errors_import_nothing_heavy():
    right = [["--help"], ["--version"], *([name, "--help"] for name in SUBPARSERS.choices)]
    wrong = [
        [],
        ["--no-such-option"],
        ["no-such-command"],
        ["predict"],
        ["predict", "a.jpg", "--policy", "nonsense"],
        ["serve", "--port", "0"],
        ["fit", "images"],
        ["train", "images", "--output", "run", "--epochs", "many"],
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(right + wrong)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for argv, expected, (code, loaded) in zip(
        right + wrong, [0] * len(right) + [2] * len(wrong), json.loads(done.stdout), strict=True
    ):
        assert code == expected, argv
        assert not HEAVY & set(loaded), argv


def imported(path):
    """Names of the modules that a file imports at its top and in functions, by `import_module` too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def test_commands_stand_at_the_top_and_nothing_imports_in_a_circle():
    package = "revit_fast.cli"
    graph = {path.stem: imported(path) for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "__main__")}
    assert graph.keys() >= COMMANDS
    for name, imports in graph.items():
        assert package not in imports, f"{name} imports the package, which imports the commands"
        assert not {f"{package}.{command}" for command in COMMANDS} & imports, f"{name} imports a command"
    inside = {name: {i.removeprefix(package + ".") for i in imports} & graph.keys() for name, imports in graph.items()}
    TopologicalSorter(inside).prepare()


def test_the_package_imports_from_the_modules_that_define():
    """The names of the package's root are for users: the root imports everything."""
    root = FOLDER.parent
    submodules = {path.stem for path in root.iterdir()}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "revit_fast" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom) and node.module == "revit_fast":
                assert {alias.name for alias in node.names} <= submodules, path
