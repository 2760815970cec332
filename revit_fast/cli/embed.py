"""`revit-fast embed`: writes the embeddings of image files."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from revit_fast.cli.arguments import (
    UsageError,
    add_batches,
    add_device,
    add_images,
    add_trace,
    add_weights,
    check_file,
)
from revit_fast.io.finding import EMBEDDING_SUFFIXES
from revit_fast.io.names import shortened


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "embed",
        help="write the embeddings of image files",
        description="Write what the model's head reads of each image; the model needs no classifier.",
    )
    add_images(p)
    p.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        type=_file,
        help="x.npy, beside x.csv that names its rows; or x.parquet (needs pyarrow). All or nothing",
    )
    p.add_argument(
        "--tokens",
        action="store_true",
        help="also write every token after the final norm: into x.tokens.npy, or a column of x.parquet",
    )
    p.add_argument("--normalize", action="store_true", help="divide every embedding by its Euclidean norm")
    add_trace(p)
    add_weights(p)
    add_device(p)
    add_batches(p)
    p.set_defaults(command="embed", labels=None)


def _file(text: str) -> str:
    if Path(text).suffix not in EMBEDDING_SUFFIXES:
        endings = " or ".join(EMBEDDING_SUFFIXES)
        raise argparse.ArgumentTypeError(f"expected a name that ends in {endings}, got {shortened(text)}")
    return text


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast embed`; returns 0, or 1 if any image failed."""
    from revit_fast.cli.pipelines import build_pipeline, choice_options, warn_of_random_weights
    from revit_fast.cli.report import Rows, run_stage
    from revit_fast.streaming.embedding_files import embedding_files

    check_outputs(args)
    if args.output.endswith(".parquet"):
        import_module("pyarrow")  # if it is missing, main says what to install
    try:
        pipe = build_pipeline(args, classifies=False).with_embeddings(tokens=args.tokens, normalize=args.normalize)
    except (TypeError, ValueError) as error:
        raise UsageError.of(error, **choice_options(args), model="--model") from error
    warn_of_random_weights(args, "embeddings are meaningless")
    model = pipe.model
    widths = {"token_width": model.embed_dim if args.tokens else 0, "n_prefix": model.num_prefix_tokens}
    with embedding_files(args.output, model.head_hidden_size, **widths) as add:
        return run_stage(args, pipe.__call__, Rows(add))


def check_outputs(args: argparse.Namespace) -> None:
    """Raises a usage error, before anything is computed, for files that cannot be written or are somebody else's."""
    from revit_fast.streaming.embedding_files import PLACED, paths_beside

    for path in paths_beside(args.output, args.tokens):
        check_file("--output", str(path))
        if path.suffix == ".csv" and path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                if not file.readline(1000).startswith(",".join(PLACED)):
                    raise UsageError(
                        f"--output: {path} would be replaced, and it holds no rows of embeddings; give another name"
                    )
    if args.trace:
        check_file("--trace", args.trace)
