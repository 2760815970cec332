"""`revit-fast evaluate`: compares accuracy, cost and time of a bundle with fixed lengths and simple baselines."""

from __future__ import annotations

import argparse

from revit_fast.cli.arguments import positive
from revit_fast.cli.labelled import add_data, check_place, check_report_files, open_both, say_unreadable, usage_errors
from revit_fast.io.progress import Progress


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 1, such as 0.5,0.9, got {text!r}")
    return list(dict.fromkeys(values))  # one row per policy


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "evaluate",
        help="compare a bundle with fixed grids and baselines",
        description="Report accuracy and cost of a bundle's policies beside fixed grids, random, entropy, confidence "
        "cascade and oracle, on labelled images; and say whether adaptive lengths pay there.",
    )
    add_data(p, "test")
    p.add_argument(
        "--thresholds", type=_numbers, metavar="X,X", help="thresholds of the assigner, and bounds of the cascade"
    )
    p.add_argument("--json", metavar="FILE", help="write the report there, all or nothing")
    p.add_argument("--plot", metavar="FILE", help="draw accuracy over cost: .png, .svg or .pdf (needs matplotlib)")
    p.add_argument("--time", action="store_true", help="measure throughput too")
    p.add_argument(
        "--time-images", type=positive, default=512, metavar="N", help="images to measure with (default %(default)s)"
    )
    p.add_argument(
        "--rounds", type=positive, default=7, metavar="N", help="rounds of the measurement (default %(default)s)"
    )
    p.set_defaults(command="evaluate")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast evaluate`; returns 0, or 1 if any image could not be read."""
    check_report_files(args)
    from revit_fast.adaptive.preprocess import AdaptivePreprocessor
    from revit_fast.cli.pipelines import optimized
    from revit_fast.streaming.pipeline import AdaptivePipeline
    from revit_fast.train.evaluate import THRESHOLDS, default_policies, evaluate
    from revit_fast.train.labels import predict_lengths
    from revit_fast.train.timing import measure
    from revit_fast.train.verdict import with_verdict

    bundle, images = open_both(args)
    if args.plot:
        check_place(images, "--plot", args.plot)
    fast = optimized(args, bundle.model, "BUNDLE")
    with Progress("images predicted") as progress:
        predictions = predict_lengths(fast, images, progress=progress)
    policies = default_policies()
    if args.thresholds:
        policies = ["argmax", *(("threshold", threshold) for threshold in args.thresholds)]
    bounds = list(args.thresholds or THRESHOLDS)
    if bundle.policy[0] == "cascade":
        bounds.append(bundle.policy[1])
    elif bundle.policy not in policies:
        policies.append(bundle.policy)
    with usage_errors():
        report = evaluate(
            fast,
            bundle.tla,
            images,
            policies=policies,
            cascade=bounds,
            predictions=predictions,
            match="argmax" if bundle.tla is None else bundle.policy,
        )
        if args.time:
            pipe = AdaptivePipeline(fast, AdaptivePreprocessor.for_model(fast, bundle.tla, policy=bundle.policy))
            readable = [i for i in range(len(images)) if i not in predictions.unreadable]
            pixels = [images.image(i) for i in readable[: args.time_images]]
            report = measure(report, pipe, pixels, rounds=args.rounds)
        report = with_verdict(report, taken=bundle.policy)
        if args.json:
            report.save(args.json)
        if args.plot:
            report.plot(args.plot)
    print(report.table(), end="")
    return say_unreadable(images, dict(predictions.unreadable))
