"""Precedence, origins, inheritance, and errors that say where, what and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsngd.config.experiment import HyLo
from hpcsngd.config.resolve import (
    Resolved,
    from_record,
    load_experiment,
    load_site,
    parse_set,
    resolve,
    resolve_parts,
    walk,
)
from hpcsngd.errors import ConfigError
from hpcsngd.resources import named_files

SITE = """\
description: test site
scheduler: {kind: local}
nodes: 2
walltime: 1h
env: {VERSION: 1.10, FLAG: true, THREADS: 4}
data_root: ${DATA:-/data}
"""
EXPERIMENT = """\
description: test
model: {name: digits-cnn}
data: {name: digits}
batch_size: 8
epochs: 2
optimizer: {name: sgd, lr: 1e-1, momentum: 0.9}
preconditioner: {name: hylo, damping: 0.5}
resources: {nodes: 1}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SITE)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    return tmp_path


def get(*sets: str, environment: dict[str, str] | None = None) -> Resolved:
    return resolve("s.yaml", "e.yaml", [parse_set(text) for text in sets], environment=environment or {})


@pytest.mark.usefixtures("files")
class TestPrecedence:
    def test_experiment_resources_win_over_the_site(self) -> None:
        assert get().nodes == 1
        assert get("resources.nodes=null").nodes == 2

    def test_environment_below_set(self) -> None:
        env = {"HPCSNGD_SET_optimizer__lr": "0.5", "HPCSNGD_DATA_ROOT": "/elsewhere"}
        found = get(environment=env)
        assert (found.experiment.optimizer.lr, found.site.data_root) == (0.5, "/elsewhere")
        assert found.origins["experiment.optimizer.lr"] == "$HPCSNGD_SET_optimizer__lr"
        assert get("optimizer.lr=2", environment=env).experiment.optimizer.lr == 2

    def test_every_leaf_has_an_origin(self) -> None:
        found = get("epochs=5")
        leaves = {
            f"{part}.{path}" for part in ("site", "experiment") for path, _ in walk(found.to_record()[part])
        }
        assert set(found.origins) == leaves
        assert found.origins["experiment.epochs"] == "--set epochs"
        assert found.origins["site.nodes"] == "s.yaml:3"
        assert found.origins["experiment.optimizer.lr"] == "e.yaml:6"
        assert found.origins["experiment.clip_norm"] == "default"

    def test_short_keys_mean_resources(self) -> None:
        found = get("nodes=4", "walltime=12:00:00", "ranks_per_node=3")
        assert (found.nodes, found.walltime_min, found.ranks_per_node) == (4, 720, 3)

    def test_ranks_follow_gpus_unless_asked(self) -> None:
        assert get("site.gpus_per_node=4").ranks_per_node == 4
        assert get("site.gpus_per_node=4", "gpus_per_node=2").ranks_per_node == 2
        assert get("site.gpus_per_node=4", "ranks_per_node=1").ranks_per_node == 1
        assert get("site.ranks_per_node=3").ranks_per_node == 3
        assert get("site.gpus_per_node=4", "gpus_per_node=0").ranks_per_node == 1

    def test_text_fields_keep_what_was_written(self) -> None:
        assert get().site.env == {"VERSION": "1.10", "FLAG": "true", "THREADS": "4"}

    def test_variables_expand_and_can_be_left_alone(self) -> None:
        assert get(environment={"DATA": "/d"}).site.data_root == "/d"
        parts = resolve_parts("s.yaml", None).models
        assert parts["site"].model_dump()["data_root"] == "${DATA:-/data}"

    def test_a_new_name_drops_the_old_arguments(self) -> None:
        found = get("optimizer.lr=0.001", "optimizer.name=adamw")
        assert found.experiment.optimizer.model_dump() == {
            "name": "adamw", "lr": 0.001, "weight_decay": 0.0, "no_decay": [], "betas": (0.9, 0.999),
            "eps": 1e-8,
        }  # fmt: skip

    def test_damping_is_a_number_or_a_decay(self) -> None:
        decay = {"initial": 1.5, "target": 0.1, "epochs": 90.0, "warmup_epochs": 5.0}
        text = "{initial: 1.5, target: 0.1, epochs: 90, warmup_epochs: 5}"
        found = get(f"preconditioner.damping={text}").experiment.preconditioner
        assert found is not None
        assert found.model_dump()["damping"] == decay
        assert HyLo.model_validate(found.model_dump()) == found

    def test_null_removes_the_preconditioner_and_a_name_brings_one(self) -> None:
        assert get("preconditioner=null").experiment.preconditioner is None
        found = get("preconditioner=null", "preconditioner.name=hylo", "preconditioner.damping=2")
        assert found.experiment.preconditioner is not None
        assert found.experiment.preconditioner.damping == 2

    def test_record_reads_back(self) -> None:
        assert from_record(get("epochs=3").to_record()) == get("epochs=3")
        with pytest.raises(ConfigError, match="does not fit this version"):
            from_record({"site_name": "x"})


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizr.lr=1", "--set optimizr.lr: unknown key 'optimizr'; did you mean 'optimizer'"),
        ("optimizer.momentun=1", "optimizer.momentun: unknown key; did you mean 'momentum'.* Allowed: "),
        ("optimizer.name=adm", "optimizer.name: unknown name 'adm'; did you mean 'adam'"),
        ("epochs=abc", "--set epochs: epochs: input should be a valid integer.*'abc'"),
        ("epochs=2.5", "epochs: input should be a valid integer"),
        ("preconditioner.dampng=1", "preconditioner.dampng: unknown key; did you mean 'damping'"),
        ("preconditioner.damping=-1", "preconditioner.damping: input should be greater than 0; found -1"),
        ("preconditioner.damping.initial=1", "preconditioner.damping.target: this key is required"),
        (
            "preconditioner.damping={initial: 1, target: 0.1, epoch: 9}",
            "preconditioner.damping.epoch: unknown key; did you mean 'epochs'",
        ),
        (
            "preconditioner.damping={initial: 0.1, target: 1, epochs: 9}",
            "preconditioner.damping: damping decays: target must not be above initial",
        ),
        ("preconditioner.damping={initial: 1, target: 0.1, epochs: 2}", "needs more than 2 epochs"),
        (
            "preconditioner.ratio=0.5",
            "preconditioner: ratio: kid, kis and hybrid take one of them, sngd none",
        ),
        ("preconditioner.switch.eta=0.1", "preconditioner: switch belongs to method hybrid, not sngd"),
        ("preconditioner={name: hylo, method: hybrid, switch: {windows: [[3, 1]]}}", "rising"),
        ("scheduler.kind=slrm", "scheduler.kind: input should be 'slurm', 'local'"),
        ("model.name=digit-cnn", "unknown model 'digit-cnn'; did you mean 'digits-cnn'"),
        ("data.name=digit", "unknown data set 'digit'; did you mean 'digits'"),
        ("data.name=zzzz", "unknown data set 'zzzz'; allowed: digits"),
        ("walltime=2:00", "'2:00' is not a wall time; allowed: 02:30:00"),
        ("walltime=true", "expected a wall time"),
        ("nodes=0", "resources.nodes: input should be greater than or equal to 1"),
        ("master_port=80", "ports 80 are outside"),
        ("schedule.kind=milestones", "belong together"),
        ("description=x", "'description' is in both: write site.description or experiment.description"),
        ("site=x", "give a key inside site"),
        ("nonsense", "expected KEY=VALUE"),
        ("epochs=[1", "--set epochs:1: not valid YAML"),
        ("site.ranks_per_node=9", None),
        ("diagnostics.profiling=no", None),
    ],
)
def test_messages(override: str, message: str | None) -> None:
    if message is None:
        assert get(override).experiment.diagnostics.profiling is False
        return
    with pytest.raises(ConfigError, match=message):
        get(override)


def test_all_errors_at_once(files: Path) -> None:
    (files / "e.yaml").write_text(EXPERIMENT.replace("epochs: 2", "epochs: two\nepohcs: 3"))
    (files / "s.yaml").write_text(SITE.replace("nodes: 2", "nodes: many"))
    with pytest.raises(ConfigError) as caught:
        get()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("s.yaml:3: nodes: ")
    assert any(line.startswith("e.yaml:6: epohcs: unknown key; did you mean 'epochs'") for line in lines)


def test_too_many_ranks_for_the_gpus(files: Path) -> None:
    with pytest.raises(ConfigError, match="ranks_per_node 5 exceeds gpus_per_node 4"):
        get("site.gpus_per_node=4", "site.ranks_per_node=5")


def test_extends_merges_and_child_wins(files: Path) -> None:
    (files / "child.yaml").write_text("extends: e\ndescription: child\noptimizer: {lr: 0.5}\n")
    found = resolve("s.yaml", "child.yaml", environment={})
    assert (found.experiment.optimizer.lr, found.experiment.epochs) == (0.5, 2)
    assert found.origins["experiment.optimizer.lr"] == "child.yaml:3"
    assert found.origins["experiment.epochs"] == "e.yaml:5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: child\n", "child.yaml:1: extends: 'child' leads back to itself"),
        ("extends: nowhere\n", "child.yaml:1: extends: unknown experiment 'nowhere'"),
        ("extends: [a]\n", "child.yaml:1: extends: expected the name of one experiment"),
    ],
)
def test_extends_refusals(files: Path, text: str, message: str) -> None:
    (files / "child.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve("s.yaml", "child.yaml", environment={})


def test_extends_in_a_circle(files: Path) -> None:
    (files / "a.yaml").write_text("extends: b\n")
    (files / "b.yaml").write_text("extends: a\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        resolve("s.yaml", "a.yaml", environment={})


def test_unknown_names_offer_the_closest() -> None:
    with pytest.raises(ConfigError, match="unknown site 'mits'; did you mean 'mist'"):
        resolve("mits", "digits-hylo")
    with pytest.raises(ConfigError, match="unknown experiment 'digit-hylo'; did you mean 'digits-hylo'"):
        resolve("local", "digit-hylo")
    with pytest.raises(ConfigError, match="no site file at"):
        resolve("./nothing.yaml", "digits-hylo")


def test_own_folders_come_first(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "local.yaml").write_text(SITE)
    monkeypatch.setenv("HPCSNGD_SITES", str(files))
    assert load_site("local").description == "test site"


def test_unset_variable_names_place_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIST_ACCOUNT", raising=False)
    with pytest.raises(ConfigError, match=r"mist.yaml:\d+: scheduler.account: .*MIST_ACCOUNT is not set"):
        resolve("mist", "digits-hylo", environment={"SCRATCH": "/s"})


@pytest.mark.parametrize("name", list(named_files("site_configs")))
def test_shipped_sites_say_where_their_facts_come_from(name: str) -> None:
    site = load_site(name)
    assert site.description
    assert site.contact
    assert site.checked_on
    assert site.docs or site.scheduler.kind == "local"


@pytest.mark.parametrize("name", list(named_files("jobs")))
def test_shipped_experiments_are_valid(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.description
    assert experiment.reference


def test_mist_is_the_cluster_of_the_hylo_experiments() -> None:
    mist = load_site("mist")
    assert (mist.arch, mist.gpus_per_node, mist.scheduler.kind) == ("ppc64le", 4, "slurm")
