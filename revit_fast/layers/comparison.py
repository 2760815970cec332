"""Whether modules still are what they were built as, so that something else may compute what calling them would."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SCALARS = (bool, int, float, str, tuple, type(None))


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type of a module, or the one that it stands for: a class that computes the same names it in `stands_for`."""
    kind = type(module)
    return vars(kind).get("stands_for", kind)  # a subclass of such a class may compute something else


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does exactly what `kind` does with its weights.

    A subclass, a parametrised module, an adapter around a layer, a quantised layer and a module with hooks (pruning and
    weight norm of older PyTorch are hooks) do more: they must be called.
    """
    return (
        kind_of(module) is kind and not any(getattr(module, name) for name in HOOKS) and "forward" not in vars(module)
    )


def alteration(module: nn.Module) -> str | None:
    """What was done to a module by itself that changes its calls: a hook, a method of its own; None for nothing."""
    for name in HOOKS:
        if getattr(module, name):
            return f"has a {'forward' if 'forward' in name else 'backward'} hook"
    own = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    return f"has a method {own[0]!r} of its own" if own else None


def difference(
    live: nn.Module,
    built: nn.Module,
    *,
    name: str = "",
    is_called: Callable[[str], bool] = lambda name: False,
    training: bool = False,
    ignored: Container[str] = (),
) -> str | None:
    """The first place where a module differs from one that was built anew, by its dotted name; None for none.

    Compared are types (a subclass is another type), hooks, methods set on an instance, plain attributes, and names and
    shapes of parameters, buffers and submodules. Values of parameters and buffers may differ.

    Args:
        live: the module.
        built: a new one of the same architecture, which may be on the meta device.
        name: dotted name of `live`; "" for the whole model, whose type and further attributes may differ.
        is_called: tells by its dotted name whether a submodule is called as a module, and may be anything.
        training: whether the mode of the modules (training or evaluation) counts too.
        ignored: attributes of `live` itself that may differ.
    """
    kinds = (kind_of(live), kind_of(built))
    if name and kinds[0] is not kinds[1]:
        names = [kind.__name__ for kind in kinds]
        if len(set(names)) == 1:  # of another library, for example peft's Linear
            names = [f"{kind.__module__}.{kind.__name__}" for kind in kinds]
        return f"{name} is {names[0]} instead of {names[1]}"
    altered = alteration(live)
    if altered:
        return f"{name or 'it'} {altered}"
    found = _different_attribute(live, built, ignored if training else ("training", *ignored))
    if found:
        return f"{name + '.' if name else ''}{found}"
    for kind in ("_parameters", "_buffers"):
        shapes, expected = ({n: _shape(t) for n, t in getattr(m, kind).items()} for m in (live, built))
        if shapes != expected:
            other = next(n for n in {**shapes, **expected} if shapes.get(n, 0) != expected.get(n, 0))
            return f"{name + '.' if name else ''}{other} is {shapes.get(other)} instead of {expected.get(other)}"
    children, expected = dict(live.named_children()), dict(built.named_children())
    for child in {**expected, **children}:
        dotted = f"{name}.{child}" if name else child
        if is_called(dotted):
            continue
        if child not in children or child not in expected:
            return f"{dotted} {'was removed' if child not in children else 'was added'}"
        found = difference(children[child], expected[child], name=dotted, is_called=is_called, training=training)
        if found:
            return found
    return None


def scalars(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: numbers, texts, tuples, None."""
    return {n: v for n, v in vars(module).items() if not n.startswith("_") and isinstance(v, SCALARS)}


def _different_attribute(live: nn.Module, built: nn.Module, ignored: Container[str]) -> str | None:
    for name, value in scalars(built).items():
        if name in ignored:
            continue
        now = vars(live).get(name, getattr(type(live), name, "missing"))
        if now != value:
            return f"{name} is {now!r} instead of {value!r}"
    return None


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
