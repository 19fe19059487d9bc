"""The columns of every CSV that a run writes: names, order, types and units, declared once.

Writer (`rundir.CsvWriter`) and readers (`rundir.read_rows`, `hpcsngd_analysis.load`) both go by these. Change
the meaning of a column only together with ``rundir.SCHEMA``.

Words: ``step`` counts optimizer steps of the whole run, beginning at 1 after the first update; ``epoch``
counts completed passes (a row inside the fourth epoch says 3.xx); ``train_s`` is the time spent training,
summed over attempts, without evaluation, checkpoints, queueing and work done twice after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["int", "float", "str"]


@dataclass(frozen=True)
class Column:
    """One column: its name, type, unit (``""`` for none) and what it means."""

    name: str
    dtype: Dtype
    unit: str
    doc: str


@dataclass(frozen=True)
class Table:
    """One kind of CSV file.

    Attributes:
        name: file name without ``.csv``; per-rank files are ``<name>.rank<r>.csv``.
        key: columns that identify a row across attempts: after a resume the last attempt's row counts.
        columns: all columns in file order.
        per_rank: every rank writes its own file; otherwise rank 0 writes the only one.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    per_rank: bool = False
    doc: str = field(default="", compare=False)

    @property
    def header(self) -> list[str]:
        """Returns the column names in file order."""
        return [column.name for column in self.columns]

    def file_name(self, rank: int | None = None) -> str:
        """Returns the file name inside ``metrics/``."""
        return f"{self.name}.rank{rank}.csv" if self.per_rank else f"{self.name}.csv"

    @property
    def pattern(self) -> str:
        """Returns the glob pattern that finds its files, of all ranks, inside ``metrics/``."""
        return f"{self.name}.rank*.csv" if self.per_rank else f"{self.name}.csv"


_ATTEMPT = Column("attempt", "int", "", "which attempt of the run wrote the row; 1 is the first")
_EPOCH = Column("epoch", "float", "epochs", "completed passes over the training set")
_STEP = Column("step", "int", "steps", "optimizer steps done")
_RANK = Column("rank", "int", "", "the rank measured")
_LAYER = Column("layer", "str", "", "module name in the model")

_CLOCKS = (
    Column("train_s", "float", "s", "training time so far, summed over attempts"),
    Column("wall_s", "float", "s", "since the worker of this attempt started"),
    Column("utc", "str", "", "ISO 8601 time of the row"),
)

_ALL = (
    Table(
        "train",
        ("step",),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column(
                "samples",
                "int",
                "samples",
                "training samples computed on so far, all ranks: one counts for each time it was evaluated",
            ),
            Column("loss", "float", "", "mean over the targets since the previous row, all ranks"),
            Column(
                "accuracy",
                "float",
                "",
                "share of correct predictions since the previous row; nan for numbers",
            ),
            Column("lr", "float", "", "learning rate of the last step"),
            *_CLOCKS,
        ),
        doc="Training progress, every diagnostics.log_every steps and at the end of each epoch.",
    ),
    Table(
        "eval",
        ("step", "split"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("split", "str", "", "which data: test, validation, or a further set's name"),
            Column("count", "int", "targets", "targets evaluated, each once: samples, or tokens of a text"),
            Column("loss", "float", "", "mean over the targets of the split"),
            Column(
                "accuracy",
                "float",
                "",
                "share of correct predictions; for masks the patients' mean Dice, for answers the mean F1, "
                "for numbers Spearman's correlation",
            ),
            Column("eval_s", "float", "s", "time of this evaluation"),
            *_CLOCKS,
        ),
        doc="Evaluation, after each epoch.",
    ),
    Table(
        "scores",
        ("step", "split", "metric"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("split", "str", "", "which data: test, validation, or a further set's name"),
            Column("metric", "str", "", "perplexity, bleu, exact_match, f1, matthews, spearman, ..."),
            Column("value", "float", "", "of the whole split; larger is better, except for perplexity"),
        ),
        doc="What else an evaluation says of the model, after each epoch; with tasks on text.",
    ),
    Table(
        "dice",
        ("step", "patient"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("patient", "str", "", "name of the patient"),
            Column("slices", "int", "", "slices of the volume"),
            Column("dice", "float", "", "Dice coefficient of the volume, for the largest component"),
        ),
        doc="Segmentation of each patient, after each epoch; with task segmentation.",
    ),
    Table(
        "profiling",
        ("step", "phase"),
        (
            _ATTEMPT,
            _STEP,
            _RANK,
            Column("refresh", "int", "", "1 on a step that recomputed curvature"),
            Column(
                "phase",
                "str",
                "",
                "data, forward, backward, update; of a preconditioner: capture, gather, factorise, invert, "
                "project, precondition, broadcast, observe",
            ),
            Column("seconds", "float", "s", "time of the phase in this step"),
        ),
        per_rank=True,
        doc="Where the time of each step went; with diagnostics.profiling.",
    ),
    Table(
        "communication",
        ("step", "phase", "op"),
        (
            _ATTEMPT,
            _STEP,
            Column("phase", "str", "", "gather, broadcast, ..."),
            Column("op", "str", "", "the collective"),
            Column("calls", "int", "", "collectives issued by one rank"),
            Column("size_bytes", "int", "B", "bytes handed to them by one rank (rank 0)"),
        ),
        doc="Bytes sent by the preconditioner; with diagnostics.profiling.",
    ),
    Table(
        "memory",
        ("step", "kind"),
        (
            _ATTEMPT,
            _STEP,
            Column(
                "kind",
                "str",
                "",
                "captured (this rank's rows, before the exchange), rows, factors, window, error, ...",
            ),
            Column("size_bytes", "int", "B", "held by the preconditioner on rank 0 after the step"),
        ),
        doc="Memory of the preconditioner by kind; with diagnostics.profiling.",
    ),
    Table(
        "rank_analysis",
        ("step", "layer", "share"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            _LAYER,
            Column("samples", "int", "samples", "size of the kernel matrix"),
            Column("share", "float", "", "share of the sum of singular values asked for"),
            Column("low_rank", "int", "", "singular values needed to reach that share"),
            Column(
                "top_eigenvalue", "float", "", "largest eigenvalue of the kernel over the number of samples"
            ),
            Column("damping", "float", "", "damping at this refresh"),
        ),
        doc="Effective matrix rank of the kernels at each refresh; with diagnostics.rank_analysis.",
    ),
    Table(
        "kept",
        ("step", "layer"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            _LAYER,
            Column("method", "str", "", "kid or kis"),
            Column("rule", "str", "", "what decided how many: ratio, low_rank or share"),
            Column("samples", "int", "samples", "in the batch, all ranks"),
            Column("kept", "int", "samples", "of those"),
        ),
        doc="Samples that a compressed method kept at each refresh; with diagnostics.rank_analysis.",
    ),
    Table(
        "switches",
        ("step",),
        (
            _ATTEMPT,
            Column(
                "step", "int", "steps", "optimizer steps done; the decision holds from the next refresh on"
            ),
            Column("epoch", "int", "", "the epoch that begins"),
            Column("method", "str", "", "kid in critical regimes, otherwise kis"),
            Column("reason", "str", "", "what decided"),
            Column("change", "float", "", "relative change of the gradient norm; nan where not looked at"),
            Column("norm", "float", "", "gradient norm of the latest check; nan before the first"),
            Column("lr", "float", "", "learning rate at the beginning of the epoch"),
        ),
        doc="Every decision of the hybrid method; written whenever there is one.",
    ),
    Table(
        "grad_norm",
        ("step", "layer"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            _LAYER,
            Column("norm", "float", "", "Frobenius norm before preconditioning"),
        ),
        doc="Gradient norm of each covered layer; with diagnostics.grad_norm.",
    ),
    Table(
        "grad_error",
        ("step", "layer", "method"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            _LAYER,
            Column("method", "str", "", "the approximation compared with the exact method"),
            Column("relative_error", "float", "", "norm of the difference over the norm of the exact result"),
            Column("cosine", "float", "", "cosine of the angle to the exact result"),
        ),
        doc="Approximate against exact preconditioned gradient on one batch; with diagnostics.grad_error.",
    ),
    Table(
        "strength",
        ("step", "layer"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            _LAYER,
            Column("strength", "float", "", "|damping v - g| / |g|: 0 where v is nothing but g over damping"),
            Column("mean_eigenvalue", "float", "", "mean eigenvalue of the layer's curvature"),
            Column("damping", "float", "", "damping that v was computed with"),
        ),
        doc="How much K-FAC's curvature changes each layer's gradient g; with diagnostics.strength.",
    ),
    Table(
        "quantify",
        ("step",),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("norm_g", "float", "", "norm of the gradient g of all parameters"),
            Column("norm_u", "float", "", "norm of u, what the preconditioner makes of it"),
            Column("norm_ratio", "float", "", "norm_u over norm_g: the scaling"),
            Column("q25", "float", "", "lower quartile of |u_i / g_i|"),
            Column("q50", "float", "", "median of |u_i / g_i|"),
            Column("q75", "float", "", "upper quartile of |u_i / g_i|"),
            Column("cosine", "float", "", "cosine of the angle between u and g"),
            Column("angle_deg", "float", "degrees", "that angle: the rotation"),
            Column(
                "entries",
                "int",
                "",
                "entries that the quartiles were taken over: all, or evenly spaced ones of more than 262,144",
            ),
        ),
        doc="How much is preconditioned; with diagnostics.quantify_every.",
    ),
    Table(
        "lbfgs",
        ("step",),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("objective", "float", "", "mean loss of the step's batch before it, with weight decay"),
            Column("iterations", "int", "", "of the method, so far"),
            Column("evaluations", "int", "", "of loss and gradient, so far, those for pairs included"),
            Column("kept", "int", "", "curvature pairs stored so far, damped ones included"),
            Column("damped", "int", "", "pairs that Powell's damping changed, so far"),
            Column("skipped", "int", "", "pairs without enough curvature, so far"),
            Column(
                "resets",
                "int",
                "",
                "times that all pairs were forgotten, so far: no finite value, no descent",
            ),
        ),
        doc="What L-BFGS did; with optimizer lbfgs, every step.",
    ),
    Table(
        "layers",
        ("layer",),
        (
            _LAYER,
            Column("kind", "str", "", "its class"),
            Column(
                "d_in", "int", "", "columns of its weight as a matrix: inputs per group times kernel size"
            ),
            Column("d_out", "int", "", "rows of its weight as a matrix; 0 where it is none"),
            Column("has_bias", "int", "", "1 with a bias"),
            Column("parameters", "int", "", "its own parameters, trained or not"),
        ),
        doc="The layers of the model that have parameters, in the model's order; written once.",
    ),
    Table(
        "confusion",
        ("step", "split", "label", "predicted"),
        (
            _ATTEMPT,
            _EPOCH,
            _STEP,
            Column("split", "str", "", "which data: test or validation"),
            Column("label", "int", "", "the true class"),
            Column("predicted", "int", "", "the class with the largest output, the first of equal ones"),
            Column(
                "count",
                "int",
                "samples",
                "of this label that were predicted so; pairs with none are left out",
            ),
        ),
        doc="Predictions of the trained model on the data that is evaluated; written at the end of training.",
    ),
    Table(
        "landscape",
        ("plane", "split", "row", "column"),
        (
            Column("plane", "str", "", "identifies the plane: runs drawn on one plane share it"),
            Column("kind", "str", "", "pca: of the runs' checkpoints; random: filter-normalised directions"),
            Column("split", "str", "", "which data: train, test or validation"),
            Column("row", "int", "", "position in the grid, along the second axis"),
            Column("column", "int", "", "position in the grid, along the first axis"),
            Column("a", "float", "", "coordinate along the first axis"),
            Column("b", "float", "", "coordinate along the second axis"),
            Column("loss", "float", "", "mean over the samples"),
            Column("accuracy", "float", "", "share of correct predictions"),
            Column("count", "int", "samples", "samples evaluated"),
            Column("share_a", "float", "", "variance of the checkpoints along the first axis; nan if random"),
            Column(
                "share_b", "float", "", "variance of the checkpoints along the second axis; nan if random"
            ),
            Column("buffers", "str", "", "batch norm's statistics at each point: none, recomputed or kept"),
        ),
        doc="Loss on a plane in the space of the weights; written by `hpcsngd landscape` into the first run.",
    ),
    Table(
        "landscape_path",
        ("plane", "split", "step"),
        (
            Column("plane", "str", "", "the plane"),
            Column("split", "str", "", "which data: train, test or validation"),
            _STEP,
            Column("a", "float", "", "the checkpoint's coordinate along the first axis"),
            Column("b", "float", "", "the checkpoint's coordinate along the second axis"),
            Column("distance", "float", "", "of the checkpoint's weights from the plane"),
            Column("loss", "float", "", "of the checkpoint itself, with its own buffers"),
            Column("accuracy", "float", "", "of the checkpoint itself"),
        ),
        doc="The run's checkpoints on a plane of `landscape`; written by `hpcsngd landscape`.",
    ),
    Table(
        "staleness",
        ("step", "worker"),
        (
            _ATTEMPT,
            _EPOCH,
            Column("step", "int", "steps", "updates that the server has made, this one included"),
            Column("worker", "int", "", "rank whose gradient is in the update; all in synchronous mode"),
            Column("pulled", "int", "steps", "updates made when the worker took its parameters"),
            Column("staleness", "int", "steps", "updates of others between the pull and this one"),
            Column("work", "int", "steps", "step of the run's plan whose samples it is of, from 0"),
            Column("delay_ms", "float", "ms", "how long the worker waited on purpose before it pushed"),
            Column("utc", "str", "", "ISO 8601 time of the update"),
        ),
        doc="Age of every gradient that a parameter server applied, and the order that a replay repeats.",
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in _ALL}
