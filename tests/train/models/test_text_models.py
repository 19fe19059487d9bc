"""Networks of text: published sizes, masks, states, and what preconditioners cover of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcsngd.config.catalogue import MODEL_TASKS, SMALL_ARGS
from hpcsngd.config.catalogue import TEXT_MODELS as CATALOGUE
from hpcsngd.config.experiment import Model
from hpcsngd.optim import KFAC, MFAC, HyLo, Preconditioner
from hpcsngd.train import carried
from hpcsngd.train.faults import SettingError
from hpcsngd.train.losses import IGNORED, token_cross_entropy
from hpcsngd.train.models import TEXT_MODELS, build_for, parameter_count
from hpcsngd.train.models.attention import Attention, causal, positions
from hpcsngd.train.models.language import Fused, Kind, RecurrentLM, TransformerLM, Unrolled
from hpcsngd.train.models.transformer import Transformer
from hpcsngd.train.text.stream import Stream
from hpcsngd.train.text.vocabulary import PADDING

SMALL: dict[str, Any] = {"width": 8, "inner": 12, "heads": 2, "layers": 2, "dropout": 0.0}
TEXT = Stream(torch.arange(50, dtype=torch.int32) % 11, 11, 6)


def test_names_are_those_of_the_catalogue() -> None:
    assert TEXT_MODELS.keys() == CATALOGUE.keys() == SMALL_ARGS.keys()
    assert CATALOGUE.keys() <= MODEL_TASKS.keys()


def on_meta(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return parameter_count(build())


def test_published_sizes() -> None:
    medium = {"width": 650, "hidden": 650, "layers": 2}
    # 20M and 66M in Merity et al., ICLR 2017, table 2, for Zaremba's medium and large
    assert on_meta(lambda: RecurrentLM("lstm", 10_000, **medium)) == 19_780_400
    assert on_meta(lambda: RecurrentLM("lstm", 10_000, width=1500, hidden=1500)) == 66_034_000
    # 65M in Vaswani et al., table 3, for some 37,000 words
    base = on_meta(lambda: Transformer((37_000, 37_000), share_embeddings=True, share_projection=True))
    assert base == pytest.approx(65e6, rel=0.05)
    layer = 4 * 512 * 512 + (2 * 512 * 2048 + 2048 + 512) + 2 * 2 * 512
    assert base == 37_000 * 512 + 2 * 2 * 512 + 6 * (2 * layer + 4 * 512 * 512 + 2 * 512)


def test_arguments_that_a_model_does_not_take_are_refused() -> None:
    with pytest.raises(SettingError, match=r"transformer-lm with args .*depth"):
        build_for(TEXT, 11, Model(name="transformer-lm", args={"depth": 2}))
    with pytest.raises(SettingError, match="no convolutions for blurpool"):
        build_for(TEXT, 11, Model(name="lstm-lm", blurpool=True))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        TransformerLM(11, width=8, heads=3)
    with pytest.raises(ValueError, match="not of 5 and 7 words"):
        Transformer((5, 7), **SMALL, share_embeddings=True)
    with pytest.raises(ValueError, match="one width, not 8 and hidden 9"):
        RecurrentLM("gru", 5, width=8, hidden=9, tied=True)


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    attention, x, memory = Attention(8, 2, 0.0), torch.randn(3, 4, 8), torch.randn(3, 4, 8)

    def heads(layer: nn.Linear, of: Tensor) -> Tensor:
        return layer(of).reshape(3, 4, 2, 4).transpose(1, 2)

    query, key, value = (
        heads(attention.query, x),
        heads(attention.key, memory),
        heads(attention.value, memory),
    )
    read = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = attention.output(read.transpose(1, 2).reshape(3, 4, 8))
    torch.testing.assert_close(attention(x, memory, causal(4, x.device)), expected)


def test_positions_are_sines_and_cosines() -> None:
    found = positions(6, 4, torch.zeros(1))
    for place in range(6):
        angles = torch.tensor([place, place / 1e4**0.5])
        expected = torch.tensor([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
        torch.testing.assert_close(found[place], expected)


@pytest.mark.parametrize("name", ["lstm-lm", "gru-lm", "transformer-lm"])
def test_what_comes_later_has_no_influence(name: str) -> None:
    torch.manual_seed(0)
    model = build_for(TEXT, 11, Model(name=name, args=SMALL_ARGS[name])).eval()
    tokens = torch.randint(0, 11, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    outputs = []
    for each in (tokens, changed):
        carried.reset(model)
        outputs.append(model(each))
    assert torch.equal(outputs[0][:, :4], outputs[1][:, :4])
    assert not torch.allclose(outputs[0][:, 4], outputs[1][:, 4])


def test_translations_depend_on_words_before_and_not_on_padding() -> None:
    torch.manual_seed(0)
    model = Transformer((9, 7), **SMALL).eval()
    source, known = torch.randint(1, 9, (2, 5)), torch.randint(1, 7, (2, 4))
    whole = model(source, known)
    assert whole.shape == (2, 4, 7)
    padded_source = functional.pad(source, (0, 3), value=PADDING)
    padded_known = functional.pad(known, (0, 2), value=PADDING)
    torch.testing.assert_close(model(padded_source, padded_known)[:, :4], whole)
    changed = known.clone()
    changed[:, 3] = 1 + changed[:, 3] % 6
    torch.testing.assert_close(model(source, changed)[:, :3], whole[:, :3])
    # every word of the source counts
    for place in range(5):
        other = source.clone()
        other[0, place] = 1 + other[0, place] % 8
        assert not torch.allclose(model(other, known)[0], whole[0])


@pytest.mark.parametrize("scaling", ["embedding", "projection", "none"])
def test_shared_weights_are_one(scaling: Any) -> None:
    torch.manual_seed(0)
    model = Transformer((7, 7), **SMALL, share_embeddings=True, share_projection=True, scaling=scaling)
    assert model.source.weight is model.target.weight is model.projection.weight
    apart = Transformer((7, 7), **SMALL)
    assert parameter_count(apart) - parameter_count(model) == 2 * 7 * 8
    known = torch.randint(1, 7, (2, 4))
    memory = model.eval().encode(known)
    model.projection.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs))
    seen: list[Tensor] = []
    found = model.decode(known, memory, known)
    torch.testing.assert_close(found, seen[0] / 8**0.5 if scaling == "projection" else seen[0])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_linear_cells_do_what_torchs_do(kind: Kind) -> None:
    torch.manual_seed(0)
    fused, linear = Fused(kind, 5, 6), Unrolled(kind, 5, 6)
    state = fused.layer.state_dict()
    linear.from_input.load_state_dict({"weight": state["weight_ih_l0"], "bias": state["bias_ih_l0"]})
    linear.from_state.load_state_dict({"weight": state["weight_hh_l0"], "bias": state["bias_hh_l0"]})
    for _ in range(2):  # the second call goes on in the states of the first
        x = torch.randn(3, 4, 5)
        torch.testing.assert_close(linear(x), fused(x))
    assert len(linear.carried) == len(fused.carried) == {"lstm": 2, "gru": 1}[kind]
    for mine, theirs in zip(linear.carried, fused.carried, strict=True):
        torch.testing.assert_close(mine, theirs[0])
        assert not mine.requires_grad
        assert not theirs.requires_grad


@pytest.mark.parametrize("cell", ["fused", "linear"])
def test_states_go_on_start_anew_and_are_restored(cell: Any) -> None:
    torch.manual_seed(0)
    model = RecurrentLM("lstm", 11, width=4, hidden=6, cell=cell).eval()
    tokens = torch.randint(0, 11, (2, 12))
    whole = model(tokens)
    carried.reset(model)
    first = model(tokens[:, :5])
    kept = carried.states(model)
    torch.testing.assert_close(torch.cat([first, model(tokens[:, 5:])], 1), whole)
    carried.restore(model, kept)
    torch.testing.assert_close(model(tokens[:, 5:]), whole[:, 5:])
    carried.reset(model)
    assert not torch.allclose(model(tokens[:, 5:]), whole[:, 5:])
    assert carried.is_carrying(model)
    assert not carried.is_carrying(TransformerLM(11, width=8))


def skipped(model: nn.Module, method: Callable[..., Preconditioner], **arguments: Any) -> dict[str, str]:
    preconditioner = method(model, **arguments)
    preconditioner.close()
    return dict(preconditioner.skipped)


def test_kfac_covers_all_of_a_transformer_but_what_is_shared() -> None:
    shared = Transformer((7, 7), **SMALL, share_embeddings=True, share_projection=True)
    assert skipped(shared, KFAC) == {
        "source": "shares a parameter with ['target']",
        "target": "shares a parameter with ['source']",
        "projection": "shares a parameter with ['source']",
    }
    assert skipped(Transformer((9, 7), **SMALL), KFAC) == {}
    assert list(skipped(Transformer((9, 7), **SMALL), KFAC, skip=["^projection$"])) == ["projection"]


def test_kfac_covers_recurrent_layers_that_are_linear() -> None:
    linear = RecurrentLM("lstm", 11, width=4, hidden=6, cell="linear")
    assert skipped(linear, KFAC) == {}
    fused = RecurrentLM("lstm", 11, width=4, hidden=6)
    assert skipped(fused, KFAC) == {f"recurrent.{n}.layer": "LSTM is not supported" for n in range(2)}


def test_hylo_leaves_embeddings_and_norms_to_the_optimizer() -> None:
    reasons = skipped(TransformerLM(11, **SMALL), HyLo)
    assert set(reasons.values()) == {
        "Embedding is not supported",
        "LayerNorm is not supported",
    }
    assert not [name for name in reasons if name.rpartition(".")[2] in ("query", "key", "value", "output")]


METHODS: dict[str, Callable[[nn.Module], Preconditioner]] = {
    "hylo": lambda model: HyLo(model, damping=0.01, conv_mode="exact"),
    "kfac": lambda model: KFAC(model, damping=0.01),
    "mfac": lambda model: MFAC(model, num_grads=4, damping=0.01),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["transformer-lm", "lstm-lm"])
def test_methods_equal_their_oracles_and_are_of_second_order(name: str, method: str) -> None:
    """Against the dense solution, and no plain gradient over the damping: on every kind of layer."""
    torch.manual_seed(0)
    arguments = SMALL_ARGS[name] | {"dropout": 0.0} | ({"cell": "linear"} if name == "lstm-lm" else {})
    model = build_for(TEXT, 11, Model(name=name, args=arguments))
    # oracles take one sample after another, which do not follow each other
    model.register_forward_pre_hook(lambda module, _: carried.reset(module))
    preconditioner = METHODS[method](model)
    for seed in range(4):
        tokens = torch.randint(0, 11, (8, 7), generator=torch.Generator().manual_seed(seed))
        batch = (tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        mean_loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        preconditioner.step()
    checks = [each for each in preconditioner.verify(batch, mean_loss, layers=20) if not each.skipped]
    assert checks
    assert max(check.strength for check in checks) > 0.05
    # M-FAC keeps its window in float32; all else is in float64
    assert max(check.error for check in checks) < (1e-5 if method == "mfac" else 1e-9)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return token_cross_entropy(outputs, targets) / (targets != IGNORED).sum()
