"""K-FAC: natural gradient with a Kronecker product for each layer's Fisher block, for 1..N ranks.

Sources: Martens and Grosse, ICML 2015; Grosse and Martens, ICML 2016 (convolutions); Eschenhagen et al.,
NeurIPS 2023 (weight sharing). What a factor is of stands in `hpcsngd.optim.kfac_layers`; whose gradients in
`fisher`; the running average in `kfac_factors`; damping and the two inverses in `kfac_inverse`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd.optim import fisher as fishers
from hpcsngd.optim import kfac_verify
from hpcsngd.optim.base import Preconditioner, Schedule
from hpcsngd.optim.checks import check_progress
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip, tell_skipped
from hpcsngd.optim.gradients import KlClip, Rescale
from hpcsngd.optim.kaisa import Cost, Grid, place
from hpcsngd.optim.kfac_apply import Applier
from hpcsngd.optim.kfac_collect import Collector
from hpcsngd.optim.kfac_costs import placement_costs
from hpcsngd.optim.kfac_covering import find_covered
from hpcsngd.optim.kfac_curvature import Curvature
from hpcsngd.optim.kfac_cycle import Cycle
from hpcsngd.optim.kfac_exchange import Scope
from hpcsngd.optim.kfac_inverse import InverseKind
from hpcsngd.optim.kfac_layers import Sharing
from hpcsngd.optim.kfac_options import DtypeName, Options, as_dtype, check_observed
from hpcsngd.optim.records import Fallback, LayerCheck, Memory, StepRecord
from hpcsngd.optim.reporting import fall_back, phase_times, traffic
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_STATE_FORMAT = "kfac/2"


class KFAC(Preconditioner):
    """Preconditions each covered layer's gradient by the damped inverse of its Kronecker factors.

    Units. Factors are averages over all samples of all ranks and micro-batches, of gradients of each sample's
    *own* loss. So damping means the same for any batch size, number of ranks, accumulation, loss reduction
    and gradient scaler. How output gradients get that scale: `hpcsngd.optim.samplescale`.

    Failure. A layer whose statistic is not finite leaves its running factors as they were; one whose factors
    cannot be decomposed keeps its last good inverse, and without one its plain gradient. All ranks agree; the
    event is logged with layer and step, and counted in `diagnostics`. A layer that no sample used keeps
    everything and is not a failure.

    Args:
        model: the model, or its DistributedDataParallel wrapper (names are those inside it).
        communicator: does the exchange with other ranks; default: with all of them.
        profile: whether to time the phases (waits for the GPU at each).
        observe: ``"strength"`` for `hpcsngd.optim.records.LayerStrength`.
        **others: the attributes of `hpcsngd.optim.kfac_options.Options`.

    Raises:
        ValueError: an argument out of its range, or no layer to cover.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inverse: InverseKind = "eigen",
        pi_split: bool = True,
        sharing: Sharing = "expand",
        fisher: fishers.Fisher = "empirical",
        loss: fishers.LossKind = "cross_entropy",
        mc_samples: int = 1,
        damping: Schedule | EpochDamping | Mapping[str, float] = 0.03,
        factor_every: Schedule = 1,
        inverse_every: Schedule = 1,
        factor_decay: Schedule = 0.95,
        bias_correction: bool = True,
        kl_clip: Schedule | None = None,
        skip: Sequence[Skip] = (),
        largest_factor: int | None = None,
        loss_reduction: LossReduction = "mean",
        accumulation_steps: int = 1,
        rescale: Rescale = "none",
        dtype: torch.dtype | None = None,
        factor_dtype: torch.dtype | DtypeName | None = None,
        inverse_dtype: torch.dtype | DtypeName | None = None,
        seed: int = 0,
        factors: Scope = "all",
        grad_worker_fraction: float = 1.0,
        placement_cost: Cost = "compute",
        colocate: bool = True,
        stagger: bool = False,
        overlap: bool = True,
        communicator: Communicator | None = None,
        profile: bool = False,
        observe: Collection[str] = (),
    ) -> None:
        self._options = options = Options(
            inverse=inverse,
            pi_split=pi_split,
            sharing=sharing,
            fisher=fisher,
            loss=loss,
            mc_samples=mc_samples,
            damping=damping,
            factor_every=factor_every,
            inverse_every=inverse_every,
            factor_decay=factor_decay,
            bias_correction=bias_correction,
            kl_clip=kl_clip,
            skip=skip,
            largest_factor=largest_factor,
            loss_reduction=loss_reduction,
            accumulation_steps=accumulation_steps,
            rescale=rescale,
            dtype=dtype,
            factor_dtype=factor_dtype,
            inverse_dtype=inverse_dtype,
            seed=seed,
            factors=factors,
            grad_worker_fraction=grad_worker_fraction,
            placement_cost=placement_cost,
            colocate=colocate,
            stagger=stagger,
            overlap=overlap,
        )
        check_observed(observe)
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_covered(self._model, skip, sharing, largest_factor)
        self._stopwatch, self._communicator = Stopwatch(profile), communicator or Communicator()
        grid = Grid.of_fraction(self._communicator.world_size, grad_worker_fraction)
        self._roles = place(placement_costs(self._layers, options), grid, colocate=colocate)
        self._collector = Collector(self._layers, options, self._communicator, self._roles, self._stopwatch)
        self._curvature = Curvature(
            self._layers,
            options.inverter(),
            self._communicator,
            grid,
            self._roles,
            stopwatch=self._stopwatch,
            dtype=dtype,
            factor_dtype=as_dtype("factor_dtype", factor_dtype),
            is_corrected=bias_correction,
        )
        self._cycle = Cycle(options, self._layers, self._collector, self._curvature, self._stopwatch)
        self._applier = Applier(
            self._layers,
            self._curvature,
            self._collector.watch.dtype,
            rescale=rescale,
            kl_clip=KlClip(kl_clip),
            observes="strength" in observe,
        )
        self._progress: tuple[float, float] | None = None
        self._step = self._failures = 0
        self._damping = options.damping_at(0.0, 0)
        self._closed = False
        self._cycle.expect(self._step)
        self._record = StepRecord(0, False, self._damping, 0, method=inverse)
        tell_skipped(logger, self.skipped)

    def set_progress(self, epoch: float, lr: float) -> None:
        """See `Preconditioner.set_progress`; raises ValueError for numbers that cannot be."""
        check_progress(epoch, lr)
        self._progress = (float(epoch), float(lr))

    def begin_step(self, sample_scale: float | None = None, micro_batches: int = 1) -> None:
        """See `Preconditioner.begin_step`; without ``overlap``, or on one rank, there is nothing to tell."""
        self._collector.begin_step(sample_scale, micro_batches)

    def before_backward(self, outputs: Tensor) -> None:
        """Sends the gradients of ``fisher`` through the graph; does nothing for the empirical one."""
        self._collector.push(outputs)

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """See `Preconditioner.step`; where ``fisher`` is not empirical, ``sample_scale`` is not used.

        Raises:
            ValueError: a scale is not positive, or not what `begin_step` was told, or a schedule left its
                range.
            RuntimeError: after `close`, or without the `set_progress` or `before_backward` that a setting
                needs.
        """
        if self._closed:
            raise RuntimeError("this preconditioner is closed")
        wanting = self._options.needs_progress()
        if self._progress is None and wanting:
            raise RuntimeError(f"{wanting}: call set_progress(epoch, lr) before step()")
        self._collector.check(sample_scale, grad_scale)
        with torch.no_grad(), torch.autocast(self._layers[0].weight.device.type, enabled=False):
            faults = self._cycle.update_factors(self._step, sample_scale, grad_scale)
            inverted = self._cycle.invert(self._step, self._progress[0] if self._progress else None)
            with self._stopwatch.phase("precondition"):
                self._applier.apply(self._progress[1] if self._progress else None, self._step)
        if inverted is not None:
            self._damping = inverted.damping
            faults |= inverted.failed
        fallbacks = tuple(self._fall_back(*item) for item in faults.items())
        self._failures += len(fallbacks)
        self._step += 1
        self._cycle.expect(self._step)
        self._record = self._make_record(inverted is not None, fallbacks)

    def verify(
        self,
        batch: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        layers: int = 8,
        max_entries: int = 2048,
        max_samples: int = 64,
    ) -> tuple[LayerCheck, ...]:
        """Compares this method with its own formula made dense, see `Preconditioner.verify`.

        The truth is what `hpcsngd.optim.kfac_inverse` documents, from factors made one sample at a time
        through autograd: the error is rounding, except for ``fisher="mc"``, which is compared with type-2.
        Running averages, ``rescale`` and ``kl_clip`` are left out.
        """
        problem = kfac_verify.Problem(self._model, (batch[0][:max_samples], batch[1][:max_samples]), loss)
        return kfac_verify.check_on_a_copy(
            problem,
            lambda model: type(self)(
                model, **self._options.on_a_copy(self._damping), communicator=Communicator(alone=True)
            ),
            self._options,
            kfac_verify.Limits(layers, max_entries),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns step, progress, damping, and every layer's factors and inverse.

        Every rank must call it: each gives what it holds.
        """
        return {
            "format": _STATE_FORMAT,
            "inverse": self._options.inverse,
            "step": self._step,
            "timetable": self._cycle.timetable.state_dict(),
            "progress": self._progress,
            "damping": self._damping,
            "failures": self._failures,
            "layers": self._curvature.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, bit for bit on the same machine; any number of ranks may have saved it.

        Raises:
            ValueError: another format or kind of inverse, or layers that this model does not have.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(f"state has format {state.get('format')!r}; this is {_STATE_FORMAT!r}")
        if state["inverse"] != self._options.inverse:
            raise ValueError(f"state has inverse={state['inverse']!r}; this is {self._options.inverse!r}")
        self._curvature.load_state_dict(state["layers"])
        self._step, self._failures, self._damping = state["step"], state["failures"], state["damping"]
        self._cycle.timetable.load_state_dict(state["timetable"])
        self._progress = None if state["progress"] is None else tuple(state["progress"])
        self._collector.watch.clear()
        self._cycle.expect(self._step)
        self._record = self._make_record(refreshed=False, fallbacks=())

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
        self._collector.close()
        self._curvature.clear()
        self._closed = True

    def _fall_back(self, name: str, reason: str) -> Fallback:
        instead = "last good inverse" if self._curvature.has_inverse(name) else "plain gradient"
        return fall_back(logger, self._step + 1, name, reason, instead)

    def _make_record(self, refreshed: bool, fallbacks: tuple[Fallback, ...]) -> StepRecord:
        step = self._step
        return StepRecord(
            step,
            refreshed,
            self._damping,
            self._failures,
            jittered=self._curvature.jittered,
            phases=phase_times(step, self._stopwatch.take()),
            communication=traffic(step, self._communicator.take_traffic()),
            memory=tuple(Memory(step, *item) for item in self._curvature.size_bytes.items()),
            fallbacks=fallbacks,
            method=self._options.inverse,
            strength=self._applier.take_strengths(step),
        )
