"""The experiment schema: what to run. No cluster facts in it.

Optimizers and preconditioners are chosen by ``name``; each has a class whose fields are the arguments of
its implementation (``tests/train`` compares the two), so a misspelt argument is refused before submission.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpcsngd.config.catalogue import DATASETS, MODEL_TASKS, TEXT_MODELS, Task
from hpcsngd.config.expressions import ScaledCount, ScaledShareOrNone
from hpcsngd.config.fields import Strict, Walltime
from hpcsngd.config.inputs import Augment, Data, Folds, Model, Resolution, Stage, Stream, Translation
from hpcsngd.config.optimizers import LBFGS, SGD, Adam, Muon, Optimizer
from hpcsngd.config.parameter_server import Delay, DelayCompensation, ParameterServer
from hpcsngd.config.preconditioners import (
    GGT,
    KFAC,
    MFAC,
    Damping,
    DampingDecay,
    DampingSteps,
    HyLo,
    Precision,
    Preconditioner,
    Switch,
)

__all__ = [
    "GGT",
    "KFAC",
    "LBFGS",
    "MFAC",
    "SGD",
    "Adam",
    "Augment",
    "Axis",
    "Checkpoint",
    "Damping",
    "DampingDecay",
    "DampingSteps",
    "Data",
    "Decoding",
    "Delay",
    "DelayCompensation",
    "Diagnostics",
    "Experiment",
    "Folds",
    "HyLo",
    "Loss",
    "Model",
    "Muon",
    "Optimizer",
    "ParameterServer",
    "Precision",
    "Preconditioner",
    "Published",
    "Resolution",
    "Resources",
    "Restart",
    "Schedule",
    "Stage",
    "Stream",
    "Switch",
    "Translation",
]


class Schedule(Strict):
    """Learning rate against epochs, as a multiple of optimizer.lr."""

    kind: Literal["constant", "milestones", "cosine", "linear", "inverse_sqrt", "plateau"] = "constant"
    """Shape after the warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs of linear rise from `warmup_start` to 1."""
    warmup_steps: int = Field(default=4000, ge=1)
    """Step at which inverse_sqrt reaches 1: it rises linearly from 0 and falls as 1 / sqrt(step)."""
    warmup_start: ScaledShareOrNone = 0.1
    """Multiple at the very beginning of the warm-up."""
    milestones: list[float] = Field(default_factory=list)
    """Epochs after which the rate is multiplied by `gamma`."""
    gamma: float = Field(default=0.1, gt=0)
    """Factor per milestone; of plateau, per evaluation whose loss is no lower than the lowest before."""
    final: float = Field(default=0.0, ge=0)
    """Multiple at the end of cosine and linear."""
    by: Literal["step", "epoch"] = "step"
    """How often the rate changes: at every step, or as in many published scripts when an epoch begins."""

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if bool(self.milestones) != (self.kind == "milestones"):
            raise ValueError("kind: milestones and a list of milestones belong together")
        if self.milestones != sorted(self.milestones):
            raise ValueError("milestones must rise")
        if self.kind == "inverse_sqrt" and (self.warmup_epochs or self.by == "epoch"):
            raise ValueError(
                "inverse_sqrt goes by steps: it takes warmup_steps, no warmup_epochs and by: step"
            )
        return self


class Loss(Strict):
    """The training loss."""

    name: Literal["cross_entropy", "dice", "mse"] = "cross_entropy"
    """Cross-entropy, the mean over the samples of the whole global batch; or one minus the Dice coefficient
    of a micro-batch's pixels, the mean over micro-batches by their size; or the squared error of a number."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all classes, in training; cross_entropy only."""
    average: Literal["samples", "tokens", "none"] = "samples"
    """Of text: what the sum over the tokens of a step is divided by: its samples (sentences), its tokens, or
    the ranks alone, so that each rank's gradient is the plain sum over its tokens."""
    smooth: float = Field(default=1.0, ge=0)
    """Added to both sides of Dice's fraction; dice only."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> Loss:
        if self.label_smoothing and self.name != "cross_entropy":
            raise ValueError(f"label_smoothing belongs to cross_entropy, not {self.name}")
        return self


class Decoding(Strict):
    """How translations are written for BLEU: beam search."""

    beam: int = Field(default=5, ge=1)
    """Hypotheses that are kept at each word; 1: the best word each time."""
    length_penalty: float = Field(default=0.7, ge=0)
    """Hypotheses compare by log-probability over length to this power."""
    max_words: int = Field(default=100, ge=1)
    """Longest translation."""
    every_epochs: int = Field(default=1, ge=1)
    """Epochs between evaluations that translate; the last one always does."""


class Checkpoint(Strict):
    """When to write checkpoints; one is also written at the end and on a stop request."""

    every_epochs: int | None = Field(default=1, ge=1)
    """Epochs between checkpoints; null: none by epoch."""
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, besides those by epoch."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept."""


class Diagnostics(Strict):
    """What a run writes besides train.csv and eval.csv."""

    log_every: int = Field(default=10, ge=1)
    """Steps between rows of train.csv."""
    profiling: bool = False
    """Seconds by phase, bytes sent, memory by kind."""
    rank_analysis: bool = False
    """Effective matrix rank of the kernels at each refresh."""
    rank_shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.9], min_length=1)
    """Shares of the sum of singular values whose rank `rank_analysis` tells."""
    grad_norm: bool = False
    """Gradient norm of each covered layer, every step."""
    grad_error: bool = False
    """Approximate against exact preconditioned gradient, at each refresh."""
    strength: bool = False
    """How much K-FAC's curvature changes each layer's gradient, at each refresh."""
    quantify_every: int = Field(default=0, ge=0)
    """Steps between measurements of how much is preconditioned (scaling and rotation); 0: never."""
    tensorboard: bool = False
    """TensorBoard event files too (needs the extra `tensorboard`)."""


class Resources(Strict):
    """What the experiment needs; whatever is absent comes from the site."""

    nodes: int | None = Field(default=None, ge=1)
    """Nodes."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs to use on each node."""
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Workers on each node; default: one per GPU, or the site's."""
    walltime: Walltime | None = None
    """Wall time of one attempt; beyond the site's limit a chain of jobs (restart.on: [timeout])."""


class Restart(Strict):
    """When a run that was stopped is put back in the queue by itself; Slurm only, local runs never are."""

    on: list[Literal["timeout", "preempted", "node_failure", "hang", "killed"]] = Field(
        default=["preempted", "node_failure"]
    )
    """Which ends start another attempt, from the newest checkpoint; an empty list: none. killed: a worker was
    ended by a signal that nobody of us sent."""
    max_attempts: int = Field(default=10, ge=1)
    """How many attempts in a row there may be, the first one included."""
    hang_timeout_s: float | None = Field(default=None, gt=0)
    """Seconds without progress that count as a hang; default: the site's."""


class Published(Strict):
    """A result that somebody has published."""

    what: str
    """What was measured, against what."""
    value: str
    """The result as it was printed, with its unit."""
    source: str
    """Where it is printed."""
    reproduce: str
    """The experiments to run, and where the report shows the number."""


Axis = Annotated[list[Any], Field(min_length=1)]


class Experiment(Strict):
    """An experiment: one YAML file in jobs/."""

    description: str
    """What is trained and why."""
    paper: str = ""
    """Short name of the paper, or whose settings these are."""
    reference: str = ""
    """Table, section or script that the settings come from."""
    corrections: list[str] = Field(default_factory=list)
    """Where this file departs from the published code or text, and why."""
    published: list[Published] = Field(default_factory=list)
    """Headline results that this experiment should be held against."""
    task: Task = "classification"
    """What is learned: a class or a number for each sample, a mask, a translation, the next word of a text,
    or the answer to a question."""
    strategy: Literal["ddp", "full_batch", "parameter_server"] = "ddp"
    """How ranks work together: all alike on a batch per step, or on the whole training set; or one server and
    workers."""
    parameter_server: ParameterServer | None = None
    """Of strategy parameter_server only; null: its defaults."""
    model: Model
    """The network."""
    data: Data
    """The data set."""
    batch_size: ScaledCount
    """Samples per rank and micro-batch."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Samples per rank in evaluation; default: batch_size."""
    accumulate: ScaledCount = 1
    """Micro-batches per optimizer step."""
    epochs: int = Field(ge=1)
    """Passes over the training set."""
    train_limit_s: float | None = Field(default=None, gt=0)
    """Seconds of training (train_s) after which a run ends with an evaluation, for comparisons at equal time;
    null: all epochs, which are equal samples for every strategy."""
    optimizer: Optimizer
    """The base optimizer."""
    preconditioner: Preconditioner | None = None
    """What changes the gradient before the optimizer; null: nothing."""
    schedule: Schedule = Schedule()
    """Learning rate against epochs."""
    loss: Loss = Loss()
    """The training loss."""
    decoding: Decoding = Decoding()
    """How translations are written for BLEU; task translation only."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of forward and backward; fp16 scales the loss and needs a GPU."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient, applied before the preconditioner."""
    checkpoint: Checkpoint = Checkpoint()
    """When to write checkpoints."""
    diagnostics: Diagnostics = Diagnostics()
    """What else is written."""
    resources: Resources = Resources()
    """What the experiment needs."""
    restart: Restart = Restart()
    """When the run is put back in the queue by itself."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, order of samples, dropout and sampling."""
    deterministic: bool = True
    """Refuse operations that do not give the same bits twice, where torch can tell."""
    matrix: dict[str, Axis] = Field(default_factory=dict)
    """Key path -> list of values: one run for each combination. `include`: a list of mappings, one more
    axis whose keys change together."""

    @model_validator(mode="after")
    def _steps_fit(self) -> Experiment:
        if self.strategy == "full_batch" and self.accumulate != 1:
            raise ValueError("strategy full_batch takes as many micro-batches as there are: no accumulate")
        if isinstance(self.optimizer, LBFGS):
            _check_lbfgs(self, self.optimizer)
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> Experiment:
        facts = DATASETS[self.data.name]
        if facts.task != self.task:
            raise ValueError(f"data set {self.data.name} is not for task {self.task}")
        is_text_model = self.model.name in TEXT_MODELS
        if self.task not in MODEL_TASKS.get(self.model.name, ("classification",)) or is_text_model != (
            facts.kind == "text"
        ):
            raise ValueError(f"model {self.model.name} is not for task {self.task} on {facts.kind}")
        expected = {"segmentation": "dice", "regression": "mse"}.get(self.task, "cross_entropy")
        if self.loss.name != expected:
            raise ValueError(f"loss {self.loss.name} is not for task {self.task}")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> Experiment:
        is_text = DATASETS[self.data.name].kind == "text"
        if self.loss.average != "samples" and not is_text:
            raise ValueError(f"loss.average: {self.loss.average} is for text")
        if self.loss.average != "samples" and self.model.name == "encoder":
            raise ValueError(f"loss.average: {self.loss.average} is for targets that are words")
        if self.loss.label_smoothing and self.task == "question_answering":
            raise ValueError("loss.label_smoothing is not for task question_answering")
        if is_text and (self.strategy == "full_batch" or isinstance(self.optimizer, LBFGS)):
            raise ValueError("strategy full_batch and optimizer lbfgs: not for data of text")
        if getattr(self.preconditioner, "fisher", "empirical") == "empirical":
            return self
        if self.task in ("segmentation", "question_answering"):
            raise ValueError(f"fisher: empirical is the only one for task {self.task}")
        if self.task == "translation" and self.loss.average == "tokens":
            raise ValueError("fisher: mc and type-2 of sentences need loss.average samples or none")
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> Experiment:
        if self.strategy != "parameter_server":
            if self.parameter_server is not None:
                raise ValueError(f"parameter_server: not for strategy {self.strategy}")
            return self
        given = {
            "preconditioner (the server has no samples, only gradients)": self.preconditioner is not None,
            "precision: fp16 (a scaled loss needs all ranks in step)": self.precision == "fp16",
            "data.workers (workers load their samples themselves)": self.data.workers > 0,
            "diagnostics.profiling": self.diagnostics.profiling,
            "data of text": DATASETS[self.data.name].kind == "text",
        }
        if wrong := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"{'; '.join(wrong)}: not for strategy parameter_server")
        settings = self.parameter_server or ParameterServer()
        if self.task != "classification" and "labels" in settings.partition:
            raise ValueError(f"partition by labels: not for task {self.task}")
        return self


def _check_lbfgs(experiment: Experiment, optimizer: LBFGS) -> None:
    """Refuses what a quasi-Newton method cannot be combined with.

    Raises:
        ValueError: all of it.
    """
    by_file = optimizer.batches == "file"
    rules = {
        "preconditioner: it has curvature of its own": experiment.preconditioner is not None,
        "clip_norm: a clipped gradient is not that of the loss": experiment.clip_norm is not None,
        f"precision {experiment.precision}: it needs fp32": experiment.precision != "fp32",
        f"loss.average {experiment.loss.average}: it evaluates means over samples": experiment.loss.average
        != "samples",
        "schedule.warmup_start 0: a first step of 0 leads nowhere": experiment.schedule.warmup_epochs > 0
        and not experiment.schedule.warmup_start,
        "strategy parameter_server: all ranks must take the same step": experiment.strategy
        == "parameter_server",
        f"batches {optimizer.batches} with strategy full_batch": experiment.strategy == "full_batch"
        and optimizer.batches != "step",
        f"batches file: data set {experiment.data.name} does not come in several files": by_file
        and not DATASETS[experiment.data.name].has_parts,
        "batches file with accumulate: a file has as many micro-batches as it takes": by_file
        and experiment.accumulate != 1,
    }
    wrong = [text for text, applies in rules.items() if applies]
    if wrong:
        raise ValueError(f"optimizer lbfgs cannot be combined with {'; nor with '.join(wrong)}")
