"""Which ViTs of timm `ReViT.from_timm` takes, and by which name it refuses the others.

Run: python -m bench.coverage [--families eva deit] [--docs docs/models.md]

Every model of timm's registry in these families is made without memory (on the meta device) and converted. `--docs`
writes the table into the page, between its two marks. The exit code is 1 if a model ends in another error than one that
names the feature.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import revit_fast as rf
from revit_fast.io.atomic import replaced

FAMILIES = ("vision_transformer", "deit", "eva", "naflexvit", "beit", "vision_transformer_hybrid")
"""Modules of timm.models."""

MARKS = "<!-- coverage: begin -->\n", "<!-- coverage: end -->"
TAKEN = "taken"


def outcome(name: str) -> str:
    """`TAKEN`, the refusal, or "error: " and another exception's name."""
    import timm

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        vit = timm.create_model(name)
    try:
        rf.ReViT.from_timm(vit)
    except (TypeError, ValueError) as error:
        text = str(error)
        return text if text.startswith("vit: ") else f"error: {type(error).__name__}"
    except Exception as error:  # a raw error is what this looks for
        return f"error: {type(error).__name__}"
    return TAKEN


def coverage(families: Sequence[str], names: Sequence[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """The models of every family by their outcome.

    Args:
        families: modules of timm.models.
        names: models to look at; by default all.
    """
    import timm

    found: dict[str, dict[str, list[str]]] = {}
    for family in families:
        for name in timm.list_models(module=family):
            if names is None or name in names:
                found.setdefault(family, {}).setdefault(outcome(name), []).append(name)
    return found


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="NAME")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page to write the table into")
    args = parser.parse_args(argv)
    found = coverage(args.families)
    table = table_of(found)
    if args.docs:
        page = args.docs.read_text(encoding="utf-8")
        (head, rest), end = page.split(MARKS[0]), MARKS[1]
        with replaced(args.docs) as temporary:
            temporary.write_text(f"{head}{MARKS[0]}{table}{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(table, end="")
    raw = [name for outcomes in found.values() for o in outcomes if o.startswith("error") for name in outcomes[o]]
    if raw:
        print(f"raw errors: {', '.join(raw)}")
    return int(bool(raw))


if __name__ == "__main__":
    raise SystemExit(main())
