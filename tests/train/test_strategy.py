from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.train.strategy import DDPStrategy
from tests.ranks import run_on_ranks
from tests.train.runs import dropout_net

CPU = torch.device("cpu")


def prepared() -> tuple[DDPStrategy, nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = dropout_net(10, 1, 8, width=3)
    strategy = DDPStrategy()
    return strategy, model, strategy.prepare(model, CPU)


def traces_of_settling() -> dict[str, Any]:
    """Returns what is left of the rehearsal, and the gradients of two equal batches after it."""
    strategy, model, trained = prepared()
    before = [buffer.clone() for buffer in model.buffers()]
    stream = torch.get_rng_state()
    strategy.settle(lambda: trained(torch.ones(2, 1, 8, 8)).sum())
    result: dict[str, Any] = {
        "buffers": all(torch.equal(*pair) for pair in zip(model.buffers(), before, strict=True)),
        "stream": torch.equal(torch.get_rng_state(), stream),
        "gradients": [parameter.grad for parameter in model.parameters()],
    }
    result["steps"] = [batch_gradients(trained) for _ in range(3)]
    return result


def batch_gradients(trained: nn.Module) -> list[Tensor]:
    torch.manual_seed(dist.rank() + 1)
    trained.zero_grad()
    trained(torch.randn(4, 1, 8, 8)).square().mean().backward()
    return [parameter.grad.clone() for parameter in trained.parameters() if parameter.grad is not None]


def buffers_before_and_after_joining() -> list[Tensor]:
    strategy, model, _ = prepared()
    for buffer in model.buffers():
        buffer.fill_(dist.rank() + 1)
    strategy.join_buffers()
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.dist
def test_the_rehearsal_leaves_no_trace_and_settles_the_sums() -> None:
    for result in run_on_ranks(traces_of_settling, 3):
        assert result["buffers"]
        assert result["stream"]
        assert result["gradients"] == [None] * len(result["gradients"])
        first, *others = result["steps"]
        for other in others:
            assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@pytest.mark.dist
def test_joined_buffers_are_those_of_rank_0() -> None:
    for buffers in run_on_ranks(buffers_before_and_after_joining, 2):
        assert all(bool((buffer == 1).all()) for buffer in buffers)


def test_one_rank_trains_the_model_itself() -> None:
    strategy, model, trained = prepared()
    assert trained is model
    strategy.settle(lambda: pytest.fail("one rank has nothing to rehearse"))
    assert strategy.loss_factor(8) == 1 / 8
