"""Everything we want to learn from a GPU in a quarter of an hour, in order of worth.

Run: python -m bench.gpu_suite --out DIR on a machine with a GPU; with `TRITON_INTERPRET=1` and `--device interpreter`
on any machine, on tiny sizes: that shows that the program works, and its times mean nothing. Every step writes
DIR/STEP.json while it runs; DIR/suite.json says how each step went. The exit status is 0 if every step passed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.gpu_suite.runner import run_steps
from bench.gpu_suite.steps import STEPS


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="steps to run; their order stays")
    parser.add_argument("--minutes", type=float, help="limit of each step, in place of the planned minutes")
    parser.add_argument("--list", action="store_true", help="print the steps and their planned minutes")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="replace the tables between the marks of PAGE")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results for --docs")
    options = parser.parse_args(arguments)
    if options.list:
        for step in STEPS:
            print(f"{step.name:<10} {step.minutes:4.1f} min  {step.about}")
        print(f"{'sum':<10} {sum(step.minutes for step in STEPS):4.1f} min")
        return 0
    if options.docs:
        from bench.gpu_suite.tables import update

        if options.results is None:
            parser.error("--docs needs --results DIR")
        update(options.docs, options.results)
        return 0
    if options.out is None:
        parser.error("--out DIR is needed")
    if options.device == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device interpreter needs TRITON_INTERPRET=1 in the environment")
    if options.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--device cuda: unset TRITON_INTERPRET")
    results = run_steps(STEPS, options.steps, options.out, options.device, options.minutes)
    for name, result in results.items():
        seconds = f"{result['seconds']:.0f} s of {result['limit_s']:.0f}" if "seconds" in result else ""
        print(f"{name:<10} {result['state']:<10} {seconds}")
    return int(any(results[name]["state"] != "done" for name in options.steps))


if __name__ == "__main__":
    raise SystemExit(main())
