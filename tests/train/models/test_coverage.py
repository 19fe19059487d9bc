"""Preconditioners on every network of ours: each layer with weights is covered, and solved rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim import KFAC, HyLo, Preconditioner
from hpcsngd.train import losses
from hpcsngd.train.models import MODELS, build_model
from tests.train.models.test_models import GREY, SMALL

#: One of each kind; factors of the wide ones take seconds to decompose.
KINDS = ("lenet5", "resnet20", "wrn22-2", "vgg16", "densenet", "mobilenetv2", "unet")

#: Layers with weights that the published code counts; U-Net's has no transposed convolutions among them.
PUBLISHED = {"3c1f": 5, "resnet32": 32, "unet": 19 + 4}

Build = Callable[[nn.Module], Preconditioner]


class Problem:
    """A small network, four samples, and the gradients before and after a preconditioner's first step."""

    def __init__(self, name: str, build: Build, size: int = 32, **arguments: Any) -> None:
        torch.manual_seed(0)
        channels, size = (1, GREY[name]) if name in GREY else (3, size)
        is_segmentation = name == "unet"
        self.model = build_model(
            name, 1 if is_segmentation else 10, channels, size, **(SMALL.get(name, {}) | arguments)
        )
        x = torch.randn(4, channels, size, size)
        y = (torch.rand(4, 1, size, size) > 0.7).float() if is_segmentation else torch.arange(4)
        self.batch = (x, y)
        self.loss = losses.dice if is_segmentation else losses.cross_entropy
        self.preconditioner = build(self.model)
        self.mean_loss(self.model.train()(x), y).backward()  # type: ignore[no-untyped-call]
        self.before = self.gradients()
        self.preconditioner.step()
        self.after = self.gradients()

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets) / len(targets)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def check_coverage(self) -> int:
        """Checks that weights of layers changed and nothing else; returns the number of these layers."""
        kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        if isinstance(self.preconditioner, KFAC):
            kinds += (nn.BatchNorm2d,)
        covered = {name for name, layer in self.model.named_modules() if isinstance(layer, kinds)}
        for name, before in self.before.items():
            change = ((self.after[name] - before).norm() / before.norm()).item()
            if name.rpartition(".")[0] in covered:
                assert change > 1e-3, f"{name} keeps its gradient"
            else:
                assert change == 0, f"{name} changes although nothing covers it"
        assert not covered & set(self.preconditioner.skipped)
        return len(covered)

    def check_solutions(self) -> None:
        """Checks three layers against the dense oracle."""
        checks = self.preconditioner.verify(self.batch, self.mean_loss, layers=3, max_entries=300)
        errors = [check.error for check in checks if not check.skipped]
        assert len(errors) == 3
        # float64, with condition numbers up to 1e5; the oracle goes through all positions of all samples
        assert max(errors) < 1e-9


def hylo(model: nn.Module) -> Preconditioner:
    return HyLo(model, method="sngd", conv_mode="exact", damping=0.01)


def kfac(model: nn.Module) -> Preconditioner:
    return KFAC(model, inverse="cholesky", damping=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_hylo_covers_every_layer(name: str) -> None:
    narrow = {"width": 1} if name.startswith("wrn28") else {}
    problem = Problem(name, hylo, **narrow)
    count = problem.check_coverage()
    assert count == PUBLISHED.get(name, count)


@pytest.mark.parametrize("name", KINDS)
def test_kfac_covers_every_layer(name: str) -> None:
    assert Problem(name, kfac).check_coverage() >= 5


@pytest.mark.parametrize("build", [hylo, kfac])
@pytest.mark.parametrize("name", ["resnet20", "densenet"])
def test_solutions_are_those_of_the_dense_oracle(name: str, build: Build) -> None:
    Problem(name, build, size=4).check_solutions()


@pytest.mark.parametrize("build", [hylo, kfac])
def test_blurred_convolutions_are_covered(build: Build) -> None:
    problem = Problem("resnet20", build, width=16, blurpool=True)
    assert problem.check_coverage() >= 20
    assert "6.conv1.conv.weight" in problem.before


def test_torchvisions_resnet50_has_the_published_54_layers() -> None:
    model = build_model("torchvision/resnet50", 10, 3, 32)
    preconditioner = HyLo(model, method="kis", ratio=0.5, conv_mode="reduce")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 54
    assert not set(layers) & set(preconditioner.skipped)
