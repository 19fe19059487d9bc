"""Saving, resuming, and leaving the model as it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from hpcsngd import optim
from hpcsngd.optim import KFAC
from tests.optim import models, oracle
from tests.optim.kfac_tools import backward, gradients, train

OPTIONS: dict[str, dict[str, Any]] = {
    "eigen": {"damping": 0.05, "factor_every": 2, "inverse_every": 3},
    "cholesky": {"damping": 0.05, "inverse": "cholesky", "factor_every": 3, "inverse_every": 2},
    "mc": {"damping": 0.05, "fisher": "mc", "loss": "mse", "seed": 4},
    "bfloat16": {"damping": 0.05, "factor_dtype": "bfloat16", "inverse_every": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("saved_at", [1, 2, 3, 4, 5])
def test_resume_is_bitwise(options: str, saved_at: int) -> None:
    """At every phase of the periods, through a file that holds nothing but tensors and numbers."""
    expected = train("conv", [6], 7, OPTIONS[options])
    file = io.BytesIO()
    torch.save(train("conv", [6], saved_at, OPTIONS[options])["state"], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = train("conv", [6], 7, OPTIONS[options], state)
    for found, wanted in zip(resumed["gradients"], expected["gradients"], strict=True):
        assert torch.equal(found, wanted)
    mine, other = (run["state"]["kfac"] for run in (resumed, expected))
    assert mine["step"] == other["step"] == 7
    for name, layer in other["layers"].items():
        assert mine["layers"][name]["factors"]["weight"] == layer["factors"]["weight"]


def test_a_state_does_not_follow_the_run() -> None:
    """What was saved stays what it was while training goes on."""
    model = models.mlp()
    kfac = KFAC(model)
    backward(model, 0)
    kfac.step()
    state = kfac.state_dict()
    before = copy.deepcopy(state)
    backward(model, 1)
    kfac.step()
    for name, layer in before["layers"].items():
        for kept, wanted in zip(
            state["layers"][name]["factors"]["sums"], layer["factors"]["sums"], strict=True
        ):
            assert torch.equal(kept, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(format="hylo/3"), "state has format 'hylo/3'; this is 'kfac/"),
        (lambda state: state.update(inverse="cholesky"), "state has inverse='cholesky'; this is 'eigen'"),
        (lambda state: state["layers"].update(other={}), "layers that are not covered here: other"),
        (
            lambda state: state["layers"]["0"]["factors"]["sums"].pop(),
            r"state of layer 0: factors have \[21\] numbers, the layer wants \[21, 21\]",
        ),
        (
            lambda state: state["layers"]["0"].update(inverse=state["layers"]["2"]["inverse"]),
            "state of layer 0: inverse of",
        ),
    ],
)
def test_other_states_are_refused(change: Any, message: str) -> None:
    model = models.mlp()
    kfac = KFAC(model)
    backward(model)
    kfac.step()
    state = copy.deepcopy(kfac.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        KFAC(models.mlp()).load_state_dict(state)


def test_what_was_captured_before_a_load_is_forgotten() -> None:
    model = models.mlp()
    kfac = KFAC(model, factor_decay=0.0)
    backward(model, 0)
    kfac.step()
    state = copy.deepcopy(kfac.state_dict())
    backward(model, 1)
    kfac.load_state_dict(state)
    backward(model, 2)
    kfac.step()
    fresh = KFAC(twin := models.mlp(), factor_decay=0.0)
    backward(twin, 2)
    fresh.step()
    for found, wanted in zip(gradients(model), gradients(twin), strict=True):
        assert oracle.relative_error(found, wanted) < 1e-12


def test_closing_restores_the_model() -> None:
    model = models.mlp()
    kfac = KFAC(model)
    backward(model)
    kfac.step()
    kfac.close()
    assert all(not module._forward_hooks for module in model.modules())
    backward(model)
    plain, bare = gradients(model), models.mlp()
    backward(bare)
    for found, wanted in zip(plain, gradients(bare), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="closed"):
        kfac.step()


def test_a_copy_of_the_model_is_not_watched() -> None:
    model = models.mlp()
    kfac = KFAC(model)
    twin = copy.deepcopy(model)
    backward(twin)
    assert kfac._collector.watch.micro_batches == 0


def test_watching_alone_changes_nothing() -> None:
    """Loss and gradients of the watched model are those of the bare one, bit for bit."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 3)
        )

    watched, bare = models.seeded(build), models.seeded(build)
    KFAC(watched)
    x, target = oracle.batch(models.seeded(build), (6, 3, 4, 5))
    for model in (watched, bare):
        oracle.mean_loss(model, x, target).backward()
    for found, wanted in zip(gradients(watched), gradients(bare), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(watched.buffers(), bare.buffers(), strict=True):
        assert torch.equal(found, wanted)


def test_verify_touches_nothing() -> None:
    """A run with verify in between equals one without, bit for bit."""
    histories = []
    for is_verified in (False, True):
        model = models.mlp()
        kfac = KFAC(model, damping=0.05, inverse_every=2)
        history = []
        for seed in range(3):
            backward(model, seed)
            if is_verified:
                checks = kfac.verify(oracle.batch(models.mlp(), (6, 5)), mean_loss)
                assert {check.layer for check in checks} == {"0", "2"}
                assert max(check.error for check in checks) < 1e-10
            kfac.step()
            history += gradients(model)
        histories.append(history)
    for left, right in zip(*histories, strict=True):
        assert torch.equal(left, right)


def mean_loss(outputs: Any, target: Any) -> Any:
    return 0.5 * (outputs - target).square().sum(1).mean()


def test_verify_says_why_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    model = models.seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 40), nn.Linear(40, 3)))
    kfac = KFAC(model)
    checks = kfac.verify(oracle.batch(model, (6, 5)), mean_loss, layers=1, max_entries=130)
    assert [check.skipped for check in checks] == [
        "",
        "280 entries, more than max_entries=130",
        "not among the 1 layers sampled",
    ]
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "compared with the dense formula:"
    assert lines == list(map(str, checks))


def test_dropin() -> None:
    """As one torch optimizer, by name, with its state."""
    runs = []
    for _ in range(2):
        model = models.mlp()
        optimizer = optim.optimizer("kfac", model, lr=0.02, momentum=0.9, damping=0.05, inverse="cholesky")
        runs.append((model, optimizer))
    (first, one), (second, other) = runs
    for seed in range(2):
        backward(first, seed)
        one.step()
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizer in runs:
        backward(model, 5)
        optimizer.step()
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def steps_to_solve(method: str) -> int:
    """Returns the steps, at most 400, to a loss of 1e-6 in a regression with inputs of scales 1 to 1/100."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 8, dtype=torch.float64)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64) * scales
    target = x @ (torch.randn(8, 2, generator=generator, dtype=torch.float64) / scales.unsqueeze(1))
    model = models.seeded(lambda: nn.Linear(8, 2, bias=False))
    kfac = KFAC(model, damping=1e-8, fisher="type-2", loss="mse") if method == "kfac" else None
    # Full steps: by one over the curvature that is left, which for SGD is the largest eigenvalue.
    curvature = 1.0 if kfac else float(torch.linalg.eigvalsh(x.T @ x / 64)[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / curvature)
    for step in range(400):
        optimizer.zero_grad()
        outputs = model(x)
        if kfac is not None:
            kfac.before_backward(outputs)
        loss = nn.functional.mse_loss(outputs, target)
        if loss.item() < 1e-6:
            return step
        loss.backward()
        if kfac is not None:
            kfac.step()
        optimizer.step()
    return 400


def test_an_ill_conditioned_problem_takes_a_tenth_of_the_steps() -> None:
    assert steps_to_solve("kfac") <= 10
    assert steps_to_solve("sgd") >= 100
