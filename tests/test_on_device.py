"""The model and its inference copy on a GPU, or in the interpreter of its kernels, held to their definition."""

import dense_vit
import helpers
import pytest
import torch
from helpers import assert_as_accurate, full, only_on
from small_models import MIX, images_of, make_model

import revit_fast as rf
from revit_fast.inference import cuda_graphs

pytestmark = only_on("interpreter", "cuda", reason="about the Triton kernels")

# Batches of one bucket and their sizes: a replay must see the tensors of its own batch.
MIXES = ([6, 4, 2], [2], [(3, 5), 2])


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """On a GPU graphs are captured; elsewhere the captured function is called."""
    if helpers.device != "cuda":
        monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", cuda_graphs.DirectCalls)


def defined(model, images, dtype):
    """Logits by the definition, on the CPU, and the parameters that they come from."""
    state = {name: t.detach().cpu().to(dtype).requires_grad_() for name, t in model.state_dict().items()}
    return torch.stack([dense_vit.logits(model.spec, state, x.cpu().to(dtype)) for x in images]), state


def hold(logits, model, images, what="logits"):
    """Holds logits to the error rule."""
    same, truth = (defined(model, images, dtype)[0].detach() for dtype in (logits.dtype, torch.float64))
    assert_as_accurate(logits.detach().cpu(), same, truth, what)


def on(device, images):
    return [image.to(device) for image in images]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"global_pool": "avg", "class_token": False}),
        (torch.bfloat16, {"embed_dim": 72, "num_heads": 1, "depth": 1}),
        full(torch.bfloat16, {"embed_dim": 160, "num_heads": 2, "init_values": 0.5}),
        (torch.bfloat16, {"rope": {"kind": "mixed"}}),
        (torch.bfloat16, {"rope": {"half": True}, "num_kv_heads": 1}),
    ],
    ids=str,
)
def test_a_forward_pass(device, dtype, options):
    model, images = make_model(**options).to(device, dtype), [image.to(dtype) for image in images_of(MIX)]
    with torch.no_grad():
        hold(model(on(device, images)), model, images)


def test_a_training_step(device):
    model, images = make_model(rope={"kind": "mixed"}).to(device), images_of(MIX)
    weights = torch.linspace(-1, 1, 40)
    loss = (model(on(device, images)) * weights.to(device)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    logits, state = defined(model, images, torch.float64)
    truth = torch.autograd.grad((logits * weights).sum(), [state[name] for name in names])
    for name, expected in zip(names, truth, strict=True):
        # 1e-5: sums of at most 10^2 terms through two blocks, in float32 and in another order.
        assert (ours[name].cpu() - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_replays_queued_one_after_another_keep_their_inputs_and_results(device):
    model = make_model(rope={"half": True}).to(device)
    fast = rf.optimize(model)
    turns = 10 if helpers.device == "cuda" else 1
    batches = [images_of(mix, seed=10 * turn) for turn in range(turns) for mix in MIXES]
    results = []
    for images in batches:
        given = [image.clone() for image in images]
        results.append(fast(given))
        for image in given:  # a caller may fill its batch again at once
            image.fill_(torch.nan)
    for i, (logits, images) in enumerate(zip(results, batches, strict=True)):
        hold(logits, model, images, f"call {i}")


def test_a_replay_after_a_change_of_weights_uses_the_new_ones(device):
    model, images = make_model(rope={"kind": "mixed"}, depth=1).to(device), images_of(MIX)
    fast = rf.optimize(model)
    fast(images)
    with torch.no_grad():
        for copied in (model, fast):
            copied.head.weight.mul_(-2)
            copied.rope.freqs.mul_(0.5)
    hold(fast(images), model, images)
