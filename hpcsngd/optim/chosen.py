"""Which parameters a method that sees one vector preconditions, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd.optim import covering

#: A model, or parameters alone; names matter for ``skip`` only.
Parameters: TypeAlias = "nn.Module | Iterable[nn.Parameter]"


def choose_parameters(
    parameters: Parameters, skip: Sequence[covering.Skip]
) -> tuple[list[tuple[str, nn.Parameter]], dict[str, str]]:
    """Returns the parameters to precondition by name, and why the others keep their plain gradient.

    Every trainable parameter is in one of the two: nothing is dropped, and what is skipped goes on training
    with its plain gradient.

    Args:
        parameters: a model (the wrapper of DistributedDataParallel is looked through), or parameters.
        skip: modules to leave out, as for HyLo; needs a model.

    Raises:
        ValueError: ``skip`` without a model, or an entry that matches no module.
    """
    if not isinstance(parameters, nn.Module):
        if skip:
            raise ValueError("skip needs the model; it was given parameters alone")
        chosen = [parameter for parameter in parameters if parameter.requires_grad]
        return [(str(index), parameter) for index, parameter in enumerate(chosen)], {}
    model = parameters.module if isinstance(parameters, DistributedDataParallel) else parameters
    matching = covering.matching_modules(model, skip)
    named, skipped = [], {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if not parameter.requires_grad:
            skipped[name] = "frozen"
        elif module in matching:
            skipped[name] = f"matches skip={[matching[module]]}"
        else:
            named.append((name, parameter))
    return named, skipped
