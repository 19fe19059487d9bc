"""L-BFGS for one to N ranks: every rank takes the same decision, so none waits for one that another skips.

The objective is the sum (or mean) over the ranks of what their closures return, plus the weight decay of each
parameter group. Gradient and loss are reduced before anything is decided; direction and decisions are rank
0's, so that rounding that differs between machines cannot part the ranks (pytorch/pytorch#30439 is what
happens otherwise). P ranks follow one process on the joined batch.

A pair is made of gradients of one and the same function (Berahas, Nocedal and Takac, NeurIPS 2016): of the
closure itself, or of ``pair_closure``, which may be the samples that two consecutive batches share. A change
of gradient between two different batches is never taken for curvature.

Messages per iteration with d parameters, e evaluations and one pair closure: ``e (d + 1)`` numbers reduced
(1 per evaluation where gradients come reduced), ``d + 2 e`` broadcast; a pair closure reduces ``2 (d + 1)``
more. Memory: ``2 history d`` numbers and five vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hpcsngd.optim import wolfe
from hpcsngd.optim.checks import check_choice
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.flat import FlatGradients
from hpcsngd.optim.secant import SecantPairs

#: Computes the gradients of this rank's part of the objective anew and returns its value.
Closure = Callable[[], "Tensor | float"]
#: How the ranks' closures make the objective.
Reduction = Literal["sum", "mean"]
LineSearch = Literal["strong_wolfe", "none"]


@dataclass(frozen=True)
class Counts:
    """What has happened since the optimizer was built.

    Attributes:
        iterations: of the method; a step does up to ``iterations`` of them.
        evaluations: closures called, pair closures included.
        kept: pairs that were stored, damped ones included.
        damped: pairs that Powell's damping changed.
        skipped: pairs without enough curvature.
        resets: times that all pairs were forgotten: values that were not finite, or no descent.
    """

    iterations: int = 0
    evaluations: int = 0
    kept: int = 0
    damped: int = 0
    skipped: int = 0
    resets: int = 0

    def plus(self, **more: int) -> Counts:
        """Returns the counts with some of them raised."""
        return replace(self, **{name: getattr(self, name) + number for name, number in more.items()})


@dataclass(frozen=True)
class _Place:
    """A point with the objective's value and gradient there."""

    x: Tensor
    value: float
    grad: Tensor

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and bool(self.grad.isfinite().all())


class LBFGS(torch.optim.Optimizer):
    """Limited-memory BFGS with a strong Wolfe line search, over any number of ranks.

    ::

        optimizer = LBFGS(model.parameters(), history=10)

        def closure():
            optimizer.zero_grad()
            loss = summed_loss(model(x), y) / samples_of_all_ranks
            loss.backward()
            return loss

        optimizer.step(closure)

    Parameter groups may differ in ``lr`` and ``weight_decay``. Learning rates relative to the first group's
    scale the initial inverse Hessian (positive definite, so the direction descends whatever they are); the
    first group's is the step that is tried first. Weight decay adds
    ``weight_decay / 2 |w|^2`` to the objective.

    Args:
        params: parameters or groups of them, all on one device.
        lr: first step tried, or the only one without line search; before there is a pair, times
            ``min(1, 1 / |g|_1)``.
        weight_decay: see above.
        history: pairs kept.
        iterations: at most so many per step, all on the step's closure.
        line_search: ``"none"`` steps by lr and undoes a step whose loss is not finite.
        c1: see `hpcsngd.optim.wolfe`.
        c2: see `hpcsngd.optim.wolfe`.
        max_evaluations: closures per line search.
        tolerance: no further iteration once ``max |g|`` is at most this.
        eps: see `SecantPairs`.
        powell: see `SecantPairs`.
        reduction: whether the objective is the sum or the mean of the ranks' closures.
        gradients_reduced: whether the closure's gradients are reduced already, as after a backward pass
            through DistributedDataParallel; its loss never is.
        communicator: counts what is exchanged.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        *,
        weight_decay: float = 0.0,
        history: int = 10,
        iterations: int = 1,
        line_search: LineSearch = "strong_wolfe",
        c1: float = 1e-4,
        c2: float = 0.9,
        max_evaluations: int = 25,
        tolerance: float = 0.0,
        eps: float = 1e-10,
        powell: float = 0.0,
        reduction: Reduction = "sum",
        gradients_reduced: bool = False,
        communicator: Communicator | None = None,
    ) -> None:
        check_choice("line_search", line_search, get_args(LineSearch))
        check_choice("reduction", reduction, get_args(Reduction))
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: must be at least 1")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._rule = wolfe.Rule(c1, c2, max_evaluations)
        self._iterations, self._line_search, self._tolerance = iterations, line_search, tolerance
        self._reduction, self._gradients_reduced = reduction, gradients_reduced
        self._communicator = communicator or Communicator()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._flat = FlatGradients([(str(index), each) for index, each in enumerate(parameters)])
        self._dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self._pairs = SecantPairs(history, eps=eps, powell=powell)
        self._place: _Place | None = None
        self.counts = Counts()
        for group in self.param_groups:
            _check_group(group)

    # torch's own signature has an optional closure; this method cannot do without one.
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure, *, pair_closure: Closure | None = None, same_batch: bool = False
    ) -> float:
        """Does up to ``iterations`` iterations; every rank must call it.

        A value that is not finite at the start leaves the parameters alone and forgets the pairs.

        Args:
            closure: of this step's batch.
            pair_closure: of the samples that curvature comes from; default: the closure.
            same_batch: whether the closure computes the same function as that of the step before, as in
                full-batch training: its last evaluation then serves again.

        Returns:
            The objective before the step, weight decay included.

        Raises:
            ValueError: a group's lr or weight decay left its range.
        """
        for group in self.param_groups:
            _check_group(group)
        self._pairs.metric = self._metric()
        place = self._place if same_batch and self._place is not None else None
        if place is None or not torch.equal(place.x, self._weights()):
            place = self._evaluate(closure, self._weights())
        before = place.value
        for _ in range(self._iterations):
            following = self._iterate(closure, place)
            if following is None:
                break
            self._add_pair(place, following, pair_closure)
            place = following
        self._write(place.x)
        self._place = place
        return before

    @property
    def has_pairs(self) -> bool:
        """Returns whether there is curvature to go by."""
        return len(self._pairs) > 0

    def _iterate(self, closure: Closure, place: _Place) -> _Place | None:
        """Returns where one iteration leads; None if nowhere."""
        if not place.is_finite:
            self._reset()
            return None
        if float(place.grad.abs().max()) <= self._tolerance:
            return None
        following = self._descend(closure, place)
        if following is None and len(self._pairs) > 0:
            self._reset()
            following = self._descend(closure, place)
        if following is not None:
            self.counts = self.counts.plus(iterations=1)
        return following

    def _descend(self, closure: Closure, place: _Place) -> _Place | None:
        """Returns a lower place in the direction of the pairs; None if there is none."""
        direction = self._communicator.tensor_from_first("direction", -self._pairs.multiply(place.grad))
        slope = self._agreed(float(place.grad @ direction))[0]
        if not -math.inf < slope < 0:
            return None
        t = float(self.param_groups[0]["lr"])
        if len(self._pairs) == 0:
            t *= self._agreed(min(1.0, 1 / float(place.grad.abs().sum())))[0]
        if self._line_search == "none":
            following = self._evaluate(closure, place.x + t * direction)
            return following if following.is_finite else None
        return self._search(closure, place, direction, slope, t)

    def _search(
        self, closure: Closure, place: _Place, direction: Tensor, slope: float, first: float
    ) -> _Place | None:
        seen: dict[float, _Place] = {}

        def evaluate(t: float) -> tuple[float, float]:
            found = self._evaluate(closure, place.x + t * direction)
            # The search ends at the last point or the lowest: others need not be kept.
            lowest = min(seen, key=lambda t: seen[t].value, default=None)
            for other in [other for other in seen if other != lowest]:
                del seen[other]
            seen[t] = found
            value, along = self._agreed(found.value, float(found.grad @ direction))
            return value, along

        found = wolfe.search(evaluate, place.value, slope, first, self._rule)
        return seen[found.t] if found.t > 0 else None

    def _add_pair(self, place: _Place, following: _Place, pair_closure: Closure | None) -> None:
        y = following.grad - place.grad
        if pair_closure is not None:
            old, new = (self._evaluate(pair_closure, each.x).grad for each in (place, following))
            y = new - old
        fate = self._pairs.add(following.x - place.x, y)
        if fate == "skipped":
            self.counts = self.counts.plus(skipped=1)
        else:
            self.counts = self.counts.plus(kept=1, damped=int(fate == "damped"))

    def _evaluate(self, closure: Closure, x: Tensor) -> _Place:
        """Returns the objective of all ranks and its gradient at ``x``."""
        self._write(x)
        with torch.enable_grad():
            loss = closure()
        loss = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        self.counts = self.counts.plus(evaluations=1)
        grad = self._flat.read(self._dtype)
        # One message where both are to be reduced: the loss goes with the gradient, in its dtype.
        if self._gradients_reduced:
            value = self._communicator.sum_floats("objective", [loss])[0]
        else:
            joined = self._communicator.sum_tensor("objective", torch.cat([grad, grad.new_tensor([loss])]))
            grad, value = joined[:-1], float(joined[-1])
        if self._reduction == "mean":
            value /= self._communicator.world_size
            if not self._gradients_reduced:
                grad = grad / self._communicator.world_size
        decay = self._per_group("weight_decay")
        if decay is not None:
            value += 0.5 * float(decay @ x.square())
            grad = grad + decay * x
        return _Place(x, self._agreed(value)[0], grad)

    def _agreed(self, *numbers: float) -> list[float]:
        return [self._communicator.from_first("decision", number) for number in numbers]

    def _reset(self) -> None:
        self._pairs.clear()
        self.counts = self.counts.plus(resets=1)

    def _weights(self) -> Tensor:
        return self._flat.read_weights(self._dtype)

    def _write(self, x: Tensor) -> None:
        for span, parameter in zip(self._flat.spans, self._flat.parameters, strict=True):
            parameter.copy_(x[span.start : span.stop].view(span.shape))

    def _metric(self) -> Tensor | None:
        """Returns learning rates relative to the first group's; None if they are equal."""
        rates = self._per_group("lr")
        first = self.param_groups[0]["lr"]
        return None if rates is None or bool((rates == first).all()) else rates / first

    def _per_group(self, name: str) -> Tensor | None:
        """Returns a setting of each parameter, shape ``(d,)``; None if it is zero everywhere."""
        if not any(group[name] for group in self.param_groups):
            return None
        sizes = [sum(each.numel() for each in group["params"]) for group in self.param_groups]
        values = [float(group[name]) for group in self.param_groups]
        settings = torch.tensor(values, dtype=self._dtype, device=self._flat.device)
        return settings.repeat_interleave(torch.tensor(sizes, device=self._flat.device))

    def state_dict(self) -> dict[str, Any]:
        """Returns groups, pairs, counts and the latest evaluation: ``weights_only`` loadable."""
        state = super().state_dict() | {"pairs": self._pairs.state_dict(), "counts": asdict(self.counts)}
        if self._place is not None:
            state["place"] = asdict(self._place)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state of `state_dict`, bit for bit on the same machine.

        Raises:
            ValueError: it is of another optimizer, or of parameters of another number.
        """
        missing = sorted({"pairs", "counts"} - set(state_dict))
        if missing:
            raise ValueError(f"the state has no {' and no '.join(missing)}: it is not of L-BFGS")
        like = torch.zeros(self._flat.size, dtype=self._dtype, device=self._flat.device)
        self._pairs.load_state_dict(state_dict["pairs"], like)
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.counts = Counts(**state_dict["counts"])
        self._place = _loaded(state_dict.get("place"), like)


def _loaded(place: Mapping[str, Any] | None, like: Tensor) -> _Place | None:
    return None if place is None else _Place(place["x"].to(like), place["value"], place["grad"].to(like))


def _check_group(group: Mapping[str, Any]) -> None:
    if not (math.isfinite(group["lr"]) and group["lr"] > 0):
        raise ValueError(f"lr={group['lr']}: must be positive")
    if not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay={group['weight_decay']}: must not be negative")
