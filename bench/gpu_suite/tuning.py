"""Other tiles of the attention kernels, timed in turns with the chosen ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.gpu_choices import CANDIDATES, FLOAT32, SEQLENS, Override, chosen, is_backward, tunable
from bench.gpu_suite import attention, setting
from bench.gpu_suite.measure import Bench, Case, Run
from bench.gpu_suite.setting import Setting
from bench.gpu_suite.step import Context
from revit_fast.kernels.launch import target_of

CURRENT = "ours: "


def under(target: str, override: Override, build: Callable[[], Run]) -> Run:
    """A candidate that is built and called with other tiles."""
    with override.applied(target):
        run = build()

    def call(turn: int):
        with override.applied(target):
            return run(turn)

    return call


def name_of(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def case(s: Setting, target: str, bound: int, field: str, values: tuple) -> Case:
    """One entry of the tables at one length: the value in use first, then the others."""
    plain = attention.case(s, is_backward(field), {"ours": attention.peers(s)["ours"]})
    current = chosen(target, bound, field)
    build = plain.candidates["ours"]
    overrides = {f"{CURRENT}{name_of(current.value)}": current}
    overrides |= {name_of(v): Override(bound, field, v) for v in values if v != current.value}
    (seqlen,) = plain.facts["seqlens"]
    return replace(
        plain,
        group="Tuning",
        name=f"{'float32' if bound == FLOAT32 else f'D up to {bound}'}, {field}, L {seqlen}",
        candidates={name: partial(under, target, override, build) for name, override in overrides.items()},
        base=next(iter(overrides)),
        facts=plain.facts | {"target": target, "bound": bound, "field": field, "seqlen": seqlen},
    )


def settings(device: torch.device, target: str) -> Iterator[tuple[Setting, int, str]]:
    """Sizes, bound of the head dimension and field of every entry that the chip has."""
    for bound, field in tunable(target):
        dtype, head_dim = (torch.float32, 64) if bound == FLOAT32 else (torch.bfloat16, bound)
        heads = setting.HEADS.get(head_dim, 4)
        for n in SEQLENS[field]:
            yield Setting(f"L {n}, D {head_dim}", device, dtype, ((8192 // n, n),), heads, head_dim), bound, field


def cases(device: torch.device) -> Iterator[Callable[[], Case]]:
    """Every entry that the chip has; in the interpreter two."""
    target = target_of(device).name
    if device.type == "cpu":
        small = setting.attentions(device)[0]
        yield partial(case, small, target, 64, "streaming", ((32, 64, 4, 1),))
        yield partial(case, small, target, FLOAT32, "streaming", ((32, 64, 4),))
        return
    for s, bound, field in settings(device, target):
        yield partial(case, s, target, bound, field, CANDIDATES[bound, field])


def winners(rows: list[dict]) -> list[dict]:
    """The fastest value of every entry at each length.

    A value is clear of the chosen one if its upper quartile lies below the chosen one's lower quartile.
    """
    found = []
    timed = [row for row in rows if "median_ms" in row]
    for case_name in dict.fromkeys(row["case"] for row in timed):
        of_case = [row for row in timed if row["case"] == case_name]
        current = next((row for row in of_case if row["candidate"].startswith(CURRENT)), None)
        if current is None:
            continue
        best = min(of_case, key=lambda row: row["median_ms"])
        found.append(
            {key: current[key] for key in ("target", "bound", "field", "seqlen")}
            | {
                "chosen": current["candidate"].removeprefix(CURRENT),
                "fastest": best["candidate"].removeprefix(CURRENT),
                "gain": current["median_ms"] / best["median_ms"],
                "clear": bool(best["quartiles_ms"][1] < current["quartiles_ms"][0]),
            }
        )
    return found


def over_lengths(rows: list[dict]) -> list[dict]:
    """The geometric mean over lengths of each value's time divided by the chosen value's."""
    ratios: dict[tuple, list[float]] = {}
    for row in rows:
        if row.get("ratio_to_ours"):
            key = (row["target"], row["bound"], row["field"], row["candidate"].removeprefix(CURRENT))
            ratios.setdefault(key, []).append(row["ratio_to_ours"])
    names = ("target", "bound", "field", "value")
    means = {key: math.exp(sum(map(math.log, found)) / len(found)) for key, found in ratios.items()}
    return [dict(zip(names, key, strict=True)) | {"lengths": len(ratios[key]), "ratio": means[key]} for key in ratios]


def run(context: Context) -> list[str]:
    """The step."""
    bench = Bench(context)
    bench.measure_ceilings(setting.models(context.device)[0].dtype)
    failures = bench.run_all(list(cases(context.device)))
    context.keep(winners=winners(bench.rows), over_lengths=over_lengths(bench.rows))
    return failures
