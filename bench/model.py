"""The whole model beside every other way to run it on mixed grids, and its time and memory per token.

All candidates of a case run in this process, on the same images, in turns. Each is first checked against timm in
float64, by the tolerance of its precision. Results go to `bench/results/model.md` and `model.json` after every case.
Run: python -m bench.model [--quick]
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import revit_fast as rf
from bench.model_peers import PEERS, SLOW_TO_BUILD
from bench.model_work import (
    MIXES,
    MODELS,
    N_SETS,
    SLOW_S,
    TOLERANCES,
    Case,
    Flops,
    agreement,
    grids_of,
    mixes_of,
    model_title,
    random_vit,
    relative_error,
    timed,
    ungroup,
)
from bench.peers.common import Kind, Peer, Run, Unsuited, precision_name
from bench.probe import PeakProbe, best_instruction, engine_instruction, instructions_in_use
from bench.report import error_text, header_line, machine_header, spread_ms, write
from bench.scaling import TOKENS, scaling, scaling_table
from revit_fast.inference.packed_weights import pack_model
from revit_fast.ops import packed_linear

OURS, CEILING = "ours", "matrix products alone"
BATCHES = (1, 3, 16, 64)


def ours(case: Case, dtype: torch.dtype = torch.float32) -> Peer:
    """The optimised model on packs."""
    model = rf.optimize(rf.ReViT.from_timm(case.vit), dtype=dtype)
    packs = [model.pack(images) for images in case.sets]
    run = torch.inference_mode()(lambda i: model(packs[i % N_SETS]))
    precision = precision_name(dtype)
    order, flops = range(len(case.grids)), flops_of_ours(case)
    return Peer(run, order, flops, precision=precision, instruction=engine_instruction(precision))


OUR_KINDS = (
    Kind(OURS, ours, "The optimised model on packs; every ratio is to it."),
    Kind(
        "ours, bfloat16",
        partial(ours, dtype=torch.bfloat16),
        "`optimize(model, dtype=torch.bfloat16)`: products of bfloat16 where the CPU has them, else of float32.",
    ),
    Kind(
        "ours, int8",
        partial(ours, dtype=torch.int8),
        "`optimize(model, dtype=torch.int8)`: the linear layers of the blocks in int8, all else in float32.",
    ),
)


def flops_of_ours(case: Case) -> Flops:
    """FLOP that ours executes: with class-token pooling the last block does only what the head reads."""
    return case.shape.flops(case.seqlens, pooled_last=case.vit.global_pool == "token")


def products_alone(case: Case) -> tuple[Run, float]:
    """The linear layers of ours' blocks on our microkernel, layer by layer and nothing between, and their FLOP."""
    n_images, n_tokens = len(case.grids), sum(case.seqlens)
    pools = case.vit.global_pool == "token"
    blocks = pack_model(rf.ReViT.from_timm(case.vit)).weights.blocks
    calls = []
    for block in blocks:
        n_rows = n_images if pools and block is blocks[-1] else n_tokens
        calls += [(n_tokens, block.qkv), (n_rows, block.proj), (n_rows, block.fc1), (n_rows, block.fc2)]
    inputs = {(n, weight.panels.shape[1]): torch.randn(n, weight.panels.shape[1]) for n, weight in calls}

    @torch.inference_mode()
    def run(turn: int) -> None:
        for n, weight in calls:
            packed_linear(inputs[n, weight.panels.shape[1]], weight)

    return run, sum(2.0 * n * weight.panels.shape[1] * weight.n_out for n, weight in calls)


class Verdict(NamedTuple):
    """What a candidate's logits of the first set are.

    Attributes:
        error: see `relative_error`; None where it cannot be computed.
        agreement: see `agreement`; None where it cannot be computed.
        problem: what is wrong with them; None where nothing is.
    """

    error: float | None
    agreement: float | None
    problem: str | None


def judged(logits: Tensor, peer: Peer, case: Case) -> Verdict:
    """Compares a candidate's logits of the first set with the true ones, by the tolerance of its precision."""
    expected = case.expected
    if logits.shape != expected.shape:
        return Verdict(None, None, f"wrong: shape {tuple(logits.shape)}, expected {tuple(expected.shape)}")
    if not logits.isfinite().all():
        return Verdict(None, None, "wrong: logits are not finite")
    if peer.order is None:
        return Verdict(None, None, None)
    logits, tolerance = ungroup(logits, peer.order), TOLERANCES[peer.precision]
    error = relative_error(logits, expected)
    problem = f"wrong: differs from timm by {error:.1e} of the largest logit, {peer.precision} may by {tolerance:.0e}"
    return Verdict(error, agreement(logits, expected), None if error <= tolerance else problem)


def page_faults(run: Run, calls: int = 5) -> int:
    """Minor page faults of a warm call, the median of a few."""
    faults = []
    for call in range(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run(call)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(faults))


def checked(case: Case, builders: dict[str, Callable[[Case], Peer]]) -> tuple[dict[str, Peer], dict[str, dict]]:
    """The candidates whose logits are right; and what was found of every one, and why it is left out."""
    peers, found = {}, {}
    for name, build in builders.items():
        precision, verdict = None, Verdict(None, None, None)
        try:
            peer = build(case)
            precision = peer.precision
            verdict = judged(peer.run(0), peer, case)
            reason = verdict.problem
        except Exception as e:  # a peer that is not installed or fails must not end the run of the others
            reason = str(e) if isinstance(e, Unsuited) else f"{type(e).__name__}: {e}".splitlines()[0]
        if reason is None:
            peers[name] = peer
        found[name] = {
            "precision": precision,
            "error": verdict.error,
            "agreement": verdict.agreement,
            "reason": reason,
        }
    return peers, found


def measure(case: Case, peer_keys: Sequence[str], rounds: int, pause_s: float) -> dict:
    """Checks and times all candidates of a case."""
    builders = {kind.name: kind.build for kind in (*OUR_KINDS, *(PEERS[key] for key in peer_keys))}
    peers, found = checked(case, builders)
    found[CEILING] = {"precision": "float32", "error": None, "agreement": None, "reason": None}
    probes = {instruction.name: PeakProbe(instruction, case.n_threads) for instruction in instructions_in_use()}
    runs = {name: peer.run for name, peer in peers.items()} | {name: probe.run for name, probe in probes.items()}
    runs[CEILING], product_flops = products_alone(case)
    samples = timed(runs, rounds, pause_s)
    peaks = {name: probe.ops / statistics.median(samples[name]) for name, probe in probes.items()}
    nominal = case.shape.flops(case.seqlens).total
    result = {"flops_nominal": nominal, "peaks": peaks, "candidates": []}
    for name, verdict in found.items():
        row = {"candidate": name} | verdict
        if name in samples:
            peer = peers.get(name)
            instruction = (peer and peer.instruction) or best_instruction(verdict["precision"])
            flops = peer.flops.total if peer else product_flops
            row |= times(samples[name], samples.get(OURS), len(case.grids))
            per_flop = 1e3 / row["median_ms"] / peaks[instruction.name]
            row |= {"note": peer.note if peer else "", "instruction": instruction.name, "flops": flops}
            row |= {"of_peak": flops * per_flop, "of_peak_nominal": nominal * per_flop if peer else None}
        result["candidates"].append(row)
    if OURS in peers:
        result["page_faults"] = page_faults(peers[OURS].run)
        result["ceiling_ms"] = statistics.median(samples[CEILING]) * 1e3 * flops_of_ours(case).total / product_flops
        result["ours_of_ceiling"] = result["ceiling_ms"] / (statistics.median(samples[OURS]) * 1e3)
    return result


def times(samples: Sequence[float], of_ours: Sequence[float] | None, n_images: int) -> dict:
    """Statistics of a candidate; its ratio is the median of those to ours in the rounds that both took part in."""
    median_ms, quartiles_ms = spread_ms(samples)
    ratio = statistics.median(s / of for s, of in zip(samples, of_ours, strict=False)) if of_ours else None
    return {
        "median_ms": median_ms,
        "quartiles_ms": quartiles_ms,
        "rounds": len(samples),
        "images_per_s": n_images / median_ms * 1e3,
        "ratio_to_ours": ratio,
    }


def case_title(result: dict) -> str:
    return f"{model_title(result['model'])}, batch {result['batch']}, {MIXES[result['mix']]}"


def agreement_text(row: dict) -> str:
    """The part of the images that a row gives the true class; a dash where no logits can be compared."""
    return "–" if row["agreement"] is None else f"{row['agreement']:.0%}"


def case_table(result: dict, rounds: int) -> str:
    """A case as Markdown."""
    facts = [
        f"{result['tokens']} tokens",
        f"{result['flops_nominal'] / 1e9:.1f} GFLOP nominal",
        *(f"peak of {name}: {peak / 1e9:.0f} GOP/s" for name, peak in result["peaks"].items()),
    ]
    if "page_faults" in result:
        facts.append(f"{result['page_faults']} page faults in a warm call of ours")
    if "ours_of_ceiling" in result:
        facts.append(f"ours at {result['ours_of_ceiling']:.0%} of the ceiling of {result['ceiling_ms']:.1f} ms")
    lines = [
        f"## {case_title(result)}",
        "",
        " · ".join(facts),
        "",
        "| candidate | precision | error | top-1 | median ms | quartiles ms | images/s | time ÷ ours | GFLOP | of peak "
        "| nominal | peak of | note |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in result["candidates"]:
        who = f"| {row['candidate']} | {row['precision'] or '–'} | {error_text(row['error'])} | {agreement_text(row)} "
        if row["reason"]:
            lines.append(f"{who}| | | | | | | | | {row['reason']} |")
            continue
        low, high = row["quartiles_ms"]
        ratio = f"{row['ratio_to_ours']:.2f}" if row["ratio_to_ours"] else "–"
        nominal = f"{row['of_peak_nominal']:.1%}" if row["of_peak_nominal"] else "–"
        notes = [
            row["note"],
            f"rounds: {row['rounds']}, as a call takes over {SLOW_S:g} s" if row["rounds"] < rounds else "",
        ]
        lines.append(
            f"{who}| {row['median_ms']:.2f} | {low:.2f}–{high:.2f} | {row['images_per_s']:.1f} "
            f"| {ratio} | {row['flops'] / 1e9:.1f} | {row['of_peak']:.1%} | {nominal} | {row['instruction']} "
            f"| {'; '.join(filter(None, notes))} |"
        )
    return "\n".join([*lines, ""])


def document(header: dict, results: Sequence[dict], scaling_rows: Sequence[dict], args: argparse.Namespace) -> str:
    """All tables as Markdown, with what their columns and candidates mean."""
    lines = [
        "# The model beside its peers",
        "",
        header_line(header),
        "",
        f"{args.threads} threads; {args.rounds} rounds in alternating order on {N_SETS} rotated sets of images, "
        f"{args.pause:g} s rest before each turn.",
        "",
        "Precision: the lowest among the operands of a candidate's matrix products. Error: its largest difference to "
        "timm's logits in float64, as a part of the largest logit, on the first set of images. Top-1: the part of "
        "those images whose largest logit is the one of float64. GFLOP: what a candidate executes, two for a "
        "multiply-add of its matrix products and attention; norms, softmax and activations are not counted.",
        "",
        "Of peak: GFLOP over time and over the rate of the instruction under 'peak of', which is measured between "
        "the turns of the same case. For ours it is the instruction that the kernels of the linear layers use "
        "(attention is in float32 in the int8 rows, but the peak is that of int8). For peers it is the fastest one "
        "of their precision among those that are probed. AMX is not probed and may exceed it. Nominal: the same with "
        "the FLOP of every block on every token of the batch in place of those executed (ours leaves out what the "
        "pooled token does not need in the last block, padded peers execute more). The ceiling is the time of our "
        "linear layers alone on our microkernel in float32, scaled to all FLOP that ours executes.",
        "",
        *(f"- **{kind.name}**: {kind.note}" for kind in (*OUR_KINDS, *(PEERS[key] for key in args.peers))),
        "",
        *(case_table(result, args.rounds) for result in results),
    ]
    if scaling_rows:
        lines.append(scaling_table(scaling_rows))
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; `--quick` gives those not named a small value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--mixes", nargs="+", choices=MIXES)
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--rounds", type=int, help="turns of every candidate")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds of rest before each turn")
    parser.add_argument("--parts", nargs="+", choices=("cases", "scaling"), default=["cases", "scaling"])
    parser.add_argument("--scaling-model", choices=MODELS)
    parser.add_argument("--scaling-tokens", nargs="+", type=int)
    parser.add_argument("--name", default="model", help="results are written under this name")
    parser.add_argument("--quick", action="store_true", help="DeiT-Ti, batch 3, two mixes, 3 rounds, no autotuning")
    args = parser.parse_args(argv)
    quick = {
        "models": ["deit-ti"],
        "batches": [3],
        "mixes": ["mix", "random"],
        "peers": [key for key in PEERS if key not in SLOW_TO_BUILD],
        "rounds": 3,
        "scaling_model": "deit-ti",
        "scaling_tokens": TOKENS[:3],
    }
    full = {
        "models": list(MODELS),
        "batches": list(BATCHES),
        "mixes": list(MIXES),
        "peers": list(PEERS),
        "rounds": 15,
        "scaling_model": "deit-s",
        "scaling_tokens": TOKENS,
    }
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench; fails at the end where ours was wrong at any precision."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    header = machine_header()
    results, scaling_rows = [], []

    def save() -> None:
        content = {"settings": vars(args), "results": results, "scaling": scaling_rows}
        write(args.name, header, content, document(header, results, scaling_rows, args))

    for model_name in args.models if "cases" in args.parts else ():
        vit = random_vit(MODELS[model_name])
        for batch in args.batches:
            for mix in (mix for mix in args.mixes if mix in mixes_of(model_name)):
                case = Case(vit, grids_of(mix, batch), open_ended=mix == "random", n_threads=args.threads)
                about = {"model": model_name, "batch": batch, "mix": mix, "tokens": sum(case.seqlens)}
                results.append(about | {"grids": case.grids} | measure(case, args.peers, args.rounds, args.pause))
                print(case_table(results[-1], args.rounds), flush=True)
                save()
                del case
                torch.compiler.reset()  # else dynamo holds compiled shapes, each with its copy of the weights
                gc.collect()
    if "scaling" in args.parts:
        vit = random_vit(MODELS[args.scaling_model])
        for n_threads in sorted({1, args.threads}):
            scaling_rows += scaling(args.scaling_model, vit, args.scaling_tokens, n_threads, args.rounds, args.pause)
            save()
    rows_of_ours = [(result, row) for result in results for row in result["candidates"][: len(OUR_KINDS)]]
    wrong = [f"{row['candidate']} on {case_title(result)}" for result, row in rows_of_ours if row["reason"]]
    if wrong:
        raise SystemExit("failed: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
