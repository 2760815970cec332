"""Our time and memory per token from one image of 50 tokens to a pack of 200,000.

`python -m bench.scaling --model deit-s --tokens 4000 --threads 2` prints the peak memory of one call. That process does
nothing else. `bench.model` runs this command.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import VisionTransformer

import revit_fast as rf
from bench.model_work import MODELS, N_SETS, grids_up_to, model_title, random_vit, timed
from bench.report import spread_ms

TOKENS = (50, 197, 1_000, 4_000, 16_000, 50_000, 200_000)
ROTATED_UP_TO = 4_000
"""Inputs are rotated up to this number of tokens. The patch rows of larger packs fill a cache several times over."""

ROOT = Path(__file__).parent.parent


def random_pack(model: rf.ReViT, n_tokens: int) -> rf.PackedBatch:
    """Patch rows of about `n_tokens` tokens, see `grids_up_to`."""
    grids = grids_up_to(n_tokens, model.num_prefix_tokens)
    seqlens = [h * w for h, w in grids]
    rows = torch.randn(sum(seqlens), 3 * model.patch_size**2)
    return rf.PackedBatch.from_rows(rows, seqlens, grids=grids, lengths=model.lengths)


def n_tokens_of(batch: rf.PackedBatch, n_prefix: int) -> int:
    """Tokens of a pack of patch rows once it is embedded."""
    return sum(batch.seqlens) + n_prefix * len(batch)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes; the file gives it in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_memory(model_name: str, n_tokens: int, n_threads: int) -> dict:
    """Measures how much one call adds to the resident memory of this process at its peak.

    Returns:
        Tokens, peak bytes above those resident before the call (so without weights and input rows), and bytes of the
        input rows.
    """
    torch.set_num_threads(n_threads)
    model = rf.optimize(rf.ReViT.from_timm(random_vit(MODELS[model_name])))
    batch = random_pack(model, n_tokens)
    with torch.inference_mode():
        model(random_pack(model, 50))  # does what only the first call does
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc: memory that is freed but kept would hide a part of the call's
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = status_bytes("VmRSS")
        model(batch)
        peak = status_bytes("VmHWM") - before
    return {
        "tokens": n_tokens_of(batch, model.num_prefix_tokens),
        "peak_bytes": peak,
        "input_bytes": batch.data.numel() * batch.data.element_size(),
    }


def peak_memory_apart(model_name: str, n_tokens: int, n_threads: int) -> dict | None:
    """`peak_memory` of a new process; None if the system does not report it."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    command = [sys.executable, "-m", "bench.scaling", "--model", model_name]
    command += ["--tokens", str(n_tokens), "--threads", str(n_threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def scaling(
    model_name: str, vit: VisionTransformer, tokens: Sequence[int], n_threads: int, rounds: int, pause_s: float
) -> list[dict]:
    """A row for every token count, on `n_threads` threads; packs of all counts take turns."""
    model = rf.optimize(rf.ReViT.from_timm(vit))
    packs = {n: [random_pack(model, n) for _ in range(N_SETS if n <= ROTATED_UP_TO else 1)] for n in tokens}
    runs = {n: torch.inference_mode()(lambda i, sets=sets: model(sets[i % len(sets)])) for n, sets in packs.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    samples = timed(runs, rounds, pause_s)
    torch.set_num_threads(before)
    rows = []
    for n in tokens:
        median_ms, quartiles_ms = spread_ms(samples[n])
        n_tokens = n_tokens_of(packs[n][0], model.num_prefix_tokens)
        rows.append(
            {
                "model": model_name,
                "threads": n_threads,
                "tokens": n_tokens,
                "images": len(packs[n][0]),
                "rounds": len(samples[n]),
                "median_ms": median_ms,
                "quartiles_ms": quartiles_ms,
                "us_per_token": median_ms * 1e3 / n_tokens,
                "memory": peak_memory_apart(model_name, n, n_threads),
            }
        )
        print(
            f"scaling, threads {n_threads}, tokens {n_tokens}: {rows[-1]['us_per_token']:.2f} µs per token", flush=True
        )
    return rows


def scaling_table(rows: Sequence[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        f"## Scaling: {model_title(rows[0]['model'])}, ours",
        "",
        "Packs of the 4/6/6 mix (one image where its tokens are the count). Memory: peak of one call in a process of "
        "its own above what was resident before it, so without weights and input rows; those are listed beside it.",
        "",
        "| threads | tokens | images | median ms | µs per token | quartiles | rounds | peak kB per token "
        "| input kB per token |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        n, memory = row["tokens"], row["memory"]
        low, high = (ms * 1e3 / n for ms in row["quartiles_ms"])
        peak, rows_in = (f"{memory[key] / n / 1e3:.2f}" if memory else "–" for key in ("peak_bytes", "input_bytes"))
        lines.append(
            f"| {row['threads']} | {n} | {row['images']} | {row['median_ms']:.1f} | {row['us_per_token']:.2f} "
            f"| {low:.2f}–{high:.2f} | {row['rounds']} | {peak} | {rows_in} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deit-s")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(peak_memory(args.model, args.tokens, args.threads)))


if __name__ == "__main__":
    main()
