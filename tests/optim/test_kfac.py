"""K-FAC's units, averages, schedules, failures and precision."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import optim
from hpcsngd.optim import KFAC
from hpcsngd.optim.kfac_variants import VARIANTS
from tests.optim import models, oracle
from tests.optim.kfac_tools import backward, gradients, kept_factors

TOLERANCE = 1e-10
DAMPING = 0.05


def same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for left, right in zip(found[name], tensors, strict=True):
            assert oracle.relative_error(left, right) <= tolerance


# --- what a factor is


def test_factors_of_a_linear_layer_by_hand() -> None:
    model = models.mlp()
    x, target = oracle.batch(model, (7, 5))
    kfac = KFAC(model)
    oracle.mean_loss(model, x, target).backward()
    kfac.step()
    hidden = torch.tanh(model[0](x))
    inputs = torch.cat([hidden, torch.ones(7, 1).double()], 1)
    errors = model[2](hidden) - target
    expected = [inputs.T @ inputs / 7, errors.T @ errors / 7]
    for found, wanted in zip(kept_factors(kfac)["2"], expected, strict=True):
        torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=1e-14)


def test_factors_of_a_convolution_are_those_of_kfc() -> None:
    """Omega by unfold, summed over positions and averaged over samples, times Gamma, averaged over both."""
    model = models.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh()))
    x, target = oracle.batch(model, (6, 3, 8, 7))
    kfac = KFAC(model)
    oracle.mean_loss(model, x, target).backward()
    kfac.step()
    out = model[0](x).detach().requires_grad_()
    own = 0.5 * (torch.tanh(out).flatten(1) - target).square().sum()
    (g,) = torch.autograd.grad(own, out)
    patches = nn.functional.unfold(x, 3, stride=2, padding=1)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    positions = patches.shape[2]
    omega = torch.einsum("nis,njs->ij", patches, patches) / 6
    gamma = torch.einsum("nihw,njhw->ij", g, g) / 6 / positions
    (a,), (b,) = kept_factors(kfac)["0"]
    torch.testing.assert_close(torch.kron(a, b), torch.kron(omega, gamma), rtol=1e-11, atol=1e-13)


# --- units: nothing but the samples decides


def after_one_step(**how: Any) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Returns factors, and preconditioned gradients per unit of loss, after eight samples handled as told."""
    model, options = models.mlp(), {"damping": DAMPING, **how.get("options", {})}
    kfac = KFAC(model, **options)
    x, target = oracle.batch(models.mlp(), (8, 5))
    x, target = x.repeat(how.get("copies", 1), 1), target.repeat(how.get("copies", 1), 1)
    parts, scale = how.get("parts", 1), how.get("scale", 1.0)
    loss = oracle.sum_loss if options.get("loss_reduction") == "sum" else oracle.mean_loss
    for part, goal in zip(x.chunk(parts), target.chunk(parts), strict=True):
        (scale * loss(model, part, goal) / how.get("divisor", parts)).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    kfac.step(**how.get("step", {}))
    unit = how.get("unit", 1.0)
    return kept_factors(kfac), [gradient / unit for gradient in gradients(model)]


@pytest.mark.parametrize(
    "how",
    [
        {"copies": 3},
        {"parts": 4, "options": {"accumulation_steps": 4}},
        {"options": {"loss_reduction": "sum"}, "unit": 8.0},
        {"scale": 1024.0, "step": {"grad_scale": 1024.0}},
        {"step": {"sample_scale": 8.0}},
        {"parts": 2, "step": {"sample_scale": 8.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_damping_means_the_same(how: dict[str, Any], inverse: str) -> None:
    """A larger batch of the same samples, accumulation, another reduction, a gradient scaler."""
    expected = after_one_step(options={"inverse": inverse})
    found = after_one_step(**{**how, "options": {**how.get("options", {}), "inverse": inverse}})
    same(found[0], expected[0], 1e-12)
    for left, right in zip(found[1], expected[1], strict=True):
        assert oracle.relative_error(left, right) < TOLERANCE


# --- running averages


@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_old_statistic_has_the_weight(is_corrected: bool) -> None:
    decays = [0.9, 0.5, 0.25, 0.8]
    model = models.mlp()
    kfac = KFAC(model, factor_decay=lambda step: decays[step], bias_correction=is_corrected)
    statistics = []
    for seed in range(4):
        alone = KFAC(twin := models.mlp())
        backward(twin, seed)
        alone.step()
        statistics.append(kept_factors(alone))
        backward(model, seed)
        kfac.step()
    weights = [1 - decays[0] if is_corrected else 1.0]
    for decay in decays[1:]:
        weights = [weight * decay for weight in weights] + [1 - decay]
    total = sum(weights)
    expected = {
        name: [
            sum(w / total * s[name][index] for w, s in zip(weights, statistics, strict=True))
            for index in range(2)
        ]
        for name in statistics[0]
    }
    same(kept_factors(kfac), expected, 1e-12)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_damping_does_not_accumulate(inverse: Any) -> None:
    """Twenty refreshes leave the factors that no refresh leaves."""
    found = []
    for inverse_every in (1, 0):
        model = models.mlp()
        kfac = KFAC(model, inverse=inverse, damping=10.0, inverse_every=inverse_every)
        for seed in range(20):
            backward(model, seed)
            kfac.step()
        found.append(kept_factors(kfac))
    same(found[0], found[1], 0)


# --- schedules


def refreshes(steps: int, **options: Any) -> tuple[list[int], list[int], KFAC]:
    """Returns the steps (0 for the first) that updated factors and inverses."""
    model = models.mlp()
    kfac = KFAC(model, damping=DAMPING, **options)
    updated, inverted, before = [], [], {}
    for step in range(steps):
        backward(model, step)
        kfac.step()
        now = kept_factors(kfac)
        if any(not torch.equal(now[name][0], before[name][0]) for name in before) or now.keys() - before:
            updated.append(step)
        if kfac.diagnostics().refresh:
            inverted.append(step)
        before = now
    return updated, inverted, kfac


@pytest.mark.parametrize(
    ("factor_every", "inverse_every", "updated", "inverted"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]),
        (2, 3, [0, 2, 4, 6], [0, 3, 6]),
        (3, 2, [0, 3, 6], [0, 2, 4, 6]),
        (1, 0, [0, 1, 2, 3, 4, 5, 6], []),
        (0, 1, [], []),
        (lambda step: 1 if step < 3 else 3, lambda step: 0 if step > 4 else 2, [0, 1, 2, 5], [0, 2, 4]),
        (lambda step: 0 if step < 2 else 2, 1, [2, 4, 6], [2, 3, 4, 5, 6]),
    ],
)
def test_intervals(factor_every: Any, inverse_every: Any, updated: list[int], inverted: list[int]) -> None:
    found = refreshes(7, factor_every=factor_every, inverse_every=inverse_every)
    assert found[:2] == (updated, inverted)


def test_off_is_bitwise_plain() -> None:
    """Watched or not, without inverses the gradients are those of the bare model."""
    for options in ({"inverse_every": 0}, {"factor_every": 0}):
        model, bare = models.mlp(), models.mlp()
        kfac = KFAC(model, **options)
        for seed in range(2):
            backward(model, seed)
            backward(bare, seed)
            kfac.step()
            for mine, other in zip(gradients(model), gradients(bare), strict=True):
                assert torch.equal(mine, other)


def test_damping_follows_the_step_and_the_epoch() -> None:
    values = [0.4, 0.3, 0.2, 0.1]
    _, _, kfac = refreshes(1, inverse_every=1)
    assert kfac.diagnostics().damping == DAMPING
    model = models.mlp()
    kfac = KFAC(model, damping=lambda step: values[step], inverse_every=2)
    seen = []
    for seed in range(4):
        backward(model, seed)
        kfac.step()
        seen.append(kfac.diagnostics().damping)
    # Used until the next refresh.
    assert seen == [0.4, 0.4, 0.2, 0.2]
    decay = optim.DampingDecay(1.0, 0.1, 10)
    kfac = KFAC(model := models.mlp(), damping=decay)
    backward(model)
    with pytest.raises(RuntimeError, match="a damping by epochs: call set_progress"):
        kfac.step()
    kfac.set_progress(3.0, 0.1)
    kfac.step()
    assert kfac.diagnostics().damping == decay.at_epoch(3.0)


# --- size of the step


def test_kl_clip_bounds_the_step() -> None:
    lr, results, sizes = 0.5, {}, {}
    for limit in (None, 1e-3, 1e6):
        model = models.mlp()
        backward(model)
        plain = gradients(model)
        kfac = KFAC(model, damping=DAMPING, kl_clip=limit)
        backward(model)
        kfac.set_progress(0.0, lr)
        kfac.step()
        results[limit] = gradients(model)
        sizes[limit] = lr**2 * sum(float((v * g).sum()) for v, g in zip(results[limit], plain, strict=True))
    # v shrinks by the root of what the bound asks for.
    assert sizes[None] > 0.01
    assert math.isclose(sizes[1e-3], math.sqrt(1e-3 / sizes[None]) * sizes[None], rel_tol=1e-9)
    for free, bounded in zip(results[None], results[1e6], strict=True):
        assert torch.equal(free, bounded)


def test_rescale() -> None:
    found = {}
    for rescale in ("none", "damping", "norm"):
        model = models.mlp()
        kfac = KFAC(model, damping=DAMPING, rescale=rescale)
        backward(model)
        plain = oracle.layer_gradient(model[0])
        kfac.step()
        found[rescale] = oracle.layer_gradient(model[0])
    assert oracle.relative_error(found["damping"], DAMPING * found["none"]) < 1e-12
    assert math.isclose(float(found["norm"].norm()), float(plain.norm()), rel_tol=1e-12)
    cosine = found["norm"] @ found["none"] / found["norm"].norm() / found["none"].norm()
    assert math.isclose(float(cosine), 1.0, rel_tol=1e-12)


def test_large_damping_gives_the_plain_gradient() -> None:
    for inverse in ("eigen", "cholesky"):
        model = models.mlp()
        kfac = KFAC(model, inverse=inverse, damping=1e9)
        backward(model)
        plain = gradients(model)
        kfac.step()
        for v, g in zip(gradients(model), plain, strict=True):
            # Cholesky's cross terms fall with the root of the damping only.
            assert oracle.relative_error(1e9 * v, g) < (1e-7 if inverse == "eigen" else 1e-3)


# --- failures


def test_a_statistic_that_is_not_finite_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = models.mlp()
    kfac = KFAC(model, damping=DAMPING)
    backward(model, 0)
    kfac.step()
    good = kept_factors(kfac)
    backward(model, 1)
    kfac._collector.watch._calls["2"][0][0].g[0, 0, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        kfac.step()
    record = kfac.diagnostics()
    assert [(item.step, item.layer, item.reason) for item in record.fallbacks] == [
        (2, "2", "its statistic is not finite")
    ]
    assert record.failures == 1
    assert "step 2, layer 2: its statistic is not finite; using its last good inverse" in caplog.text
    now = kept_factors(kfac)
    assert torch.equal(now["2"][1], good["2"][1])
    assert not torch.equal(now["0"][1], good["0"][1])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model))
    backward(model, 2)
    kfac.step()
    assert kfac.diagnostics().fallbacks == ()
    assert kfac.diagnostics().failures == 1


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_a_failed_decomposition_keeps_the_last_good_one(
    inverse: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.mlp()
    kfac = KFAC(model, inverse=inverse, damping=DAMPING, factor_decay=0.0)
    name = {"eigen": "torch.linalg.eigh", "cholesky": "torch.linalg.cholesky_ex"}[inverse]
    held: dict[str, Any] = {}
    # Only the last layer has a factor of three rows.
    for seed, fails in ((0, True), (1, False), (2, True)):
        backward(model, seed)
        plain = oracle.layer_gradient(model[2])
        failing = mock.patch(name, _failing(name, size=3)) if fails else nullcontext()
        with failing, caplog.at_level(logging.WARNING):
            kfac.step()
        result, record = oracle.layer_gradient(model[2]), kfac.diagnostics()
        assert [item.layer for item in record.fallbacks] == (["2"] if fails else [])
        if seed == 0:
            assert torch.equal(result, plain)
            assert "layer 2: its factors cannot be inverted; using its plain gradient" in caplog.text
        elif seed == 1:
            held = kfac.state_dict()["layers"]["2"]["inverse"]
        else:
            kept = kfac.state_dict()["layers"]["2"]["inverse"]
            assert all(torch.equal(kept["tensors"][key], held["tensors"][key]) for key in held["tensors"])
            assert oracle.relative_error(DAMPING * result, plain) > 0.01
    assert kfac.diagnostics().failures == 2
    assert "layer 2: its factors cannot be inverted; using its last good inverse" in caplog.text


def _failing(name: str, size: int) -> Any:
    real = {"torch.linalg.eigh": torch.linalg.eigh, "torch.linalg.cholesky_ex": torch.linalg.cholesky_ex}[
        name
    ]

    def call(matrices: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real(matrices, *args, **kwargs)
        if matrices.shape[-1] != size:
            return result
        if name.endswith("eigh"):
            raise torch.linalg.LinAlgError("did not converge")
        return result[0] * math.nan, torch.ones_like(result[1])

    return call


def test_misaligned_calls_leave_the_layer_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = models.seeded(Misaligned)
    kfac = KFAC(model, damping=DAMPING)
    backward(model)
    plain = gradients(model)
    with caplog.at_level(logging.WARNING):
        kfac.step()
    assert torch.equal(model.inner.weight.grad, plain[0])
    assert not torch.equal(model.head.weight.grad, plain[2])
    assert "layer inner: calls in one forward do not align" in caplog.text
    assert "(called with [2, 8] samples in one forward pass; add it to skip)" in caplog.text


def test_a_second_backward_pass_is_refused() -> None:
    model = models.mlp()
    KFAC(model)
    loss = oracle.mean_loss(model, *oracle.batch(models.mlp(), (6, 5)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="layer 2: second backward pass through one forward pass"):
        loss.backward()


# --- precision


def test_dtypes() -> None:
    """Factors and inverses are kept as told, statistics and decompositions are float32."""
    results = {}
    for options in (
        {},
        {"factor_dtype": torch.bfloat16, "inverse_dtype": "bfloat16"},
        {"dtype": torch.float64, "inverse_dtype": torch.float64},
    ):
        model = models.mlp().float()
        kfac = KFAC(model, damping=DAMPING, **options)
        x, target = (tensor.float() for tensor in oracle.batch(models.mlp(), (8, 5)))
        oracle.mean_loss(model, x, target).backward()
        plain = oracle.layer_gradient(model[0])
        kfac.step()
        saved = kfac.state_dict()["layers"]["0"]
        kinds = (
            {t.dtype for t in saved["factors"]["sums"]},
            {t.dtype for t in saved["inverse"]["tensors"].values()},
        )
        results[kinds[0].pop(), kinds[1].pop()] = oracle.layer_gradient(model[0])
        assert model[0].weight.grad.dtype == torch.float32
    single = results[torch.float32, torch.float32]
    half = results[torch.bfloat16, torch.bfloat16]
    double = results[torch.float64, torch.float64]
    assert oracle.relative_error(single, double) < 1e-5
    # Eight bits: two digits, times the few factors that an error meets.
    assert 1e-5 < oracle.relative_error(half, double) < 0.05
    assert oracle.relative_error(DAMPING * double, plain) > 0.1


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_autocast(fisher: Any, amp_dtype: torch.dtype) -> None:
    x, target = (tensor.float() for tensor in oracle.batch(models.mlp(), (8, 5)))
    results = {}
    for amp in (False, True):
        model = models.mlp().float()
        kfac = KFAC(model, damping=DAMPING, fisher=fisher, loss="mse")
        with torch.autocast("cpu", dtype=amp_dtype, enabled=amp):
            outputs = model(x)
            kfac.before_backward(outputs)
            (0.5 * (outputs.float() - target).square().sum(1).mean()).backward()
            kfac.step()
        results[amp] = oracle.layer_gradient(model[0])
        assert {tensor.dtype for pair in kept_factors(kfac).values() for tensor in pair} == {torch.float32}
    assert 0 < oracle.relative_error(results[True], results[False]) < 0.05


# --- what it reports


def test_strength_of_every_layer() -> None:
    """No layer's result is g over damping in disguise, the convolution's neither."""
    model = models.conv_net(kernel_size=3, padding=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kfac = KFAC(model, damping=0.03, rescale="damping", observe=["strength"])
    for seed in range(5):
        backward(model, seed, shape=(3, 8, 7))
        plain = {name: oracle.layer_gradient(model[int(name)]) for name in ("0", "4")}
        kfac.step()
        reported = {item.layer: item for item in kfac.diagnostics().strength}
        assert reported.keys() == plain.keys()
        for name, item in reported.items():
            found = oracle.relative_error(oracle.layer_gradient(model[int(name)]), plain[name])
            assert math.isclose(item.strength, found, rel_tol=1e-9)
            assert item.strength > 0.05
            a, g = kept_factors(kfac)[name]
            expected = float(torch.linalg.eigvalsh(torch.kron(a[0], g[0])).mean())
            assert math.isclose(item.mean_eigenvalue, expected, rel_tol=1e-9)
            assert item.damping == 0.03
        optimizer.step()


def test_memory_and_phases() -> None:
    model = models.mlp()
    kfac = KFAC(model, profile=True)
    backward(model)
    kfac.step()
    record = kfac.diagnostics()
    sides = (6, 6, 7, 3)
    triangles = 8 * sum(side * (side + 1) // 2 for side in sides)
    vectors_and_values = 8 * sum(side**2 + side for side in sides)
    held = {item.kind: item.size_bytes for item in record.memory}
    assert held == {"factors": triangles, "inverses": vectors_and_values}
    # The first four: what the original study took away one by one to see what it costs.
    phases = {"capture", "reduce", "invert", "broadcast", "precondition"}
    assert {item.phase for item in record.phases} == phases
    assert all(item.seconds >= 0 for item in record.phases)
    quiet = KFAC(models.mlp())
    assert quiet.diagnostics().phases == ()


# --- what is covered


def test_skipping() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 40), nn.MultiheadAttention(40, 2))
    kfac = KFAC(model, skip=["LayerNorm"], largest_factor=30)
    assert set(kfac.skipped) == {"1", "2", "3", "3.out_proj"}
    assert kfac.skipped["2"] == "a factor of 40 rows, more than largest_factor=30"
    assert "matches skip" in kfac.skipped["1"]
    for name in ("3", "3.out_proj"):
        assert kfac.skipped[name].startswith("its projections are applied inside one function")
    with pytest.raises(ValueError, match="no layer to precondition"):
        KFAC(nn.Sequential(nn.Linear(50, 40)), largest_factor=30)
    sparse = KFAC(nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2)))
    assert sparse.skipped == {"0": "its gradient is sparse or scaled by frequency"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse": "qr"}, "inverse='qr': allowed are eigen, cholesky"),
        ({"sharing": "mean"}, "sharing='mean'"),
        ({"fisher": "true"}, "fisher='true'"),
        ({"loss": "dice"}, "loss='dice'"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"factor_decay": 1.0}, r"factor_decay=1.0 at step 0: must be in \[0, 1\)"),
        ({"factor_every": 0.5}, "factor_every=0.5 at step 0: must be 0"),
        ({"inverse_every": -1}, "inverse_every=-1"),
        ({"mc_samples": 0}, "mc_samples=0"),
        ({"mc_samples": 2}, "mc_samples=2: fisher='empirical' draws nothing"),
        ({"pi_split": False}, "pi_split=False: inverse='eigen' has nothing to split"),
        ({"kl_clip": 0.0}, "kl_clip=0.0"),
        ({"largest_factor": 0}, "largest_factor=0"),
        ({"inverse_dtype": "int8"}, "inverse_dtype=int8"),
        ({"factor_dtype": "single"}, "factor_dtype=single"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"rescale": "up"}, "rescale='up'"),
        ({"observe": ["rank_analysis"]}, "KFAC knows strength"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(models.mlp(), **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_name(name: str) -> None:
    """On one rank they are two methods: whose samples and who sends what does not matter there."""
    results = []
    for build in (optim.get_kfac(name), lambda model, **options: KFAC(model, **VARIANTS[name], **options)):
        model = models.mlp()
        kfac = build(model, damping=DAMPING)
        backward(model)
        kfac.step()
        assert kfac.diagnostics().method == ("eigen" if name.startswith("eigen") else "cholesky")
        results.append(gradients(model))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown K-FAC variant 'kaisa'; known: eigen, inverse, eigen_dp"):
        optim.get_kfac("kaisa")


class Misaligned(nn.Module):
    """Calls one Linear with another number of rows than there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) + self.inner(x[:2]).sum(0))
