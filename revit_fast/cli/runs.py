"""Parts that `train` and `fit` share: the options of a training run, its configuration and its exit code.

Functions that run something import torch and the package; the options need neither.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

from revit_fast.cli.arguments import INTERRUPTED, UsageError, add_threads
from revit_fast.io.atomic import read_json
from revit_fast.train.config import TrainConfig


def exit_code(args: argparse.Namespace, work: Callable[[], None]) -> int:
    """Runs `work` with the threads of the arguments; prints an error on stderr and returns the exit code.

    Args:
        args: arguments of `train` or `fit`.
        work: function that does the run.

    Returns:
        0; 1 if the run failed; 130 if it was stopped and can be resumed.

    Raises:
        UsageError: for arguments that cannot work.
    """
    import torch

    from revit_fast.cli.pipelines import checked_device
    from revit_fast.train.loader import UnreadableError
    from revit_fast.train.stopping import Interrupted, NotFiniteError

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UsageError(f"--output: {args.output} is a file; give a folder")
    checked_device(args.device)
    try:
        work()
    except Interrupted as stop:
        resume = f"revit-fast {args.command} --output {args.output} --resume"
        print(f"revit-fast: {stop}: {resume}", file=sys.stderr)
        return INTERRUPTED
    except (NotFiniteError, UnreadableError, OSError) as error:
        print(f"revit-fast: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError:
        raise  # main says what to install
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError.of(error, **OPTION_OF) from error
    return 0


def configuration(args: argparse.Namespace, folder: Path) -> TrainConfig:
    """The run's configuration.

    Options override the file of --config, which overrides the configuration in the folder of a run that is resumed.
    """
    from revit_fast.train.run import read_config
    from revit_fast.train.trainer import CONFIG

    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    kept = read_config(folder).as_dict() if args.resume and (folder / CONFIG).is_file() else {}
    base = {}
    if args.config is not None:
        try:
            base = read_json(args.config)
        except (OSError, ValueError) as error:
            raise UsageError(f"--config: cannot read {args.config}: {error}") from error
        if not isinstance(base, dict):
            raise UsageError(f"--config: {args.config} holds no object of names and values, but {base!r:.40}")
    config = TrainConfig.from_dict(kept | base | given)
    if not config.data:
        raise UsageError("DATA: expected images to train on, or --resume with the --output of a run")
    return config


def add_run(p: argparse.ArgumentParser, output: str) -> None:
    """Arguments of the commands that train a model; `output` is the help of --output."""
    p.add_argument("data", nargs="?", metavar="DATA", help="labelled images to train on: see docs/training.md")
    p.add_argument("--output", required=True, metavar="DIR", help=output)
    p.add_argument("--resume", action="store_true", help="go on with the run in --output, bit for bit")
    p.add_argument("--config", metavar="FILE", help="a train.json to start from; options change it")
    add_config(p.add_argument_group("choices of the run (names and meanings as in timm where it has them)"))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to train on (default %(default)s)")
    add_threads(p)


def add_config(group: argparse._ArgumentGroup) -> None:
    """Adds an option for every field of `TrainConfig` except `data`; options that are not given are None."""
    texts = field_texts(TrainConfig)
    for f in fields(TrainConfig):
        if f.name == "data":
            continue
        default = f.default if f.default is not MISSING else f.default_factory()
        shown = "" if default in (None, {}) else f" (default {' '.join(map(str, as_list(default)))})"
        text = texts.get(f.name, "").replace("`", "").replace("%", "%%") + shown
        group.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **OPTIONS[f.type])


def field_texts(cls: type) -> dict[str, str]:
    """The text of each attribute in the docstring of a dataclass."""
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", cls.__doc__ or "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


class KeyValues(argparse.Action):
    """Parses `name=value ...` to a dict; values are Python literals, or else text."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        pairs = {}
        for text in values:
            name, equals, value = text.partition("=")
            if not equals or not name:
                parser.error(f"{option_string}: expected name=value, got {text!r}")
            try:
                pairs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[name] = value
        setattr(namespace, self.dest, pairs)


OPTIONS = {
    "str": {"type": str, "metavar": "NAME"},
    "str | None": {"type": str, "metavar": "NAME"},
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "float | None": {"type": float, "metavar": "X"},
    "bool": {"action": argparse.BooleanOptionalAction},
    "Sequence[int]": {"type": int, "nargs": "+", "metavar": "N"},
    "Sequence[float] | None": {"type": float, "nargs": 3, "metavar": "X"},
    "Mapping[str, Any]": {"action": KeyValues, "nargs": "+", "metavar": "NAME=VALUE"},
}
"""Arguments of `add_argument` for a field of each type."""


OPTION_OF = {
    **{f.name: f"--{f.name.replace('_', '-')}" for f in fields(TrainConfig) if f.name != "data"},
    **{"path": "DATA", "share": "--held-out-share", "output": "--output", "device": "--device", "name": "--model"},
    **{"budget": "--budget", "max_drop": "--max-drop", "assigner": "--assigner"},
}
"""The option that each argument in an error of a run comes from."""


def as_list(value: object) -> list:
    """A sequence's items, or the value alone."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
