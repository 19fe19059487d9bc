"""Weights & Biases runs from a run's numbers, offline unless somebody is logged in. Needs the package wandb.

Its history can only grow. Beside it a small file remembers up to which step it goes, with a digest of what
was logged. Numbers of later steps are added; if what was logged has changed since, because a later attempt
did its steps again, the history begins anew: offline in place of the earlier folder, and as another run where
the server has seen the earlier one. Offline folders are not opened a second time, so there everything is
logged again whenever there is more.
"""

from __future__ import annotations

import hashlib
import json
import netrc
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import pandas as pd

from hpcsngd.errors import ConfigError
from hpcsngd_analysis.records import Run
from hpcsngd_analysis.trackers.history import newest, steps_of

Mode = Literal["offline", "online"]

STATE = "hpcsngd-export.json"
"""What was exported: id, mode, last step, digest."""

_HOST = "https://api.wandb.ai"


def default_mode() -> Mode:
    """Returns ``online`` where a login of wandb is found or ``$WANDB_MODE`` says so, else ``offline``."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked:
        return "online" if asked == "online" else "offline"
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class WeightsAndBiases:
    """One run at Weights & Biases.

    Args:
        folder: for wandb's own files and ours.
        project: at Weights & Biases.
        mode: offline keeps everything in the folder; ``wandb sync`` sends it later.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, folder: Path, *, project: str, mode: Mode) -> None:
        # their daemon would report its own crashes over the network
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"wandb is missing: pip install 'hpcsngd[wandb]' ({error})") from error
        self.folder, self._project, self._mode = folder, project, mode
        self._wandb: Any = wandb
        self._open: Any = None
        state = self._read_state()
        self._last_step, self._digest = int(state.get("last_step", 0)), str(state.get("digest", ""))
        self._generation = int(state.get("generation", 1))

    def sync(self, run: Run, numbers: pd.DataFrame) -> int:
        """Makes the history agree with the numbers so far; see `hpcsngd_analysis.trackers.event_files`."""
        is_grown = digest(numbers[numbers["step"] <= self._last_step]) == self._digest
        is_same = is_grown and newest(numbers) <= self._last_step
        if is_same or not len(numbers):
            return 0
        if not is_grown or (self._mode == "offline" and self._open is None):
            self._begin_anew(is_changed=bool(self._digest) and not is_grown)
        new = numbers[numbers["step"] > self._last_step]
        opened = self._opened(run)
        for step, time, values in steps_of(new):
            opened.log({**values, "_timestamp": time}, step=step)
        self._last_step, self._digest = newest(numbers), digest(numbers)
        self._write_state()
        return len(new)

    def close(self) -> None:
        """Ends the run at Weights & Biases."""
        if self._open is not None:
            self._open.finish()
            self._open = None

    def _begin_anew(self, *, is_changed: bool) -> None:
        self.close()
        if self._mode == "online":
            self._generation += is_changed
        else:
            for folder in self._offline_folders():
                # what was sent under this name already cannot be taken back
                self._generation += any(folder.glob("*.synced"))
                shutil.rmtree(folder)
        self._last_step, self._digest = 0, ""

    def _opened(self, run: Run) -> Any:
        if self._open is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            settings = self._wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
            )
            self._open = self._wandb.init(
                dir=str(self.folder),
                mode=self._mode,
                project=self._project,
                id=self._id(run),
                name=run.name,
                group=run.experiment,
                resume="allow" if self._mode == "online" else None,
                config={**run.config.get("experiment", {}), "site": run.site, "experiment": run.experiment},
                reinit="create_new",
                settings=settings,
            )
        return self._open

    def _id(self, run: Run) -> str:
        generation = "" if self._generation == 1 else f"-{self._generation}"
        return re.sub(r"[^A-Za-z0-9._-]", "-", run.name)[-100:] + generation

    def _read_state(self) -> dict[str, Any]:
        file = self.folder / STATE
        if not file.exists():
            return {}
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_there = self._mode == "online" or any(True for _ in self._offline_folders())
        return state if is_there and state.get("mode") == self._mode else {}

    def _offline_folders(self) -> list[Path]:
        return sorted((self.folder / "wandb").glob("offline-run-*"))

    def _write_state(self) -> None:
        state = {
            "mode": self._mode,
            "generation": self._generation,
            "last_step": self._last_step,
            "digest": self._digest,
        }
        (self.folder / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")


def digest(numbers: pd.DataFrame) -> str:
    """Returns what changes with any step, tag or value; empty without rows."""
    if not len(numbers):
        return ""
    found = hashlib.sha256(numbers["step"].to_numpy("int64").tobytes())
    found.update("\n".join(numbers["tag"]).encode())
    found.update(numbers["value"].to_numpy("float64").tobytes())
    return found.hexdigest()
