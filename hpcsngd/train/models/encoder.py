"""Encoders of the library `transformers` with a head for classes, numbers or spans."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.train.data.samples import Samples
from hpcsngd.train.faults import MissingDataError, SettingError
from hpcsngd.train.text import hub
from hpcsngd.train.text.encoded import Encoded
from hpcsngd.train.text.windows import Windows


class Encoder(nn.Module):
    """A network of transformers that takes one tensor and gives one.

    Positions are handed over for every sample: by itself BERT looks them up once for the whole batch, so that
    no sample would have gradients of its own there.

    Args:
        network: with a head for sequences or for spans.
        has_spans: whether it answers by spans.
    """

    def __init__(self, network: nn.Module, *, has_spans: bool) -> None:
        super().__init__()
        self.network, self._has_spans = network, has_spans
        config: Any = network.config
        accepted = inspect.signature(network.forward).parameters
        self._takes_types = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1
        # RoBERTa's count from the padding's id on, which it does for each sample by itself
        self._takes_positions = "position_ids" in accepted and not _counts_from_padding(network)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits ``(n, classes)``; for spans ``(n, 2, length)``, padding at minus infinity.

        Args:
            tokens: ids, mask and types, ``(n, 3, length)``.
        """
        ids, mask, types = tokens.unbind(1)
        given = {"token_type_ids": types} if self._takes_types else {}
        if self._takes_positions:
            given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        found = self.network(input_ids=ids, attention_mask=mask, return_dict=True, **given)
        if not self._has_spans:
            logits: Tensor = found.logits
            return logits
        ends = torch.stack([found.start_logits, found.end_logits], 1)
        return ends.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(ends.dtype).min)


def encoder(samples: Samples, num_classes: int, *, weights: str = "pretrained", **changes: Any) -> Encoder:
    """Returns the encoder of the folder that the samples' tokenizer comes from, with a new head.

    Args:
        samples: says which folder, and whether answers are spans.
        num_classes: size of the output, 1 for a number; not used for spans.
        weights: ``pretrained``, from the folder, or ``random``, drawn from torch's global stream.
        changes: other values for entries of the folder's ``config.json``, e.g. ``hidden_dropout_prob``; sizes
            can be changed only where weights are drawn.

    Raises:
        SettingError: the data are no text for encoders, or a change that the encoder does not know.
        MissingDataError: the folder has no weights, or others than its configuration says.
    """
    if not isinstance(samples, Encoded):
        raise SettingError("model encoder needs one of the data sets of GLUE or SQuAD")
    if weights not in ("pretrained", "random"):
        raise SettingError(f"model.args.weights is {weights!r}; allowed: pretrained, random")
    library, folder = hub.transformers(), str(samples.encoder)
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        unknown = [name for name in changes if not hasattr(config, name)]
        if unknown:
            raise SettingError(f"model.args: {', '.join(unknown)} not in {folder}/config.json")
        config.update({**changes, "num_labels": 2 if isinstance(samples, Windows) else num_classes})
        kind = (
            library.AutoModelForQuestionAnswering
            if isinstance(samples, Windows)
            else library.AutoModelForSequenceClassification
        )
        # eager attention: the fused kernels do not give the same bits twice in their backward pass
        network = (
            kind.from_config(config, attn_implementation="eager")
            if weights == "random"
            else _pretrained(kind, folder, config)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise MissingDataError(f"cannot read the encoder in {folder}: {error}") from error
    return Encoder(network, has_spans=isinstance(samples, Windows))


def _pretrained(kind: Any, folder: str, config: Any) -> nn.Module:
    """Returns a network with a folder's weights; refuses one whose body is not all there."""
    network, told = kind.from_pretrained(
        folder,
        config=config,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    body = f"{network.base_model_prefix}."
    # a pooler is part of the head: checkpoints of other encoders have none
    absent = [name for name in told["missing_keys"] if name.startswith(body) and ".pooler." not in name]
    if absent:
        raise MissingDataError(f"the weights in {folder} lack {', '.join(sorted(absent)[:3])}, ...")
    result: nn.Module = network.float()  # some are published in half precision
    return result


def _counts_from_padding(network: nn.Module) -> bool:
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in network.named_modules()
    )
