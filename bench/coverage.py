"""Which ViTs of timm and transformers `ReViT` takes, and by which name it refuses the others.

Run: python -m bench.coverage [--families eva deit] [--docs docs/models.md]

Every model of timm's registry in these families, and every class that transformers' `AutoModel` and
`AutoModelForImageClassification` make and that takes images, is made without memory (on the meta device) and converted.
A library that is not installed is left out. `--docs` writes the tables into the page, each between its two marks. The
exit code is 1 if a model ends in another error than one that names the feature.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import revit_fast as rf
from revit_fast.io.atomic import replaced
from revit_fast.models.from_transformers import KINDS

FAMILIES = ("vision_transformer", "deit", "eva", "naflexvit", "beit", "vision_transformer_hybrid")
"""Modules of timm.models."""

REGISTRIES = {
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
"""Where transformers names the classes that each of its automatic classes makes."""

OTHER = "another class"
MARKS = {library: (f"<!-- {library}: begin -->\n", f"<!-- {library}: end -->") for library in ("timm", "transformers")}
TAKEN = "taken"


def outcome(make: Callable[[], nn.Module], read: Callable[[nn.Module], rf.ReViT]) -> str:
    """`TAKEN`, the refusal, or "error: " and another exception's name.

    Args:
        make: makes a model of another library.
        read: `ReViT.from_timm` or `ReViT.from_transformers`.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        vit = make()
    try:
        read(vit)
    except (TypeError, ValueError) as error:
        text = str(error)
        return text if text.startswith("vit: ") else f"error: {type(error).__name__}"
    except Exception as error:  # a raw error is what this looks for
        return f"error: {type(error).__name__}"
    return TAKEN


def coverage(families: Sequence[str], names: Sequence[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """The models of every family of timm by their outcome.

    Args:
        families: modules of timm.models.
        names: models to look at; by default all.
    """
    import timm

    found: dict[str, dict[str, list[str]]] = {}
    for family in families:
        for name in timm.list_models(module=family):
            if names is None or name in names:
                result = outcome(lambda name=name: timm.create_model(name), rf.ReViT.from_timm)
                found.setdefault(family, {}).setdefault(result, []).append(name)
    return found


def class_coverage(names: Sequence[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """The classes of transformers that take images, by the automatic class that makes them and by their outcome.

    Classes that are not public, or need a library which is not installed, are left out.

    Args:
        names: classes to look at; by default all.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, dict[str, list[str]]] = {}
    for registry, mapping in REGISTRIES.items():
        of_types = getattr(modeling_auto, mapping).values()
        for name in dict.fromkeys(n for entry in of_types for n in ([entry] if isinstance(entry, str) else entry)):
            if names is not None and name not in names:
                continue
            try:
                kind = getattr(transformers, name)
                modalities = kind.input_modalities
            except (AttributeError, ImportError):  # it is not public, or needs a library that is not installed
                continue
            if "image" in modalities:
                others = "" if modalities == "image" or len(modalities) == 1 else ", images and more"
                found.setdefault(registry + others, {}).setdefault(_outcome_of_class(kind), []).append(name)
    return dict(sorted(found.items()))


def _outcome_of_class(kind: type[nn.Module]) -> str:
    if kind.__name__ in KINDS:
        return outcome(lambda: kind(kind.config_class()), rf.ReViT.from_transformers)
    # A refusal reads no more than the class, and some of these have many billions of weights in thousands of modules.
    found = outcome(lambda: kind.__new__(kind), rf.ReViT.from_transformers)
    return OTHER if found.startswith(f"vit: the class {kind.__module__}.{kind.__name__} (supported: ") else found


def table_of(found: dict[str, dict[str, list[str]]]) -> str:
    """A row for every family: how many are taken, and the refusals of the others with their counts."""
    lines = ["| timm.models | taken | refused |", "| --- | --- | --- |"]
    for family, outcomes in found.items():
        counts = Counter({reason: len(names) for reason, names in outcomes.items()})
        total, taken = counts.total(), counts.pop(TAKEN, 0)
        reasons = [f"{n} × {reason.removeprefix('vit: ').partition(' (')[0]}" for reason, n in counts.most_common()]
        short = [reason.removesuffix(" is not supported by ReViT") for reason in reasons]
        lines.append(f"| `{family}` | {taken} of {total} | {'; '.join(short) or '–'} |")
    return "\n".join(lines) + "\n"


def class_table_of(found: dict[str, dict[str, list[str]]]) -> str:
    """A row for every automatic class: which classes are taken, and the refusals of the others with their names."""
    lines = ["| transformers | taken | refused |", "| --- | --- | --- |"]
    for registry, outcomes in found.items():
        named = {
            reason.removeprefix("vit: "): ", ".join(f"`{name}`" for name in names) for reason, names in outcomes.items()
        }
        counts = [sum(map(len, outcomes.values())), len(outcomes.get(TAKEN, []))]
        refused = "; ".join(f"{reason}: {names}" for reason, names in named.items() if reason != TAKEN)
        taken = f"{counts[1]} of {counts[0]}" + (f": {named[TAKEN]}" if counts[1] else "")
        name, comma, more = registry.partition(", ")
        lines.append(f"| `{name}`{comma}{more} | {taken} | {refused or '–'} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="NAME")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the tables into")
    args = parser.parse_args(argv)
    found, tables = {}, {}
    if find_spec("timm"):
        found |= (of_timm := coverage(args.families))
        tables["timm"] = table_of(of_timm)
    if find_spec("transformers"):
        found |= (of_transformers := class_coverage())
        tables["transformers"] = class_table_of(of_transformers)
    for library, table in tables.items():
        if args.docs:
            write_table(args.docs, library, table)
        print(table)
    raw = [name for outcomes in found.values() for o in outcomes if o.startswith("error") for name in outcomes[o]]
    if raw:
        print(f"raw errors: {', '.join(raw)}")
    return int(bool(raw))


def write_table(page: Path, library: str, table: str) -> None:
    """Puts a table into a page, in the place of what stands between the marks of its library."""
    begin, end = MARKS[library]
    head, rest = page.read_text(encoding="utf-8").split(begin)
    with replaced(page) as temporary:
        temporary.write_text(f"{head}{begin}{table}{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
