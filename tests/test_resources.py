"""Shipped files are found in a checkout; a user's own come first. (The wheel is tested in test_packaging.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.errors import ConfigError, did_you_mean
from hpcsngd.resources import find_named, named_files, resource_dir


def test_checkout_folders() -> None:
    assert resource_dir("jobs").name == "jobs"
    assert {"local", "slurm", "mist", "perlmutter", "frontier"} <= set(named_files("site_configs"))
    assert {"digits-hylo", "digits-sgd", "fashion-mnist-sgd", "fashion-mnist-hylo"} <= set(
        named_files("jobs")
    )


def test_own_folders_are_searched_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "local.yaml").write_text("")
    monkeypatch.setenv("HPCSNGD_SITES", f"{tmp_path}:/nowhere")
    assert named_files("site_configs")["mine"] == tmp_path / "mine.yaml"
    assert find_named("site_configs", "local") == tmp_path / "local.yaml"


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown site 'perlmuter'; did you mean 'perlmutter'\? Known: frontier"
    ):
        find_named("site_configs", "perlmuter")
    with pytest.raises(ConfigError, match=r"unknown site 'zzz'\. Known: frontier"):
        find_named("site_configs", "zzz")


def test_did_you_mean() -> None:
    assert did_you_mean("LR", ["lr", "epochs"]) == "; did you mean 'lr'?"
    assert did_you_mean("zzz", ["lr", "epochs"]) == ""
