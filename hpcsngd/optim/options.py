"""HyLo's arguments: what each means, and what they may be, alone and together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.calls import ConvMode
from hpcsngd.optim.checks import check_choice, positive
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.curvature import Complement
from hpcsngd.optim.gradients import Rescale
from hpcsngd.optim.hybrid import Switch, SwitchRule
from hpcsngd.optim.placement import Placement
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping, epoch_damping
from hpcsngd.optim.selection import RankRule
from hpcsngd.optim.sketches import Compression, Plain, Scope

Method = Literal["sngd", "kid", "kis", "hybrid"]

_CHOICES: dict[str, Any] = {
    "method": Method,
    "kid_scope": Scope,
    "complement": Complement,
    "conv_mode": ConvMode,
    "placement": Placement,
    "rescale": Rescale,
}
#: What a HyLo on a copy of the model has in common with this one, besides method and damping.
_SHARED = (
    "ratio",
    "low_rank",
    "share",
    "unbiased",
    "residual",
    "complement",
    "conv_mode",
    "skip",
    "loss_reduction",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `HyLo` under their own names.

    Methods. ``"sngd"`` uses every sample. ``"kid"`` keeps the pivots of the kernel and interpolates the
    others from them. ``"kis"`` draws samples without replacement with probability in proportion to
    ``||a_i||^2 ||g_i||^2`` and proceeds as if they were the whole batch, as published (``unbiased``
    re-weights them). ``"hybrid"`` is KID in critical regimes, KIS otherwise (`hpcsngd.optim.hybrid`); a
    switch takes effect at the next refresh. How many samples are kept is decided for each layer and refresh
    by one of ``ratio``, ``low_rank`` and ``share``, and is in the records.

    Where a sample has several positions (pixels of a convolution, tokens of a Linear, calls of a layer used
    more than once) ``conv_mode`` says what stands for its gradient ``sum_s g_s x_s^T``:

    * ``"reduce"``: ``(sum_s g_s)(mean_s x_s)^T``, as if every position had the mean output gradient. One
      outer product per sample as in HyLo, but with the sum of the output gradients where HyLo's published
      code has their mean. That keeps it the size of a true per-sample gradient (exact for the bias), so one
      damping fits convolutions and linear layers.
    * ``"exact"``: the true gradient, so F is the layer's true empirical Fisher and a given damping means
      exactly what it says. Costs about a second weight gradient at refreshes, and memory for a gradient of
      the layer per sample of all ranks (`hpcsngd.optim.rows`). One backward pass per forward pass only.
    * ``"paper"``: ``(mean_s g_s)(mean_s x_s)^T``, what HyLo's published code computes. With S positions F is
      S^2 times smaller than in ``"reduce"``: at one damping for all layers, the early convolutions get
      little more than ``g / damping``. For comparisons; a damping tuned for it fits no other mode.

    Attributes:
        method: ``"sngd"``, ``"kid"``, ``"kis"`` or ``"hybrid"``; see above.
        damping: positive; a function of the step; or one by epochs (`DampingDecay`, `DampingSteps`, or a
            mapping of the fields of either). Evaluated at refreshes and used until the next.
        refresh_every: steps between refreshes, or a function of the step; the first step refreshes.
        stagger: whether to refresh some layers at each step instead of all of them every ``refresh_every``
            steps (which must be a whole number), so that no step but the first is slow. Each layer is
            refreshed once in ``refresh_every`` steps; `hpcsngd.optim.calendar` states a step's ceiling.
        ratio: share of the joined batch that KID and KIS keep, in (0, 1].
        low_rank: instead, how many samples they keep, whatever the batch size and number of ranks.
        share: instead, keep as many as eigenvalues are needed for this share of their sum (KIS: as the
            largest scores are needed for this share of theirs).
        unbiased: whether KIS weighs the samples drawn so that F is that of the batch in expectation.
        residual: whether KID carries the residual of the interpolation, as published. It costs a
            factorization of the size of what was left out and buys nothing (`hpcsngd.optim.kid`).
        kid_scope: ``"joined"``: KID decides on the gathered batch, alike for any number of ranks.
            ``"local"``: each rank decides on its own samples and sends only what it keeps
            (`hpcsngd.optim.sketches`).
        switch: rule of the hybrid method (`SwitchRule`, or a mapping of its fields).
        complement: what scales the part of the gradient orthogonal to every kept row. ``"damped"``:
            1 / damping, as the formula says. ``"plain"``: 1, the plain gradient. ``"residual"``:
            1 / (damping + mean eigenvalue of the curvature that was left out). Before ``rescale``.
        kl_clip: bound on the step's ``lr^2 v^T F v``, which is taken as ``lr^2 sum v . g`` over the covered
            layers: all v are multiplied by ``min(1, sqrt(kl_clip / that))`` (Ba et al., ICLR 2017, section
            5). After ``rescale``. A number or a function of the step; None: no bound.
        conv_mode: ``"reduce"``, ``"exact"`` or ``"paper"``; see above.
        skip: layers to leave to the optimizer: regular expressions found anywhere in a module's name, names
            of module classes, or module classes; what is inside a skipped module is skipped as well.
        loss_reduction: of the loss given to ``backward()``; see `hpcsngd.optim.samplescale`.
        accumulation_steps: micro-batches per step.
        rescale: what becomes of the preconditioned gradient v of a layer. ``"none"``: v. ``"damping"``:
            damping * v, which tends to the plain gradient for large damping, so that covered and other
            parameters share a learning rate while damping changes. ``"norm"``: v scaled to
            the plain gradient's norm.
        dtype: of rows, kernels and solves; default: float32, or float64 for float64 weights.
        seed: of KIS's draws.
        placement: who solves for a layer. ``"replicate"``: every rank, from all rows. ``"owner"``: one rank,
            which sends the preconditioned gradient at every step. ``"auto"``: for each layer and refresh
            whatever takes fewer bytes (`hpcsngd.optim.placement`); replicated while ``observe`` asks for
            kernels or errors. With owners, every rank must call `state_dict`, and layers must have their
            gradients on all ranks alike, as DistributedDataParallel leaves them.
        observe: any of ``"rank_analysis"``, ``"grad_norm"``, ``"grad_error"``; see `hpcsngd.optim.records`.

    Raises:
        ValueError: an argument out of its range, or a combination in which one would be ignored.
    """

    method: Method
    damping: Schedule | EpochDamping | Mapping[str, float]
    refresh_every: Schedule
    stagger: bool
    ratio: float
    low_rank: int | None
    share: float | None
    unbiased: bool
    residual: bool
    kid_scope: Scope
    switch: SwitchRule | Mapping[str, Any] | None
    complement: Complement
    kl_clip: Schedule | None
    conv_mode: ConvMode
    skip: Sequence[Skip]
    loss_reduction: LossReduction
    accumulation_steps: int
    rescale: Rescale
    dtype: torch.dtype | None
    seed: int
    placement: Placement
    observe: Collection[str]

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(allowed))
        rule = RankRule(self.ratio, self.low_rank, self.share)
        if self.method == "sngd" and not rule.keeps_everything:
            raise ValueError(f"{rule.name}: method 'sngd' keeps every sample")
        if self.switch is not None and self.method != "hybrid":
            raise ValueError(f"switch: method {self.method!r} does not switch; allowed with 'hybrid'")
        if self.placement == "owner" and self.kid_scope == "local":
            raise ValueError("placement='owner': kid_scope 'local' keeps its few rows on every rank")
        if self.placement == "owner" and self._needs_every_kernel:
            wanted = sorted(self.observe)
            raise ValueError(f"placement='owner': observe={wanted} needs kernels on every rank")

    def compression(self) -> Compression:
        """Returns what makes sketches of a batch."""
        rule = RankRule(self.ratio, self.low_rank, self.share)
        return Compression(rule, self.residual, self.unbiased, self.kid_scope, self.seed)

    def new_switch(self) -> Switch | None:
        """Returns the hybrid method's switch at the start of a run; None for the other methods."""
        if self.method != "hybrid":
            return None
        rule = self.switch
        return Switch(SwitchRule(**(rule or {})) if isinstance(rule, Mapping | None) else rule)

    def damping_schedule(self) -> Schedule | EpochDamping:
        """Returns the damping, where a mapping stands for the decay of these fields."""
        return epoch_damping(self.damping) if isinstance(self.damping, Mapping) else self.damping

    def effective_placement(self) -> Placement:
        """Returns the placement, which is ``"replicate"`` where what is observed needs every rank's rows."""
        return "replicate" if self._needs_every_kernel else self.placement

    def on_a_copy(self, method: Plain, damping: float) -> dict[str, Any]:
        """Returns the arguments of a HyLo that shows on a copy of the model what this one does now."""
        return {"method": method, "damping": damping} | {name: getattr(self, name) for name in _SHARED}

    def needs_progress(self) -> str:
        """Returns which settings need `HyLo.set_progress`; an empty text if none does."""
        settings = {
            "a damping by epochs": isinstance(self.damping, EpochDamping | Mapping),
            "method 'hybrid'": self.method == "hybrid",
            "kl_clip": self.kl_clip is not None,
        }
        return " and ".join(name for name, needs in settings.items() if needs)

    @property
    def _needs_every_kernel(self) -> bool:
        return bool({"rank_analysis", "grad_error"} & set(self.observe))


def damping_at(schedule: Schedule | EpochDamping, epoch: float | None, step: int) -> float:
    """Returns the damping of a refresh; ``epoch`` is read where damping follows epochs."""
    if isinstance(schedule, EpochDamping):
        return schedule.at_epoch(epoch or 0.0)
    return positive("damping", schedule, step)
