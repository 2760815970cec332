"""The steps of the suite in order of worth. This module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of the suite.

    Attributes:
        name: name of the step and of its JSON file.
        minutes: minutes planned; the step is killed when they are over.
        function: "module:function" that computes it, called with a `step.Context`. It returns what failed, a line each.
        about: what it tells.
        interpreted: whether it runs in Triton's interpreter if there is no GPU.
    """

    name: str
    minutes: float
    function: str
    about: str
    interpreted: bool = True


STEPS = (
    Step(
        "compile",
        1.2,
        "bench.gpu_suite.warm:run",
        "compiles the kernels of the steps after `tests` on all cores, into Triton's cache",
        interpreted=False,
    ),
    Step("tests", 2.5, "bench.gpu_suite.gpu_tests:run", "tests of ops, graphs and model; first those that once failed"),
    Step(
        "model", 2.9, "bench.gpu_suite.model:run", "DeiT-S and ViT-B, 64 and 256 images, beside other ways to run them"
    ),
    Step("attention", 1.8, "bench.gpu_suite.attention:run", "attention by length and head dimension, beside its peers"),
    Step("rows", 0.8, "bench.gpu_suite.rows:run", "norms, activations, rotation, epilogues as shares of the copy rate"),
    Step("profile", 0.7, "bench.gpu_suite.profile:run", "one call of the model by kernel, eagerly and from its graph"),
    Step("tuning", 2.0, "bench.gpu_suite.tuning:run", "other tiles of the attention kernels beside the chosen ones"),
)
