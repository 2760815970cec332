"""Everything that may be done to the modules of a model, and what an optimised copy must make of it."""

import copy

import torch

from revit_fast.layers.comparison import scalars
from revit_fast.layers.positions import Resampling


def mutations(module, name):
    """(what, change) of everything that may be done to a module: hooks, another class, a method, every attribute."""

    def scaled(output):
        if isinstance(output, tuple):
            return tuple(scaled(part) for part in output)
        return output * 0.5 if isinstance(output, torch.Tensor) and output.is_floating_point() else output

    yield "a forward hook", lambda m: m.register_forward_hook(lambda module, args, output: scaled(output))
    yield "a forward pre-hook", lambda m: m.register_forward_pre_hook(lambda module, args: scaled(args))

    def subclassed(m):
        kind = type(m)
        call = kind.forward
        m.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, *a, **k: scaled(call(self, *a, **k))})

    def overridden(m):
        call = m.forward
        m.forward = lambda *args, **kwargs: scaled(call(*args, **kwargs))

    if name:
        yield "a subclass", subclassed
        yield "a forward of its own", overridden
    for attribute, value in scalars(module).items():
        others = {
            bool: lambda v: [not v],
            int: lambda v: [v + 1, max(v // 2, 1)],
            float: lambda v: [v * 3 + 0.25],
            str: lambda v: ["tanh", "none", "avg", ""],
            tuple: lambda v: [tuple(n + 1 for n in v) if all(isinstance(n, int) for n in v) else v[:1]],
            type(None): lambda v: [0.3, True],
            Resampling: lambda v: [v._replace(keep_aspect=not v.keep_aspect), v._replace(base_grid=(2, 8))],
        }[type(value)](value)
        for other in others:
            if other != value:
                yield f"{attribute}={other!r}", lambda m, a=attribute, o=other: setattr(m, a, o)


def assert_copies_follow(model, optimize, images, refuses=True, left_out=None):
    """Whatever is changed: where the model's result changes, the copy's does too, or the copy refuses by name.

    Changes are made to the model before it is copied, and to a copy that has been called.

    Args:
        model: in evaluation mode.
        optimize: makes the copy.
        images: an input of both.
        refuses: whether a copy may refuse; otherwise it must follow every change.
        left_out: name of a module whose changes are left out, as those of another of its kind are not.
    """
    right = _result(model, images)
    n_effective = n_refused = 0
    for name, module in list(model.named_modules()):
        if left_out is not None and f"{name}.".startswith(f"{left_out}."):
            continue
        for what, change in mutations(module, name):
            changed = copy.deepcopy(model)
            try:
                change(changed.get_submodule(name))
            except Exception:  # nobody can do this to the module
                continue
            mutated = _result(changed, images)
            if isinstance(mutated, Exception) or not _differs(mutated, right):
                continue  # it breaks the model, or changes nothing
            n_effective += 1
            fast = optimize(model)
            _result(fast, images)
            before = _result_of_copy(changed, optimize, images)
            change(fast.get_submodule(name))
            after = _result(fast, images)
            in_evaluation = _result(copy.deepcopy(changed).eval(), images)  # what `optimize` copies
            for when, got, wanted in (("before", before, in_evaluation), ("after", after, mutated)):
                if refuses and isinstance(got, ValueError):
                    n_refused += 1
                    assert str(got).startswith("model: "), got
                    continue
                assert not isinstance(got, Exception), f"{name}: {what}, {when} the first call: {got!r}"
                assert not _differs(got, wanted), f"{name}: {what}, {when} the first call, has no effect"
    least = 100 if left_out is None else 50
    assert n_effective > least
    assert n_refused > least or not refuses


def _result(model, images):
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(images)
    except Exception as error:
        return error


def _result_of_copy(changed, optimize, images):
    try:
        fast = optimize(changed)
    except ValueError as error:
        return error
    return _result(fast, images)


def _differs(a, b):
    return isinstance(a, Exception) or a.shape != b.shape or bool(((a - b).abs() > 1e-4).any() | a.isnan().any())
