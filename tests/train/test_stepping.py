"""What L-BFGS is shown within one step: one function, whatever in the model is random or remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.config.experiment import Augment
from hpcsngd.config.experiment import Data as DataConfig
from hpcsngd.optim.lbfgs import LBFGS
from hpcsngd.train import data
from hpcsngd.train.data import Batch
from hpcsngd.train.sampler import ShardedSampler
from hpcsngd.train.stepping import ClosureStepping


class Remembering(nn.Module):
    """A layer whose output depends on how often it was called before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Asking:
    """Stands for an optimizer that asks three times for each closure and moves nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.pair_losses: list[float] = []

    def step(self, closure: Callable[[], Tensor], *, pair_closure: Callable[[], Tensor] | None) -> float:
        for _ in range(3):
            self.losses.append(float(closure()))
            if pair_closure is not None:
                self.pair_losses.append(float(pair_closure()))
        return 0.0


def stepping(**options: Any) -> tuple[ClosureStepping, Asking, nn.Module, ShardedSampler]:
    samples = data.load(DataConfig(name="digits", train_limit=40), None).train
    model = nn.Sequential(Remembering(), nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    sampler = ShardedSampler(40, 5, accumulate=2, seed=3, **options)
    asking = Asking()
    changed = samples.augmented(Augment(crop=2, flip=True), 7)
    built = ClosureStepping(cast("LBFGS", asking), model, changed, sampler, seed=1, workers=0, pin=False)
    return built, asking, model, sampler


@pytest.mark.parametrize("overlap", [0.0, 0.4])
def test_every_evaluation_of_a_step_is_of_the_same_function(overlap: float) -> None:
    built, asking, model, sampler = stepping(overlap=overlap)
    seen: list[list[Tensor]] = []

    def run_pass(batches: Iterator[Batch], count: int, size: int) -> Tensor:
        images, losses = zip(*[next(batches) for _ in range(count)], strict=True), []
        pixels, targets = images
        seen.append(list(pixels))
        for each, target in zip(pixels, targets, strict=True):
            losses.append(nn.functional.cross_entropy(model(each), target, reduction="sum"))
        return torch.stack(losses).sum().detach() / size

    calls = cast("Remembering", model[0]).calls  # type: ignore[index]
    totals = []
    for step in (0, 1):
        built.start(2, step)
        before = float(calls)
        first = run_pass(built.batches(step), sampler.micro_batches_in(step), sampler.sizes[step])
        once = float(calls) - before
        totals.append(built.update(first, run_pass))
        # what the first evaluation left behind stays, what the others did is gone
        assert float(calls) == before + once == before + sampler.micro_batches_in(step)
    for losses in (asking.losses[:3], asking.losses[3:]):
        assert losses == [losses[0]] * 3
    assert asking.losses[0] != asking.losses[3]
    own = 2 * sum(sampler.sizes[:2])
    if overlap:
        assert sampler.sizes[:2] == [10, 14]
        assert totals == [2 * 10 + 3 * 4, 2 * 14 + 3 * 4]
        assert asking.pair_losses[:3] == [asking.pair_losses[0]] * 3
        # the samples of the first pairs are the first of the second batch, changed in the same way
        assert torch.equal(torch.cat(seen[1]), torch.cat(seen[6])[:4])
    else:
        assert sum(totals) == own
        assert asking.pair_losses == []
