"""Advice in messages can be followed: what a message tells to give, call or install exists where it is told.

The messages are read from the source. In the text of one, a formatted value counts as `{}`.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import functools
import importlib
import multiprocessing
import re
from typing import NamedTuple

import numpy as np
import pytest
import timm
import tomllib
import torch
from PIL import Image
from test_architecture import ROOT, modules_of
from torch.distributed.tensor import DTensor
from torch.masked import MaskedTensor

import revit_fast as rf
from revit_fast.cli import build_parser
from revit_fast.cli.arguments import EXTRA_MODULES

OTHERS_OPTIONS = {"--nproc-per-node", "--no-build-isolation"}
"""Options of torchrun and pip."""

OTHERS_KEYWORDS = {"pretrained", "amp"}
"""Arguments of functions of timm, and choices of a run, that messages show."""

PAGES = ("revit_fast.explain.", *(f"revit_fast.deploy.{name}" for name in ("bodies", "http", "openapi", "service")))
"""Modules with texts of HTML and HTTP, which are no messages."""


class Message(NamedTuple):
    module: str
    line: int
    text: str


def text_of(node: ast.expr) -> str | None:
    """The text of a literal or a formatted string; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "{}") + (text_of(node.right) or "{}")
    return None


def arguments_of(node: ast.AST) -> set[str]:
    """Names of the arguments of every function in a class or function, and of the fields of a class."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found |= {a.arg for a in (*inner.args.args, *inner.args.kwonlyargs, *inner.args.posonlyargs)}
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            found.add(inner.target.id)
    return found


def messages() -> list[Message]:
    """Every text in the code that has a space, except for docstrings: also help, and parts of messages."""
    found = []

    def visit(node: ast.AST, module: str) -> None:
        text = text_of(node)
        if text is not None:
            if " " in text:
                found.append(Message(module, node.lineno, text))
            return
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                visit(child, module)

    for module, path in modules_of(ROOT).items():
        if not module.startswith(PAGES):
            visit(ast.parse(path.read_text(encoding="utf-8")), module)
    return found


MESSAGES = messages()


@functools.cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices


@functools.cache
def all_options() -> set[str]:
    return {option for parser in parsers().values() for action in parser._actions for option in action.option_strings}


def where(message: Message) -> str:
    return f"{message.module}:{message.line}: {message.text}"


def test_there_are_messages_to_read():
    assert len(MESSAGES) > 350
    assert {"revit_fast.train.loader", "revit_fast.cli.runs"} <= {m.module for m in MESSAGES}


def test_options_exist():
    """Those in the module of a command are of that command."""
    commands = {p.get_default("command"): name for name, p in parsers().items()}
    unknown = []
    for message in MESSAGES:
        command = commands.get(message.module.rpartition(".cli.")[2])
        legal = all_options()
        if command is not None and ".cli." in message.module:
            legal = {option for action in parsers()[command]._actions for option in action.option_strings}
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", message.text):
            if option not in legal | OTHERS_OPTIONS:
                unknown.append((option, where(message)))
    assert not unknown


def test_commands_exist():
    named = [(n, where(m)) for m in MESSAGES for n in re.findall(r"`revit-fast ([a-z][a-z-]+)", m.text)]
    assert len(named) > 5
    assert not [pair for pair in named if pair[0] not in parsers()]


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [(n, where(m)) for m in MESSAGES for n in re.findall(r"revit-fast\[(\w+)\]", m.text)]
    assert len(named) > 3
    assert not [pair for pair in named if pair[0] not in extras]
    assert set(EXTRA_MODULES.values()) <= set(extras)


def definitions() -> dict[str, set[str]]:
    """The arguments of every function and class of the package, by its name; more than one may have a name."""
    found: dict[str, set[str]] = {}
    for path in modules_of(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.setdefault(node.name, set()).update(arguments_of(node))
    return found


DEFINED = definitions()

OF_OTHERS = (
    Image.Image,
    torch,
    torch.Tensor,
    torch.nn.Module,
    torch.nn.functional,
    torch.func,
    torch.export,
    DTensor,
    MaskedTensor,
    multiprocessing,
    timm.models,
    np.ndarray,
    copy,
    builtins,
)
"""Where functions of other packages are looked for."""


def test_functions_exist():
    """`model.eval()`, `ReViT.from_timm(vit)`, `copy.deepcopy(model)`: the last name is of ours, or of PyTorch."""
    unknown = []
    for message in MESSAGES:
        for name in re.findall(r"(?<![{\w])(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w+)\((?=[\w\"')*{.=/, -]*\))", message.text):
            known = name in DEFINED or any(hasattr(place, name) for place in OF_OTHERS) or name in ("create_model",)
            if not known and re.search(rf"[.`]{name}\(|(?:call|use|with|by|give|take) [\w.]*{name}\(", message.text):
                unknown.append((name, where(message)))
    assert not unknown


OF_MODULE = {
    module: arguments_of(ast.parse(path.read_text(encoding="utf-8"))) for module, path in modules_of(ROOT).items()
}


def test_keywords_exist():
    """`name=value` is an argument of a function that the message names, of one in its module, or of a public one.

    Options of timm and transformers that a message tells to set are arguments there, not here.
    """
    public = DEFINED["spec_of"].union(
        *(DEFINED.get(name, set()) for name in rf.__all__)
    )  # `ReViT(...)` takes the first
    unknown = []
    for message in MESSAGES:
        if message.module.rpartition(".")[2] in (
            "from_timm",
            "from_transformers",
            "transformers_import",
            "timm_models",
        ):
            continue
        called = set(re.findall(r"(\w+)\(", message.text))
        legal = (
            OF_MODULE[message.module]
            | OTHERS_KEYWORDS
            | public
            | set().union(*(DEFINED.get(name, set()) for name in called))
        )
        advice = message.text.partition(";")[2] or message.text
        for name in re.findall(r"(?<![\w{-])([a-z_]\w+)=(?![={])", advice):
            if name not in legal:
                unknown.append((name, where(message)))
    assert not unknown


@pytest.mark.parametrize("name", ["held_out_share", "grad_accum_steps", "batch_size", "clip_grad", "max_unreadable"])
def test_choices_of_a_run_that_messages_name_are_options_too(name):
    assert any(name in message.text for message in MESSAGES if ".train." in message.module)
    assert "--" + name.replace("_", "-") in all_options()


def test_messages_of_a_run_name_nothing_that_only_the_loader_has(tmp_path):
    """A run's batches are whole; `drop_last` is an argument of the loader alone."""
    from train_helpers import tiny_config, tiny_trainer

    for size in (49, 1000):
        with pytest.raises(ValueError, match=r"use smaller batches: a batch_size of at most 48$"):
            tiny_trainer(tiny_config(batch_size=size))
    assert "--drop-last" not in all_options()


def test_modules_exist():
    for message in MESSAGES:
        for name in re.findall(r"`(revit_fast(?:\.\w+)+)`", message.text):
            parent, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(parent), last), where(message)
