"""The base optimizers of an experiment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpcsngd.config.expressions import ScaledFloat
from hpcsngd.config.fields import Strict


class _Optimizer(Strict):
    lr: ScaledFloat
    """Peak learning rate; scaled by the world size only where written so."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay as torch's optimizer of that name means it: coupled for sgd and adam, else decoupled."""
    no_decay: list[str] = Field(default_factory=list)
    """What does not decay: modules by class (BatchNorm2d) or regular expression, or parameters (bias$)."""


class SGD(_Optimizer):
    """torch.optim.SGD."""

    name: Literal["sgd"]
    momentum: float = Field(default=0.0, ge=0)
    """Heavy-ball momentum."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    nesterov: bool = False
    """Nesterov's form."""
    decoupled: bool = False
    """Multiply the weights by 1 - lr * weight_decay, past preconditioner and momentum (SGDW)."""


class Adam(_Optimizer):
    """torch.optim.Adam or AdamW."""

    name: Literal["adam", "adamw"]
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class Muon(_Optimizer):
    """torch.optim.Muon for matrices, AdamW for everything else; needs torch >= 2.9."""

    name: Literal["muon"]
    momentum: float = Field(default=0.95, ge=0)
    """Momentum of the matrices."""
    nesterov: bool = True
    """Nesterov's form."""
    adamw_lr: ScaledFloat = 1e-3
    """Peak learning rate of the parameters that are not matrices."""


class LBFGS(_Optimizer):
    """hpcsngd.optim.LBFGS: quasi-Newton steps; the loss is evaluated several times per step."""

    name: Literal["lbfgs"]
    lr: ScaledFloat = 1.0
    """First step that a line search tries, or the only one without; smaller before there is curvature."""
    history: int = Field(default=10, ge=1)
    """Curvature pairs kept."""
    iterations: int = Field(default=1, ge=1)
    """Iterations per step, all on the step's batch."""
    line_search: Literal["strong_wolfe", "none"] = "strong_wolfe"
    """Strong Wolfe conditions on the loss of all ranks, or steps of `lr`."""
    c1: float = Field(default=1e-4, gt=0, lt=1)
    """Share of the promised decrease that a line search wants; below `c2`."""
    c2: float = Field(default=0.9, gt=0, lt=1)
    """Largest share of the slope that it leaves."""
    max_evaluations: int = Field(default=25, ge=1)
    """Evaluations per line search."""
    tolerance: float = Field(default=0.0, ge=0)
    """No further iteration in a step once no entry of the gradient is larger."""
    eps: float = Field(default=1e-10, ge=0)
    """A pair of step s and change of gradient y is skipped unless y's > eps |s| |y|."""
    powell: float = Field(default=0.0, ge=0, lt=1)
    """Powell's damping of pairs; 0: none."""
    batches: Literal["step", "overlap", "file"] = "step"
    """Where curvature comes from: the step's batch, its overlap with the next one, or a file at each step."""
    overlap: float | None = Field(default=None, gt=0, le=1)
    """Share of a step's own samples that the next step has too; default with batches overlap: 0.25."""

    @model_validator(mode="after")
    def _fits_together(self) -> LBFGS:
        if self.c1 >= self.c2:
            raise ValueError("c1 must be below c2")
        if self.overlap is not None and self.batches != "overlap":
            raise ValueError(f"overlap belongs to batches overlap, not {self.batches}")
        return self


Optimizer = Annotated[SGD | Adam | Muon | LBFGS, Field(discriminator="name")]
