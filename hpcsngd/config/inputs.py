"""What an experiment trains, and on what: model and data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hpcsngd.config.catalogue import DATASETS, MODEL_TASKS, MODELS, TEXT_MODELS, TORCHVISION_PREFIX
from hpcsngd.config.fields import Strict
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
