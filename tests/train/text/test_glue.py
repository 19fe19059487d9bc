"""The layouts of GLUE's files, each in lines as the published archives have them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hpcsngd.train.faults import MissingDataError
from hpcsngd.train.text.glue import LAYOUTS, read

PARSES = "( a b )\t( c d )\t(ROOT a)\t(ROOT b)"

#: data set -> the file's lines, sentences and targets of its first example.
FILES: dict[str, tuple[str, list[str], float]] = {
    "cola": ("gj04\t1\t\tThe sea rose.\nks08\t0\t*\tRose the sea sea.\n", ["The sea rose."], 1),
    "sst2": ("sentence\tlabel\nhide nothing \t0\na fine film \t1\n", ["hide nothing "], 0),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t702\t703\tShe said "no\tNo , she said\n',
        ['She said "no', "No , she said"],
        1,
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tIs it?\tIs it so?\t1\n",
        ["Is it?", "Is it so?"],
        1,
    ),
    "stsb": (
        (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
            "0\tmain-captions\tMSRvid\t2012\t1\tnone\tnone\tA plane lands.\tA plane is landing.\t4.800\n"
        ),
        ["A plane lands.", "A plane is landing."],
        4.8,
    ),
    "mnli": (
        (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
            f"0\t31\t31n\tfiction\t{PARSES}\tIt rains.\tIt pours.\tneutral\tneutral\n"
        ),
        ["It rains.", "It pours."],
        1,
    ),
    "qnli": (
        'index\tquestion\tsentence\tlabel\n0\tWho came?\tNobody "came" .\tentailment\n',
        ["Who came?", 'Nobody "came" .'],
        0,
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\tnot_entailment\n", ["One.", "Two."], 1),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tI fell.\tHe fell.\t0\n", ["I fell.", "He fell."], 0),
}


def write(folder: Path, text: str) -> Path:
    file = folder / "train.tsv"
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_task_is_read_as_it_is_published(name: str, tmp_path: Path) -> None:
    text, sentences, target = FILES[name]
    for content in (text, text.replace("\n", "\r\n"), text.removesuffix("\n")):
        found = read(write(tmp_path, content), LAYOUTS[name])
        assert [part[0] for part in found.sentences] == sentences
        assert float(found.targets[0]) == pytest.approx(target)
        assert found.targets.is_floating_point() == (name == "stsb")
        assert len(found) == len(text.splitlines()) - (name != "cola")


def test_the_development_sets_of_mnli_have_five_labels_before_the_gold_one(tmp_path: Path) -> None:
    head, line = FILES["mnli"][0].splitlines()
    head = head.replace("label1\t", "label1\tlabel2\tlabel3\tlabel4\tlabel5\t")
    line = line.replace("neutral\tneutral", "neutral\tentailment\tneutral\tneutral\tneutral\tcontradiction")
    found = read(write(tmp_path, f"{head}\n{line}\n"), LAYOUTS["mnli"])
    assert found.targets.tolist() == [2]
    assert dict(LAYOUTS["mnli"].evaluated) == {"": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}


def test_quotation_marks_and_other_line_ends_are_text(tmp_path: Path) -> None:
    text = 'sentence\tlabel\n"open\t1\nshut"\t0\nodd\u2028\x85\x0c \rends\t1\n'
    found = read(write(tmp_path, text), LAYOUTS["sst2"])
    assert found.sentences == [['"open', 'shut"', "odd\u2028\x85\x0c \rends"]]
    assert found.targets.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("rte", "index\tsentence1\tlabel\n0\ta\tentailment\n", "lacks the columns sentence2; it has index"),
        ("rte", FILES["rte"][0] + "1\tThree.\tFour.\n", r"train\.tsv:3: 3 cells, not 4$"),
        (
            "rte",
            FILES["rte"][0] + "1\tThree.\tFour.\tmaybe\n2\n",
            r"train\.tsv:3: label 'maybe', not one of entailment, not_entailment \(and 1 more lines\)",
        ),
        ("stsb", FILES["stsb"][0].replace("4.800", "high"), r"train\.tsv:2: .*'high'"),
        ("cola", "", "has no examples"),
        ("cola", "gj04\t1\tThe sea rose.\n", r"train\.tsv:1: 3 cells, not 4"),
        ("sst2", "sentence\tlabel\n", "has no examples"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=problem):
        read(write(tmp_path, text), LAYOUTS[name])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"cannot read .*dev\.tsv"):
        read(tmp_path / "dev.tsv", LAYOUTS["rte"])
    (tmp_path / "dev.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(MissingDataError, match=r"cannot read .*dev\.tsv"):
        read(tmp_path / "dev.tsv", LAYOUTS["rte"])


def test_the_broken_lines_of_qqp_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = FILES["qqp"][0] + "8\t3\t4\tcut\n9\t5\t6\tWhy?\tWhy not?\t0\n"
    with caplog.at_level(logging.WARNING):
        found = read(write(tmp_path, text), LAYOUTS["qqp"])
    assert found.targets.tolist() == [1, 0]
    assert "1 lines of another shape are left out, the first" in caplog.text
