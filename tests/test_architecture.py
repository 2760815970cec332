"""The structure of the package, read from its code: the order of the wings, no circles, no imports upwards."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "revit_fast"


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name; `kernels/` is installed as `revit_fast.kernels`."""
    found = {}
    for base, prefix in ((root / PACKAGE, PACKAGE), (root / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(base.rglob("*.py")):
            if any(part.is_symlink() for part in path.parents):
                continue
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[tuple[str, str | None]]:
    """(module, name) for everything that a module imports of the package, wherever in its code the import stands.

    `from package import module` is an import of the module. A name that is not a module is one of the package's face.
    A dynamic import of a formatted name counts for every module that it can stand for.
    """
    is_face = path.name == "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + is_face]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add((inner, None) if inner in modules else (base, alias.name))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {(module, None) for module in _dynamic(node.args[0], name, modules)}
    return {(module, imported) for module, imported in found if module.split(".")[0] == PACKAGE}


def _dynamic(argument: ast.expr, name: str, modules: dict[str, Path]) -> list[str]:
    """The modules that the argument of `import_module` can name."""
    if isinstance(argument, ast.Constant):
        return [argument.value]
    if not isinstance(argument, ast.JoinedStr):
        return []
    known = {"__name__": name, "__package__": name.rpartition(".")[0], "PACKAGE": PACKAGE}
    pattern = "".join(
        re.escape(part.value)
        if isinstance(part, ast.Constant)
        else re.escape(known[part.value.id])
        if isinstance(part.value, ast.Name) and part.value.id in known
        else r"\w+(\.\w+)*"
        for part in argument.values
    )
    return [name for name in modules if re.fullmatch(pattern, name) and not name.endswith(".__main__")]


def edges_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports; the root's own lazy loading is not an import."""
    return {
        name: {target for target, _ in imports_of(name, path, modules)} - {name, PACKAGE}
        for name, path in modules.items()
        if name not in (PACKAGE, f"{PACKAGE}._importing")
    }


def wing_of(module: str) -> str:
    """The folder, or the module itself where it lies at the top."""
    return module.split(".")[1]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def upward(edges: dict[str, set[str]], order: list[str]) -> list[str]:
    """Imports of a wing that stands later in the order, or of one that the order does not name."""
    place = {wing: i for i, wing in enumerate(order)}
    return [
        f"{name} -> {target}"
        for name, targets in sorted(edges.items())
        for target in sorted(targets)
        if place.get(wing_of(target), len(order)) > place.get(wing_of(name), -1)
    ]


def drawn_order() -> list[str]:
    """The wings in the order in which CONTRIBUTING.md lists them, the lowest first."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [
        "kernels" if name == "kernels/" else name.removeprefix(f"{PACKAGE}/").removesuffix(".py").rstrip("/")
        for name in names
        if name == "kernels/" or (name.startswith(f"{PACKAGE}/") and name != f"{PACKAGE}/zoo/")  # zoo/ is data
    ]


MODULES = modules_of(ROOT)
EDGES = edges_of(MODULES)


def test_the_order_names_every_wing():
    order = drawn_order()
    assert len(order) == len(set(order))
    lazy_root = {PACKAGE, f"{PACKAGE}._importing"}
    assert set(order) == {wing_of(name) for name in MODULES if name not in lazy_root}


def test_imports_point_down():
    assert upward(EDGES, drawn_order()) == []


def test_no_circles():
    assert circles(EDGES) == []


def test_nothing_inside_imports_the_lazy_names_of_the_root():
    found = [
        f"{name}: {imported or 'import revit_fast'}"
        for name, path in MODULES.items()
        for target, imported in imports_of(name, path, MODULES)
        if target == PACKAGE and imported != "annotations"
    ]
    assert found == []


def test_only_the_command_line_imports_the_command_line():
    found = [
        f"{name} -> {t}" for name, ts in EDGES.items() if wing_of(name) != "cli" for t in ts if wing_of(t) == "cli"
    ]
    assert found == []


def test_kernels_import_only_each_other_and_relatively():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.startswith(PACKAGE) for name in names), f"{path.name}: {names}"
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path.name} reaches out of its folder"


def test_the_package_does_not_import_benches_or_tests():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(n.split(".")[0] in ("bench", "tests") for n in names), name


def test_sizes():
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 9
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    over = {name: n for name, n in lines.items() if n > 450}
    assert set(over) <= {f"{PACKAGE}.models.vit"}, over
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_what_make_test_leaves_out_has_a_target():
    makefile, mark = (ROOT / "Makefile").read_text(encoding="utf-8"), ".".join(("pytest", "mark", "beside"))
    marked = [path for path in (ROOT / "tests").rglob("*.py") if mark in path.read_text(encoding="utf-8")]
    named = [str((path if path.parent.name == "tests" else path.parent).relative_to(ROOT)) for path in marked]
    assert "tests/aot" in named
    assert [name for name in named if name not in makefile] == []


def test_every_module_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'"(revit_fast[\w.]*)",', text[text.index("packages = [") : text.index("package-dir")]))
    assert listed == {name for name, path in MODULES.items() if path.name == "__init__.py"}


class TestTheChecks:
    """Each check finds what it is for, in a package made for it."""

    @pytest.fixture
    def edges(self, tmp_path):
        def make(files: dict[str, str]) -> dict[str, set[str]]:
            for name, text in files.items():
                path = tmp_path / PACKAGE / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / "__init__.py").touch()
                path.write_text(text)
            return edges_of(modules_of(tmp_path))

        return make

    @pytest.mark.parametrize(
        "line",
        [
            "from revit_fast.high.b import x",
            "from revit_fast.high import b",
            "import revit_fast.high.b",
            "from ..high.b import x",
            "from ..high import b",
            "def f():\n    from revit_fast.high.b import x",
            "from importlib import import_module\ndef f():\n    import_module('revit_fast.high.b')",
            "import importlib\ndef f(name):\n    importlib.import_module(f'revit_fast.high.{name}')",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from revit_fast.high.b import x",
        ],
    )
    def test_circles_and_upward_imports(self, edges, line):
        found = edges({"low/a.py": line, "high/b.py": "from revit_fast.low.a import y"})
        assert circles(found) == [["revit_fast.high.b", "revit_fast.low.a"]]
        assert "revit_fast.low.a -> revit_fast.high.b" in upward(found, ["low", "high"])

    def test_faces_and_longer_circles(self, edges):
        found = edges(
            {
                "low/a.py": "from revit_fast.high import x",
                "high/__init__.py": "from revit_fast.high.b import x",
                "high/b.py": "from revit_fast.low.a import y",
            }
        )
        assert circles(found) == [["revit_fast.high", "revit_fast.high.b", "revit_fast.low.a"]]

    def test_a_clean_package(self, edges):
        found = edges({"low/a.py": "import torch", "high/b.py": "from revit_fast.low.a import y"})
        assert circles(found) == []
        assert upward(found, ["low", "high"]) == []
        assert upward(found, ["high"]) == ["revit_fast.high.b -> revit_fast.low.a"], "a wing that the order lacks"
