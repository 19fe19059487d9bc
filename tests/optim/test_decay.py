"""Weight decay: decoupled, coupled, both; float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import MFAC, DecoupledSGD

LR, DECAY = 0.1, 0.25


def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_the_weights_shrink_and_momentum_never_hears_of_it(options: dict[str, Any]) -> None:
    """The difference to plain SGD is the decay of the weights alone, whatever the momentum."""
    found, plain = weight(), weight()
    optimizer = DecoupledSGD([found], lr=LR, weight_decay=DECAY, **options)
    other = torch.optim.SGD([plain], lr=LR, **options)
    expected = found.detach().clone()
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        gradient = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        found.grad, plain.grad = gradient.clone(), gradient.clone()
        before = plain.detach().clone()
        optimizer.step()
        other.step()
        expected = (1 - LR * DECAY) * expected + (plain.detach() - before)
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_without_momentum_it_is_torchs_own_decay_and_with_it_it_is_not() -> None:
    for momentum, is_same in ((0.0, True), (0.9, False)):
        found, other = weight(), weight()
        options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": momentum}
        ours = run(DecoupledSGD([found], **options), found)
        torchs = run(torch.optim.SGD([other], **options), other)
        assert torch.allclose(ours, torchs, rtol=0, atol=1e-14) == is_same


def test_groups_decay_by_their_own_and_only_with_a_gradient() -> None:
    decaying, exempt, idle = weight(), weight(), weight()
    groups = [{"params": [decaying, idle]}, {"params": [exempt], "weight_decay": 0.0}]
    optimizer = DecoupledSGD(groups, lr=LR, weight_decay=DECAY)
    for parameter in (decaying, exempt):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(decaying, (1 - LR * DECAY) * weight())
    assert torch.equal(exempt, weight())
    assert torch.equal(idle, weight())


def test_the_learning_rate_of_now_counts() -> None:
    parameter = weight()
    optimizer = DecoupledSGD([parameter], lr=LR, weight_decay=DECAY)
    optimizer.param_groups[0]["lr"] = 0.5
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, (1 - 0.5 * DECAY) * weight())


def test_resume_is_bit_for_bit() -> None:
    whole, again = weight(), weight()
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": 0.9}
    first = DecoupledSGD([whole], **options)
    run(first, whole)
    twin = DecoupledSGD([again], **options)
    run(twin, again)
    resumed = nn.Parameter(again.detach().clone())
    optimizer = DecoupledSGD([resumed], lr=9.0)
    optimizer.load_state_dict(twin.state_dict())
    assert torch.equal(run(optimizer, resumed), run(first, whole))


def test_a_closure_is_called_once_and_before_the_decay() -> None:
    parameter = weight()
    optimizer = DecoupledSGD([parameter], lr=LR, weight_decay=DECAY)
    seen: list[Tensor] = []

    def closure() -> float:
        seen.append(parameter.detach().clone())
        parameter.grad = torch.zeros_like(parameter)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert len(seen) == 1
    assert torch.equal(seen[0], weight())
    assert torch.equal(parameter, (1 - LR * DECAY) * weight())


def test_both_kinds_add_up() -> None:
    """One step of both: P (g + c w) from the preconditioner, then (1 - lr d) w - lr u."""
    parameter, coupled = weight(), 0.3
    gradient = torch.tensor([[0.3, 1.0], [-1.0, 0.2]], dtype=torch.float64)
    method = MFAC([parameter], 2, damping=0.05, weight_decay=coupled)
    optimizer = DecoupledSGD([parameter], lr=LR, weight_decay=DECAY, momentum=0.9)
    parameter.grad = gradient.clone()
    method.step()
    optimizer.step()
    g, w = gradient.reshape(-1), weight().detach().reshape(-1)
    fisher = 0.05 * torch.eye(4, dtype=torch.float64) + torch.outer(g, g) / 2
    expected = (1 - LR * DECAY) * w - LR * torch.linalg.solve(fisher, g + coupled * w)
    assert torch.allclose(parameter.detach().reshape(-1), expected, rtol=1e-12)


def test_a_negative_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        DecoupledSGD([{"params": [weight()], "weight_decay": -0.1}], lr=LR)
