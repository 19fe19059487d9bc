"""The preconditioners of an experiment, and their damping."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hpcsngd.config.expressions import ScaledCount, ScaledCountOrNone, ScaledFloat, ScaledShare
from hpcsngd.config.fields import Strict


class DampingDecay(Strict):
    """Damping that decays by epochs: hpcsngd.optim.DampingDecay."""

    initial: float = Field(gt=0)
    """Damping at the start."""
    target: float = Field(gt=0)
    """Damping that is approached."""
    epochs: float = Field(gt=0)
    """Sets the pace: the gap shrinks each epoch by 2 log10(initial / target) / epochs of itself."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs at `initial` before the decay begins."""

    @model_validator(mode="after")
    def _falls(self) -> DampingDecay:
        if self.target > self.initial:
            raise ValueError("damping decays: target must not be above initial")
        least = 2 * math.log10(self.initial / self.target)
        if self.epochs <= least:
            raise ValueError(f"this decay needs more than {least:.3g} epochs")
        return self


class DampingSteps(Strict):
    """Damping that is multiplied by a factor at some epochs: hpcsngd.optim.DampingSteps."""

    initial: float = Field(gt=0)
    """Damping at the start."""
    factor: float = Field(gt=0)
    """What it is multiplied by at each milestone."""
    milestones: list[float] = Field(min_length=1)
    """Epochs after which it is multiplied."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> DampingSteps:
        if self.milestones != sorted(self.milestones):
            raise ValueError("milestones must rise")
        return self


def _kind_of_damping(value: object) -> str:
    if isinstance(value, DampingSteps) or (isinstance(value, dict) and "milestones" in value):
        return "steps"
    return "decay" if isinstance(value, dict | DampingDecay) else "number"


Damping = Annotated[
    Annotated[ScaledFloat, Tag("number")]
    | Annotated[DampingDecay, Tag("decay")]
    | Annotated[DampingSteps, Tag("steps")],
    Discriminator(_kind_of_damping),
]


class Switch(Strict):
    """When the hybrid method uses KID: hpcsngd.optim.SwitchRule."""

    eta: float = Field(default=0.5, gt=0)
    """Relative change of the gradient norm between checks that counts as critical."""
    interval: int = Field(default=1, ge=1)
    """Epochs between checks."""
    lr_drop: float = Field(default=0.5, ge=0, lt=1)
    """A learning rate at most this share of the one an epoch earlier counts as critical."""
    windows: list[tuple[float, float]] | None = None
    """Epochs (first, end) that are critical instead; null: decide while training."""

    @model_validator(mode="after")
    def _windows_rise(self) -> Switch:
        if any(not 0 <= first < end for first, end in self.windows or ()):
            raise ValueError("each window is [first epoch, end], rising")
        return self


class HyLo(Strict):
    """hpcsngd.optim.HyLo."""

    name: Literal["hylo"]
    method: Literal["sngd", "kid", "kis", "hybrid"] = "sngd"
    """Exact; interpolative decomposition; importance sampling; or the last two by turns."""
    damping: Damping = 0.1
    """Added to the eigenvalues of the Fisher matrix: a number, or one by epochs."""
    refresh_every: ScaledCount = 10
    """Steps between recomputations of the curvature."""
    stagger: bool = False
    """Refresh some layers at each step, each once in refresh_every steps, so that no step is slow."""
    placement: Literal["auto", "replicate", "owner"] = "auto"
    """Who solves for a layer: every rank, one that sends its result at each step, or what is fewer bytes."""
    ratio: ScaledShare = 1.0
    """Share of the samples kept by kid and kis."""
    low_rank: int | None = Field(default=None, ge=1)
    """Instead: how many samples they keep, whatever the number of ranks."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Instead: keep as many as are needed for this share of the spectrum."""
    unbiased: bool = False
    """Weigh the samples drawn by kis so that the curvature is right in expectation."""
    residual: bool = False
    """Let kid carry the residual of its interpolation."""
    kid_scope: Literal["joined", "local"] = "joined"
    """Whether kid decides on the joined batch, or each rank on its own samples (fewer bytes)."""
    switch: Switch | None = None
    """When the hybrid method uses kid; null: the defaults."""
    complement: Literal["damped", "plain", "residual"] = "damped"
    """How far to go where no kept sample has a gradient: g / damping, g, or g / (damping + residual)."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on the step in the metric of the curvature; null: none."""
    rescale: Literal["none", "damping", "norm"] = "none"
    """Multiply by the damping, or graft the plain gradient's norm, so that one learning rate serves all."""
    conv_mode: Literal["reduce", "exact", "paper"] = "reduce"
    """What stands for a sample's gradient where it has several positions."""
    skip: list[str] = Field(default_factory=list)
    """Regular expressions of module names that are left to the optimizer alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> HyLo:
        rules = {"ratio": self.ratio != 1, "low_rank": self.low_rank, "share": self.share}
        given = [name for name, value in rules.items() if value]
        if len(given) > 1 or (given and self.method == "sngd"):
            raise ValueError(f"{' and '.join(given)}: kid, kis and hybrid take one of them, sngd none")
        if self.switch is not None and self.method != "hybrid":
            raise ValueError(f"switch belongs to method hybrid, not {self.method}")
        return self


Precision = Literal["float64", "float32", "bfloat16", "float16"]


class KFAC(Strict):
    """hpcsngd.optim.KFAC."""

    name: Literal["kfac"]
    inverse: Literal["eigen", "cholesky"] = "eigen"
    """Exact damping by eigenvectors, or factored damping by Cholesky."""
    pi_split: bool = True
    """Split cholesky's damping between the factors by their mean eigenvalues."""
    sharing: Literal["expand", "reduce"] = "expand"
    """Whether positions (pixels, tokens) count one by one, or summed up for each sample."""
    fisher: Literal["empirical", "mc", "type-2"] = "empirical"
    """Gradients of the true targets, of drawn ones, or the generalized Gauss-Newton matrix."""
    mc_samples: int = Field(default=1, ge=1)
    """Draws per sample for mc; each costs a backward pass at an update of the factors."""
    damping: Damping = 0.03
    """Added to the eigenvalues of the Kronecker product: a number, or one by epochs."""
    factor_every: ScaledCountOrNone = 10
    """Steps between updates of the factors; 0: none."""
    inverse_every: ScaledCountOrNone = 10
    """Steps between recomputations of the inverses; 0 switches K-FAC off."""
    factor_decay: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the old factors in the running average."""
    bias_correction: bool = True
    """Correct the running average for its start."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on the step in the metric of the curvature; null: none."""
    rescale: Literal["none", "damping", "norm"] = "none"
    """Multiply by the damping, or graft the plain gradient's norm, so that one learning rate serves all."""
    largest_factor: int | None = Field(default=None, ge=1)
    """Leave layers with a factor of more rows to the optimizer alone; null: none."""
    factor_dtype: Precision | None = None
    """Type of the running factors; null: as computed, float32."""
    inverse_dtype: Precision | None = None
    """Type of the inverses; null: as computed, float32."""
    factors: Literal["all", "local"] = "all"
    """Factors of all ranks' samples, or of one rank's for each layer, which takes no communication."""
    grad_worker_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the ranks that precondition a layer: 1 all, 0 one of them, or what divides them evenly."""
    placement_cost: Literal["compute", "memory"] = "compute"
    """What is evened out over the ranks."""
    colocate: bool = True
    """Let one rank hold both factors of a layer."""
    stagger: bool = False
    """Update some layers at each step instead of all of them every `inverse_every` steps."""
    overlap: bool = True
    """Sum factors over the ranks while the backward pass runs."""
    skip: list[str] = Field(default_factory=list)
    """Regular expressions of module names that are left to the optimizer alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> KFAC:
        if self.mc_samples != 1 and self.fisher != "mc":
            raise ValueError(f"mc_samples belongs to fisher mc, not {self.fisher}")
        if not self.pi_split and self.inverse != "cholesky":
            raise ValueError(f"pi_split belongs to inverse cholesky, not {self.inverse}")
        if self.factors == "local" and not self.colocate:
            raise ValueError("factors: local needs colocate: true")
        if self.stagger and (not self.factor_every or self.inverse_every % self.factor_every):
            raise ValueError("with stagger, factor_every must divide inverse_every")
        return self


class _Windowed(Strict):
    """What M-FAC and GGT share: sparse storage, and what is done with the result."""

    density: float = Field(default=0.01, gt=0, le=1)
    """Share of the entries that sparse storage keeps."""
    entries: Literal["fp32+int32", "fp32+int16", "bf16+int16"] = "fp32+int32"
    """Values and positions of sparse storage: 8, 6 or 4 bytes per entry."""
    scope: Literal["block", "layer", "global"] = "block"
    """Where entries compete for being kept."""
    block_size: int = Field(default=32_768, ge=1)
    """Entries of a block; at most 32,768 with 16-bit positions."""
    feedback: bool = True
    """Add what was not kept to the next gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Coupled weight decay, preconditioned with the gradient; optimizer.weight_decay comes on top."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the preconditioned gradient; null: none."""
    clip_value: float | None = Field(default=None, gt=0)
    """Largest entry of the preconditioned gradient; null: none."""
    skip: list[str] = Field(default_factory=list)
    """Modules, by regular expression or class, that train with their plain gradient."""


class MFAC(_Windowed):
    """hpcsngd.optim.MFAC."""

    name: Literal["mfac"]
    num_grads: int = Field(default=1024, ge=1)
    """Gradients in the window."""
    damping: float = Field(default=1e-4, gt=0)
    """Added to the eigenvalues of the mean outer product of batch gradients."""
    storage: Literal["dense", "sparse", "lowrank"] = "dense"
    """Gradients in full, their largest entries, or factors; the rest is fed back."""
    scale_rule: Literal["window", "count"] = "window"
    """Divide the sum of outer products by the window's length, or by the gradients in it."""
    low_rank: int = Field(default=1, ge=1)
    """Rank of lowrank storage."""
    target: Literal["sent", "gradient"] = "sent"
    """Precondition what was kept, or the whole gradient."""
    early: Literal["none", "gradient", "error", "dense"] = "none"
    """What fills the zeros of the result while a sparse window fills."""
    feedback_scale: float = Field(default=1.0, gt=0)
    """Factor of a gradient as it enters the error."""


class GGT(_Windowed):
    """hpcsngd.optim.GGT."""

    name: Literal["ggt"]
    num_grads: int = Field(default=100, ge=1)
    """Gradients in the window."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean that is preconditioned; 0: the newest gradient."""
    beta2: float = Field(default=0.999, gt=0, le=1)
    """Decay of a gradient's weight in the window; at least beta1."""
    eps: float = Field(default=1e-4, gt=0)
    """Added to the singular values of the window."""
    storage: Literal["dense", "sparse"] = "dense"
    """Gradients in full, or their largest entries; the rest is fed back."""

    @model_validator(mode="after")
    def _weights_fit(self) -> GGT:
        if self.beta2 < self.beta1:
            raise ValueError(f"beta2 {self.beta2} must be at least beta1 {self.beta1}")
        return self


Preconditioner = Annotated[HyLo | KFAC | MFAC | GGT, Field(discriminator="name")]
