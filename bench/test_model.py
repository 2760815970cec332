"""The model on 16 images of the 4/6/6 mix beside timm; `python -m bench.model` has all sizes, batches and peers."""

import pytest
from conftest import Comparison

from bench.model import OURS, judged, ours
from bench.model_peers import PEERS
from bench.model_work import MODELS, Case, grids_of, model_title, random_vit

BUILDERS = {OURS: ours} | {PEERS[key].name: PEERS[key].build for key in ("timm", "timm-full")}


def build_deit_small() -> Comparison:
    return compare("deit-s")


def build_deit_tiny() -> Comparison:
    return compare("deit-ti")


def compare(model: str) -> Comparison:
    case = Case(random_vit(MODELS[model]), grids_of("mix", 16))
    peers = {name: build(case) for name, build in BUILDERS.items()}

    def check(candidate: str, logits) -> float | None:
        verdict = judged(logits, peers[candidate], case)
        assert verdict.problem is None, f"{candidate}: {verdict.problem}"
        return verdict.error

    return Comparison(
        group="model",
        case=f"{model_title(model)}, 4/6/6 mix",
        candidates={name: peer.run for name, peer in peers.items()},
        check=check,
        precision="float32",
        rounds=9,
    )


@pytest.mark.parametrize("candidate", BUILDERS)
def test_deit_small(replay, candidate):
    replay(build_deit_small, candidate)


@pytest.mark.parametrize("candidate", BUILDERS)
def test_deit_tiny(replay, candidate):
    replay(build_deit_tiny, candidate)
