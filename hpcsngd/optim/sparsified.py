"""Any torch optimizer on the largest entries alone, with error feedback: of its gradients or its updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from hpcsngd.optim.checks import check_choice
from hpcsngd.optim.flat import FlatGradients
from hpcsngd.optim.topk import MAX_BLOCK, BlockTopK, ErrorFeedback, Scope

#: What is made sparse.
Selection = Literal["gradient", "update"]


class TopKFeedback(torch.optim.Optimizer):
    """Wraps an optimizer so that only the largest entries take effect in a step and the rest waits its turn.

    ::

        optimizer = TopKFeedback(torch.optim.Adam(model.parameters(), lr=1e-3), density=0.01)

    ``on="gradient"``: the optimizer sees ``c_t``, the largest entries of error plus gradient; what SGD,
    Adam or AdaGrad remember is made of these. ``on="update"``: the optimizer sees the whole gradient, and of
    its update, with learning rate and weight decay in it, the largest entries of error plus update are
    applied. Parameters without a gradient in a step keep their error for later.

    Learning-rate schedulers work on the wrapper: both share their parameter groups. Sources: see
    `hpcsngd.optim.topk`.

    Args:
        optimizer: any torch optimizer whose ``step`` needs no closure; from now on the wrapper steps it.
        density: share of the entries that take effect, in (0, 1].
        on: what is made sparse.
        scope: where entries compete, see `BlockTopK`.
        block_size: of scope ``"block"``.
        feedback: False drops what is not chosen.

    Raises:
        ValueError: an unknown choice, or what `BlockTopK` and `FlatGradients` refuse.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        density: float = 0.01,
        *,
        on: Selection = "gradient",
        scope: Scope = "block",
        block_size: int = MAX_BLOCK,
        feedback: bool = True,
    ) -> None:
        check_choice("on", on, get_args(Selection))
        check_choice("scope", scope, get_args(Scope))
        self._parameters: list[nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._flat = FlatGradients([(str(index), item) for index, item in enumerate(self._parameters)])
        sizes = [span.stop - span.start for span in self._flat.spans]
        rule = BlockTopK(self._flat.size, density, scope=scope, layers=sizes, block_size=block_size)
        dtype = torch.promote_types(self._parameters[0].dtype, torch.float32)
        self._sender = ErrorFeedback(
            rule, value_dtype=dtype, dtype=dtype, device=self._flat.device, is_on=feedback
        )
        self.optimizer = optimizer
        self._on = on
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()

    def _share(self) -> None:
        """Makes groups and state one with the wrapped optimizer's."""
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state

    @property
    def error(self) -> Tensor:
        """Returns what has not taken effect yet, shape ``(d,)``, in the order of the parameter groups."""
        return self._sender.error

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Does one step.

        Args:
            closure: computes gradients anew and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._on == "gradient":
            self._flat.write(self._chosen(self._flat.read(self.error.dtype)))
            self.optimizer.step()
        else:
            self._step_on_update()
        return loss

    def _step_on_update(self) -> None:
        before = [parameter.detach().clone() for parameter in self._parameters]
        self.optimizer.step()
        pairs = list(zip(self._parameters, before, strict=True))
        update = torch.cat([(now - then).reshape(-1).to(self.error) for now, then in pairs])
        chosen = self._chosen(update)
        for span, (parameter, then) in zip(self._flat.spans, pairs, strict=True):
            parameter.copy_(then + chosen[span.start : span.stop].view(span.shape))

    def _chosen(self, vector: Tensor) -> Tensor:
        values, positions = self._sender.send(vector)
        return torch.zeros_like(vector).index_copy_(0, positions, values)

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state and the error under ``error``."""
        return {**self.optimizer.state_dict(), "error": self.error.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a state of `state_dict`.

        Raises:
            ValueError: it has no error, or one of another length.
        """
        error = state_dict.get("error")
        if error is None or error.shape != self.error.shape:
            found = None if error is None else tuple(error.shape)
            raise ValueError(f"the state has an error of shape {found}; needed: {tuple(self.error.shape)}")
        self.optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.error.copy_(error)
        self._share()
