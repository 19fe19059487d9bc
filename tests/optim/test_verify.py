"""verify(): right numbers, and nothing of the user's is touched."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import HyLo
from tests.optim import models, oracle

DAMPING = 0.05


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def verify(
    model: nn.Module, shape: tuple[int, ...], limits: dict[str, int] | None = None, **options: Any
) -> Any:
    hylo = HyLo(model, damping=DAMPING, **options)
    x, target = oracle.batch(copy.deepcopy(model).double(), shape)
    dtype = next(model.parameters()).dtype
    return {
        check.layer: check
        for check in hylo.verify((x.to(dtype), target.to(dtype)), half_square, **(limits or {}))
    }


@pytest.mark.parametrize("options", [{}, {"method": "kid"}, {"method": "kis"}, {"method": "hybrid"}], ids=str)
def test_exact_methods_have_no_error(options: dict[str, Any]) -> None:
    checks = verify(models.mlp(), (9, 5), **options)
    assert set(checks) == {"0", "2"}
    for check in checks.values():
        assert check.error < 1e-10
        assert check.strength > 0.01
        assert check.skipped == ""


def test_numbers_are_those_of_the_oracle() -> None:
    """Error and strength of KIS, which has both, computed once more by other code."""
    model, data = models.mlp(), oracle.batch(models.mlp(), (10, 5))
    checks = verify(model, (10, 5), method="kis", ratio=0.3)
    hylo = HyLo(model, damping=DAMPING, method="kis", ratio=0.3)
    oracle.mean_loss(model, *data).backward()
    plain = oracle.layer_gradients(model, ["0", "2"])
    hylo.step()
    hylo.close()
    found = oracle.layer_gradients(model, ["0", "2"])
    for name, check in checks.items():
        rows = oracle.true_gradients(model, dict(model.named_modules())[name], *data)
        exact = oracle.dense_solution(rows, plain[name], DAMPING)
        assert check.error == pytest.approx(oracle.relative_error(found[name], exact), rel=1e-8)
        strength = oracle.relative_error(DAMPING * found[name], plain[name])
        assert check.strength == pytest.approx(strength, rel=1e-8)
        assert check.error > 0.01


def test_the_mode_of_a_convolution_shows_as_error() -> None:
    checks = verify(models.conv_net(kernel_size=3), (6, 3, 8, 7))
    assert checks["0"].error > 0.01
    assert checks["4"].error < 1e-10


def test_sum_reduction() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=DAMPING, loss_reduction="sum")
    data = oracle.batch(models.mlp(), (9, 5))
    checks = hylo.verify(data, lambda outputs, targets: 0.5 * (outputs - targets).square().sum())
    assert max(check.error for check in checks) < 1e-10


def test_nothing_is_touched() -> None:
    """A run with verify in between equals one without, bit for bit; also within an accumulation."""
    histories = []
    for is_verified in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
            )
            hylo = HyLo(
                model, damping=DAMPING, method="kis", ratio=0.5, refresh_every=2, accumulation_steps=2
            )
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            history = []
            for _ in range(4):
                sgd.zero_grad()
                for _ in range(2):
                    x, target = torch.randn(6, 5), torch.randn(6, 3)
                    (half_square(model(x), target) / 2).backward()
                    if is_verified:
                        hylo.verify((x, target), half_square)
                hylo.step()
                history += [p.grad.clone() for p in model.parameters()]
                sgd.step()
            history += [*model.state_dict().values(), torch.rand(3)]
        assert model.training
        histories.append(history)
    for left, right in zip(*histories, strict=True):
        assert torch.equal(left, right)


def test_layers_are_sampled_and_large_ones_skipped() -> None:
    widths = [5, 6, 6, 6, 6, 40, 3]
    model = models.seeded(lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths))))
    checks = verify(model, (7, 5), {"layers": 2, "max_entries": 130})
    assert {name for name, check in checks.items() if not check.skipped} == {"0", "2"}
    assert checks["1"].skipped == "not among the 2 layers sampled"
    assert checks["4"].skipped == "280 entries, more than max_entries=130"
    assert math.isnan(checks["4"].error)
    assert checks["4"].entries == 280
    assert str(checks["4"]) == "4: skipped, 280 entries, more than max_entries=130"


def test_unused_layers_are_skipped() -> None:
    checks = verify(models.seeded(models.Optional), (6, 5))
    assert checks["branch"].skipped == "it has no gradient on this batch"
    assert checks["head"].error < 1e-10


def test_large_batches_are_cut() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=DAMPING)
    x, target = oracle.batch(models.mlp(), (20, 5))
    cut = hylo.verify((x, target), half_square, max_samples=8)
    assert cut == hylo.verify((x[:8], target[:8]), half_square)


def test_error_and_strength_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hylo = HyLo(models.mlp(), damping=DAMPING)
    checks = hylo.verify(oracle.batch(models.mlp(), (6, 5)), half_square)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["compared with the dense oracle:", *map(str, checks)]
    assert lines[1].startswith(f"0: error {checks[0].error:.3g}, second-order strength ")
