"""Names that both the schema (which may not import torch) and the training code must agree on.

``tests/train`` asserts that every name here has its implementation and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TORCHVISION_PREFIX = "torchvision/"

# name -> what `hpcsngd experiments` and the error for an unknown name say
MODELS: dict[str, str] = {
    "digits-cnn": "two 3x3 convolutions and two linear layers for 8x8 digits",
    "3c1f": "three 3x3 convolutions of 128 channels, max-pool, linear 500, linear classes (28x28 input)",
    "lenet5": "LeNet-5 with ReLU and max-pooling (28x28 input)",
    "lenet5-tanh": "LeNet-5 with tanh and average pooling (32x32 or 64x64 input)",
    "cnn1": "two 3x3 convolutions of 32 and 64 channels, linear 128, dropout (28x28 input)",
    "cnn2": "two 3x3 convolutions of 32 and 64 channels, each with a pool, linear 512, dropout (32x32 input)",
    "linear": "one linear layer: logistic regression on pixels or stored features",
    "resnet20": "residual network for 32x32 images, shortcuts without parameters",
    "resnet32": "the same with 32 layers",
    "resnet44": "the same with 44 layers",
    "resnet56": "the same with 56 layers",
    "resnet110": "the same with 110 layers",
    "resnet18-cifar": "ResNet-18 with a 3x3 stem for 32x32 images",
    "wrn28-10": "wide residual network for 32x32 images: 28 layers, ten times as wide",
    "wrn28-20": "the same, twenty times as wide",
    "wrn22-2": "22 layers, twice as wide",
    "wrn22-4": "22 layers, four times as wide",
    "wrn40-2": "40 layers, twice as wide",
    "wrn40-4": "40 layers, four times as wide",
    "vgg16": "VGG-16 with batch norm and one linear layer for 32x32 images",
    "vgg19": "VGG-19, the same way",
    "densenet": "DenseNet with bottlenecks for 32x32 images; by default HyLo's, depth 19 and growth 100",
    "mobilenetv2": "MobileNetV2 for 32x32 images; with dense: true, HyLo's variant",
    "unet": "U-Net with batch norm, 32 features, for segmentation",
}

# the same for networks of text, which are built for a vocabulary
TEXT_MODELS: dict[str, str] = {
    "transformer": "encoder-decoder Transformer for translation; by default the base size of its paper",
    "lstm-lm": "LSTM language model",
    "gru-lm": "GRU language model",
    "transformer-lm": "causal Transformer encoder as language model",
    "encoder": "BERT, DistilBERT, RoBERTa, ... of the library transformers, from the folder data.tokenizer",
}

# what models are for; the others are for classification alone
MODEL_TASKS: dict[str, tuple[str, ...]] = {
    "unet": ("segmentation",),
    "transformer": ("translation",),
    "lstm-lm": ("language_modelling",),
    "gru-lm": ("language_modelling",),
    "transformer-lm": ("language_modelling",),
    "encoder": ("classification", "regression", "question_answering"),
}

# text model -> the sizes that --smoke gives it
SMALL_ARGS: dict[str, dict[str, Any]] = {
    "transformer": {"width": 16, "inner": 32, "heads": 2, "layers": 1},
    "lstm-lm": {"width": 8, "hidden": 8},
    "gru-lm": {"width": 8, "hidden": 8},
    "transformer-lm": {"width": 16, "inner": 16, "heads": 2, "layers": 1},
    # its sizes are those of the folder it comes from
    "encoder": {},
}

# name of the folder with the encoder that --smoke takes
SMALL_ENCODER = "tiny-bert"

Task = Literal[
    "classification",
    "segmentation",
    "translation",
    "language_modelling",
    "regression",
    "question_answering",
]


@dataclass(frozen=True)
class DatasetFacts:
    """What the login side must know of a data set.

    Attributes:
        description: one line.
        needs_root: whether files must exist below the data root.
        probes: files or folders below the data root; any of them present means that the data are there.
        folders: where the data may lie below the data root, as ``stage`` copies them; the first that exists.
        files: what must be in the folder, files or folders; ``a|b`` where either name will do.
        system_paths: absolute places where a package manager puts the data.
        get: how a person gets the data.
        task: what can be learned from it.
        kind: what its samples are.
        evaluated: which part is evaluated: a ``test`` set, or a ``validation`` set.
        resizes: whether ``data.size`` may be chosen.
        has_parts: whether the training set comes in several files, of which one is in memory at a time.
    """

    description: str
    needs_root: bool = False
    probes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    system_paths: tuple[str, ...] = ()
    get: str = ""
    task: Task = "classification"
    kind: Literal["images", "text"] = "images"
    evaluated: Literal["test", "validation"] = "test"
    resizes: bool = False
    has_parts: bool = False

    def absent(self, exists: Callable[[str], bool]) -> list[str]:
        """Returns which of `files` are missing from a folder.

        Args:
            exists: whether the folder has a file or folder of that name.
        """
        choices = (name.split("|") for name in self.files)
        return [names[0] for names in choices if not any(map(exists, names))]


_IDX_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def _idx(name: str, folder: str, torchvision: str, description: str, get: str) -> DatasetFacts:
    """Returns the facts of a data set of idx files, plain or gzipped."""
    folders = (f"{torchvision}/raw", folder)
    return DatasetFacts(
        description,
        needs_root=True,
        probes=tuple(
            f"{place}train-images-idx3-ubyte{suffix}"
            for place in (*(f"{folder}/" for folder in folders), "")
            for suffix in ("", ".gz")
        ),
        folders=folders,
        files=tuple(f"{name}|{name}.gz" for name in _IDX_FILES),
        system_paths=(f"/usr/share/datasets/{name}/train-images-idx3-ubyte.gz",),
        get=f"{get}, put the four idx files under <data root>/{torchvision}/raw, "
        "or set data.download=true where the node has internet access",
    )


def _cifar(classes: int, folder: str, files: tuple[str, ...]) -> DatasetFacts:
    return DatasetFacts(
        f"50,000 + 10,000 colored 32x32 images of {classes} classes",
        needs_root=True,
        probes=(folder,),
        folders=(folder,),
        files=files,
        get=f"unpack {folder.replace('-batches-py', '-python')}.tar.gz below the data root, which makes "
        f"<data root>/{folder}, or set data.download=true where the node has internet access",
    )


def _small_imagenet(size: int) -> DatasetFacts:
    folder = f"imagenet{size}"
    return DatasetFacts(
        f"ImageNet's 1,281,167 + 50,000 images, down-sampled to {size}x{size}",
        needs_root=True,
        probes=(f"{folder}/train_data_batch_1", f"{folder}/val_data", "train_data_batch_1"),
        folders=(folder,),
        files=(*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"),
        get=f"unpack image-net.org's Imagenet{size}_train.zip and Imagenet{size}_val.zip (for Python) "
        f"into <data root>/{folder}: train_data_batch_1 to _10 and val_data",
        evaluated="validation",
        has_parts=True,
    )


def _tokens(name: str, folders: tuple[str, ...], description: str, extension: str, get: str) -> DatasetFacts:
    """Returns the facts of a text in three files, whose tokens are separated by blanks."""
    files = tuple(f"{name}.{part}.{extension}" for part in ("train", "valid", "test"))
    return DatasetFacts(
        description,
        needs_root=True,
        probes=(*(f"{folder}/{files[0]}" for folder in folders), files[0]),
        folders=folders,
        files=files,
        get=f"{get}, put {', '.join(files)} into <data root>/{folders[0]}",
        task="language_modelling",
        kind="text",
        evaluated="validation",
    )


def _glue(
    folder: str, description: str, *, dev: tuple[str, ...] = ("dev.tsv",), task: Task = "classification"
) -> DatasetFacts:
    """Returns the facts of a task of GLUE, as its archive unpacks."""
    folders = tuple(f"{parent}{folder}" for parent in ("", "glue/", "GLUE/", "glue_data/"))
    return DatasetFacts(
        description,
        needs_root=True,
        probes=tuple(f"{place}/train.tsv" for place in folders),
        folders=folders,
        files=("train.tsv", *dev),
        get=f"unpack GLUE's {folder} below the data root, which makes <data root>/{folder}/train.tsv",
        task=task,
        kind="text",
        evaluated="validation",
    )


def _squad(version: str, description: str) -> DatasetFacts:
    files = tuple(f"{part}-{version}.json" for part in ("train", "dev"))
    folders = (f"squad-{version}", "squad", "SQuAD")
    return DatasetFacts(
        description,
        needs_root=True,
        probes=(*(f"{folder}/{files[0]}" for folder in folders), files[0]),
        folders=folders,
        files=files,
        get=f"put {' and '.join(files)} into <data root>/squad",
        task="question_answering",
        kind="text",
        evaluated="validation",
    )


DATASETS: dict[str, DatasetFacts] = {
    "digits": DatasetFacts("1,797 real 8x8 handwritten digits that come with scikit-learn"),
    "mnist": _idx(
        "mnist", "mnist", "MNIST", "60,000 + 10,000 handwritten digits, 28x28", "get MNIST from its mirrors"
    ),
    "fashion-mnist": _idx(
        "fashion-mnist",
        "fashion-mnist",
        "FashionMNIST",
        "60,000 + 10,000 images of clothing, 28x28",
        "install Debian's package dataset-fashion-mnist",
    ),
    "cifar10": _cifar(
        10, "cifar-10-batches-py", (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    ),
    "cifar100": _cifar(100, "cifar-100-python", ("train", "test")),
    "imagenet": DatasetFacts(
        "ImageNet-1k, or any images in one folder per class",
        needs_root=True,
        probes=("imagenet/train", "train"),
        folders=("imagenet",),
        files=("train", "val|validation"),
        get="put the images into <data root>/imagenet/train/<class>/ and <data root>/imagenet/val/<class>/ "
        "(or validation/<class>/), with the same classes in both",
        evaluated="validation",
        resizes=True,
    ),
    "imagenet32": _small_imagenet(32),
    "imagenet64": _small_imagenet(64),
    "lgg-mri": DatasetFacts(
        "brain MRI slices of 110 patients with lower-grade glioma, and masks of the tumors",
        needs_root=True,
        probes=("kaggle_3m", "lgg-mri-segmentation/kaggle_3m"),
        folders=("kaggle_3m", "lgg-mri-segmentation/kaggle_3m"),
        get="unpack Kaggle's mateuszbuda/lgg-mri-segmentation below the data root, which makes "
        "<data root>/kaggle_3m/<patient>/<patient>_<slice>.tif and _mask.tif",
        task="segmentation",
        evaluated="validation",
        resizes=True,
    ),
    "features": DatasetFacts(
        "stored features of another network, for logistic regression",
        needs_root=True,
        probes=("features/features_train.pt", "features_train.pt"),
        folders=("features",),
        files=("features_train.pt", "targets_train.pt", "features_val.pt", "targets_val.pt"),
        get="save tensors as <data root>/features/features_train.pt, targets_train.pt, features_val.pt and "
        "targets_val.pt (float (n, d) and int64 (n,))",
        evaluated="validation",
    ),
    "multi30k": DatasetFacts(
        "29,000 + 1,014 + 1,000 captions of images, English and German",
        needs_root=True,
        probes=("multi30k/train.de", "train.de"),
        folders=("multi30k",),
        files=(
            "train.de",
            "train.en",
            "val.de",
            "val.en",
            "test.de|test_2016_flickr.de|test2016.de",
            "test.en|test_2016_flickr.en|test2016.en",
        ),
        get="unpack training.tar.gz, validation.tar.gz and mmt16_task1_test.tar.gz of WMT 2016's multimodal "
        "task into <data root>/multi30k: train.de, train.en, val.de, val.en, test.de and test.en",
        task="translation",
        kind="text",
        evaluated="validation",
    ),
    "ptb": _tokens(
        "ptb",
        ("ptb", "simple-examples/data", "penn"),
        "Penn Treebank as Mikolov prepared it: 929,589 + 73,760 + 82,430 tokens, 10,000 words",
        "txt",
        "unpack simple-examples.tgz below the data root, or, file by file",
    ),
    "wikitext2": _tokens(
        "wiki",
        ("wikitext-2",),
        "WikiText-2: 2,088,628 + 217,646 + 245,569 tokens of Wikipedia, 33,278 words",
        "tokens",
        "unpack wikitext-2-v1.zip below the data root, or, file by file",
    ),
    "wikitext103": _tokens(
        "wiki",
        ("wikitext-103",),
        "WikiText-103: 103,227,021 + 217,646 + 245,569 tokens of Wikipedia, 267,735 words",
        "tokens",
        "unpack wikitext-103-v1.zip below the data root, or, file by file",
    ),
    "cola": _glue("CoLA", "GLUE: is a sentence grammatical; 8,551 + 1,043 sentences"),
    "sst2": _glue("SST-2", "GLUE: is a review positive; 67,349 + 872 sentences"),
    "mrpc": _glue("MRPC", "GLUE: do two sentences say the same; 3,668 + 408 pairs"),
    "qqp": _glue("QQP", "GLUE: do two questions ask the same; 363,846 + 40,430 pairs"),
    "stsb": _glue(
        "STS-B", "GLUE: how alike are two sentences, 0 to 5; 5,749 + 1,500 pairs", task="regression"
    ),
    "mnli": _glue(
        "MNLI",
        "GLUE: does one sentence entail another; 392,702 + 9,815 matched + 9,832 mismatched pairs",
        dev=("dev_matched.tsv", "dev_mismatched.tsv"),
    ),
    "qnli": _glue("QNLI", "GLUE: does a sentence answer a question; 104,743 + 5,463 pairs"),
    "rte": _glue("RTE", "GLUE: does one sentence entail another; 2,490 + 277 pairs"),
    "wnli": _glue("WNLI", "GLUE: who does a pronoun stand for; 635 + 71 pairs"),
    "squad": _squad("v1.1", "SQuAD v1.1: 87,599 + 10,570 questions on paragraphs of Wikipedia"),
    "squadv2": _squad("v2.0", "SQuAD v2: 130,319 + 11,873 questions, of which some have no answer"),
}
