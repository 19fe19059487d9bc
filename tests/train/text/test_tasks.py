from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from hpcsngd.config import experiment as schema
from hpcsngd.config.experiment import Decoding
from hpcsngd.train import data, losses, tinydata
from hpcsngd.train.faults import SettingError
from hpcsngd.train.losses import IGNORED
from hpcsngd.train.models.transformer import Transformer
from hpcsngd.train.text.pairs import Pairs
from hpcsngd.train.text.tasks import Bleu, Perplexity, Translation, Words, bleu
from hpcsngd.train.text.vocabulary import END

CPU = torch.device("cpu")
TARGETS = torch.tensor([[1, 2, IGNORED], [0, 3, 3]])


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


class TestWords:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_the_loss_is_summed_over_words_and_not_over_padding(self, smoothing: float) -> None:
        outputs, expected = logits(), 0.0
        for row, position in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
            logp = outputs[row, position].log_softmax(0)
            # Szegedy et al., CVPR 2016, section 7: the share is spread over all words evenly
            expected -= (1 - smoothing) * float(logp[TARGETS[row, position]]) + smoothing * float(logp.mean())
        assert float(Words(smoothing).loss(outputs, TARGETS)) == pytest.approx(expected, rel=1e-6)

    def test_the_score_counts_words_that_are_right(self) -> None:
        outputs = torch.zeros(2, 3, 4)
        outputs[0, 0, 1] = outputs[1, 1, 3] = outputs[1, 2, 2] = 1.0
        # of (0, 1) and (1, 0) the first word is taken, which is right in the second
        assert float(Words().score(outputs, TARGETS)) == 3

    def test_perplexity_is_of_every_word_once(self) -> None:
        evaluation = Words(smoothing=0.5).evaluation(CPU)
        evaluation.add([0, 1], logits(), TARGETS)
        evaluation.add([2, 3], logits(1), TARGETS)
        found = evaluation.result()
        total = losses.token_cross_entropy(logits(), TARGETS) + losses.token_cross_entropy(logits(1), TARGETS)
        assert found.sums.count == 10
        assert found.sums.mean_loss == pytest.approx(float(total) / 10)
        assert found.scores == {"perplexity": pytest.approx(math.exp(float(total) / 10))}

    def test_a_perplexity_beyond_all_numbers_is_infinite(self) -> None:
        evaluation = Perplexity(CPU)
        evaluation.add([0], torch.tensor([[[0.0, 1e6]]]), torch.tensor([[0]]))
        assert evaluation.result().scores["perplexity"] == math.inf

    def test_a_fisher_matrix_knows_no_padding(self) -> None:
        outputs = logits().requires_grad_()
        assert torch.equal(Words().curvature_outputs(outputs, TARGETS), outputs[TARGETS != IGNORED])
        mean = Words(is_mean=True).curvature_outputs(outputs, TARGETS)
        assert torch.equal(mean, outputs.transpose(1, 2))
        mean.sum().backward()  # type: ignore[no-untyped-call]
        assert outputs.grad is not None
        assert torch.equal(outputs.grad[..., 0], (TARGETS != IGNORED).float())


class TestBleu:
    def test_it_is_sacrebleus(self) -> None:
        references = ["The cat sat on the mat.", "A dog runs in the snow ."]
        assert bleu(references, references, lowercase=False) == pytest.approx(100)
        written = ["the cat sat on a mat .", "a dog runs in the snow ."]
        assert bleu(written[1:], references[1:], lowercase=True) == pytest.approx(100)
        assert bleu(written, references, lowercase=False) < bleu(written, references, lowercase=True) < 100
        # 7 and 7 words of both; matches of 1 to 4 words: 13/14, 10/12, 7/10, 5/8
        matches = [13 / 14, 10 / 12, 7 / 10, 5 / 8]
        expected = 100 * math.prod(matches) ** 0.25
        assert bleu(written, references, lowercase=True) == pytest.approx(expected)

    def test_what_is_written_is_what_the_model_says(self, pairs: Pairs) -> None:
        evaluation = Bleu(pairs, Decoding(beam=2, max_words=6), CPU)
        torch.manual_seed(0)
        sizes = tuple(len(language) for language in pairs.languages)
        model = Transformer((sizes[0], sizes[1]), width=8, inner=8, heads=2, layers=1).eval()
        with torch.no_grad():
            for start in (0, 5):
                indices = list(range(start, min(start + 5, len(pairs))))
                *inputs, targets = pairs[indices]
                evaluation.look(model, indices, tuple(inputs))
                evaluation.add(indices, model(*inputs), targets)
        result = evaluation.result()
        assert result.sums.count == sum(pairs.targets)
        hypotheses = [evaluation._written[index] for index in range(len(pairs))]
        assert result.scores["bleu"] == bleu(hypotheses, pairs.references, lowercase=True)
        known = set(pairs.languages[1].words) - {"</s>"}
        assert {word for line in hypotheses for word in line.split()} <= known

    def test_a_missing_library_is_told_before_training(
        self, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(SettingError, match=r"pip install 'hpcsngd\[text\]'"):
            Translation(pairs, Decoding())

    def test_other_evaluations_need_no_translation(self, pairs: Pairs) -> None:
        task = Translation(pairs, Decoding())
        assert isinstance(task.evaluation(CPU), Bleu)
        assert type(task.evaluation(CPU, is_full=False)) is Perplexity


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    tinydata.write("multi30k", tmp_path)
    config = schema.Data.model_validate(
        {"name": "multi30k", "translation": {"min_count": 1}, "test_limit": 7}
    )
    samples = data.load(config, str(tmp_path)).test
    assert isinstance(samples, Pairs)
    assert END not in samples._sentences.targets[0]
    return samples
