"""Every layer and situation, in every convolution mode, against one sample at a time through autograd."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import HyLo
from hpcsngd.optim.rows import FactoredRows, GradientRows
from tests.optim import models, oracle

# Kernels have condition numbers below 1e5 at these dampings, so float64 leaves 1e-11. Convolutions in the
# paper's mode have S^2 times less curvature: it needs a smaller damping to be seen at all.
TOLERANCE = 1e-10
DAMPING = {"reduce": 0.05, "exact": 0.05, "paper": 0.0005}
MODES = list(DAMPING)

Data = tuple[Tensor, Tensor]


def covered(model: nn.Module, hylo: HyLo) -> dict[str, nn.Module]:
    """Returns the layers that have a curvature and a gradient."""
    modules = dict(model.named_modules())
    names = hylo.state_dict()["layers"]
    return {name: modules[name] for name in names if modules[name].weight.grad is not None}


def check_step(model: nn.Module, hylo: HyLo, data: Data, mode: str, names: set[str]) -> None:
    """Compares one refresh and solve with the dense solution of the mode's own rows, layer by layer."""
    model.zero_grad()
    oracle.mean_loss(model, *data).backward()
    modules = dict(model.named_modules())
    plain = {name: oracle.layer_gradient(modules[name]) for name in names}
    hylo.step()
    found = {name: oracle.layer_gradient(layer) for name, layer in covered(model, hylo).items()}
    hylo.close()
    assert set(found) == names
    for name in names:
        rows = oracle.ROWS[mode](model, modules[name], *data)
        expected = oracle.dense_solution(rows, plain[name], DAMPING[mode])
        assert oracle.relative_error(found[name], expected) < TOLERANCE, name
        # The case says something: curvature changes this layer's direction.
        assert oracle.relative_error(DAMPING[mode] * expected, plain[name]) > 0.01, name


def single(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """Returns a builder of one layer with 4 input channels (unless options say otherwise) and a Tanh."""
    arguments = {"in_channels": 4, "out_channels": 6, **options}
    return lambda: models.seeded(lambda: nn.Sequential(kind(**arguments), nn.Tanh()))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (single(nn.Conv1d, kernel_size=3), (4, 9)),
    "conv1d strided": (single(nn.Conv1d, kernel_size=4, stride=3, padding=2, dilation=2), (4, 11)),
    "conv1d same": (single(nn.Conv1d, kernel_size=3, padding="same", dilation=2), (4, 6)),
    "conv1d depthwise": (single(nn.Conv1d, kernel_size=3, groups=4, out_channels=4), (4, 6)),
    "conv2d": (single(nn.Conv2d, kernel_size=3), (4, 5, 6)),
    "conv2d no bias": (single(nn.Conv2d, kernel_size=3, bias=False), (4, 5, 6)),
    "conv2d 1x1": (single(nn.Conv2d, kernel_size=1), (4, 3, 3)),
    "conv2d strided": (single(nn.Conv2d, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2)), (4, 6, 5)),
    "conv2d dilated": (single(nn.Conv2d, kernel_size=3, dilation=(1, 2), padding=(0, 2)), (4, 5, 6)),
    "conv2d same": (single(nn.Conv2d, kernel_size=(3, 5), padding="same"), (4, 4, 5)),
    "conv2d valid": (single(nn.Conv2d, kernel_size=2, padding="valid"), (4, 4, 5)),
    "conv2d grouped": (single(nn.Conv2d, kernel_size=3, groups=2, padding=1), (4, 4, 5)),
    "conv2d grouped no bias": (single(nn.Conv2d, kernel_size=3, groups=2, bias=False), (4, 4, 5)),
    "conv2d depthwise": (single(nn.Conv2d, kernel_size=3, groups=4, out_channels=8), (4, 4, 5)),
    "conv2d all options": (
        single(nn.Conv2d, kernel_size=(2, 3), stride=(1, 2), padding=(1, 3), dilation=(2, 1), groups=2),
        (4, 5, 4),
    ),
    "conv2d one position": (single(nn.Conv2d, kernel_size=(3, 2)), (4, 3, 2)),
    "conv2d two positions": (single(nn.Conv2d, kernel_size=3, out_channels=8), (4, 3, 4)),
    "conv2d two positions grouped": (single(nn.Conv2d, kernel_size=3, out_channels=16, groups=2), (4, 3, 4)),
    "conv3d": (single(nn.Conv3d, kernel_size=2), (4, 3, 2, 4)),
    "conv3d all options": (
        single(
            nn.Conv3d,
            kernel_size=(2, 1, 3),
            stride=(1, 2, 1),
            padding=(1, 0, 2),
            dilation=(2, 1, 2),
            groups=2,
        ),
        (4, 3, 4, 3),
    ),
    "transposed 1d": (single(nn.ConvTranspose1d, kernel_size=3, stride=2, output_padding=1), (4, 4)),
    "transposed 2d": (single(nn.ConvTranspose2d, kernel_size=3), (4, 3, 3)),
    "transposed 2d no bias": (single(nn.ConvTranspose2d, kernel_size=2, stride=2, bias=False), (4, 2, 3)),
    "transposed 2d grouped": (single(nn.ConvTranspose2d, kernel_size=(2, 3), groups=2, padding=1), (4, 4, 3)),
    "transposed 2d all options": (
        single(
            nn.ConvTranspose2d,
            kernel_size=(3, 2),
            stride=(2, 3),
            padding=(1, 0),
            output_padding=(1, 2),
            dilation=(1, 2),
            groups=2,
        ),
        (4, 3, 2),
    ),
    "transposed 2d depthwise": (
        single(nn.ConvTranspose2d, kernel_size=3, out_channels=4, groups=4, stride=2, padding=1),
        (4, 2, 3),
    ),
    "transposed 2d one pixel": (single(nn.ConvTranspose2d, kernel_size=3), (4, 1, 1)),
    "transposed 3d": (
        single(nn.ConvTranspose3d, kernel_size=2, stride=(1, 2, 1), padding=(0, 1, 0)),
        (4, 2, 2, 2),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str, mode: str) -> None:
    build, shape = LAYERS[case]
    model = build()
    hylo = HyLo(model, damping=DAMPING[mode], conv_mode=mode)
    check_step(model, hylo, oracle.batch(model, (7, *shape)), mode, {"0"})


Rehearsal = Callable[[nn.Module, HyLo], None]


def nothing(_: nn.Module, __: HyLo) -> None:
    """The batch under test is the first."""


def a_larger_batch(model: nn.Module, hylo: HyLo) -> None:
    oracle.mean_loss(model, *oracle.batch(model, (9, 4, 5, 6), seed=5)).backward()
    hylo.step()


def forwards_in_eval(model: nn.Module, _: HyLo) -> None:
    x, _ = oracle.batch(model, (3, 4, 5, 6), seed=5)
    model.eval()
    model(x)
    with torch.no_grad():
        model(x)
    model.train()


def the_other_branch(model: nn.Module, hylo: HyLo) -> None:
    model.use_branch = True
    oracle.mean_loss(model, *oracle.batch(model, (6, 5), seed=5)).backward()
    hylo.step()
    assert "branch" in hylo.state_dict()["layers"]
    model.use_branch = False


def frozen() -> nn.Module:
    model = models.mlp()
    model[0].requires_grad_(requires_grad=False)
    return model


def freeze_later(model: nn.Module, hylo: HyLo) -> None:
    oracle.mean_loss(model, *oracle.batch(model, (6, 5), seed=5)).backward()
    hylo.step()
    model[0].requires_grad_(requires_grad=False)


def conv() -> nn.Module:
    return LAYERS["conv2d"][0]()


#: Situations of which each breaks some published implementation: builder, input shape, what happens before
#: the batch under test, layers that must then be right.
TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Rehearsal, set[str]]] = {
    "grouped convolution": (LAYERS["conv2d grouped"][0], (4, 4, 5), nothing, {"0"}),
    "depthwise convolution": (LAYERS["conv2d depthwise"][0], (4, 4, 5), nothing, {"0"}),
    "dilated convolution": (LAYERS["conv2d dilated"][0], (4, 5, 6), nothing, {"0"}),
    "padding same": (LAYERS["conv2d same"][0], (4, 4, 5), nothing, {"0"}),
    "linear on (N, T, D)": (lambda: models.seeded(models.Tokens), (4, 5), nothing, {"token", "head"}),
    "linear on (N, H, W, D)": (
        lambda: models.seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh())),
        (2, 3, 5),
        nothing,
        {"0"},
    ),
    "layer used twice": (lambda: models.seeded(models.Shared), (5,), nothing, {"inner", "head"}),
    "convolution used twice": (
        lambda: models.seeded(models.SharedConv),
        (4, 4, 5),
        nothing,
        {"inner", "head"},
    ),
    "layer unused in this step": (
        lambda: models.seeded(models.Optional),
        (5,),
        the_other_branch,
        {"trunk", "head"},
    ),
    "frozen layer": (frozen, (5,), nothing, {"2"}),
    "layer frozen during training": (models.mlp, (5,), freeze_later, {"2"}),
    "in-place activations": (
        lambda: models.seeded(models.InPlace),
        (3, 6, 6),
        nothing,
        {"conv", "fc", "head"},
    ),
    "linear without bias": (lambda: models.mlp(bias=False), (5,), nothing, {"0", "2"}),
    "linear with one output": (
        lambda: models.seeded(lambda: nn.Sequential(nn.Linear(5, 1), nn.Tanh())),
        (5,),
        nothing,
        {"0"},
    ),
    "smaller last batch": (conv, (4, 5, 6), a_larger_batch, {"0"}),
    "forwards in eval between": (conv, (4, 5, 6), forwards_in_eval, {"0"}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", TABLE)
def test_situation(case: str, mode: str) -> None:
    build, shape, rehearse, names = TABLE[case]
    model = build()
    hylo = HyLo(model, damping=DAMPING[mode], conv_mode=mode)
    rehearse(model, hylo)
    check_step(model, hylo, oracle.batch(build(), (7, *shape)), mode, names)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    """bfloat16 keeps 8 bits: two digits are right, not more; rows and solves are float32.

    The error is relative to g / damping: rounding errors of g outside the span of the rows are divided by the
    damping alone, whereas g itself lies in the span, where curvature is many times the damping.
    """
    data = tuple(tensor.float() for tensor in oracle.batch(conv(), (7, 4, 5, 6)))
    results = {}
    for amp in (False, True):
        model = conv().float()
        hylo = HyLo(model, damping=DAMPING[mode], conv_mode=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            oracle.mean_loss(model, *data).backward()
            plain = oracle.layer_gradient(model[0])
            hylo.step()
        results[amp] = DAMPING[mode] * oracle.layer_gradient(model[0])
        (layer,) = hylo.state_dict()["layers"].values()
        assert {tensor.dtype for tensor in (*layer["rows"], layer["factor"])} == {torch.float32}
    assert float((results[True] - results[False]).norm() / plain.norm()) < 0.02
    assert oracle.relative_error(results[True], plain) > 0.1


def preconditioned(
    parts: list[Data], weights: list[float], mode: str, grad_scale: float = 1.0, **options: Any
) -> Tensor:
    """Returns the preconditioned gradient of a convolution after micro-batches with weighted losses."""
    model = conv()
    hylo = HyLo(model, damping=DAMPING[mode], conv_mode=mode, **options)
    for part, weight in zip(parts, weights, strict=True):
        (grad_scale * weight * oracle.own_losses(model, *part).sum()).backward()
    for parameter in model.parameters():
        parameter.grad /= grad_scale
    hylo.step(grad_scale=grad_scale)
    return oracle.layer_gradient(model[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sizes", "weight", "factor", "options"),
    [
        ([12], 1.0, 12.0, {"loss_reduction": "sum"}),
        ([4, 4, 4], 1 / 12, 1.0, {"accumulation_steps": 3}),
        ([7, 5], 1.0, 12.0, {"accumulation_steps": 2, "loss_reduction": "sum"}),
        ([12], 1 / 12, 1.0, {"grad_scale": 4096.0}),
        ([6, 6], 1 / 12, 1.0, {"grad_scale": 4096.0, "accumulation_steps": 2}),
    ],
    ids=["sum", "accumulation", "sum and accumulation", "scaler", "scaler and accumulation"],
)
def test_curvature_does_not_depend_on_how_the_batch_is_processed(
    sizes: list[int], weight: float, factor: float, options: dict[str, Any], mode: str
) -> None:
    data = oracle.batch(conv(), (12, 4, 5, 6))
    expected = factor * preconditioned([data], [1 / 12], mode)
    parts = list(zip(data[0].split(sizes), data[1].split(sizes), strict=True))
    found = preconditioned(parts, [weight] * len(parts), mode, **options)
    assert oracle.relative_error(found, expected) < TOLERANCE


def test_micro_batches_of_different_lengths() -> None:
    """In exact mode a short sequence is one with fewer terms, whichever form the others have."""
    for lengths in ((1, 2), (2, 9), (9, 8)):
        model = models.seeded(models.Tokens)
        hylo = HyLo(model, damping=0.05, conv_mode="exact", loss_reduction="sum")
        batches = [oracle.batch(model, (3, length, 5), seed=length) for length in lengths]
        for data in batches:
            oracle.sum_loss(model, *data).backward()
        plain = oracle.layer_gradient(model.token)
        hylo.step()
        hylo.close()
        rows = torch.cat([oracle.true_gradients(model, model.token, *data) for data in batches])
        expected = oracle.dense_solution(rows, plain, 0.05)
        assert oracle.relative_error(oracle.layer_gradient(model.token), expected) < TOLERANCE, lengths


def captured(model: nn.Module, data: Data, **options: Any) -> Any:
    """Returns the rows of the model's first layer."""
    hylo = HyLo(model, damping=0.05, **options)
    oracle.mean_loss(model, *data).backward()
    hylo.step()
    return hylo._curvature["0"].rows


@pytest.mark.parametrize(
    ("case", "mode", "form"),
    [
        ("conv2d", "reduce", FactoredRows),
        ("conv1d depthwise", "reduce", GradientRows),
        ("conv2d", "exact", GradientRows),
        ("conv2d two positions", "exact", FactoredRows),
        ("conv2d two positions grouped", "exact", FactoredRows),
        ("transposed 2d one pixel", "exact", GradientRows),
    ],
)
def test_form_of_rows(case: str, mode: str, form: type[Any]) -> None:
    """Both forms of exact rows are among the cases above."""
    build, shape = LAYERS[case]
    assert type(captured(build(), oracle.batch(build(), (5, *shape)), conv_mode=mode)) is form


def test_paper_rows_are_reduced_rows_over_the_positions() -> None:
    data = oracle.batch(conv(), (5, 4, 5, 6))
    paper, reduced = (captured(conv(), data, conv_mode=mode) for mode in ("paper", "reduce"))
    # 3 x 4 output pixels.
    torch.testing.assert_close(paper.gram(), reduced.gram() / 12**2)


def test_patches_are_built_for_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = oracle.batch(conv(), (7, 4, 5, 6))
    expected = captured(conv(), data, conv_mode="exact")
    # One sample's patches: 4 channels x 9 taps x 12 positions x 8 bytes.
    for size in (1, 2 * 4 * 9 * 12 * 8):
        monkeypatch.setattr("hpcsngd.optim.layers.PATCH_BYTES", size)
        torch.testing.assert_close(captured(conv(), data, conv_mode="exact").u, expected.u)


def test_exact_rows_survive_saving() -> None:
    data = oracle.batch(conv(), (7, 4, 5, 6))
    results = []
    saved = io.BytesIO()
    for resume in (False, True):
        model = conv()
        hylo = HyLo(model, damping=0.05, conv_mode="exact", refresh_every=2)
        if resume:
            saved.seek(0)
            hylo.load_state_dict(torch.load(saved, weights_only=True))
        else:
            oracle.mean_loss(model, *data).backward()
            hylo.step()
            torch.save(hylo.state_dict(), saved)
        model.zero_grad()
        oracle.mean_loss(model, *data).backward()
        hylo.step()
        results.append(oracle.layer_gradient(model[0]))
    assert torch.equal(*results)


def test_a_second_backward_in_exact_mode_is_an_error() -> None:
    model = conv()
    hylo = HyLo(model, damping=0.05, conv_mode="exact")
    loss = oracle.mean_loss(model, *oracle.batch(model, (7, 4, 5, 6)))
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="second backward pass through one forward pass; layer 0: use conv_mode"
    ):
        loss.backward()
    hylo.close()


def test_an_input_written_to_before_backward_is_an_error() -> None:
    """Under autocast autograd keeps a copy of the input and would not tell."""
    model = models.mlp().float()
    hylo = HyLo(model, damping=0.05, conv_mode="exact")
    x, target = (tensor.float() for tensor in oracle.batch(models.mlp(), (7, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = oracle.mean_loss(model, x, target)
    x.zero_()
    with pytest.raises(RuntimeError, match="the input changed between forward and backward; layer 0"):
        loss.backward()
    hylo.close()


def every_kind() -> nn.Module:
    """A grouped, a plain and a transposed convolution and a Linear on tokens."""
    return models.seeded(
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv1d(4, 6, 3, stride=2), nn.Tanh(),
            nn.ConvTranspose1d(6, 4, 2, groups=2), nn.Tanh(), nn.Linear(4, 3),
        )
    )  # fmt: skip


@pytest.mark.parametrize("method", ["sngd", "kid", "kis"])
def test_verify_finds_exact_mode_exact(method: str) -> None:
    """Every method with every sample kept is the true Fisher's solution; reduce and paper are not."""
    model = every_kind()
    x, target = oracle.batch(model, (7, 4, 9))

    def loss(out: Tensor, wanted: Tensor) -> Tensor:
        return 0.5 * (out.flatten(1) - wanted).square().sum(1).mean()

    errors = {}
    for mode in MODES:
        hylo = HyLo(model, method=method, damping=0.05, conv_mode=mode)
        errors[mode] = {item.layer: item.error for item in hylo.verify((x, target), loss)}
        hylo.close()
    assert set(errors["exact"]) == {"0", "2", "4", "6"}
    assert max(errors["exact"].values()) < 1e-9
    assert min((*errors["reduce"].values(), *errors["paper"].values())) > 0.01


@pytest.mark.parametrize("method", ["kid", "kis"])
def test_compressed_methods_work_on_exact_rows(method: str) -> None:
    """The error against the true Fisher falls with the number of samples kept."""
    data = oracle.batch(every_kind(), (12, 4, 9))
    results: dict[int, list[Tensor]] = {}
    for kept in (1, 6, 12):
        model = every_kind()
        hylo = HyLo(model, method=method, low_rank=kept, damping=0.05, conv_mode="exact")
        oracle.mean_loss(model, *data).backward()
        hylo.step()
        results[kept] = [oracle.layer_gradient(model[index]) for index in (0, 2, 4, 6)]
    for one, six, all_ in zip(*results.values(), strict=True):
        assert oracle.relative_error(one, all_) > oracle.relative_error(six, all_) > 1e-6
