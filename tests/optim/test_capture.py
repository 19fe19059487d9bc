"""What is captured, what is not, and that watching changes nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcsngd.optim import HyLo, StepRecord
from tests.optim import models, oracle

DAMPING = 0.05
TOLERANCE = 1e-10


def stepped(
    model: nn.Module, data: tuple[Tensor, Tensor], **options: object
) -> tuple[dict[str, Tensor], StepRecord]:
    """Returns the preconditioned gradients and the record of one step."""
    preconditioner = HyLo(model, **{"damping": DAMPING, **options})
    model.zero_grad()
    oracle.mean_loss(model, *data).backward()
    preconditioner.step()
    preconditioner.close()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, preconditioner.diagnostics()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert oracle.relative_error(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize(
    ("build", "shape"),
    [(models.mlp, (7, 5)), (lambda: models.seeded(models.InPlace), (7, 3, 6, 6))],
)
def test_watching_changes_nothing(build: object, shape: tuple[int, ...]) -> None:
    plain, watched = build(), build()
    preconditioner = HyLo(watched, damping=DAMPING)
    data = oracle.batch(plain, shape)
    losses = [oracle.mean_loss(model, *data) for model in (plain, watched)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)
    preconditioner.step()
    assert not torch.equal(next(plain.parameters()).grad, next(watched.parameters()).grad)


def test_close_leaves_the_model_as_before() -> None:
    model = models.mlp()
    before = [dict(module._forward_hooks) for module in model.modules()]
    preconditioner = HyLo(model, damping=DAMPING)
    assert [dict(module._forward_hooks) for module in model.modules()] != before
    data = oracle.batch(model, (4, 5))
    loss = oracle.mean_loss(model, *data)
    preconditioner.close()
    preconditioner.close()
    # A graph that was recorded before must not capture any more either.
    loss.backward()
    assert [dict(module._forward_hooks) for module in model.modules()] == before
    assert preconditioner._capture.micro_batches == 0
    with pytest.raises(RuntimeError, match="closed"):
        preconditioner.step()


def test_evaluation_between_forward_and_step_leaves_nothing() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(model, data)
    preconditioner = HyLo(model, damping=DAMPING)
    model.zero_grad()
    other = oracle.batch(model, (3, 5), seed=9)
    with torch.no_grad():
        model(other[0])
    loss = oracle.mean_loss(model, *data)
    model.eval()
    with torch.inference_mode():
        model(other[0])
    model(other[0])  # with gradient, but nobody goes backward
    model.train()
    loss.backward()
    model(other[0])
    preconditioner.step()
    same({name: p.grad for name, p in model.named_parameters()}, expected)


def test_eval_mode_is_captured_when_trained() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(model, data)
    same(stepped(model.eval(), data)[0], expected)


def test_two_backwards_through_one_forward_add_up() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(model, data)
    preconditioner = HyLo(model, damping=DAMPING)
    model.zero_grad()
    loss = oracle.mean_loss(model, *data)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    preconditioner.step()
    same({name: p.grad for name, p in model.named_parameters()}, expected)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = models.mlp()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    x, target = oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(models.mlp(), (x, target))
    found, _ = stepped(Checkpointed(reentrant), (x.requires_grad_(), target))
    same({name.removeprefix("body."): value for name, value in found.items()}, expected)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2](input=torch.tanh(self.body[0](input=x)))


def test_layer_called_by_keyword() -> None:
    data = oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(models.mlp(), data)
    found, _ = stepped(ByKeyword(), data)
    same({name.removeprefix("body."): value for name, value in found.items()}, expected)


def test_input_buffer_may_be_reused_before_the_step() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    expected, _ = stepped(model, data)
    preconditioner = HyLo(model, damping=DAMPING)
    model.zero_grad()
    oracle.mean_loss(model, *data).backward()
    data[0].zero_()
    preconditioner.step()
    same({name: p.grad for name, p in model.named_parameters()}, expected)


def test_single_unbatched_samples() -> None:
    linear = models.seeded(nn.Linear, 5, 3)
    x, target = oracle.batch(linear, (1, 5))
    expected, _ = stepped(linear, (x, target))
    preconditioner = HyLo(linear, damping=DAMPING)
    linear.zero_grad()
    (0.5 * (linear(x[0]) - target[0]).square().sum()).backward()
    preconditioner.step()
    same({name: p.grad for name, p in linear.named_parameters()}, expected)
    conv = models.seeded(nn.Conv2d, 2, 3, 3)
    image, target = oracle.batch(conv, (1, 2, 5, 4))
    expected, _ = stepped(conv, (image, target))
    preconditioner = HyLo(conv, damping=DAMPING)
    conv.zero_grad()
    (0.5 * (conv(image[0]).flatten() - target[0]).square().sum()).backward()
    preconditioner.step()
    same({name: p.grad for name, p in conv.named_parameters()}, expected)


def test_channels_last() -> None:
    data = oracle.batch(models.conv_net(kernel_size=3), (6, 3, 8, 7))
    expected, _ = stepped(models.conv_net(kernel_size=3), data)
    model = models.conv_net(kernel_size=3).to(memory_format=torch.channels_last)
    same(stepped(model, (data[0].to(memory_format=torch.channels_last), data[1]))[0], expected)


def test_an_unused_layer_keeps_its_curvature() -> None:
    model = models.seeded(models.Optional)
    preconditioner = HyLo(model, damping=DAMPING)
    data = oracle.batch(model, (7, 5))
    for used in (False, True, False):
        model.use_branch = used
        model.zero_grad()
        oracle.mean_loss(model, *data).backward()
        plain = model.branch.weight.grad
        plain = None if plain is None else plain.clone()
        preconditioner.step()
        if used:
            assert not torch.equal(model.branch.weight.grad, plain)
        else:
            assert model.branch.weight.grad is None
    assert "branch" in preconditioner.state_dict()["layers"]
    assert preconditioner.diagnostics().failures == 0


class Misaligned(nn.Module):
    """Calls one Linear with another number of rows than there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) + self.inner(x[:2]).sum(0))


def test_calls_that_do_not_align_leave_the_layer_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = models.seeded(Misaligned)
    data = oracle.batch(model, (7, 5))
    oracle.mean_loss(model, *data).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    found, record = stepped(model, data)
    assert torch.equal(found["inner.weight"], plain["inner.weight"])
    assert not torch.equal(found["head.weight"], plain["head.weight"])
    assert record.failures == 1
    assert (
        "layer inner: calls in one forward do not align on rank 0 (called with [2, 7] samples" in caplog.text
    )


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_autocast_rows_are_float32(amp_dtype: torch.dtype) -> None:
    data = tuple(tensor.float() for tensor in oracle.batch(models.mlp(), (7, 5)))
    full, _ = stepped(models.mlp().float(), data)
    model = models.mlp().float()
    preconditioner = HyLo(model, damping=DAMPING)
    with torch.autocast("cpu", dtype=amp_dtype):
        loss = oracle.mean_loss(model, *data)
        loss.backward()
        preconditioner.step()
    for name, layer in preconditioner.state_dict()["layers"].items():
        assert {tensor.dtype for tensor in (*layer["rows"], layer["factor"])} == {torch.float32}, name
    # bfloat16 keeps 8 bits: two digits of the result are right, not more.
    for name, parameter in model.named_parameters():
        assert oracle.relative_error(parameter.grad, full[name]) < 0.05, name


def test_bfloat16_weights_and_wider_rows() -> None:
    data = tuple(tensor.bfloat16() for tensor in oracle.batch(models.mlp(), (7, 5)))
    model = models.mlp().bfloat16()
    preconditioner = HyLo(model, damping=DAMPING, dtype=torch.float64)
    oracle.mean_loss(model, *data).backward()
    preconditioner.step()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert preconditioner.state_dict()["layers"]["0"]["factor"].dtype == torch.float64


def test_more_micro_batches_than_announced_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    preconditioner = HyLo(model, damping=DAMPING)
    for _ in range(2):
        oracle.mean_loss(model, *data).backward()
        oracle.mean_loss(model, *data).backward()
        preconditioner.step()
    assert caplog.text.count("captured 2 micro-batches, but accumulation_steps=1") == 1


def test_copies_of_the_model_are_not_watched() -> None:
    model, data = models.mlp(), oracle.batch(models.mlp(), (7, 5))
    preconditioner = HyLo(model, damping=DAMPING)
    average = copy.deepcopy(model)
    oracle.mean_loss(average, *data).backward()
    assert preconditioner._capture.micro_batches == 0
    hooks = [hook for module in average.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert not any(hook.func.__self__.enabled for hook in hooks)


class Unsupported(nn.Module):
    """One module for every reason to be left to the base optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.covered = nn.Linear(4, 4)
        self.skipped = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(requires_grad=False)
        self.tied = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.tied.weight = self.embedding.weight
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)


def test_every_skipped_module_has_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        preconditioner = HyLo(Unsupported(), skip=["^skip"])
    assert preconditioner.skipped == {
        "skipped": "matches skip=['^skip']",
        "frozen": "frozen weight",
        "tied": "shares a parameter with ['embedding']",
        "embedding": "Embedding is not supported",
        "circular": "padding_mode='circular' is not supported",
        "normed": "ParametrizedLinear is not supported",
        "normed.parametrizations.weight": "ParametrizationList is not supported",
        "norm": "LayerNorm is not supported",
        "attention": "MultiheadAttention is not supported",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not supported",
    }
    assert caplog.text.count("left to the base optimizer: ") == 1


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 4, 3)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": nn.Linear(4, 4)}))
        self.up = nn.ConvTranspose1d(4, 3, 2)
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ([nn.Linear], {"stem", "up"}),
        (["Linear"], {"stem", "up"}),
        (["^body$"], {"stem", "up", "head"}),
        ([nn.ModuleDict], {"stem", "body.0", "up", "head"}),
        (["ModuleDict", r"\.0$"], {"stem", "up", "head"}),
        ([nn.modules.conv._ConvNd], {"body.0", "body.1.inner", "head"}),
        ([nn.Conv1d, "ConvTranspose1d", "head"], {"body.0", "body.1.inner"}),
    ],
)
def test_skip_by_name_class_and_name_of_a_class(skip: list[str | type[nn.Module]], left: set[str]) -> None:
    model = Nested()
    preconditioner = HyLo(model, skip=skip)
    covered = {layer.name for layer in preconditioner._layers}
    assert covered == left
    shown = [entry if isinstance(entry, str) else entry.__name__ for entry in skip]
    for name, reason in preconditioner.skipped.items():
        assert reason in {f"matches skip={[entry]}" for entry in shown}, name
    assert covered | set(preconditioner.skipped) == {"stem", "body.0", "body.1.inner", "up", "head"}


def test_a_class_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"skip='Conv3d' matches no module; .* classes: Linear, Sequential"):
        HyLo(models.mlp(), skip=[nn.Conv3d])


def test_a_skip_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        ValueError,
        match=r"skip='haed' matches no module; modules: 0, 1, 2; classes: Linear, Sequential, Tanh",
    ):
        HyLo(models.mlp(), skip=["haed"])


def test_nothing_to_cover_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no layer to precondition; skipped: \{'': 'LayerNorm is not"):
        HyLo(nn.LayerNorm(3))
