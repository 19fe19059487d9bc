"""Where a rank computes and how ranks talk, as the launcher says it in the environment."""

from __future__ import annotations

import os

import torch

from hpcsngd import dist, handover
from hpcsngd.train.faults import RendezvousError, SettingError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: str = "cpu") -> torch.device:
    """Returns this rank's device.

    Args:
        asked: ``cpu`` or ``cuda``, where the environment does not say.

    Raises:
        SettingError: a GPU was asked for and torch sees none, or too few.
    """
    name = os.environ.get(handover.DEVICE, asked)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SettingError(f"{name} was asked for, but torch {torch.__version__} sees {count} GPUs here")
    return device


def join_ranks(device: torch.device) -> None:
    """Joins the process group that the environment describes, if any.

    Raises:
        RendezvousError: the ranks could not meet.
    """
    try:
        dist.init(os.environ.get(handover.BACKEND), device=device)
    except RuntimeError as error:  # torch's DistError and its children are RuntimeErrors
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(f"cannot meet the other ranks at {address}: {error}") from error


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Returns the gradient scaler of a precision; one that does nothing unless it is fp16.

    Raises:
        SettingError: fp16 without a GPU.
    """
    if precision == "fp16" and device.type != "cuda":
        raise SettingError(f"precision fp16 needs a GPU; this rank computes on {device}; use bf16 or fp32")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns the context in which forward passes compute."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def use_deterministic_operations() -> None:
    """Makes torch refuse operations that may give different bits in another run."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def wait_for(device: torch.device) -> None:
    """Returns once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
