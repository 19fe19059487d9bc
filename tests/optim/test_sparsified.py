"""Error-feedback top-k around torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim.sparsified import TopKFeedback

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


def problem() -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((5, 4), (4,))]
    stream = [[torch.randn_like(parameter) for parameter in params] for _ in range(8)]
    return params, stream


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], stream: list[list[Tensor]]) -> Tensor:
    for gradients in stream:
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in params])


@pytest.mark.parametrize("on", ["gradient", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_kept_is_the_optimizer_itself(name: str, on: Any) -> None:
    params, stream = problem()
    twins, _ = problem()
    plain = run(OPTIMIZERS[name](params), params, stream)
    wrapped = run(TopKFeedback(OPTIMIZERS[name](twins), 1.0, on=on), twins, stream)
    assert torch.allclose(wrapped, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_gradient_the_optimizer_sees_what_is_sent(name: str) -> None:
    params, stream = problem()
    optimizer = TopKFeedback(OPTIMIZERS[name](params), 0.25)
    total = torch.zeros(24, dtype=torch.float64)
    sent = total.clone()
    for gradients in stream:
        run(optimizer, params, [gradients])
        total += torch.cat([gradient.reshape(-1) for gradient in gradients])
        seen = torch.cat([parameter.grad.reshape(-1) for parameter in params if parameter.grad is not None])
        assert int((seen != 0).sum()) == 6
        sent += seen
        assert torch.allclose(sent + optimizer.error, total, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_update_few_weights_move_and_the_rest_is_owed(name: str) -> None:
    params, stream = problem()
    optimizer = TopKFeedback(OPTIMIZERS[name](params), 0.25, on="update")
    before = torch.cat([parameter.detach().reshape(-1) for parameter in params])
    after = run(optimizer, params, stream[:1])
    assert int((after != before).sum()) == 6
    twins, _ = problem()
    whole = run(OPTIMIZERS[name](twins), twins, stream[:1])
    assert torch.allclose(after + optimizer.error, whole, rtol=0, atol=1e-14)


def test_schedulers_reach_the_optimizer() -> None:
    params, stream = problem()
    optimizer = TopKFeedback(torch.optim.SGD(params, lr=1.0), 0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, params, stream[:1])
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("on", ["gradient", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bit_for_bit(name: str, on: Any) -> None:
    params, stream = problem()
    whole = TopKFeedback(OPTIMIZERS[name](params), 0.2, on=on)
    run(whole, params, stream[:3])
    state, weights = whole.state_dict(), [parameter.detach().clone() for parameter in params]
    expected = run(whole, params, stream[3:])
    twins = [nn.Parameter(weight) for weight in weights]
    resumed = TopKFeedback(OPTIMIZERS[name](twins), 0.2, on=on)
    # Optimizer.state_dict shares its tensors with the optimizer: the error alone is a copy
    fresh, _ = problem()
    again = TopKFeedback(OPTIMIZERS[name](fresh), 0.2, on=on)
    run(again, fresh, stream[:3])
    resumed.load_state_dict({**again.state_dict(), "error": state["error"]})
    assert torch.equal(run(resumed, twins, stream[3:]), expected)


def test_what_is_refused() -> None:
    params, stream = problem()
    with pytest.raises(ValueError, match="on='weights'"):
        TopKFeedback(torch.optim.SGD(params, lr=0.1), on="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density=0"):
        TopKFeedback(torch.optim.SGD(params, lr=0.1), 0.0)
    optimizer = TopKFeedback(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="error of shape None"):
        optimizer.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())
    assert run(optimizer, params, stream).isfinite().all()


def test_a_closure_is_called_once() -> None:
    params, _ = problem()
    optimizer = TopKFeedback(torch.optim.SGD(params, lr=0.1), 0.5)
    calls = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = sum((parameter.square().sum() for parameter in params), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        calls.append(float(loss.detach()))
        return calls[-1]

    assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    assert optimizer.step(closure) < calls[0]
