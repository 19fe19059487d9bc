"""HyLo: damped natural gradient in sample space, exact (SNGD) or low-rank (KID, KIS, hybrid).

Source: Mu, Soori, Can, Gurbuzbalaban, Mehri Dehnavi, "HyLo: A Hybrid Low-Rank Natural Gradient Descent
Method", SC 2022. The formulas are in `hpcsngd.optim.linalg`, `curvature` and `kid`; what is captured in
`hpcsngd.optim.capture`; which rows travel, and how many bytes, in `hpcsngd.optim.sketches`; arguments and
their checks in `hpcsngd.optim.options`; a refresh in `hpcsngd.optim.refresh`.

Ranks. For each layer, either every rank gathers the rows and solves for itself, or one rank does and sends
the preconditioned gradient at every step: `hpcsngd.optim.placement` states the bytes of both and chooses.
Kernels are never sent: to factorize again takes no bytes, and time only above some ten thousand rows.
Layers of equal shape are solved together (`hpcsngd.optim.stacks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd.optim import verify
from hpcsngd.optim.base import Preconditioner, Schedule
from hpcsngd.optim.calendar import Calendar
from hpcsngd.optim.calls import ConvMode
from hpcsngd.optim.capture import Capture
from hpcsngd.optim.checks import check_progress
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip, find_layers, tell_skipped
from hpcsngd.optim.curvature import Complement
from hpcsngd.optim.gradients import KlClip, Rescale, Solved, gradient_matrices, rescaled, write_gradients
from hpcsngd.optim.held import Curvatures
from hpcsngd.optim.hybrid import SwitchRule
from hpcsngd.optim.observe import SHARES, Observer
from hpcsngd.optim.options import Method, Options, damping_at
from hpcsngd.optim.placement import Placement
from hpcsngd.optim.records import Communication, LayerCheck, Memory, PhaseTime, StepRecord
from hpcsngd.optim.refresh import Moment, Outcome, Refresher, spread_refreshes
from hpcsngd.optim.samplescale import LossReduction, SampleScale
from hpcsngd.optim.schedules import EpochDamping
from hpcsngd.optim.sketches import Plain, Scope
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_STATE_FORMAT = "hylo/3"


class HyLo(Preconditioner):
    """Preconditions each covered layer's gradient by ``(F + damping I)^-1`` in sample space.

    ``F = 1/N sum_i u_i u_i^T`` over the N samples of the last refresh, all ranks and micro-batches together,
    where ``u_i`` is the gradient of sample i's *own* loss. Damping is in units of F's eigenvalues and so
    means the same for any batch size, number of ranks, accumulation and loss reduction. A sample is an entry
    of the first dimension of a layer's input.

    Captured output gradients are turned into gradients of each sample's own loss by ``loss_reduction`` and
    ``accumulation_steps``, or by ``step(sample_scale=...)``: `hpcsngd.optim.samplescale` states how.

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
        profile: whether to time the phases and measure memory (waits for the GPU once a step).
        observe: any of ``"rank_analysis"``, ``"grad_norm"``, ``"grad_error"``; see `hpcsngd.optim.records`.
        rank_shares: shares of the sum of singular values whose matrix rank ``rank_analysis`` tells.

    Raises:
        ValueError: an argument out of its range, or no layer to cover.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: Method = "sngd",
        damping: Schedule | EpochDamping | Mapping[str, float] = 0.1,
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
        rank_shares: Sequence[float] = SHARES,
    ) -> None:
        options = Options(
            method=method,
            damping=damping,
            refresh_every=refresh_every,
            stagger=stagger,
            ratio=ratio,
            low_rank=low_rank,
            share=share,
            unbiased=unbiased,
            residual=residual,
            kid_scope=kid_scope,
            switch=switch,
            complement=complement,
            kl_clip=kl_clip,
            conv_mode=conv_mode,
            skip=skip,
            loss_reduction=loss_reduction,
            accumulation_steps=accumulation_steps,
            rescale=rescale,
            dtype=dtype,
            seed=seed,
            placement=placement,
            observe=observe,
        )
        self._switch, self._kl_clip = options.new_switch(), KlClip(kl_clip)
        self._damping_schedule = options.damping_schedule()
        self._scale = SampleScale(loss_reduction, accumulation_steps)
        self._options = options
        self._progress: tuple[float, float] | None = None
        self._step, self._failures, self._decisions_told = 0, 0, 0
        self._damping, self._used = damping_at(self._damping_schedule, 0.0, 0), self._method_now
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_layers(self._model, skip)
        self._stopwatch, self._observer = Stopwatch(profile), Observer(observe, rank_shares)
        self._calendar = Calendar([x.name for x in self._layers], refresh_every, stagger=stagger)
        self._communicator = communicator or Communicator()
        self._capture = Capture(self._layers, dtype, self._stopwatch, conv_mode)
        self._curvature = Curvatures(
            self._layers, self._communicator, self._capture.rows_dtype, self._stopwatch
        )
        self._refresher = Refresher(
            options, self._communicator, self._curvature, self._observer, self._stopwatch
        )
        self._record = StepRecord(0, False, self._damping, 0, method=self._used)
        self._closed, self._profile = False, profile
        tell_skipped(logger, self.skipped)

    def set_progress(self, epoch: float, lr: float) -> None:
        """Tells how far training is; call it before every ``step()``.

        Args:
            epoch: epochs done, with its fraction: steps done over steps per epoch.
            lr: learning rate of the coming step.

        Raises:
            ValueError: a number is negative or not finite.
        """
        check_progress(epoch, lr)
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
        self._scale.check(sample_scale, grad_scale)
        self._check_progress()
        outcome = Outcome(happened=False)
        with torch.no_grad(), torch.autocast(self._layers[0].module.weight.device.type, enabled=False):
            if self._capture.enabled:
                outcome = self._refresh(sample_scale, grad_scale)
            self._precondition()
        self._step += 1
        self._capture.due = frozenset(self._calendar.due(self._step))
        self._record = self._make_record(outcome)

    def verify(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: int = 8,
        max_entries: int = 2048,
        max_samples: int = 64,
    ) -> tuple[LayerCheck, ...]:
        """Compares this method with the dense oracle, see `Preconditioner.verify`.

        The truth is the exact per-sample gradient, so that the error contains what ``conv_mode`` and a
        compressed method leave out; for SNGD in mode ``exact``, and on layers without positions in any mode,
        it is rounding alone. ``rescale`` and ``kl_clip`` are left out.
        """
        options = self._options.on_a_copy(self._method_now, self._damping)
        data = (batch[0][:max_samples], batch[1][:max_samples])
        return verify.check_on_a_copy(
            verify.Problem(self._model, self._layers, data, loss),
            partial(type(self), **options, communicator=Communicator(alone=True)),
            lambda copies: verify.choose_layers(copies, layers, max_entries),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns step, progress, seed, damping, the switch, and every layer's rows and factors.

        Every rank must call it: layers with an owner come from there.
        """
        return {
            "format": _STATE_FORMAT,
            "step": self._step,
            "calendar": self._calendar.state_dict(),
            "progress": self._progress,
            "seed": self._refresher.compression.seed,
            "damping": self._damping,
            "method": self._used,
            "failures": self._failures,
            "switch": None if self._switch is None else self._switch.state_dict(),
            **self._curvature.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, bit for bit on the same machine; any number of ranks may have saved it.

        The state of another method loads too: its curvature serves until the next refresh.

        Raises:
            ValueError: another format, or layers that this model does not have in this shape.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(f"state has format {state.get('format')!r}; this is {_STATE_FORMAT!r}")
        self._curvature.load_state_dict(state)
        self._refresher.comparison.clear()
        self._step = state["step"]
        self._calendar.load_state_dict(state["calendar"])
        self._progress = None if state["progress"] is None else tuple(state["progress"])
        self._refresher.compression = replace(self._refresher.compression, seed=state["seed"])
        self._damping, self._failures, self._used = state["damping"], state["failures"], state["method"]
        if self._switch is not None and state["switch"] is not None:
            like = {layer.name: self._curvature.like(layer.name) for layer in self._layers}
            self._switch.load_state_dict(state["switch"], like)
            self._decisions_told = len(self._switch.history)
        self._capture.clear()
        self._capture.due = frozenset(self._calendar.due(self._step))
        self._record = self._make_record(Outcome(happened=False))

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
        self._capture.close()
        self._curvature.clear()
        self._refresher.comparison.clear()
        self._closed = True

    @property
    def _method_now(self) -> Plain:
        """Returns the method of a refresh that happened now."""
        if self._options.method == "hybrid":
            return "kid" if self._switch is None or self._switch.is_critical else "kis"
        return self._options.method

    def _refresh(self, sample_scale: float | None, grad_scale: float) -> Outcome:
        """Recomputes the curvature from the captured rows."""
        epoch = self._progress[0] if self._progress else None
        now = Moment(self._step, self._method_now, damping_at(self._damping_schedule, epoch, self._step))
        self._scale.check_accumulation(sample_scale, self._capture.micro_batches)
        with self._stopwatch.phase("capture"):
            local = self._capture.take(self._scale.factor(sample_scale, grad_scale))
        if self._calendar.wants_costs:
            layers = {layer.name: layer for layer in self._layers}
            exact = self._options.conv_mode == "exact"
            spread_refreshes(self._calendar, self._capture, self._communicator, local, layers, exact=exact)
        outcome = self._refresher.refresh(local, now)
        if outcome.happened:
            self._used, self._damping = now.method, now.damping
            self._calendar.refreshed(self._step)
            self._failures += len(outcome.fallbacks)
        return outcome

    def _precondition(self) -> None:
        """Overwrites the gradients of layers that have a curvature."""
        with self._stopwatch.phase("precondition"):
            grads = gradient_matrices(self._layers, self._capture.rows_dtype)
            if self._switch is not None:
                for name, grad in grads.items():
                    self._switch.add(name, grad)
            solved = self._curvature.solve(grads)
            results: dict[str, Tensor] = {}
            for group in solved:
                matrices = self._rescaled(group)
                results.update(zip(group.names, matrices, strict=True))
                self._kl_clip.add(matrices, group.grads)
            sent = self._curvature.from_owners(grads, self._rescaled)
            for name, matrix in sent.items():
                self._kl_clip.add(matrix, grads[name])
        # Before the gradients are overwritten: the matrices may be views of them.
        with self._stopwatch.phase("observe"):
            self._observe(grads, solved)
        with self._stopwatch.phase("precondition"):
            write_gradients(self._layers, results | sent)
            covered = [layer for layer in self._layers if self._curvature.is_covered(layer.name)]
            self._kl_clip.apply(covered, self._progress[1] if self._progress else None, self._step)

    def _rescaled(self, solved: Solved) -> Tensor:
        return rescaled(self._options.rescale, solved.results, solved.grads, solved.damping)

    def _observe(self, grads: Mapping[str, Tensor], solved: Sequence[Solved]) -> None:
        results = dict(grads)
        for group in solved:
            results.update(zip(group.names, group.results, strict=True))
        for name, grad in grads.items():
            self._observer.gradient(name, grad)
            exact = self._refresher.comparison.exact(name, grad)
            if exact is not None:
                self._observer.error(name, self._used, results[name], exact)
                for method, other in self._refresher.comparison.results(name, grad):
                    self._observer.error(name, method, other, exact)

    def _check_progress(self) -> None:
        """Refuses to guess an epoch or a learning rate."""
        settings = {
            "a damping by epochs": isinstance(self._damping_schedule, EpochDamping),
            "method 'hybrid'": self._switch is not None,
            "kl_clip": self._kl_clip.enabled,
        }
        if self._progress is None and any(settings.values()):
            wanting = " and ".join(name for name, needs in settings.items() if needs)
            raise RuntimeError(f"{wanting}: call set_progress(epoch, lr) before step()")

    def _sizes(self, outcome: Outcome) -> dict[str, int]:
        """Returns bytes by kind of memory; nothing if nobody asked."""
        if not self._profile:
            return {}
        compared = sum(sum(c.size_bytes) for c in self._refresher.comparison.curvatures())
        sizes = {"captured": outcome.captured_bytes, "rows": 0, "factors": 0, "comparison": compared}
        for curvature in self._curvature.values():
            for kind, size in zip(("rows", "factors"), curvature.size_bytes, strict=True):
                sizes[kind] += size
        return sizes

    def _make_record(self, outcome: Outcome) -> StepRecord:
        step = self._step
        traffic = self._communicator.take_traffic()
        decisions = () if self._switch is None else tuple(self._switch.history[self._decisions_told :])
        self._decisions_told += len(decisions)
        return StepRecord(
            step,
            outcome.happened,
            self._damping,
            self._failures,
            jittered=sum(curvature.jitter > 0 for curvature in self._curvature.values()),
            phases=tuple(PhaseTime(step, *item) for item in self._stopwatch.take().items()),
            communication=tuple(Communication(step, *what, *amount) for what, amount in traffic.items()),
            memory=tuple(Memory(step, *item) for item in self._sizes(outcome).items()),
            rank_analysis=self._observer.take_rank_analysis(step),
            grad_norm=self._observer.take_grad_norm(step),
            grad_error=self._observer.take_grad_error(step),
            fallbacks=outcome.fallbacks,
            kept=outcome.kept,
            method=self._used,
            switches=decisions,
        )
