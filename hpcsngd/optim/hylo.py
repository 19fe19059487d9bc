"""HyLo: damped natural gradient in sample space, exact (SNGD) or low-rank (KID, KIS, hybrid).

Source: Mu, Soori, Can, Gurbuzbalaban, Mehri Dehnavi, "HyLo: A Hybrid Low-Rank Natural Gradient Descent
Method", SC 2022. The formulas are in `hpcsngd.optim.linalg`, `curvature` and `kid`; what is captured in
`hpcsngd.optim.capture`; which rows travel, and how many bytes, in `hpcsngd.optim.compress`.

Ranks. For each layer, either every rank gathers the rows and solves for itself, or one rank does and sends
the preconditioned gradient at every step: `hpcsngd.optim.placement` states the bytes of both and chooses.
Kernels are never sent: to factorize again takes no bytes, and time only above some ten thousand rows.
Layers of equal shape are solved together (`hpcsngd.optim.stacks`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist
from hpcsngd.optim import verify
from hpcsngd.optim.base import Preconditioner, Schedule
from hpcsngd.optim.calendar import Calendar
from hpcsngd.optim.calls import ConvMode, MisalignedError
from hpcsngd.optim.capture import Capture
from hpcsngd.optim.checks import (
    at_least_one_step,
    check_choice,
    check_method,
    check_placement,
    needs_every_kernel,
    positive,
    switch_rule,
)
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.compare import Comparison
from hpcsngd.optim.compress import Batch, Compression, Plain, Scope
from hpcsngd.optim.covering import Skip, find_layers
from hpcsngd.optim.curvature import Complement, SampleCurvature, build_all
from hpcsngd.optim.hybrid import Switch, SwitchRule
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.observe import Observer
from hpcsngd.optim.owners import Owners
from hpcsngd.optim.placement import Placement, Placer, refresh_cost
from hpcsngd.optim.records import Communication, Fallback, Kept, LayerCheck, Memory, PhaseTime, StepRecord
from hpcsngd.optim.rows import Rows
from hpcsngd.optim.schedules import DampingDecay
from hpcsngd.optim.selection import RankRule
from hpcsngd.optim.stacks import Solved, Stacks
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Method = Literal["sngd", "kid", "kis", "hybrid"]
LossReduction = Literal["mean", "sum"]
Rescale = Literal["none", "damping", "norm"]

_STATE_FORMAT = "hylo/3"


class HyLo(Preconditioner):
    """Preconditions each covered layer's gradient by ``(F + damping I)^-1`` in sample space.

    ``F = 1/N sum_i u_i u_i^T`` over the N samples of the last refresh, all ranks and micro-batches together,
    where ``u_i`` is the gradient of sample i's *own* loss. Damping is in units of F's eigenvalues and so
    means the same for any batch size, number of ranks, accumulation and loss reduction. A sample is an entry
    of the first dimension of a layer's input.

    The scale of samples. Captured output gradients are those of the loss given to ``backward()``. The default
    turns them into gradients of each sample's own loss as follows; ``step(sample_scale=...)`` overrides it.

    * ``"mean"``: the loss is the mean over the micro-batch, divided by ``accumulation_steps``; the factor is
      rows in the micro-batch times ``accumulation_steps``. DistributedDataParallel averages parameter
      gradients and leaves output gradients alone, so the number of ranks does not enter.
    * ``"sum"``: the loss is the sum over the samples; the factor is 1. The gradient is then a sum as well and
      its preconditioned form grows with the number of samples.
    * A loop that weighs samples exactly over uneven ranks, ``loss = sum(own losses) * ranks / N`` for every
      micro-batch, says ``sample_scale = N / ranks``.

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

    Methods. ``"sngd"`` uses every sample. ``"kid"`` keeps the pivots of the kernel and interpolates the
    others from them. ``"kis"`` draws samples without replacement with probability in proportion to
    ``||a_i||^2 ||g_i||^2`` and proceeds as if they were the whole batch, as published (``unbiased``
    re-weights them). ``"hybrid"`` is KID in critical regimes, KIS otherwise (`hpcsngd.optim.hybrid`); a
    switch takes effect at the next refresh. How many samples are kept is decided for each layer and refresh
    by one of ``ratio``, ``low_rank`` and ``share``, and is in the records.

    One learning rate. Preconditioned gradients have another size than plain ones. ``rescale="damping"`` or
    ``"norm"`` (grafting on SGD's step) brings them back, so that covered and other parameters share a rate;
    ``kl_clip`` bounds the step of all covered layers together whatever their size; ``complement`` says how
    far to go where the kept samples know nothing.

    Epochs. A damping by epochs, the hybrid method and ``kl_clip`` need ``set_progress(epoch, lr)`` before
    every ``step()``.

    Failure. A layer whose rows are not finite, or whose kernel cannot be factorized even with jitter, keeps
    its last good curvature; without one it keeps its plain gradient. All ranks agree; the event is logged
    with layer, ranks and step, and counted in `diagnostics`. A layer that no sample used at a refresh
    keeps its curvature too and is not a failure.

    Args:
        model: the model, or its DistributedDataParallel wrapper (names are those inside it).
        method: see above.
        damping: positive; a function of the step; or a decay by epochs (`DampingDecay`, or a mapping of its
            fields). Evaluated at refreshes and used until the next.
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
            (`hpcsngd.optim.compress`).
        switch: rule of the hybrid method (`SwitchRule`, or a mapping of its fields).
        complement: what scales the part of the gradient orthogonal to every kept row. ``"damped"``:
            1 / damping, as the formula says. ``"plain"``: 1, the plain gradient. ``"residual"``:
            1 / (damping + mean eigenvalue of the curvature that was left out). Before ``rescale``.
        kl_clip: bound on the step's ``lr^2 v^T F v``, which is taken as ``lr^2 sum v . g`` over the covered
            layers: all v are multiplied by ``min(1, sqrt(kl_clip / that))`` (Ba et al., ICLR 2017, section
            5). After ``rescale``. A number or a function of the step; None: no bound.
        conv_mode: see above.
        skip: layers to leave to the optimizer: regular expressions found anywhere in a module's name, names
            of module classes, or module classes; what is inside a skipped module is skipped as well.
        loss_reduction: see above.
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
        communicator: does the exchange with other ranks; default: with all of them.
        profile: whether to time the phases (waits for the GPU at each).
        observe: any of ``"rank_analysis"``, ``"grad_norm"``, ``"grad_error"``; see `hpcsngd.optim.records`.

    Raises:
        ValueError: an argument out of its range, or no layer to cover.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: Method = "sngd",
        damping: Schedule | DampingDecay | Mapping[str, float] = 0.1,
        refresh_every: Schedule = 1,
        stagger: bool = False,
        ratio: float = 1.0,
        low_rank: int | None = None,
        share: float | None = None,
        unbiased: bool = False,
        residual: bool = False,
        kid_scope: Scope = "joined",
        switch: SwitchRule | Mapping[str, Any] | None = None,
        complement: Complement = "damped",
        kl_clip: Schedule | None = None,
        conv_mode: ConvMode = "reduce",
        skip: Sequence[Skip] = (),
        loss_reduction: LossReduction = "mean",
        accumulation_steps: int = 1,
        rescale: Rescale = "none",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        placement: Placement = "auto",
        communicator: Communicator | None = None,
        profile: bool = False,
        observe: Collection[str] = (),
    ) -> None:
        check_choice("method", method, get_args(Method))
        check_choice("kid_scope", kid_scope, get_args(Scope))
        check_choice("complement", complement, get_args(Complement))
        check_choice("conv_mode", conv_mode, get_args(ConvMode))
        check_choice("placement", placement, get_args(Placement))
        check_placement(placement, kid_scope, observe)
        check_choice("loss_reduction", loss_reduction, get_args(LossReduction))
        check_choice("rescale", rescale, get_args(Rescale))
        rule = RankRule(ratio, low_rank, share)
        check_method(method, rule, has_switch=switch is not None)
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps}: must be at least 1")
        self._method, self._rescale, self._complement = method, rescale, complement
        self._damping_schedule = DampingDecay(**damping) if isinstance(damping, Mapping) else damping
        self._kl_clip, self._conv_mode = kl_clip, conv_mode
        self._loss_reduction, self._accumulation_steps = loss_reduction, accumulation_steps
        self._compression = Compression(rule, residual, unbiased, kid_scope, seed)
        self._switch = Switch(switch_rule(switch)) if method == "hybrid" else None
        self._step, self._failures, self._decisions_told = 0, 0, 0
        self._progress: tuple[float, float] | None = None
        self._damping = self._damping_at(0.0)
        self._used: Plain = self._method_now
        if kl_clip is not None:
            positive("kl_clip", kl_clip, 0)
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_layers(self._model, skip)
        self._observer = Observer(observe)
        self._calendar = Calendar([x.name for x in self._layers], refresh_every, stagger=stagger)
        self._stopwatch = Stopwatch(profile)
        self._communicator = communicator or Communicator()
        self._capture = Capture(self._layers, dtype, self._stopwatch, conv_mode)
        self._placement: Placement = "replicate" if needs_every_kernel(observe) else placement
        self._refresh_every = refresh_every
        self._owners = Owners(self._communicator)
        # Of the layers that are solved here; those solved here for all ranks are stacked by themselves.
        self._curvature: dict[str, SampleCurvature] = {}
        self._stacks, self._owned_stacks = Stacks(), Stacks()
        self._comparison = Comparison()
        self._kept: tuple[Kept, ...] = ()
        self._record = StepRecord(0, False, self._damping, 0, method=self._used)
        self._closed = self._told_accumulation = False
        # What `verify` builds on a copy of the model: the same method, by itself.
        self._build_alike: Callable[..., HyLo] = partial(
            type(self),
            ratio=ratio,
            low_rank=low_rank,
            share=share,
            unbiased=unbiased,
            residual=residual,
            complement=complement,
            conv_mode=conv_mode,
            skip=skip,
            loss_reduction=loss_reduction,
            seed=seed,
            communicator=Communicator(alone=True),
        )
        if self.skipped and dist.rank() == 0:
            text = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            logger.info("left to the base optimizer: %s", text)

    def set_progress(self, epoch: float, lr: float) -> None:
        """Tells how far training is; call it before every ``step()``.

        Args:
            epoch: epochs done, with its fraction: steps done over steps per epoch.
            lr: learning rate of the coming step.

        Raises:
            ValueError: a number is negative or not finite.
        """
        if not (0 <= epoch < math.inf and 0 <= lr < math.inf):
            raise ValueError(f"epoch={epoch}, lr={lr}: must be finite and not negative")
        self._progress = (float(epoch), float(lr))
        if self._switch is not None:
            self._switch.advance(self._step, epoch, lr, partial(self._communicator.from_first, "switch"))

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """Overwrites ``.grad`` of the covered parameters by the preconditioned gradient.

        Args:
            sample_scale: captured output gradients times this are gradients of each sample's own loss;
                default: by ``loss_reduction``.
            grad_scale: the factor of a gradient scaler (``GradScaler.get_scale()`` before its update) that
                captured output gradients still carry; ``.grad`` must already be unscaled.

        Raises:
            ValueError: a scale is not positive, or a schedule left its range.
            RuntimeError: after `close`, or without the `set_progress` that a setting needs.
        """
        if self._closed:
            raise RuntimeError("this preconditioner is closed")
        for name, scale in (("sample_scale", sample_scale), ("grad_scale", grad_scale)):
            if scale is not None and not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name}={scale}: must be positive")
        self._check_progress()
        refreshed = False
        fallbacks: tuple[Fallback, ...] = ()
        with torch.no_grad(), torch.autocast(self._layers[0].module.weight.device.type, enabled=False):
            if self._capture.enabled:
                refreshed, fallbacks = self._refresh(sample_scale, grad_scale)
            self._clip(self._precondition())
        self._step += 1
        self._capture.due = frozenset(self._calendar.due(self._step))
        self._record = self._make_record(refreshed, fallbacks)

    def verify(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: int = 8,
        max_entries: int = 2048,
        max_samples: int = 64,
    ) -> tuple[LayerCheck, ...]:
        """Compares this method with the dense oracle on layers of the user's own model.

        The truth is the exact per-sample gradient, so that the error contains what ``conv_mode`` and a
        compressed method leave out; for SNGD in mode ``exact``, and on layers without positions in any mode,
        it is rounding alone. ``rescale`` and ``kl_clip`` are left out. See `Preconditioner.verify` for
        arguments and result.
        """
        model = copy.deepcopy(self._model).double().eval()
        model.zero_grad()
        inputs, targets = (
            tensor[:max_samples].double() if tensor.is_floating_point() else tensor[:max_samples]
            for tensor in batch
        )
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        modules: dict[str, Any] = dict(model.named_modules())
        copies = [replace(layer, module=modules[layer.name]) for layer in self._layers]
        reasons = verify.choose_layers(copies, layers, max_entries)
        with torch.random.fork_rng(devices):
            alike = self._build_alike(model, method=self._method_now, damping=self._damping)
            checks = verify.check(alike, verify.Problem(model, copies, (inputs, targets), loss), reasons)
        if dist.rank() == 0:
            logger.info("compared with the dense oracle:\n%s", "\n".join(map(str, checks)))
        return checks

    def state_dict(self) -> dict[str, Any]:
        """Returns step, progress, seed, damping, the switch, and every layer's rows and factors.

        Every rank must call it: layers with an owner come from there.
        """
        layers = self._owners.all_states({name: c.state_dict() for name, c in self._curvature.items()})
        return {
            "format": _STATE_FORMAT,
            "step": self._step,
            "calendar": self._calendar.state_dict(),
            "progress": self._progress,
            "seed": self._compression.seed,
            "damping": self._damping,
            "method": self._used,
            "failures": self._failures,
            "switch": None if self._switch is None else self._switch.state_dict(),
            "ranks": self._communicator.world_size,
            "owners": dict(self._owners.ranks),
            "layers": {layer.name: layers[layer.name] for layer in self._layers if layer.name in layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, bit for bit on the same machine; any number of ranks may have saved it.

        The state of another method loads too: its curvature serves until the next refresh.

        Raises:
            ValueError: another format, or layers that this model does not have in this shape.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(f"state has format {state.get('format')!r}; this is {_STATE_FORMAT!r}")
        layers = {layer.name: layer for layer in self._layers}
        unknown = sorted(set(state["layers"]) - set(layers))
        if unknown:
            raise ValueError(f"state has layers that are not covered here: {', '.join(unknown)}")
        # On as many ranks as before, owners go on; on any other number every rank has everything for now.
        is_alike = state["ranks"] == self._communicator.world_size
        self._owners.ranks = dict(state["owners"]) if is_alike else {}
        self._curvature = {
            name: loaded
            for name, saved in state["layers"].items()
            if (loaded := self._load_layer(layers[name], saved))
            and (name not in self._owners.ranks or self._owners.is_here(name))
        }
        self._stack()
        self._comparison.clear()
        self._kept = ()
        self._step = state["step"]
        self._calendar.load_state_dict(state["calendar"])
        self._progress = None if state["progress"] is None else tuple(state["progress"])
        self._compression = replace(self._compression, seed=state["seed"])
        self._damping, self._failures, self._used = state["damping"], state["failures"], state["method"]
        if self._switch is not None and state["switch"] is not None:
            self._switch.load_state_dict(state["switch"], {name: self._like(layers[name]) for name in layers})
            self._decisions_told = len(self._switch.history)
        self._capture.clear()
        self._capture.due = frozenset(self._calendar.due(self._step))
        self._record = self._make_record(refreshed=False, fallbacks=())

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
        self._capture.close()
        self._curvature, self._owners.ranks = {}, {}
        self._stack()
        self._comparison.clear()
        self._closed = True

    @property
    def _method_now(self) -> Plain:
        """Returns the method of a refresh that happened now."""
        if self._method == "hybrid":
            return "kid" if self._switch is None or self._switch.is_critical else "kis"
        return self._method

    def _refresh(self, sample_scale: float | None, grad_scale: float) -> tuple[bool, tuple[Fallback, ...]]:
        """Recomputes the curvature from the captured rows; returns whether there were any, and failures."""
        damping = self._damping_at(self._progress[0] if self._progress else None)
        self._check_accumulation(sample_scale)
        with self._stopwatch.phase("capture"):
            local = self._capture.take(partial(self._own_loss_scale, sample_scale, grad_scale))
        if self._calendar.wants_costs:
            self._spread_refreshes(local)
        with self._stopwatch.phase("gather"):
            batch = self._compression.gather(
                self._communicator,
                local,
                self._method_now,
                step=self._step,
                damping=damping,
                everything=self._observer.wants_exact,
                placer=Placer(
                    self._placement,
                    self._communicator.world_size,
                    at_least_one_step(self._refresh_every, self._step),
                ),
            )
        if not batch.samples and not batch.faults:
            return False, ()
        self._used = self._method_now
        with self._stopwatch.phase("factorise"):
            faults = {**batch.faults, **self._factorise(batch, damping)}
        if self._observer.wants_exact:
            with self._stopwatch.phase("observe"):
                self._factorise_to_compare(batch, damping)
        self._damping = damping
        self._calendar.refreshed(self._step)
        self._failures += len(faults)
        return True, tuple(self._fall_back(name, reason) for name, reason in faults.items())

    def _spread_refreshes(self, local: Mapping[str, Rows | MisalignedError]) -> None:
        """Tells the calendar what the layers cost, once there are rows: from the joined batch's sizes."""
        counts = [len(rows) if isinstance(rows, Rows) else 0 for rows in local.values()]
        reads = [self._capture.reads.get(name, (0, 0)) for name in local]
        flat = [number for count, pair in zip(counts, reads, strict=True) for number in (count, *pair)]
        sums = self._communicator.sum_numbers("stagger", flat)
        if any(sums[::3]):
            exact = self._conv_mode == "exact"
            self._calendar.set_costs(
                {
                    layer.name: refresh_cost(layer, *sums[3 * i : 3 * i + 3], exact=exact)
                    for i, layer in enumerate(self._layers)
                }
            )

    def _factorise(self, batch: Batch, damping: float) -> dict[str, str]:
        """Replaces the curvature of every layer that has rows; returns where that failed, and why."""
        sketches = {name: sketch for name, sketch in batch.sketches.items() if sketch is not None}
        kernels = [sketch.kernel() for sketch in sketches.values()]
        curvatures = build_all(list(sketches.values()), kernels, damping, self._complement)
        found = dict(zip(sketches, curvatures, strict=True))
        # None for a failure here; layers owned elsewhere are their owners' to judge.
        built = {name: found.get(name) for name in batch.sketches}
        with self._stopwatch.phase("observe"):
            for name, kernel in zip(sketches, kernels, strict=True):
                if built[name] is not None:
                    self._observer.kernel(name, kernel, damping)
        # The same rows on unlike hardware may fail on one rank only: one rank's failure is everybody's.
        failures = [int(name in built and built[name] is None) for name in batch.samples]
        kept = [len(sketches[name].rows) if name in sketches else 0 for name in batch.owners]
        sums = self._communicator.sum_numbers("factorise", [*failures, *kept])
        failed = [name for name, ranks in zip(batch.samples, sums, strict=False) if ranks]
        for name in batch.samples:
            if name not in failed:
                self._replace(name, built.get(name), batch.owners.get(name))
        self._stack()
        sizes = {name: len(sketch.rows) for name, sketch in sketches.items()}
        sizes.update(zip(batch.owners, sums[len(failures) :], strict=True))
        self._kept = tuple(
            Kept(self._step + 1, name, self._used, self._compression.rule.name, batch.samples[name], size)
            for name, size in sizes.items()
            if size and self._used != "sngd"
        )
        return dict.fromkeys(failed, "kernel is not positive definite")

    def _replace(self, name: str, new: SampleCurvature | None, owner: int | None) -> None:
        """Takes over a layer's new curvature; None where its owner has it."""
        self._owners.assign(name, owner)
        if new is None:
            self._curvature.pop(name, None)
        else:
            self._curvature[name] = new

    def _stack(self) -> None:
        """Stacks the curvatures, always in the order of the layers."""
        names = [layer.name for layer in self._layers if layer.name in self._curvature]
        owned = [name for name in names if self._owners.is_here(name)]
        shared = [name for name in names if name not in owned]
        self._curvature = {
            **self._stacks.update({name: self._curvature[name] for name in shared}),
            **self._owned_stacks.update({name: self._curvature[name] for name in owned}),
        }

    def _is_covered(self, name: str) -> bool:
        """Returns whether some rank has a curvature of the layer."""
        return name in self._curvature or name in self._owners.ranks

    def _factorise_to_compare(self, batch: Batch, damping: float) -> None:
        """Keeps the exact curvature of the same batch, and that of the other of KID and KIS."""

        def build(name: str, method: Plain) -> SampleCurvature | None:
            sketch = self._compression.sketch(method, name, batch.everything[name], self._step, damping)
            if sketch is None:
                return None
            return SampleCurvature.build(sketch, sketch.kernel(), damping, self._complement)

        compressed: tuple[Plain, ...] = () if self._method == "sngd" else ("kid", "kis")
        self._comparison.refresh(batch, [method for method in compressed if method != self._used], build)

    def _fall_back(self, name: str, reason: str) -> Fallback:
        if dist.rank() == 0:
            instead = "last good curvature" if self._is_covered(name) else "plain gradient"
            logger.warning("step %d, layer %s: %s; using its %s", self._step + 1, name, reason, instead)
        return Fallback(self._step + 1, name, reason)

    def _precondition(self) -> list[Tensor]:
        """Overwrites the gradients of layers that have a curvature; returns v . g where kl_clip wants it."""
        gradients = {layer: found for layer in self._layers if (found := _gradients(layer))}
        products = []
        with self._stopwatch.phase("precondition"):
            grads = {
                layer.name: layer.to_matrix(found).to(self._capture.rows_dtype(layer))
                for layer, found in gradients.items()
            }
            if self._switch is not None:
                for name, grad in grads.items():
                    self._switch.add(name, grad)
            solved = self._stacks.solve(grads)
            rescaled: dict[str, Tensor] = {}
            for group in solved:
                matrices = self._rescaled(group)
                rescaled.update(zip(group.names, matrices, strict=True))
                if self._kl_clip is not None:
                    products.append((matrices * group.grads).sum(dtype=torch.float64))
            sent = self._from_owners(grads)
            rescaled.update(sent)
            if self._kl_clip is not None:
                products += [(sent[name] * grads[name]).sum(dtype=torch.float64) for name in sent]
            for layer, found in gradients.items():
                if layer.name in rescaled:
                    for gradient, piece in zip(found, layer.from_matrix(rescaled[layer.name]), strict=True):
                        gradient.copy_(piece)
        with self._stopwatch.phase("observe"):
            self._observe(grads, solved)
        return products

    def _from_owners(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the preconditioned gradients of the layers that have an owner."""
        mine: dict[str, Tensor] = {}
        for group in self._owned_stacks.solve(grads):
            mine.update(zip(group.names, self._rescaled(group), strict=True))
        return self._owners.exchange(mine, grads)

    def _observe(self, grads: Mapping[str, Tensor], solved: Sequence[Solved]) -> None:
        results = dict(grads)
        for group in solved:
            results.update(zip(group.names, group.results, strict=True))
        for name, grad in grads.items():
            self._observer.gradient(name, grad)
            exact = self._comparison.exact(name, grad)
            if exact is not None:
                self._observer.error(name, self._used, results[name], exact)
                for method, other in self._comparison.results(name, grad):
                    self._observer.error(name, method, other, exact)

    def _clip(self, products: Sequence[Tensor]) -> None:
        """Multiplies every preconditioned gradient by ``min(1, sqrt(kl_clip / (lr^2 sum v . g)))``."""
        if self._kl_clip is None or self._progress is None or not products:
            return
        limit, lr = positive("kl_clip", self._kl_clip, self._step), self._progress[1]
        with self._stopwatch.phase("precondition"):
            size = lr**2 * torch.stack(list(products)).sum()
            factor = (limit / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp_max(1)
            for layer in self._layers:
                if self._is_covered(layer.name):
                    for gradient in _gradients(layer):
                        gradient.mul_(factor)

    def _rescaled(self, solved: Solved) -> Tensor:
        result = solved.results
        if self._rescale == "damping":
            return result * solved.damping
        if self._rescale == "norm":
            norms = torch.linalg.vector_norm(result, dim=(1, 2), keepdim=True)
            plain = torch.linalg.vector_norm(solved.grads, dim=(1, 2), keepdim=True)
            result = result * (plain / norms.clamp_min(torch.finfo(result.dtype).tiny))
        return result

    def _damping_at(self, epoch: float | None) -> float:
        """Returns the damping of a refresh now; ``epoch`` is read where damping follows epochs."""
        if isinstance(self._damping_schedule, DampingDecay):
            return self._damping_schedule.at_epoch(epoch or 0.0)
        return positive("damping", self._damping_schedule, self._step)

    def _check_progress(self) -> None:
        """Refuses to guess an epoch or a learning rate."""
        settings = {
            "a damping by epochs": isinstance(self._damping_schedule, DampingDecay),
            "method 'hybrid'": self._switch is not None,
            "kl_clip": self._kl_clip is not None,
        }
        if self._progress is None and any(settings.values()):
            wanting = " and ".join(name for name, needs in settings.items() if needs)
            raise RuntimeError(f"{wanting}: call set_progress(epoch, lr) before step()")

    def _own_loss_scale(self, sample_scale: float | None, grad_scale: float, rows: int) -> float:
        """Returns what turns captured output gradients into gradients of each sample's own loss."""
        if sample_scale is None:
            sample_scale = rows * self._accumulation_steps if self._loss_reduction == "mean" else 1.0
        return sample_scale / grad_scale

    def _check_accumulation(self, sample_scale: float | None) -> None:
        """Tells once about more micro-batches than announced: their scale, hence damping, would be wrong."""
        seen, announced = self._capture.micro_batches, self._accumulation_steps
        if (
            sample_scale is None
            and self._loss_reduction == "mean"
            and seen > announced
            and not self._told_accumulation
        ):
            self._told_accumulation = True
            logger.warning("captured %d micro-batches, but accumulation_steps=%d", seen, announced)

    def _like(self, layer: Layer) -> Tensor:
        """Returns an empty tensor on the device and in the dtype of the layer's rows."""
        return torch.empty(0, device=layer.module.weight.device, dtype=self._capture.rows_dtype(layer))

    def _load_layer(self, layer: Layer, saved: Mapping[str, Any]) -> SampleCurvature:
        try:
            return SampleCurvature.from_state(saved, layer.row_sizes, layer.groups, self._like(layer))
        except ValueError as error:
            raise ValueError(f"state of layer {layer.name}: {error}") from error

    def _make_record(self, refreshed: bool, fallbacks: tuple[Fallback, ...]) -> StepRecord:
        step = self._step
        sizes = {"rows": 0, "factors": 0}
        for curvature in (*self._curvature.values(), *self._comparison.curvatures()):
            for kind, size in zip(sizes, curvature.size_bytes, strict=True):
                sizes[kind] += size
        traffic = self._communicator.take_traffic()
        decisions = () if self._switch is None else tuple(self._switch.history[self._decisions_told :])
        self._decisions_told += len(decisions)
        return StepRecord(
            step,
            refreshed,
            self._damping,
            self._failures,
            jittered=sum(curvature.jitter > 0 for curvature in self._curvature.values()),
            phases=tuple(PhaseTime(step, *item) for item in self._stopwatch.take().items()),
            communication=tuple(Communication(step, *what, *amount) for what, amount in traffic.items()),
            memory=tuple(Memory(step, *item) for item in sizes.items()),
            rank_analysis=self._observer.take_rank_analysis(step),
            grad_norm=self._observer.take_grad_norm(step),
            grad_error=self._observer.take_grad_error(step),
            fallbacks=fallbacks,
            kept=self._kept if refreshed else (),
            method=self._used,
            switches=decisions,
        )


def _gradients(layer: Layer) -> list[Tensor]:
    """Returns the gradients of all the layer's parameters, or none of them."""
    gradients = [parameter.grad for parameter in layer.parameters if parameter.grad is not None]
    return gradients if len(gradients) == len(layer.parameters) else []
