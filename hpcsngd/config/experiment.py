"""The experiment schema: what to run. No cluster facts in it.

Optimizers and preconditioners are chosen by ``name``; each has a class here whose fields are the arguments of
its implementation (``tests/train`` compares the two), so a misspelt argument is refused before submission.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from hpcsngd.config.catalogue import DATASETS, MODEL_TASKS, MODELS, TEXT_MODELS, TORCHVISION_PREFIX, Task
from hpcsngd.config.expressions import (
    ScaledCount,
    ScaledCountOrNone,
    ScaledFloat,
    ScaledShare,
    ScaledShareOrNone,
)
from hpcsngd.config.fields import Strict, Walltime
from hpcsngd.errors import did_you_mean


class Model(Strict):
    """The network; the number of classes and input channels, or the vocabulary, comes from the data."""

    name: str
    """A model of ours, or `torchvision/<name>`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the model's constructor."""
    blurpool: bool = False
    """Blur the input of every strided convolution of at least 16 channels, against aliasing."""
    channels_last: bool = False
    """Lay images out with channels last, which some GPUs and CPUs compute faster."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [*MODELS, *TEXT_MODELS]
        if name not in known and not (name.startswith(TORCHVISION_PREFIX) and name != TORCHVISION_PREFIX):
            hint = did_you_mean(name, known) or ";"
            raise ValueError(
                f"unknown model {name!r}{hint} allowed: {', '.join(known)}, {TORCHVISION_PREFIX}<name>"
            )
        return name


class Folds(Strict):
    """Cross-validation: the training set in `count` parts, one of which is evaluated and not trained on."""

    count: int = Field(ge=2)
    """Number of folds."""
    index: int = Field(ge=0)
    """The fold that is held out, from 0."""
    shuffled: bool = True
    """Draw the folds at random; false: in the order of the data set."""
    stratified: bool = True
    """Give every fold the same share of each class, to within one sample."""
    seed: int = Field(default=0, ge=0)
    """Decides the shuffle; apart from the experiment's seed, so that all runs have the same folds."""

    @model_validator(mode="after")
    def _index_fits(self) -> Folds:
        if self.index >= self.count:
            raise ValueError(f"index {self.index}: folds are counted from 0 to {self.count - 1}")
        return self


class Augment(Strict):
    """Random changes of training images; a sample's follow from the seed, the epoch and its index alone."""

    crop: int = Field(default=0, ge=0)
    """Pixels of zeros around the image before a crop of its size is taken; 0: none."""
    flip: bool = False
    """Mirror half of the images, left to right."""
    cutout: int = Field(default=0, ge=0)
    """Side of a square, anywhere, that is set to the mean; 0: none."""
    resized_crop: bool = False
    """Take 8 to 100 % of the area in a ratio of 3:4 to 4:3, resized; imagenet only."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Resize by a factor between 1 - scale and 1 + scale; 0: none."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Turn by at most so many degrees, either way; 0: none."""


class Resolution(Strict):
    """Training images that grow: from `start` to `end` pixels, in steps of 32 between two epochs."""

    start: int = Field(ge=32, multiple_of=32)
    """Height and width in pixels before `first_epoch`."""
    end: int = Field(ge=32, multiple_of=32)
    """Height and width in pixels from `last_epoch` on."""
    first_epoch: int = Field(ge=0)
    """Epoch, from 0, at which they begin to grow."""
    last_epoch: int = Field(ge=0)
    """Epoch, from 0, from which they are at `end`."""

    @model_validator(mode="after")
    def _epochs_rise(self) -> Resolution:
        if self.last_epoch < self.first_epoch:
            raise ValueError("last_epoch must not be before first_epoch")
        return self


class Stage(Strict):
    """A copy on each node's own disk, made once per node behind a lock and verified."""

    to: str
    """Folder on the node; $NAME is expanded there, e.g. $TMPDIR/data."""
    archive: str | None = None
    """Tar file below the data root, unpacked into the folder; null: copy the data set's own folder."""


class Translation(Strict):
    """Sentence pairs: which way, and the vocabularies that are made of the training set."""

    source: Literal["de", "en"] = "de"
    """Language that is read; the other one is written."""
    min_count: int = Field(default=3, ge=1)
    """A word must occur so often to be in the vocabulary."""
    shared: bool = False
    """One vocabulary for both languages."""
    lowercase: bool = True
    """Lower-case all words; BLEU then ignores case."""
    max_words: int = Field(default=100, ge=1)
    """Leave out training pairs with a longer sentence."""
    buckets: int = Field(default=1, ge=1)
    """Cut the training set into so many parts of like length, each gone through by itself: less padding."""


class Stream(Strict):
    """A long text for language models."""

    length: int = Field(default=35, ge=1)
    """Tokens of a training sample, through which gradients go back."""


class Data(Strict):
    """The data set."""

    name: str
    """Which data set."""
    root: str | None = None
    """Folder of the files; default: the site's data_root."""
    download: bool = False
    """Let rank 0 download missing files (needs internet access on the node)."""
    workers: int = Field(default=0, ge=0)
    """Loader processes per rank; 0 loads in the training process."""
    train_limit: int | None = Field(default=None, ge=1)
    """Use only the first so many training samples of a fixed shuffle."""
    test_limit: int | None = Field(default=None, ge=1)
    """Use only the first so many test samples of a fixed shuffle."""
    folds: Folds | None = None
    """Cross-validation: evaluate on a held-out part of the training set; the test set stays unseen."""
    classes: int | None = Field(default=None, ge=2)
    """Use only the samples of the first so many classes."""
    size: int | None = Field(default=None, ge=1)
    """Height and width in pixels that images are brought to; default: 224 for imagenet, 256 for lgg-mri."""
    eval_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels in evaluation, imagenet only; default: `size`."""
    augment: Augment = Augment()
    """Random changes of training images; none by default."""
    resolution: Resolution | None = None
    """Training images that grow, imagenet only; null: of `size`."""
    stage: Stage | None = None
    """A copy on each node's own disk; null: read where the data are."""
    validation_patients: int | None = Field(default=None, ge=1)
    """How many patients are evaluated, lgg-mri only; default: 10."""
    split_seed: int = Field(default=42, ge=0)
    """Decides which patients these are; apart from the experiment's seed, so that all runs have the same."""
    translation: Translation | None = None
    """Sentence pairs, multi30k only; null: the defaults."""
    stream: Stream | None = None
    """A long text, ptb and wikitext only; null: the defaults."""
    tokenizer: str | None = None
    """Folder with an encoder and its tokenizer, as the library transformers saves them: absolute, or below
    the data root (bert-base-uncased); GLUE and SQuAD need one."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens that samples are cut and padded to; default: 128 for GLUE, 384 for SQuAD."""
    doc_stride: int | None = Field(default=None, ge=0)
    """Tokens that neighboring windows of a paragraph share, SQuAD only; default: 128."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            hint = did_you_mean(name, DATASETS) or ";"
            raise ValueError(f"unknown data set {name!r}{hint} allowed: {', '.join(DATASETS)}")
        return name

    @model_validator(mode="after")
    def _fits_the_data_set(self) -> Data:
        facts = DATASETS[self.name]
        is_folder, is_segmentation = self.name == "imagenet", facts.task == "segmentation"
        needs_tokenizer = facts.kind == "text" and facts.task in MODEL_TASKS["encoder"]
        if needs_tokenizer and self.tokenizer is None:
            raise ValueError(
                f"data set {self.name} needs tokenizer: the folder of an encoder, as bert-base-uncased"
            )
        if self.stage is not None and self.tokenizer is not None and not self.tokenizer.startswith("/"):
            raise ValueError("with stage, tokenizer must be an absolute path: only the data set is copied")
        is_memory = facts.kind == "images" and not is_folder
        rules = {
            "size": (self.size is not None, facts.resizes),
            "eval_size": (self.eval_size is not None, is_folder),
            "resolution": (self.resolution is not None, is_folder),
            "augment.resized_crop": (self.augment.resized_crop, is_folder),
            "augment.crop": (self.augment.crop > 0, is_memory),
            "augment.flip": (self.augment.flip, facts.kind == "images"),
            "augment.scale": (self.augment.scale > 0, is_memory),
            "augment.rotate": (self.augment.rotate > 0, is_memory),
            "augment.cutout": (self.augment.cutout > 0, facts.kind == "images" and not is_segmentation),
            "validation_patients": (self.validation_patients is not None, is_segmentation),
            "classes": (self.classes is not None, facts.task == "classification" and facts.kind == "images"),
            "folds": (self.folds is not None, facts.task == "classification"),
            "stage": (self.stage is not None, facts.needs_root),
            "translation": (self.translation is not None, facts.task == "translation"),
            "stream": (self.stream is not None, facts.task == "language_modelling"),
            "tokenizer": (self.tokenizer is not None, needs_tokenizer),
            "max_length": (self.max_length is not None, needs_tokenizer),
            "doc_stride": (self.doc_stride is not None, facts.task == "question_answering"),
        }
        wrong = [key for key, (given, allowed) in rules.items() if given and not allowed]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not for data set {self.name}")
        return self


class _Optimizer(Strict):
    lr: ScaledFloat
    """Peak learning rate; scaled by the world size only where written so."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay as torch's optimizer of that name means it: coupled for sgd and adam, else decoupled."""
    no_decay: list[str] = Field(default_factory=list)
    """What does not decay: modules by class (BatchNorm2d) or regular expression, or parameters (bias$)."""


class SGD(_Optimizer):
    """torch.optim.SGD."""

    name: Literal["sgd"]
    momentum: float = Field(default=0.0, ge=0)
    """Heavy-ball momentum."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    nesterov: bool = False
    """Nesterov's form."""
    decoupled: bool = False
    """Multiply the weights by 1 - lr * weight_decay, past preconditioner and momentum (SGDW)."""


class Adam(_Optimizer):
    """torch.optim.Adam or AdamW."""

    name: Literal["adam", "adamw"]
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class Muon(_Optimizer):
    """torch.optim.Muon for matrices, AdamW for everything else; needs torch >= 2.9."""

    name: Literal["muon"]
    momentum: float = Field(default=0.95, ge=0)
    """Momentum of the matrices."""
    nesterov: bool = True
    """Nesterov's form."""
    adamw_lr: ScaledFloat = 1e-3
    """Peak learning rate of the parameters that are not matrices."""


class LBFGS(_Optimizer):
    """hpcsngd.optim.LBFGS: quasi-Newton steps; the loss is evaluated several times per step."""

    name: Literal["lbfgs"]
    lr: ScaledFloat = 1.0
    """First step that a line search tries, or the only one without; smaller before there is curvature."""
    history: int = Field(default=10, ge=1)
    """Curvature pairs kept."""
    iterations: int = Field(default=1, ge=1)
    """Iterations per step, all on the step's batch."""
    line_search: Literal["strong_wolfe", "none"] = "strong_wolfe"
    """Strong Wolfe conditions on the loss of all ranks, or steps of `lr`."""
    c1: float = Field(default=1e-4, gt=0, lt=1)
    """Share of the promised decrease that a line search wants; below `c2`."""
    c2: float = Field(default=0.9, gt=0, lt=1)
    """Largest share of the slope that it leaves."""
    max_evaluations: int = Field(default=25, ge=1)
    """Evaluations per line search."""
    tolerance: float = Field(default=0.0, ge=0)
    """No further iteration in a step once no entry of the gradient is larger."""
    eps: float = Field(default=1e-10, ge=0)
    """A pair of step s and change of gradient y is skipped unless y's > eps |s| |y|."""
    powell: float = Field(default=0.0, ge=0, lt=1)
    """Powell's damping of pairs; 0: none."""
    batches: Literal["step", "overlap", "file"] = "step"
    """Where curvature comes from: the step's batch, its overlap with the next one, or a file at each step."""
    overlap: float | None = Field(default=None, gt=0, le=1)
    """Share of a step's own samples that the next step has too; default with batches overlap: 0.25."""

    @model_validator(mode="after")
    def _fits_together(self) -> LBFGS:
        if self.c1 >= self.c2:
            raise ValueError("c1 must be below c2")
        if self.overlap is not None and self.batches != "overlap":
            raise ValueError(f"overlap belongs to batches overlap, not {self.batches}")
        return self


Optimizer = Annotated[SGD | Adam | Muon | LBFGS, Field(discriminator="name")]


class DampingDecay(Strict):
    """Damping that decays by epochs: hpcsngd.optim.DampingDecay."""

    initial: float = Field(gt=0)
    """Damping at the start."""
    target: float = Field(gt=0)
    """Damping that is approached."""
    epochs: float = Field(gt=0)
    """Sets the pace: the gap shrinks each epoch by 2 log10(initial / target) / epochs of itself."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs at `initial` before the decay begins."""

    @model_validator(mode="after")
    def _falls(self) -> DampingDecay:
        if self.target > self.initial:
            raise ValueError("damping decays: target must not be above initial")
        least = 2 * math.log10(self.initial / self.target)
        if self.epochs <= least:
            raise ValueError(f"this decay needs more than {least:.3g} epochs")
        return self


class DampingSteps(Strict):
    """Damping that is multiplied by a factor at some epochs: hpcsngd.optim.DampingSteps."""

    initial: float = Field(gt=0)
    """Damping at the start."""
    factor: float = Field(gt=0)
    """What it is multiplied by at each milestone."""
    milestones: list[float] = Field(min_length=1)
    """Epochs after which it is multiplied."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> DampingSteps:
        if self.milestones != sorted(self.milestones):
            raise ValueError("milestones must rise")
        return self


def _kind_of_damping(value: object) -> str:
    if isinstance(value, DampingSteps) or (isinstance(value, dict) and "milestones" in value):
        return "steps"
    return "decay" if isinstance(value, dict | DampingDecay) else "number"


Damping = Annotated[
    Annotated[ScaledFloat, Tag("number")]
    | Annotated[DampingDecay, Tag("decay")]
    | Annotated[DampingSteps, Tag("steps")],
    Discriminator(_kind_of_damping),
]


class Switch(Strict):
    """When the hybrid method uses KID: hpcsngd.optim.SwitchRule."""

    eta: float = Field(default=0.5, gt=0)
    """Relative change of the gradient norm between checks that counts as critical."""
    interval: int = Field(default=1, ge=1)
    """Epochs between checks."""
    lr_drop: float = Field(default=0.5, ge=0, lt=1)
    """A learning rate at most this share of the one an epoch earlier counts as critical."""
    windows: list[tuple[float, float]] | None = None
    """Epochs (first, end) that are critical instead; null: decide while training."""

    @model_validator(mode="after")
    def _windows_rise(self) -> Switch:
        if any(not 0 <= first < end for first, end in self.windows or ()):
            raise ValueError("each window is [first epoch, end], rising")
        return self


class HyLo(Strict):
    """hpcsngd.optim.HyLo."""

    name: Literal["hylo"]
    method: Literal["sngd", "kid", "kis", "hybrid"] = "sngd"
    """Exact; interpolative decomposition; importance sampling; or the last two by turns."""
    damping: Damping = 0.1
    """Added to the eigenvalues of the Fisher matrix: a number, or one by epochs."""
    refresh_every: ScaledCount = 10
    """Steps between recomputations of the curvature."""
    stagger: bool = False
    """Refresh some layers at each step, each once in refresh_every steps, so that no step is slow."""
    placement: Literal["auto", "replicate", "owner"] = "auto"
    """Who solves for a layer: every rank, one that sends its result at each step, or what is fewer bytes."""
    ratio: ScaledShare = 1.0
    """Share of the samples kept by kid and kis."""
    low_rank: int | None = Field(default=None, ge=1)
    """Instead: how many samples they keep, whatever the number of ranks."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Instead: keep as many as are needed for this share of the spectrum."""
    unbiased: bool = False
    """Weigh the samples drawn by kis so that the curvature is right in expectation."""
    residual: bool = False
    """Let kid carry the residual of its interpolation."""
    kid_scope: Literal["joined", "local"] = "joined"
    """Whether kid decides on the joined batch, or each rank on its own samples (fewer bytes)."""
    switch: Switch | None = None
    """When the hybrid method uses kid; null: the defaults."""
    complement: Literal["damped", "plain", "residual"] = "damped"
    """How far to go where no kept sample has a gradient: g / damping, g, or g / (damping + residual)."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on the step in the metric of the curvature; null: none."""
    rescale: Literal["none", "damping", "norm"] = "none"
    """Multiply by the damping, or graft the plain gradient's norm, so that one learning rate serves all."""
    conv_mode: Literal["reduce", "exact", "paper"] = "reduce"
    """What stands for a sample's gradient where it has several positions."""
    skip: list[str] = Field(default_factory=list)
    """Regular expressions of module names that are left to the optimizer alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> HyLo:
        rules = {"ratio": self.ratio != 1, "low_rank": self.low_rank, "share": self.share}
        given = [name for name, value in rules.items() if value]
        if len(given) > 1 or (given and self.method == "sngd"):
            raise ValueError(f"{' and '.join(given)}: kid, kis and hybrid take one of them, sngd none")
        if self.switch is not None and self.method != "hybrid":
            raise ValueError(f"switch belongs to method hybrid, not {self.method}")
        return self


Precision = Literal["float64", "float32", "bfloat16", "float16"]


class KFAC(Strict):
    """hpcsngd.optim.KFAC."""

    name: Literal["kfac"]
    inverse: Literal["eigen", "cholesky"] = "eigen"
    """Exact damping by eigenvectors, or factored damping by Cholesky."""
    pi_split: bool = True
    """Split cholesky's damping between the factors by their mean eigenvalues."""
    sharing: Literal["expand", "reduce"] = "expand"
    """Whether positions (pixels, tokens) count one by one, or summed up for each sample."""
    fisher: Literal["empirical", "mc", "type-2"] = "empirical"
    """Gradients of the true targets, of drawn ones, or the generalized Gauss-Newton matrix."""
    mc_samples: int = Field(default=1, ge=1)
    """Draws per sample for mc; each costs a backward pass at an update of the factors."""
    damping: Damping = 0.03
    """Added to the eigenvalues of the Kronecker product: a number, or one by epochs."""
    factor_every: ScaledCountOrNone = 10
    """Steps between updates of the factors; 0: none."""
    inverse_every: ScaledCountOrNone = 10
    """Steps between recomputations of the inverses; 0 switches K-FAC off."""
    factor_decay: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the old factors in the running average."""
    bias_correction: bool = True
    """Correct the running average for its start."""
    kl_clip: float | None = Field(default=None, gt=0)
    """Bound on the step in the metric of the curvature; null: none."""
    rescale: Literal["none", "damping", "norm"] = "none"
    """Multiply by the damping, or graft the plain gradient's norm, so that one learning rate serves all."""
    largest_factor: int | None = Field(default=None, ge=1)
    """Leave layers with a factor of more rows to the optimizer alone; null: none."""
    factor_dtype: Precision | None = None
    """Type of the running factors; null: as computed, float32."""
    inverse_dtype: Precision | None = None
    """Type of the inverses; null: as computed, float32."""
    factors: Literal["all", "local"] = "all"
    """Factors of all ranks' samples, or of one rank's for each layer, which takes no communication."""
    grad_worker_fraction: float = Field(default=1.0, ge=0, le=1)
    """Share of the ranks that precondition a layer: 1 all, 0 one of them, or what divides them evenly."""
    placement_cost: Literal["compute", "memory"] = "compute"
    """What is evened out over the ranks."""
    colocate: bool = True
    """Let one rank hold both factors of a layer."""
    stagger: bool = False
    """Update some layers at each step instead of all of them every `inverse_every` steps."""
    overlap: bool = True
    """Sum factors over the ranks while the backward pass runs."""
    skip: list[str] = Field(default_factory=list)
    """Regular expressions of module names that are left to the optimizer alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> KFAC:
        if self.mc_samples != 1 and self.fisher != "mc":
            raise ValueError(f"mc_samples belongs to fisher mc, not {self.fisher}")
        if not self.pi_split and self.inverse != "cholesky":
            raise ValueError(f"pi_split belongs to inverse cholesky, not {self.inverse}")
        if self.factors == "local" and not self.colocate:
            raise ValueError("factors: local needs colocate: true")
        if self.stagger and (not self.factor_every or self.inverse_every % self.factor_every):
            raise ValueError("with stagger, factor_every must divide inverse_every")
        return self


class _Windowed(Strict):
    """What M-FAC and GGT share: sparse storage, and what is done with the result."""

    density: float = Field(default=0.01, gt=0, le=1)
    """Share of the entries that sparse storage keeps."""
    entries: Literal["fp32+int32", "fp32+int16", "bf16+int16"] = "fp32+int32"
    """Values and positions of sparse storage: 8, 6 or 4 bytes per entry."""
    scope: Literal["block", "layer", "global"] = "block"
    """Where entries compete for being kept."""
    block_size: int = Field(default=32_768, ge=1)
    """Entries of a block; at most 32,768 with 16-bit positions."""
    feedback: bool = True
    """Add what was not kept to the next gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Coupled weight decay, preconditioned with the gradient; optimizer.weight_decay comes on top."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the preconditioned gradient; null: none."""
    clip_value: float | None = Field(default=None, gt=0)
    """Largest entry of the preconditioned gradient; null: none."""
    skip: list[str] = Field(default_factory=list)
    """Modules, by regular expression or class, that train with their plain gradient."""


class MFAC(_Windowed):
    """hpcsngd.optim.MFAC."""

    name: Literal["mfac"]
    num_grads: int = Field(default=1024, ge=1)
    """Gradients in the window."""
    damping: float = Field(default=1e-4, gt=0)
    """Added to the eigenvalues of the mean outer product of batch gradients."""
    storage: Literal["dense", "sparse", "lowrank"] = "dense"
    """Gradients in full, their largest entries, or factors; the rest is fed back."""
    scale_rule: Literal["window", "count"] = "window"
    """Divide the sum of outer products by the window's length, or by the gradients in it."""
    low_rank: int = Field(default=1, ge=1)
    """Rank of lowrank storage."""
    target: Literal["sent", "gradient"] = "sent"
    """Precondition what was kept, or the whole gradient."""
    early: Literal["none", "gradient", "error", "dense"] = "none"
    """What fills the zeros of the result while a sparse window fills."""
    feedback_scale: float = Field(default=1.0, gt=0)
    """Factor of a gradient as it enters the error."""


class GGT(_Windowed):
    """hpcsngd.optim.GGT."""

    name: Literal["ggt"]
    num_grads: int = Field(default=100, ge=1)
    """Gradients in the window."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean that is preconditioned; 0: the newest gradient."""
    beta2: float = Field(default=0.999, gt=0, le=1)
    """Decay of a gradient's weight in the window; at least beta1."""
    eps: float = Field(default=1e-4, gt=0)
    """Added to the singular values of the window."""
    storage: Literal["dense", "sparse"] = "dense"
    """Gradients in full, or their largest entries; the rest is fed back."""

    @model_validator(mode="after")
    def _weights_fit(self) -> GGT:
        if self.beta2 < self.beta1:
            raise ValueError(f"beta2 {self.beta2} must be at least beta1 {self.beta1}")
        return self


Preconditioner = Annotated[HyLo | KFAC | MFAC | GGT, Field(discriminator="name")]


class DelayCompensation(Strict):
    """What a stale gradient is changed by (DC-ASGD): g + lambda g g (w - w_then)."""

    strength: float = Field(ge=0)
    """Lambda, or lambda_0 if adaptive; 0 changes nothing."""
    adaptation: Literal["constant", "adaptive"] = "constant"
    """Adaptive: lambda_0 over the root of the gradients' mean square, entry by entry."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of that mean square."""
    eps: float = Field(default=1e-7, gt=0)
    """Added to it."""


class Delay(Strict):
    """What workers wait before each push, to study slow ones."""

    intensity: Literal["small", "medium", "long"] | None = None
    """Mean of 30, 60 or 90 ms."""
    mean_ms: float | None = Field(default=None, ge=0)
    """Instead: the mean in milliseconds."""
    std_ms: float = Field(default=5.0, ge=0)
    """Standard deviation of gaussian delays; what would be negative is 0."""
    kind: Literal["constant", "gaussian"] = "gaussian"
    """Whether every delay is the mean, or drawn."""
    all_workers: bool = True
    """Delay all workers; false: the slow one only."""
    slow_worker: int | None = Field(default=None, ge=1)
    """A worker, from 1, that waits twice as long, with twice the deviation; null: none."""

    @model_validator(mode="after")
    def _somebody_waits(self) -> Delay:
        if (self.intensity is None) == (self.mean_ms is None):
            raise ValueError("a delay takes one of intensity and mean_ms")
        if not self.all_workers and self.slow_worker is None:
            raise ValueError("all_workers: false needs a slow_worker; without a delay leave it out")
        return self


class ParameterServer(Strict):
    """Rank 0 is the server, all others are workers; see hpcsngd/train/parameter_server."""

    mode: Literal["async", "sync"] = "async"
    """Async: every push is an update. Sync: an update is the mean of one push of each worker."""
    partition: Literal["dealt", "shared", "split", "labels", "labels_unscaled"] = "dealt"
    """Which samples a worker trains on: what comes next in an order that all share, all samples in an order
    of its own, or a part of its own: at random, or by labels (cut to equal size, or not)."""
    shares: Literal["free", "equal"] = "free"
    """Async: whether whoever is ready computes the next update, or each worker's share of the whole run is
    set before (by the size of its part), so that slow workers are not left behind."""
    compensation: DelayCompensation | None = None
    """Compensation of delays, async only; null: none."""
    delay: Delay | None = None
    """Delays that workers add; null: none."""
    replay: str | None = None
    """Run directory, or its staleness.csv, whose order of pulls and pushes is repeated, async only."""
    lost_after_s: float = Field(default=60.0, gt=0)
    """Seconds without a word of a worker's process after which it counts as lost."""

    @model_validator(mode="after")
    def _fits_the_mode(self) -> ParameterServer:
        given = {
            "compensation": self.compensation is not None,
            "replay": self.replay is not None,
            "shares: equal": self.shares == "equal",
        }
        wrong = [name for name, is_given in given.items() if is_given]
        if self.mode == "sync" and wrong:
            raise ValueError(f"{', '.join(wrong)}: not in mode sync, where all workers wait for each other")
        if self.replay is not None and self.shares == "equal":
            raise ValueError("replay repeats who computed what, so shares: equal says nothing")
        return self


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
