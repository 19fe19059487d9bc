"""What the agent and the workers tell each other outside the run directory: two variables and an exit status.

The launcher may not import the training code nor the other way round; both import this.
"""

from __future__ import annotations

DEVICE = "HPCSNGD_DEVICE"
"""Variable: the worker's device, ``cpu``, ``cuda:<index>``, or ``cuda`` for the one numbered LOCAL_RANK."""

BACKEND = "HPCSNGD_BACKEND"
"""Variable with the worker's torch.distributed backend: ``gloo`` or ``nccl``."""

CODE = "HPCSNGD_CODE"
"""Variable, set only for workers in an image: the submitter's code, as ``fingerprint.identity`` names it."""

EXIT_STOPPED = 75
"""Exit status of a worker that checkpointed and left because it was asked to (EX_TEMPFAIL: try later)."""
