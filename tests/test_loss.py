import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_reward import PairwiseLoss

loss = PairwiseLoss()


def closed_form(chosen, rejected, margin=None, weight=None):
    """
    Return the loss and its gradient by the chosen rewards in float64.

    By hand, L = Σ w log(1 + e^-d) / Σ w and dL/dr_w = -w σ(-d) / Σ w.
    """
    d = chosen.double() - rejected.double() - (0 if margin is None else margin.double())
    w = torch.ones_like(d) if weight is None else weight.double()
    return (w * torch.log1p(torch.exp(-d))).sum() / w.sum(), -w / (1 + torch.exp(d)) / w.sum()


@pytest.mark.parametrize("shape", [(7, 1), (7,)])
@pytest.mark.parametrize("options", [(), ("margin",), ("weight",), ("margin", "weight")], ids=str)
def test_loss_and_gradient_equal_the_closed_form(shape, options):
    torch.manual_seed(0)
    chosen = 3 * torch.randn(shape)
    rejected = 3 * torch.randn(shape)
    options = {name: torch.rand(shape) + 0.1 for name in options}
    chosen.requires_grad_()
    rejected.requires_grad_()
    value = loss(chosen, rejected, **options)
    value.backward()
    expected, gradient = closed_form(chosen.detach(), rejected.detach(), **options)
    assert value.shape == () and value.dtype == torch.float32
    assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    assert_close(chosen.grad.double(), gradient, atol=1e-7, rtol=1e-5)
    assert_close(rejected.grad.double(), -gradient, atol=1e-7, rtol=1e-5)


def test_ints_as_in_the_first_version():
    value = loss(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3]))
    assert value.numel() == 1 and value > 0
    assert value.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)  # every difference is 1


def test_equal_rewards_cost_log_2():
    assert loss(torch.zeros(3, 1), torch.zeros(3, 1)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_finite_at_extremes(dtype, difference):
    chosen = torch.tensor([[difference]], dtype=dtype, requires_grad=True)
    value = loss(chosen, torch.zeros_like(chosen))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(max(0, -chosen.item()), rel=1e-6)
    assert chosen.grad.item() == (-1 if difference < 0 else 0)


def test_difference_is_taken_in_float32():
    "In bfloat16 the difference of -255 and 1.0078125 would round to -256."
    chosen = torch.tensor([1.0078125], dtype=torch.bfloat16)
    rejected = torch.tensor([-255.0], dtype=torch.bfloat16)
    assert loss(rejected, chosen).item() == pytest.approx(256.0078125, abs=1e-4)


def test_k_ranked_responses_count_as_one_element():
    """
    Rewards 3, 1, 0 (best first) and 0, 2 (best first). By hand, with s(d) = log(1 + e^-d):
    prompt 1: pairs 3-1, 3-0, 1-0, so (s(2) + s(3) + s(1)) / 3; prompt 2: s(-2). Their mean is the loss.
    """

    def s(difference):
        return math.log(1 + math.exp(-difference))

    expected = ((s(2) + s(3) + s(1)) / 3 + s(-2)) / 2
    chosen = torch.tensor([3.0, 3.0, 1.0, 0.0])
    rejected = torch.tensor([1.0, 0.0, 0.0, 2.0])
    value = loss(chosen, rejected, weight=torch.tensor([1 / 3, 1 / 3, 1 / 3, 1]))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert loss(chosen, rejected).item() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "chosen, rejected, options, message",
    [
        ((4, 1), (4,), {}, r"chosen_rewards has shape \(4, 1\) and rejected_rewards \(4,\); expected the same shape"),
        ((4,), (3,), {}, "expected the same shape"),
        ((0, 1), (0, 1), {}, "holds no pair"),
        ((), (), {}, "holds no pair"),
        ((4, 2), (4, 2), {}, r"chosen_rewards has shape \(4, 2\); expected one number a pair"),
        ((4,), (4,), {"margin": torch.ones(4, 4)}, r"margin has shape \(4, 4\)"),
        (
            (4,),
            (4,),
            {"weight": torch.ones(1)},
            r"weight has shape \(1,\); expected one number a pair: \(4, 1\) or \(4,\)",
        ),
    ],
)
def test_nothing_is_broadcast(chosen, rejected, options, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(chosen), torch.zeros(rejected), **options)


def test_weights_that_add_up_to_nothing_are_refused():
    with pytest.raises(ValueError, match="add up to 0"):
        loss(torch.ones(2), torch.zeros(2), weight=torch.zeros(2))
