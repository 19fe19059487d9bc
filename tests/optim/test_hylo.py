"""Options, failures, diagnostics, and that curvature really acts on every layer."""

from __future__ import annotations

import copy
import io
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpcsngd import optim
from hpcsngd.optim import HyLo
from tests.optim import models, oracle, training


def test_preconditioners_by_name() -> None:
    assert optim.get("hylo") is HyLo
    with pytest.raises(ValueError, match="unknown preconditioner 'hilo'; known: hylo"):
        optim.get("hilo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kid2"}, "method='kid2': allowed are sngd, kid, kis, hybrid"),
        ({"conv_mode": "expand"}, "conv_mode='expand': allowed are reduce, exact, paper"),
        ({"loss_reduction": "none"}, "loss_reduction='none': allowed are mean, sum"),
        ({"rescale": "adam"}, "rescale='adam': allowed are none, damping, norm"),
        ({"damping": 0.0}, "damping=0.0 at step 0: must be positive"),
        ({"damping": lambda _: float("nan")}, "damping=nan at step 0"),
        ({"refresh_every": 0}, "refresh_every=0.0 at step 0: must be at least 1"),
        ({"method": "kis", "ratio": 0.0}, "ratio=0.0"),
        ({"method": "kis", "ratio": 1.5}, "ratio=1.5"),
        ({"method": "sngd", "ratio": 0.5}, "ratio: method 'sngd' keeps every sample"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        (
            {"observe": ["grad_nrm"]},
            r"observe=\['grad_nrm'\]: allowed are rank_analysis, grad_norm, grad_error",
        ),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyLo(models.mlp(), **options)


@pytest.mark.parametrize(
    "scales", [{"sample_scale": 0.0}, {"grad_scale": float("inf")}, {"grad_scale": -1.0}]
)
def test_bad_scales_are_refused(scales: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(scales))}=.*must be positive"):
        HyLo(models.mlp()).step(**scales)


def test_rescale() -> None:
    results = {}
    for rescale in ("none", "damping", "norm"):
        model = models.mlp()
        hylo = HyLo(model, damping=0.05, rescale=rescale)
        oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5))).backward()
        plain = oracle.layer_gradient(model[0])
        hylo.step()
        results[rescale] = oracle.layer_gradient(model[0])
    torch.testing.assert_close(results["damping"], 0.05 * results["none"])
    torch.testing.assert_close(results["norm"], results["none"] * plain.norm() / results["none"].norm())


def test_rescaled_zero_gradient_stays_zero() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, rescale="norm")
    (0 * oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5)))).backward()
    hylo.step()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def poisoned(steps: int, bad: set[int], **options: Any) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    """Returns plain and final gradients of steps in which layer 2 sometimes captures a NaN."""
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, **options)
    history, records = [], []
    for step in range(steps):
        model.zero_grad()
        oracle.mean_loss(model, *oracle.batch(models.mlp(), (6, 5), seed=step)).backward()
        if step in bad:
            hylo._capture._calls["2"][0][0].output_sums[0, 0] = float("nan")
        plain = oracle.layer_gradients(model, ["0", "2"])
        hylo.step()
        final = oracle.layer_gradients(model, ["0", "2"])
        history.append({**final, "plain": plain["2"]})
        records.append(hylo.diagnostics())
    return history, records


@pytest.mark.parametrize("options", [{}, {"method": "kis", "ratio": 0.5}], ids=["sngd", "kis"])
def test_without_good_curvature_the_gradient_stays_plain(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    history, records = poisoned(2, {0}, **options)
    assert torch.equal(history[0]["2"], history[0]["plain"])
    assert not torch.equal(history[1]["2"], history[1]["plain"])
    assert "step 1, layer 2: rows are not finite on rank 0; using its plain gradient" in caplog.text
    assert [(item.step, item.layer) for item in records[0].fallbacks] == [(1, "2")]
    assert [record.failures for record in records] == [1, 1]
    assert records[1].fallbacks == ()


def test_last_good_curvature_is_used_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    history, records = poisoned(2, {1})
    # Curvature of step 0 on the gradient of step 1, as if step 1 had been no refresh for this layer.
    stale, _ = poisoned(2, set(), refresh_every=2)
    assert torch.equal(history[1]["2"], stale[1]["2"])
    assert not torch.equal(history[1]["0"], stale[1]["0"])
    assert "using its last good curvature" in caplog.text
    assert records[1].failures == 1


def test_a_kernel_that_overflows_falls_back() -> None:
    model = models.mlp().float()
    hylo = HyLo(model, damping=0.05)
    x, target = (tensor.float() for tensor in oracle.batch(models.mlp(), (6, 5)))
    oracle.mean_loss(model, x * 1e25, target).backward()
    plain = oracle.layer_gradients(model, ["0", "2"])
    hylo.step()
    record = hylo.diagnostics()
    assert ("0", "kernel is not positive definite") in {
        (item.layer, item.reason) for item in record.fallbacks
    }
    assert torch.equal(oracle.layer_gradient(model[0]), plain["0"])


def test_jitter_is_counted() -> None:
    """In float32, equal samples with eigenvalues 1e9 times the damping are not positive definite any more."""
    model = models.seeded(nn.Linear, 5, 3).float()
    hylo = HyLo(model, damping=1e-6)
    x = 30 * torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).repeat(24, 1)
    oracle.mean_loss(model, x, torch.zeros(24, 3)).backward()
    hylo.step()
    assert hylo.diagnostics().jittered == 1
    assert bool(model.weight.grad.isfinite().all())


def test_nothing_is_measured_unasked() -> None:
    record = training.train("mlp", [6], 1, {"damping": 0.05})["records"][0]
    assert (record.phases, record.rank_analysis, record.grad_norm, record.grad_error) == ((), (), (), ())
    assert (record.communication, record.memory) == ((), ())


@pytest.mark.parametrize("method", ["sngd", "kid", "kis"])
def test_what_is_off_computes_nothing(method: Any) -> None:
    """No tensor operation of a measurement is left when it is off; timing adds none at all."""
    options: dict[str, Any] = {"method": method} | ({} if method == "sngd" else {"ratio": 0.5})
    off, norm = operations(options), "aten.linalg_vector_norm.default"
    assert operations({**options, "profile": True}) == off
    for what, operation in (
        ("rank_analysis", "aten._linalg_eigh.default"),
        ("grad_norm", norm),
        ("grad_error", norm),
    ):
        on = operations({**options, "observe": [what]})
        # KIS's own scores: two norms for each of the two layers.
        own = 4 if method == "kis" and operation == norm else 0
        assert on[operation] > off[operation] == own
        assert sum(on.values()) > sum(off.values())


def test_between_refreshes_no_hook_is_on_any_output() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, refresh_every=2)
    hooked = []
    for _ in range(2):
        x, target = oracle.batch(models.mlp(), (6, 5))
        outputs = model(x)
        hooked.append(bool(outputs._backward_hooks))
        (outputs - target).square().sum().backward()
        hylo.step()
    assert hooked == [True, False]


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(options: dict[str, Any]) -> Counter[str]:
    """Returns the operations of two training steps, the first with a refresh."""
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, refresh_every=2, **options)
    x, target = oracle.batch(models.mlp(), (6, 5))
    with Counting() as counting:
        for _ in range(2):
            oracle.mean_loss(model, x, target).backward()
            hylo.step()
    return counting.counts


def test_profile_times_every_phase() -> None:
    records = training.train("conv", [6], 2, {"damping": 0.05, "refresh_every": 2, "profile": True})[
        "records"
    ]
    phases = [{item.phase: item.seconds for item in record.phases} for record in records]
    every_step = {"project", "precondition", "broadcast", "observe"}
    assert set(phases[0]) == {"capture", "gather", "factorise", "invert"} | every_step
    assert set(phases[1]) == every_step
    assert all(seconds >= 0 for seconds in (*phases[0].values(), *phases[1].values()))
    assert phases[0]["capture"] > 0


def test_memory_is_what_the_state_holds() -> None:
    result = training.train("conv", [6], 1, {"damping": 0.05, "profile": True})
    memory = {item.kind: item.size_bytes for item in result["records"][0].memory}
    layers = result["state"]["hylo"]["layers"].values()
    assert memory["rows"] == sum(tensor.nbytes for layer in layers for tensor in layer["rows"])
    assert memory["factors"] == 2 * 6 * 6 * 8
    # On one rank what was captured is what is held.
    assert memory["captured"] == memory["rows"]
    assert memory["comparison"] == 0


def test_rank_analysis_equals_the_dense_spectrum() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (8, 5))
    hylo = HyLo(model, damping=0.05, observe=["rank_analysis"])
    oracle.mean_loss(model, *data).backward()
    hylo.step()
    hylo.close()
    records = {item.layer: item for item in hylo.diagnostics().rank_analysis}
    for name in ("0", "2"):
        rows = oracle.true_gradients(model, dict(model.named_modules())[name], *data)
        values = torch.linalg.svdvals(rows.T @ rows / 8)
        assert records[name].top_eigenvalue == pytest.approx(float(values[0]), rel=1e-10)
        low_rank = records[name].low_rank
        assert float(values[:low_rank].sum()) >= 0.9 * float(values.sum())
        assert float(values[: low_rank - 1].sum()) < 0.9 * float(values.sum())
        assert (records[name].samples, records[name].damping, records[name].share) == (8, 0.05, 0.9)


def test_rank_analysis_tells_any_share() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, observe=["rank_analysis"], rank_shares=[0.5, 0.9, 1.0])
    oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5))).backward()
    hylo.step()
    ranks = {(item.layer, item.share): item.low_rank for item in hylo.diagnostics().rank_analysis}
    assert len(ranks) == 2 * 3
    for name in ("0", "2"):
        assert 1 <= ranks[name, 0.5] < ranks[name, 0.9] < ranks[name, 1.0] <= 8
    for shares in ([], [0.0], [1.5]):
        with pytest.raises(ValueError, match="rank_shares"):
            HyLo(model, damping=0.05, rank_shares=shares)


def test_gradient_norms_are_those_before_preconditioning() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, observe=["grad_norm"])
    oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5))).backward()
    expected = {name: float(g.norm()) for name, g in oracle.layer_gradients(model, ["0", "2"]).items()}
    hylo.step()
    assert {item.layer: item.norm for item in hylo.diagnostics().grad_norm} == pytest.approx(expected)


def test_gradient_error_compares_with_exact_sngd() -> None:
    """At every step, also between refreshes, KID and KIS both, against runs with each of them."""
    options = {"damping": 0.05, "refresh_every": 2}
    data = [oracle.batch(models.mlp(), (10, 5), seed=seed) for seed in (1, 2)]
    results, records = {}, {}
    for method, extra in (("sngd", {}), ("kid", {"ratio": 0.3}), ("kis", {"ratio": 0.3})):
        model = models.mlp()
        hylo = HyLo(model, method=method, observe=["grad_error"], **options, **extra)
        for x, target in data:
            model.zero_grad()
            oracle.mean_loss(model, x, target).backward()
            hylo.step()
        results[method] = oracle.layer_gradients(model, ["0", "2"])
        records[method] = hylo.diagnostics().grad_error
    for item in (*records["kid"], *records["kis"]):
        found, exact = results[item.method][item.layer], results["sngd"][item.layer]
        assert item.relative_error == pytest.approx(oracle.relative_error(found, exact), rel=1e-8)
        assert item.cosine == pytest.approx(float((found * exact).sum() / found.norm() / exact.norm()))
        assert item.relative_error > 0.01
    for method in ("kid", "kis"):
        assert {(item.layer, item.method) for item in records[method]} == {
            (layer, other) for layer in ("0", "2") for other in ("kid", "kis")
        }


def test_the_exact_method_has_no_gradient_error() -> None:
    options = {"damping": 0.05, "observe": ["grad_error", "grad_norm", "rank_analysis"]}
    record = training.train("mlp", [6], 1, options)["records"][0]
    assert [item.relative_error for item in record.grad_error] == pytest.approx([0.0, 0.0], abs=1e-13)


def test_observing_does_not_change_training() -> None:
    options: dict[str, Any] = {"damping": 0.05, "method": "kis", "ratio": 0.5}
    plain = training.train("mlp", [8], 3, options)
    observed = training.train(
        "mlp", [8], 3, {**options, "profile": True, "observe": ["grad_error", "grad_norm", "rank_analysis"]}
    )
    for left, right in zip(plain["gradients"], observed["gradients"], strict=True):
        assert torch.equal(left, right)


#: Second-order strength |damping v - g| / |g| that every layer must exceed. g / damping in disguise has 0.
STRENGTH = 0.05
STRENGTH_DAMPING = 0.01


def small_conv_net() -> nn.Module:
    def conv(d_in: int, d_out: int, **options: Any) -> list[nn.Module]:
        return [nn.Conv2d(d_in, d_out, 3, padding=1, **options), nn.BatchNorm2d(d_out), nn.ReLU(inplace=True)]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *conv(3, 8), *conv(8, 8, bias=False), *conv(8, 16, stride=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip


def strengths(sample_scale: float | None, **options: Any) -> dict[str, float]:
    """Returns each layer's strength after 20 SGD steps on learnable classes of 12 x 12 images."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(4, 3, 12, 12, generator=generator)
    labels = torch.randint(4, (64,), generator=generator)
    x = 1 + (prototypes[labels] + torch.randn(64, 3, 12, 12, generator=generator)) / 3
    model = small_conv_net()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        sgd.step()
    hylo = HyLo(model, damping=STRENGTH_DAMPING, **options)
    sgd.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    plain = oracle.layer_gradients(model, names)
    hylo.step(sample_scale)
    found = oracle.layer_gradients(model, names)
    assert set(names) == set(hylo.state_dict()["layers"])
    return {name: oracle.relative_error(STRENGTH_DAMPING * found[name], plain[name]) for name in names}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "kid", "ratio": 0.25},
        {"method": "kid", "share": 0.9},
        {"method": "kid", "ratio": 0.25, "residual": True, "kid_scope": "local"},
        {"method": "kis", "ratio": 0.25},
        {"method": "kis", "ratio": 0.25, "unbiased": True},
    ],
    ids=str,
)
def test_curvature_acts_on_every_layer(options: dict[str, Any]) -> None:
    assert min(strengths(None, **options).values()) > STRENGTH


def test_strength_would_notice_averaged_output_gradients() -> None:
    """The published code divides by the number of pixels (144): that leaves the convolutions to SGD."""
    weak = strengths(64 / 144)
    assert max(weak[name] for name in ("0", "3")) < STRENGTH


def test_trains_faster_than_sgd_where_inputs_are_badly_scaled() -> None:
    """Logistic regression on features of scales 1 to 1e-2: 40 steps beat 400 of SGD at its best rate."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 10, dtype=torch.float64)
    x = torch.randn(200, 10, generator=generator, dtype=torch.float64) * scales
    truth = torch.randn(10, generator=generator, dtype=torch.float64) / scales
    labels = (x @ truth > 0).double()

    def final_loss(steps: int, lr: float, **options: Any) -> float:
        model = models.seeded(nn.Linear, 10, 1)
        hylo = HyLo(model, **options) if options else None
        sgd = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(steps):
            sgd.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], labels)
            loss.backward()
            if hylo:
                hylo.step()
            sgd.step()
        return float(loss.detach())

    best_sgd = min(final_loss(400, lr) for lr in (0.1, 1.0, 10.0, 30.0))
    assert final_loss(40, 0.5, damping=1e-4) < best_sgd


def test_state_moves_between_devices_and_dtypes() -> None:
    """A float64 run's state continues in float32, and a file mapped to another device is brought back."""
    state = training.train("mlp", [6], 1, {"damping": 0.05})["state"]["hylo"]
    stored = io.BytesIO()
    torch.save(copy.deepcopy(state), stored)
    stored.seek(0)
    hylo = HyLo(models.mlp().float(), damping=0.05)
    hylo.load_state_dict(torch.load(stored, weights_only=True, map_location="cpu"))
    assert {layer["factor"].dtype for layer in hylo.state_dict()["layers"].values()} == {torch.float32}


def test_logging_is_quiet_when_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        training.train("mlp", [6], 2, {"damping": 0.05})
    assert caplog.text == ""
