import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from revit_fast.train.losses import length_loss, tlsd_loss


def written_out(logits, target, weight, temperature):
    """The formula of METHOD, term by term in float64."""
    total = 0.0
    n_lengths, batch, n_classes = logits.shape
    for i in range(n_lengths):
        for b in range(batch):
            p = logits[i, b].double().softmax(0)
            t = F.one_hot(target[b], n_classes).double() if target.dim() == 1 else target[b].double()
            ce = -(t * p.log()).sum()
            if i == 0:
                total += ce
                continue
            teacher = (logits[0, b].double() / temperature).softmax(0)
            student = (logits[i, b].double() / temperature).softmax(0)
            kl = (teacher * (teacher.log() - student.log())).sum()
            total += (1 - weight) * ce + weight * temperature**2 * kl
    return total / (n_lengths * batch)


@settings(max_examples=40, deadline=None)
@given(
    n_lengths=st.integers(1, 5),
    batch=st.integers(1, 4),
    n_classes=st.integers(2, 7),
    weight=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    soft=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_is_the_formula(n_lengths, batch, n_classes, weight, temperature, soft, seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(n_lengths, batch, n_classes, dtype=torch.float64)
    target = torch.rand(batch, n_classes).softmax(1) if soft else torch.randint(n_classes, (batch,))
    loss, losses = tlsd_loss(logits, target.double() if soft else target, weight, temperature)
    torch.testing.assert_close(loss, written_out(logits, target, weight, temperature), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses.mean(), loss)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradcheck(weight, soft):
    """Against finite differences with the teacher held fast, as no gradient flows to it."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 4, dtype=torch.float64).softmax(1) if soft else torch.tensor([1, 3])
    teacher = logits[0].detach().clone()

    def loss(z):
        return torch.stack([length_loss(z[i], target, teacher if i else None, weight, 2.0) for i in range(3)]).mean()

    assert torch.autograd.gradcheck(loss, logits)
    ours = torch.autograd.grad(tlsd_loss(logits, target, weight, 2.0)[0], logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(loss(logits), logits)[0], rtol=0, atol=0)


def test_no_gradient_reaches_the_teacher():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    tlsd_loss(logits, torch.tensor([0, 1, 2]), 1.0, 2.0)[0].backward()
    alone = logits.detach()[0].requires_grad_()
    F.cross_entropy(alone, torch.tensor([0, 1, 2])).backward()
    torch.testing.assert_close(logits.grad[0], alone.grad / 2)


def test_a_length_that_equals_its_teacher_has_no_distillation_loss():
    z = torch.randn(5, 10)
    loss = length_loss(z, torch.zeros(5, dtype=torch.long), z.clone(), 1.0, 4.0)
    assert abs(loss.item()) < 1e-6


def test_16_bit_logits_are_judged_in_float32():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 64, 10).bfloat16(), torch.randint(10, (64,))
    loss, _ = tlsd_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, tlsd_loss(logits.float(), target)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 3, 4), 1.5, 2.0), "distill_weight: expected a number in \\[0, 1\\], got 1.5"),
        (((2, 3, 4), 0.5, 0.0), "temperature: expected a positive number, got 0.0"),
        (((2, 3, 4), 0.5, math.inf), "temperature: expected a positive number, got inf"),
        (((3, 4), 0.5, 2.0), r"logits: expected shape \[n_lengths, B, K\], the longest first, got \[3, 4\]"),
    ],
)
def test_bad_arguments(arguments, message):
    shape, weight, temperature = arguments
    with pytest.raises(ValueError, match=message):
        tlsd_loss(torch.zeros(shape), torch.zeros(3, dtype=torch.long), weight, temperature)
