"""Encoders of transformers from local folders: what they compute, and how preconditioners cover them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd import optim
from hpcsngd.config.catalogue import SMALL_ENCODER
from hpcsngd.optim.quantify import quantify
from hpcsngd.train.faults import MissingDataError, SettingError
from hpcsngd.train.loop import flat_gradients
from hpcsngd.train.models.encoder import Encoder, encoder
from hpcsngd.train.text import hub, tiny
from hpcsngd.train.text.encoded import Encoded, tokenized
from hpcsngd.train.text.squad import Question
from hpcsngd.train.text.windows import Windows, cut

LENGTH = 24
TEXTS = [
    ["the cat is red", "a dog", "the old house was not green", "river", "the garden is blue and good", "bad"],
    [
        "a cat",
        "the dog is white",
        "the house was old",
        "the river is near",
        "a garden",
        "the window is not bad",
    ],
]
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
#: Weights this large make attention depend on its input, as in trained encoders.
LARGE = {"initializer_range": 0.5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ATTENTION = ("self.query", "self.key", "self.value", "attention.output.dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    tiny.encoder(root)
    return root / SMALL_ENCODER


def samples(folder: Path) -> Encoded:
    tokens = tokenized(hub.tokenizer(folder), TEXTS, LENGTH)
    return Encoded(folder, tokens, TARGETS, length=LENGTH, padding=0)


def spans(folder: Path) -> Windows:
    tokenizer = hub.tokenizer(folder)
    questions = [
        Question("q", "what is red?", "the cat is red. the dog is not. the house is old.", [("cat", 4)])
    ]
    windows = list(cut(tokenizer, questions, 16, 3))
    return Windows(folder, questions, windows, length=LENGTH, padding=tokenizer.pad_token_id)


def drawn(part: Encoded, seed: int = 0, **changes: Any) -> Encoder:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return encoder(part, 3, weights="random", **LARGE, **changes)


def test_weights_come_from_the_folder_and_the_head_is_drawn(folder: Path) -> None:
    first, second = (encoder(samples(folder), 3) for _ in range(2))
    ours = {f"network.bert.{name}": each for name, each in _saved(folder).items()}
    found = first.state_dict()
    assert ours
    assert all(found[name].equal(each) for name, each in ours.items())
    assert {name for name in found if name not in ours} == {
        "network.classifier.weight",
        "network.classifier.bias",
    }
    assert not found["network.classifier.weight"].equal(second.state_dict()["network.classifier.weight"])


def _saved(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_drawn_weights_follow_torch_s_stream(folder: Path) -> None:
    part = samples(folder)
    one, same, other = (drawn(part, seed).state_dict() for seed in (0, 0, 1))
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["network.bert.encoder.layer.0.output.dense.weight"].equal(
        other["network.bert.encoder.layer.0.output.dense.weight"]
    )


def test_padding_changes_nothing(folder: Path) -> None:
    model, part = drawn(samples(folder)).eval(), samples(folder)
    tokens = part[[0, 2]][0]
    short = int(tokens[:, 1].sum(1).max())
    torch.testing.assert_close(model(tokens), model(tokens[:, :, :short]))
    windows = spans(folder)
    answering = drawn(windows).eval()
    tokens = windows[[0, 1]][0]
    logits = answering(tokens)
    assert logits.shape == (2, 2, LENGTH)
    short = int(tokens[:, 1].sum(1).max())
    torch.testing.assert_close(logits[:, :, :short], answering(tokens[:, :, :short]))
    assert float(logits.detach().softmax(2)[(tokens[:, 1:2] == 0).expand(-1, 2, -1)].sum()) == 0


def test_the_second_sentence_is_told_by_its_type(folder: Path) -> None:
    model, tokens = drawn(samples(folder)).eval(), samples(folder)[[0]][0]
    other = tokens.clone()
    other[:, 2] = 0
    assert not torch.allclose(model(tokens), model(other))


def distilbert(folder: Path) -> None:
    config = {
        "model_type": "distilbert",
        "vocab_size": 120,
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()


def roberta(folder: Path) -> None:
    import tokenizers

    for file in folder.iterdir():
        file.unlink()
    words = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator(TEXTS[0], vocab_size=300, special_tokens=special, show_progress=False)
    words.save_model(str(folder))
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": 300, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta", **config, **sizes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))


@pytest.mark.parametrize("change", [distilbert, roberta])
def test_other_encoders_learn_and_every_sample_has_its_own_positions(
    change: Any, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "other"
    shutil.copytree(folder, place)
    change(place)
    tokenizer = hub.tokenizer(place)
    tokens = tokenized(tokenizer, TEXTS, LENGTH)
    part = Encoded(place, tokens, TARGETS, length=LENGTH, padding=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model = encoder(part, 3, weights="random", initializer_range=0.5)
    seen: list[torch.Size] = []
    for name, module in model.named_modules():
        if name.endswith("position_embeddings"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    x, y = part[list(range(6))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kfac, losses = optim.KFAC(model, damping=0.1, rescale="norm"), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        kfac.step()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert set(seen) == {torch.Size([6, LENGTH, 16])}


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def mean_span_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("has_spans", [False, True])
@pytest.mark.parametrize(
    ("method", "options", "largest"),
    [(optim.HyLo, {"conv_mode": "exact"}, 600), (optim.KFAC, {}, 300)],
)
def test_every_covered_layer_has_exact_curvature_and_second_order_strength(
    method: Any, options: dict[str, Any], largest: int, *, has_spans: bool, folder: Path
) -> None:
    part = spans(folder) if has_spans else samples(folder)
    preconditioner = method(drawn(part), damping=1e-3, **options)
    batch, loss = part[list(range(len(part)))], mean_span_loss if has_spans else mean_loss
    checks = preconditioner.verify(batch, loss, layers=99, max_entries=largest)
    compared = {check.layer: check for check in checks if not check.skipped}
    for name in (*ATTENTION, *(["qa_outputs"] if has_spans else ["pooler.dense", "classifier"])):
        assert any(layer.endswith(name) for layer in compared), name
    for layer, check in compared.items():
        # what a solve in float64 leaves of matrices with condition 1e3 to 1e6
        assert check.error < 1e-9, layer
        assert check.strength > 0.5, layer


def test_kfac_covers_embeddings_and_norms_and_hylo_names_them(folder: Path) -> None:
    part = samples(folder)
    kfac, hylo = optim.KFAC(drawn(part), damping=0.1), optim.HyLo(drawn(part), damping=0.1)
    assert kfac.skipped == {}
    reasons = {name.removeprefix("network.bert."): reason for name, reason in hylo.skipped.items()}
    assert reasons["embeddings.word_embeddings"] == "Embedding is not supported"
    assert reasons["encoder.layer.0.output.LayerNorm"] == "LayerNorm is not supported"
    assert all("Embedding" in reason or "LayerNorm" in reason for reason in reasons.values())
    without = optim.KFAC(drawn(part), damping=0.1, skip=["word_embeddings"])
    assert list(without.skipped) == ["network.bert.embeddings.word_embeddings"]


def test_kfac_covers_places_types_and_norms_by_their_exact_formula(folder: Path) -> None:
    part = samples(folder)
    others = ["word_embeddings", "encoder", "pooler", "classifier"]
    preconditioner = optim.KFAC(drawn(part), damping=1e-3, skip=others)
    checks = preconditioner.verify(part[list(range(6))], mean_loss, layers=99, max_entries=1100)
    found = {check.layer.removeprefix("network.bert.embeddings."): check for check in checks}
    for name in ("position_embeddings", "token_type_embeddings", "LayerNorm"):
        assert found[name].error < 1e-9, name
        assert found[name].strength > 0.5, name


def test_mfac_turns_the_whole_gradient(folder: Path) -> None:
    part = samples(folder)
    model = drawn(part)
    mfac = optim.MFAC(model, num_grads=8, damping=0.1)
    assert dict(mfac.skipped) == {}
    for index in range(8):
        x, y = part[[index % 6, (index + 1) % 6]]
        model.zero_grad()
        mean_loss(model(x), y).backward()
        before = flat_gradients(model)
        mfac.step()
    measured = quantify(before, flat_gradients(model))
    assert measured.angle_deg > 10


def test_what_is_missing_or_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    part = samples(folder)
    with pytest.raises(SettingError, match=r"model\.args: hiden_size not in .*config\.json"):
        encoder(part, 3, hiden_size=32)
    with pytest.raises(SettingError, match=r"model\.args\.weights is 'none'; allowed: pretrained, random"):
        encoder(part, 3, weights="none")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(MissingDataError, match=r"cannot read the encoder in .*bare"):
        encoder(samples(bare), 3)
    deeper = tmp_path / "deeper"
    shutil.copytree(folder, deeper)
    config = json.loads((folder / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(MissingDataError, match=r"the weights in .*deeper lack bert\.encoder\.layer\.2"):
        encoder(samples(deeper), 3)


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        (["config.json"], r"lacks config\.json$"),
        (["vocab.txt", "config.json"], r"lacks config\.json and a vocabulary \(tokenizer\.json, vocab\.txt"),
    ],
)
def test_folders_without_an_encoder_are_told(
    removed: list[str], problem: str, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "partial"
    shutil.copytree(folder, place)
    for name in removed:
        (place / name).unlink()
    with pytest.raises(MissingDataError, match=problem):
        hub.find_folder("partial", tmp_path)
    with pytest.raises(MissingDataError, match=r"no folder .*absent \(data\.tokenizer\)"):
        hub.find_folder("absent", tmp_path)
    with pytest.raises(SettingError, match=r"data\.tokenizer must name the folder"):
        hub.find_folder(None, tmp_path)
    assert hub.find_folder(str(folder), None) == folder
