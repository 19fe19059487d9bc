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
from hpcsngd.optim.calls import ConvMode
from hpcsngd.optim.capture import Capture
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip, find_layers, tell_skipped
from hpcsngd.optim.curvature import Complement
from hpcsngd.optim.gradients import KlClip, Rescale
from hpcsngd.optim.held import Curvatures
from hpcsngd.optim.hybrid import SwitchRule
from hpcsngd.optim.hylo_apply import Applier
from hpcsngd.optim.hylo_cycle import Cycle
from hpcsngd.optim.hylo_record import Recorder
from hpcsngd.optim.hylo_steering import Steering
from hpcsngd.optim.observe import SHARES, Observer
from hpcsngd.optim.options import Method, Options
from hpcsngd.optim.placement import Placement
from hpcsngd.optim.records import LayerCheck, StepRecord
from hpcsngd.optim.refresh import Outcome, Refresher
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping
from hpcsngd.optim.sketches import Scope
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

    Methods, what a convolution's rows are (and what that means for damping), and all other arguments stand
    at `hpcsngd.optim.options.Options`.

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
        communicator: does the exchange with other ranks; default: with all of them.
        profile: whether to time the phases and measure memory (waits for the GPU once a step).
        rank_shares: shares of the sum of singular values whose matrix rank ``rank_analysis`` tells.
        **others: the attributes of `hpcsngd.optim.options.Options`.

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
        self._options, self._communicator = options, communicator or Communicator()
        self._steering = Steering(options, self._communicator)
        self._step = self._failures = 0
        self._damping, self._used = self._steering.moment(0).damping, self._steering.method
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_layers(self._model, skip)
        self._stopwatch, self._observer = Stopwatch(profile), Observer(observe, rank_shares)
        self._capture = Capture(self._layers, dtype, self._stopwatch, conv_mode)
        self._curvature = Curvatures(
            self._layers, self._communicator, self._capture.rows_dtype, self._stopwatch
        )
        self._refresher = Refresher(
            options, self._communicator, self._curvature, self._observer, self._stopwatch
        )
        self._cycle = Cycle(options, self._layers, self._capture, self._refresher, self._communicator)
        self._applier = Applier(
            self._layers,
            self._curvature,
            self._capture.rows_dtype,
            stopwatch=self._stopwatch,
            observer=self._observer,
            comparison=self._refresher.comparison,
            rescale=rescale,
            kl_clip=KlClip(kl_clip),
        )
        self._recorder = Recorder(
            self._communicator,
            self._curvature,
            self._refresher.comparison,
            self._observer,
            self._stopwatch,
            measures=profile,
        )
        self._record = StepRecord(0, False, self._damping, 0, method=self._used)
        self._closed = False
        tell_skipped(logger, self.skipped)

    def set_progress(self, epoch: float, lr: float) -> None:
        """See `Preconditioner.set_progress`; decides about the hybrid method once an epoch has begun.

        Raises:
            ValueError: a number is negative or not finite.
        """
        self._steering.advance(self._step, epoch, lr)

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """See `Preconditioner.step`.

        Raises:
            ValueError: a scale is not positive, or a schedule left its range.
            RuntimeError: after `close`, or without the `set_progress` that a setting needs.
        """
        if self._closed:
            raise RuntimeError("this preconditioner is closed")
        self._cycle.check(sample_scale, grad_scale)
        self._steering.check()
        outcome = Outcome(happened=False)
        with torch.no_grad(), torch.autocast(self._layers[0].module.weight.device.type, enabled=False):
            if self._cycle.is_due:
                outcome = self._refresh(sample_scale, grad_scale)
            self._applier.apply(self._steering.lr, self._step, self._used, self._steering.watch)
        self._step += 1
        self._cycle.expect(self._step)
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
        options = self._options.on_a_copy(self._steering.method, self._damping)
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
            "calendar": self._cycle.calendar.state_dict(),
            "seed": self._refresher.compression.seed,
            "damping": self._damping,
            "method": self._used,
            "failures": self._failures,
            **self._steering.state_dict(),
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
        self._cycle.calendar.load_state_dict(state["calendar"])
        self._refresher.compression = replace(self._refresher.compression, seed=state["seed"])
        self._damping, self._failures, self._used = state["damping"], state["failures"], state["method"]
        like = {layer.name: self._curvature.like(layer.name) for layer in self._layers}
        self._steering.load_state_dict(state, like)
        self._capture.clear()
        self._cycle.expect(self._step)
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

    def _refresh(self, sample_scale: float | None, grad_scale: float) -> Outcome:
        """Recomputes the curvature from the captured rows."""
        now = self._steering.moment(self._step)
        outcome = self._cycle.refresh(now, sample_scale, grad_scale)
        if outcome.happened:
            self._used, self._damping = now.method, now.damping
            self._failures += len(outcome.fallbacks)
        return outcome

    def _make_record(self, outcome: Outcome) -> StepRecord:
        record = self._recorder.record(self._step, outcome, damping=self._damping, failures=self._failures)
        return replace(record, method=self._used, switches=self._steering.take_decisions())
