"""K-FAC: natural gradient with a Kronecker product for each layer's Fisher block, for 1..N ranks.

Sources: Martens and Grosse, ICML 2015; Grosse and Martens, ICML 2016 (convolutions); Eschenhagen et al.,
NeurIPS 2023 (weight sharing). What a factor is of stands in `hpcsngd.optim.kfac_layers`; whose gradients in
`fisher`; the running average in `kfac_factors`; damping and the two inverses in `kfac_inverse`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist
from hpcsngd.optim import fisher as fishers
from hpcsngd.optim import kfac_verify
from hpcsngd.optim.base import Preconditioner, Schedule
from hpcsngd.optim.checks import check_progress
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip, tell_skipped
from hpcsngd.optim.gradients import KlClip, Rescale
from hpcsngd.optim.kaisa import Cost, Grid, inversion_cost, place
from hpcsngd.optim.kfac_apply import Applier
from hpcsngd.optim.kfac_collect import Collector
from hpcsngd.optim.kfac_covering import find_covered
from hpcsngd.optim.kfac_curvature import Curvature
from hpcsngd.optim.kfac_exchange import Scope
from hpcsngd.optim.kfac_inverse import InverseKind
from hpcsngd.optim.kfac_layers import Sharing
from hpcsngd.optim.kfac_options import DtypeName, Options, as_dtype
from hpcsngd.optim.kfac_timetable import Timetable
from hpcsngd.optim.records import (
    Communication,
    Fallback,
    LayerCheck,
    Memory,
    PhaseTime,
    StepRecord,
)
from hpcsngd.optim.samplescale import LossReduction
from hpcsngd.optim.schedules import EpochDamping
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Observable = Literal["strength"]

_STATE_FORMAT = "kfac/2"

#: Multiplications of a matrix product that take as long as a decomposition, in side^3.
DECOMPOSITION = {"eigen": 20, "cholesky": 2}


class KFAC(Preconditioner):
    """Preconditions each covered layer's gradient by the damped inverse of its Kronecker factors.

    Units. Factors are averages over all samples of all ranks and micro-batches, of gradients of each sample's
    *own* loss. So damping means the same for any batch size, number of ranks, accumulation, loss reduction
    and gradient scaler. How output gradients get that scale: `hpcsngd.optim.samplescale`.

    The Fisher matrix. ``fisher="empirical"`` takes the gradients of the loss's own backward pass and needs
    nothing from the user. ``"type-2"`` and ``"mc"`` send gradients of their own through the graph, between
    the forward and the backward pass of every micro-batch::

        outputs = model(inputs)
        preconditioner.before_backward(outputs)
        criterion(outputs, targets).backward()
        preconditioner.step()

    They need to know the loss (``loss``), and are in its units whatever the scale of the backward pass.

    Failure. A layer whose statistic is not finite leaves its running factors as they were; one whose factors
    cannot be decomposed keeps its last good inverse, and without one its plain gradient. All ranks agree; the
    event is logged with layer and step, and counted in `diagnostics`. A layer that no sample used keeps
    everything and is not a failure.

    Phases (``profile``): ``capture`` computes factors, inside the hooks, ``reduce`` communicates them;
    ``invert`` computes inverses, ``broadcast`` communicates them; ``precondition``.

    Args:
        model: the model, or its DistributedDataParallel wrapper (names are those inside it).
        inverse: ``"eigen"`` or ``"cholesky"``; see `hpcsngd.optim.kfac_inverse`.
        pi_split: whether Cholesky's damping is split between A and G by their mean eigenvalues; True
            for eigen, which splits nothing.
        sharing: ``"expand"`` or ``"reduce"``; see `hpcsngd.optim.kfac_layers`.
        fisher: see above and `hpcsngd.optim.fisher`.
        loss: read where ``fisher`` is not empirical.
        mc_samples: draws per sample; only for ``fisher="mc"``.
        damping: positive; a function of the step; or one by epochs (`DampingDecay`, `DampingSteps`, or a
            mapping of the fields of either). Evaluated when inverses are computed, used until the next time.
        factor_every: steps between updates of the running factors, or a function of the step; 0: none.
        inverse_every: the same for inverses. Without inverses gradients stay plain, so 0 from the start
            switches K-FAC off.
        factor_decay: weight of the old factors in the running average, in [0, 1); or a function of the step.
        bias_correction: whether the running average is corrected for its start.
        kl_clip: bound on ``lr^2 sum v . g`` over the covered layers: all v are multiplied by
            ``min(1, sqrt(kl_clip / that))`` (Ba et al., ICLR 2017, section 5). After ``rescale``. A number or
            a function of the step; None: no bound. Needs `set_progress`, as a damping by epochs does.
        skip: layers to leave to the optimizer: regular expressions found anywhere in a module's name, names
            of module classes, or module classes; what is inside a skipped module is skipped as well.
        largest_factor: layers with a factor of more rows are left to the optimizer; None: none.
        loss_reduction: of the loss given to ``backward()``.
        accumulation_steps: micro-batches per step.
        rescale: ``"none"``; ``"damping"``: damping * v; ``"norm"``: v with the plain gradient's norm.
        dtype: in which statistics are computed; default: float32, or float64 for float64 weights.
        factor_dtype: of the running factors, as a dtype or its name; default: ``dtype``.
        inverse_dtype: in which inverses are kept and applied; default: float32, or float64 for float64
            weights. They are computed in at least float32 whatever it is.
        seed: of the draws of ``fisher="mc"``.
        factors: ``"all"``: of the samples of all ranks. ``"local"``: of one rank's samples, that which holds
            the layer's factors: an estimate from 1/P of the batch that takes no communication and spreads
            even the work of capturing over the ranks (DP-KFAC, Zhang et al., IEEE TCC 2022).
        grad_worker_fraction: share of the ranks that precondition a layer: 1 (all of them), 0 (one of them),
            or what divides their number evenly (`hpcsngd.optim.kaisa` states memory and bytes). Results do
            not depend on it beyond rounding. Below 1, layers must have their gradients on all ranks alike,
            as DistributedDataParallel leaves them.
        placement_cost: what is evened out over the ranks: ``"compute"`` or ``"memory"``.
        colocate: whether the same rank holds A and G of a layer; otherwise they are placed one by one.
        stagger: whether to update some layers at each step instead of all of them every ``inverse_every``
            steps (a whole multiple of ``factor_every``), so that no step but the first is slow
            (`hpcsngd.optim.kfac_timetable`).
        overlap: whether factors are summed over the ranks while the backward pass runs, in steps that
            `begin_step` announces. Results are the same bit for bit.
        communicator: does the exchange with other ranks; default: with all of them.
        profile: whether to time the phases (waits for the GPU at each).
        observe: ``"strength"`` for `hpcsngd.optim.records.LayerStrength`.

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
        unknown = sorted(set(observe) - set(get_args(Observable)))
        if unknown:
            raise ValueError(f"observe={unknown}: KFAC knows {', '.join(get_args(Observable))}")
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_covered(self._model, skip, sharing, largest_factor)
        self._stopwatch, self._communicator = Stopwatch(profile), communicator or Communicator()
        grid = Grid.of_fraction(self._communicator.world_size, grad_worker_fraction)
        self._roles = place(self._costs(), grid, colocate=colocate)
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
        names = [layer.name for layer in self._layers]
        self._timetable = Timetable(names, factor_every, inverse_every, stagger=stagger)
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
        self._expect()
        self._record = StepRecord(0, False, self._damping, 0, method=inverse)
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

    def begin_step(self, sample_scale: float | None = None, micro_batches: int = 1) -> None:
        """See `Preconditioner.begin_step`; without ``overlap``, or on one rank, there is nothing to tell.

        Raises:
            ValueError: a number out of its range.
        """
        self._collector.begin_step(sample_scale, micro_batches)

    def before_backward(self, outputs: Tensor) -> None:
        """Sends the gradients of ``fisher`` through the graph; does nothing for the empirical one.

        Args:
            outputs: of the model, with their graph, samples first; see `hpcsngd.optim.fisher` for shapes.
        """
        self._collector.push(outputs)

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """Overwrites ``.grad`` of the covered parameters by the preconditioned gradient.

        Args:
            sample_scale: captured output gradients times this are gradients of each sample's own loss;
                default: by ``loss_reduction``. Not used where ``fisher`` is not empirical.
            grad_scale: the factor of a gradient scaler (``GradScaler.get_scale()`` before its update) that
                captured output gradients still carry; ``.grad`` must already be unscaled.

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
            faults = self._update_factors(sample_scale, grad_scale)
            refreshed, failed = self._invert()
            with self._stopwatch.phase("precondition"):
                self._applier.apply(self._progress[1] if self._progress else None, self._step)
        fallbacks = tuple(self._fall_back(*item) for item in {**faults, **failed}.items())
        self._failures += len(fallbacks)
        self._step += 1
        self._expect()
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
        """Compares this method with its own formula made dense, see `Preconditioner.verify`.

        The truth is what `hpcsngd.optim.kfac_inverse` documents, from factors made one sample at a time
        through autograd: the error is rounding, except for ``fisher="mc"``, which is compared with type-2.
        Running averages, ``rescale`` and ``kl_clip`` are left out.
        """
        problem = kfac_verify.Problem(self._model, (batch[0][:max_samples], batch[1][:max_samples]), loss)
        checks = kfac_verify.check_on_a_copy(
            problem,
            lambda model: type(self)(
                model, **self._options.on_a_copy(self._damping), communicator=Communicator(alone=True)
            ),
            self._options,
            kfac_verify.Limits(layers, max_entries),
        )
        if dist.rank() == 0:
            logger.info("compared with the dense formula:\n%s", "\n".join(map(str, checks)))
        return checks

    def state_dict(self) -> dict[str, Any]:
        """Returns step, progress, damping, and every layer's factors and inverse.

        Every rank must call it: each gives what it holds.
        """
        return {
            "format": _STATE_FORMAT,
            "inverse": self._options.inverse,
            "step": self._step,
            "timetable": self._timetable.state_dict(),
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
        self._timetable.load_state_dict(state["timetable"])
        self._progress = None if state["progress"] is None else tuple(state["progress"])
        self._collector.watch.clear()
        self._expect()
        self._record = self._make_record(refreshed=False, fallbacks=())

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
        self._collector.close()
        self._curvature.clear()
        self._closed = True

    def _costs(self) -> dict[str, list[int]]:
        """Returns what each factor of each layer costs the rank that holds it."""
        is_memory = self._options.placement_cost == "memory"
        cost = self._options.inverter().kept_numbers if is_memory else inversion_cost
        return {layer.name: [cost(shape) for shape in layer.factor_shapes()] for layer in self._layers}

    def _expect(self) -> None:
        """Tells the hooks what the coming step needs."""
        self._collector.expect(self._timetable.factors_due(self._step), self._step)

    def _update_factors(self, sample_scale: float | None, grad_scale: float) -> dict[str, str]:
        """Adds what was captured to the running factors; returns whose could not be used, and why."""
        due = frozenset(self._timetable.factors_due(self._step))
        if not due:
            return {}
        reduced = self._collector.collect(due, sample_scale, grad_scale)
        with self._stopwatch.phase("capture"):
            self._curvature.update(reduced.names, reduced.means, self._options.decay_at(self._step))
        if reduced.names:
            self._timetable.factors_done(self._step)
            if self._timetable.wants_costs:
                self._timetable.set_costs(self._update_costs(reduced.inputs))
        return reduced.faults

    def _update_costs(self, inputs: Mapping[str, int]) -> dict[str, int]:
        """Returns about how many multiplications an update of each layer's factors and inverse takes."""
        decompose = DECOMPOSITION[self._options.inverse]
        return {
            layer.name: sum(
                prod(shape) * (inputs.get(layer.name, 0) + decompose * shape[-1] if len(shape) == 3 else 1)
                for shape in layer.factor_shapes()
            )
            for layer in self._layers
        }

    def _invert(self) -> tuple[bool, dict[str, str]]:
        """Computes the inverses that are due; returns whether, and where that failed and why."""
        known = self._curvature.known
        due = [name for name in self._timetable.inverses_due(self._step) if name in known]
        if not due:
            return False, {}
        damping = self._options.damping_at(self._progress[0] if self._progress else None, self._step)
        with self._stopwatch.phase("invert"):
            failed = self._curvature.refresh(due, damping)
        self._damping = damping
        self._timetable.inverses_done(self._step)
        return True, failed

    def _fall_back(self, name: str, reason: str) -> Fallback:
        if dist.rank() == 0:
            instead = "last good inverse" if self._curvature.has_inverse(name) else "plain gradient"
            logger.warning("step %d, layer %s: %s; using its %s", self._step + 1, name, reason, instead)
        return Fallback(self._step + 1, name, reason)

    def _make_record(self, refreshed: bool, fallbacks: tuple[Fallback, ...]) -> StepRecord:
        step = self._step
        traffic = self._communicator.take_traffic()
        return StepRecord(
            step,
            refreshed,
            self._damping,
            self._failures,
            jittered=self._curvature.jittered,
            phases=tuple(PhaseTime(step, *item) for item in self._stopwatch.take().items()),
            communication=tuple(Communication(step, *what, *amount) for what, amount in traffic.items()),
            memory=tuple(Memory(step, *item) for item in self._curvature.size_bytes.items()),
            fallbacks=fallbacks,
            method=self._options.inverse,
            strength=self._applier.take_strengths(step),
        )
