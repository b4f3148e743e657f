"""GLUE's files with their traps, its metrics, the made-up language, and data of one's own."""

import numpy as np
import pytest

from data import glue, toy

HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    "\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
    "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
}
ROWS = {
    "cola": ["x\t1\t\tIt snows."],
    "sst2": ["a fine day \t1"],
    "mrpc": ["0\t1\t2\tIt snows .\tIt rains ."],
    "stsb": ["0\tg\tf\ty\t1\tn\tn\tIt snows.\tIt rains.\t3.25"],
    "qqp": ["1\t2\t3\tWho?\tWhy?\t1"],
    "qnli": ["0\tWho?\tShe did.\tnot_entailment"],
    "rte": ["0\tIt snows.\tIt is cold.\tentailment"],
    "wnli": ["0\tIt fell.\tThe cup fell.\t1"],
    "mnli": ["0\t1\t2\tg\t(a)\t(b)\t(c)\t(d)\tIt snows.\tIt is hot.\tneutral\tcontradiction"],
}
LABELS = {
    "cola": 1,
    "sst2": 1,
    "mrpc": 0,
    "stsb": 3.25,
    "qqp": 1,
    "qnli": 1,
    "rte": 0,
    "wnli": 1,
    "mnli": 2,
}


def write_task(root, task, rows=None, dev=None):
    folder = root / glue.TASKS[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", *glue.TASKS[task].devs):
        lines = ([HEADERS[task]] if task in HEADERS else []) + (
            dev if dev and name != "train" else rows or ROWS[task] * 10
        )
        (folder / f"{name}.tsv").write_bytes("\n".join(lines).encode())
    return folder


@pytest.mark.parametrize("task", glue.TASKS)
def test_all_nine_tasks_are_read_by_their_columns_names(tmp_path, task):
    write_task(tmp_path, task)
    splits = glue.load(task, tmp_path)
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sizes == {"train": 9, "validation": 1, "test": 10} | (
        {"test_mismatched": 10} if task == "mnli" else {}
    )
    assert all(label == LABELS[task] for split in splits.values() for label in split.labels)
    expected = {
        "cola": ("It snows.",),
        "sst2": ("a fine day ",),
        "qnli": ("Who?", "She did."),
        "mnli": ("It snows.", "It is hot."),
    }
    assert splits["test"].texts[0] == expected.get(task, splits["test"].texts[0])


def test_quotes_byte_order_marks_carriage_returns_and_odd_line_separators_are_no_structure(
    tmp_path,
):
    rows = [
        '1\t1\t2\t"Odd , he said .\tHe said " odd .\r',
        "0\t3\t4\tA\u2028b\x85c\x0cd .\t\r",
        '1\t5\t6\t"\t"',
    ]
    write_task(tmp_path, "mrpc", rows)
    test = glue.load("mrpc", tmp_path)["test"]
    assert test.texts == [
        ('"Odd , he said .', 'He said " odd .'),
        ("A\u2028b\x85c\x0cd .", ""),
        ('"', '"'),
    ] and test.labels == [1, 0, 1]


def test_a_fixed_tenth_of_train_is_held_out(tmp_path):
    write_task(tmp_path, "sst2", [f"day {i}\t{i % 2}" for i in range(203)], dev=["night\t0"])
    one, two = glue.load("SST-2", tmp_path), glue.load("sst2", tmp_path)
    assert one == two and len(one["validation"].texts) == 20 and one["test"].texts == [("night",)]
    assert sorted(one["train"].texts + one["validation"].texts) == sorted(
        (f"day {i}",) for i in range(203)
    )
    assert all(int(text[0].split()[1]) % 2 == label for text, label in zip(*one["validation"]))


@pytest.mark.parametrize(
    "task, row, words",
    [
        ("rte", "7\tOnly one.", "RTE/train.tsv: line 12: 2 columns, expected 4"),
        (
            "rte",
            "7\tIt snows.\tIt rains.\tmaybe",
            "RTE/train.tsv: line 12: label 'maybe', expected one of entailment, not_entailment",
        ),
        ("cola", "x\t2\t\tIt snows.", "CoLA/train.tsv: line 11: label '2'"),
        (
            "stsb",
            "0\tg\tf\ty\t1\tn\tn\tIt snows.\tIt rains.\t5,1",
            "STS-B/train.tsv: line 12: label '5,1', expected a number",
        ),
        ("stsb", "0\tg\tf\ty\t1\tn\tn\tIt snows.\tIt rains.\tnan", "label 'nan'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, task, row, words):
    write_task(tmp_path, task, ROWS[task] * 10 + [row])
    with pytest.raises(ValueError, match=words):
        glue.load(task, tmp_path)


def test_a_missing_file_column_or_task_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.tsv not found. For GLUE .*load.py RTE`"):
        glue.load("rte", tmp_path)
    (write_task(tmp_path, "rte") / "dev.tsv").write_text("index\tsentence1\tlabel\n")
    with pytest.raises(ValueError, match="dev.tsv: line 1 must name a column 'sentence2'"):
        glue.load("rte", tmp_path)
    for content, words in (
        (b"index\tsentence1\tsentence2\tlabel\n", "dev.tsv: it needs 1 rows or more, and has 0"),
        (b"index\tcaf\xe9", "dev.tsv: UnicodeDecodeError"),
    ):
        (tmp_path / "RTE" / "dev.tsv").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            glue.load("rte", tmp_path)
    with pytest.raises(ValueError, match="xnli is neither a folder nor toy, cola, sst2"):
        glue.load("xnli", tmp_path)


def test_metrics_are_scikit_learns_and_scipys():
    predictions, labels = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 0, 0, 1, 0]
    assert list(glue.metrics("mrpc", predictions, labels).items()) == [
        ("accuracy", 0.7),
        ("f1", pytest.approx(0.7272727272727273)),
    ]
    assert list(glue.metrics("cola", predictions, labels).items()) == [
        ("matthews", pytest.approx(0.408248290463863)),
        ("accuracy", 0.7),
    ]
    assert glue.metrics("mnli", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}
    scores = glue.metrics(
        "stsb", [0.1, 2.5, 2.5, 4.9, 3.3, 0.1, 5.2], [0, 2.2, 3.0, 5, 3.0, 1.0, 4.4]
    )
    assert list(scores.items()) == [
        ("pearson", pytest.approx(0.966551357119323)),
        ("spearman", pytest.approx(0.9266445023146869)),
    ]


def test_the_held_out_tenth_is_always_the_same_so_that_figures_compare():
    whole = glue.Split([(str(i),) for i in range(30)], list(range(30)))
    splits = glue.held_out(whole)
    assert splits["validation"].labels == [2, 11, 26]
    assert splits["train"].labels == [i for i in range(30) if i not in (2, 11, 26)]
    assert splits["validation"].texts == [("2",), ("11",), ("26",)]


def test_undefined_metrics_are_zero():
    assert glue.metrics("cola", [1, 1, 1], [1, 0, 1])["matthews"] == 0
    assert glue.metrics("stsb", [0.1, 0.1, 0.1], [1, 2, 3]) == {"pearson": 0, "spearman": 0}
    # scipy's pearsonr and spearmanr
    found = glue.metrics("stsb", [1e300, 2e300, -1e300], [1, 2, 3])
    assert found == pytest.approx({"pearson": -0.6546536707079772, "spearman": -0.5})
    assert all(np.isnan(x) for x in glue.metrics("stsb", [1, np.nan, 2], [1, 2, 3]).values())
    assert glue.metrics("qqp", [0, 0], [0, 0])["f1"] == 0
    with pytest.raises(ValueError, match=r"\(2,\) predictions for \(1,\) labels"):
        glue.metrics("rte", [0, 1], [0])


# The made-up language ----------------------------------------------------------------------------


def test_the_toy_task_is_the_same_every_time_balanced_and_without_repeats():
    splits = toy.load()
    assert splits == toy.load()
    texts = [text for split in splits.values() for text in split.texts]
    assert len(set(texts)) == len(texts)
    assert all(abs(np.mean(split.labels) - 0.5) < 0.06 for split in splits.values())
    assert {word for text in texts for sentence in text for word in sentence.split()} <= set(
        toy.vocabulary()
    )


def test_every_toy_sentence_is_well_formed_whatever_its_label():
    for sentence in sum(toy.load()["test"].texts, ()):
        (kind, number, _), noun = sentence.split()[-1][len("verb"):], sentence.split()[1]
        noun = sentence.split()[2] if noun.startswith("adj") else noun
        assert sentence[: len("det0")] == f"det{number}" and noun[4] == kind
        assert noun.startswith(("noun", "kind"))


def test_a_toy_pair_is_true_where_noun_and_verb_say_the_same():
    split = toy.load()["test"]
    for (first, second), label in zip(split.texts, split.labels):
        (noun, *_), (said,) = (
            [w for w in s.split() if w.startswith(("noun", "kind"))] for s in (first, second)
        )
        assert noun[4] == said[4]  # always of the same kind: that alone tells nothing
        says_noun = said.startswith("kind") or said[:6] == noun[:6]  # noun00a, noun00b: synonyms
        assert (says_noun and first.split()[-1] == second.split()[-1]) == bool(label)


# Your own data -----------------------------------------------------------------------------------


def write_own(folder, train, dev=None, header="text\tlabel"):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("dev", dev)):
        if rows is not None:
            (folder / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_a_folder_of_ones_own_is_a_task_with_its_labels_in_sorted_order(tmp_path):
    rows = [f"sentence {i}\t{('so so', 'good', 'bad')[i % 3]}" for i in range(30)]
    task = glue.own_task(write_own(tmp_path / "mine", rows, rows[:2]))
    splits = task.load("anywhere")
    assert task.classes == ("bad", "good", "so so")
    assert (splits["test"].texts, splits["test"].labels) == (
        [("sentence 0",), ("sentence 1",)],
        [2, 1],
    )
    assert len(splits["train"].labels) == 27 and len(splits["validation"].labels) == 3
    rows = [f"a\tb {i}\t{i / 4}" for i in range(10)]
    folder = write_own(tmp_path / "pairs", rows, header="text1\ttext2\tlabel")
    task = glue.own_task(folder, regression=True)
    splits = task.load("anywhere")
    assert task.classes == () and sorted(splits) == ["train", "validation"]
    assert sorted(splits["train"].labels + splits["validation"].labels) == [
        i / 4 for i in range(10)
    ]


def test_accuracy_and_macro_f1_are_scikit_learns():
    metrics = glue.accuracy_and_macro_f1
    found = metrics(np.array([0, 1, 2, 2, 1, 0, 0]), np.array([0, 1, 2, 1, 1, 2, 1]))
    # accuracy_score, and f1_score(average="macro"), in which the absent class d does not count
    assert found == pytest.approx({"accuracy": 4 / 7, "macro_f1": 0.5555555555555555})
    found = metrics(np.array([0, 3]), np.array([0, 1]))
    assert found == pytest.approx({"accuracy": 1 / 2, "macro_f1": 1 / 3})


@pytest.mark.parametrize(
    "train, dev, header, words",
    [
        (["a\t1"], None, "text\tlabel", "train.tsv: two different labels or more are"),
        (
            ["a\t1", "b\t2"],
            ["c\t3"],
            "text\tlabel",
            "dev.tsv: line 2: label '3', expected one of 1, 2",
        ),
        (["a\t1", "b"], None, "text\tlabel", "train.tsv: line 3: 1 columns, expected 2"),
        (["a\t1", "b\tc\t2"], None, "text\tlabel", "train.tsv: line 3: 3 columns, expected 2"),
        (["a\t1"], None, "sentence\tlabel", "line 1 must name a column 'text'"),
        ([], None, "text\tlabel", "train.tsv: two different labels or more are needed, it has .."),
        (["a\t1", "b\t "], None, "text\tlabel", "train.tsv: line 3: the label is empty"),
    ],
)
def test_a_file_of_ones_own_that_is_wrong_is_named_with_its_line(
    tmp_path, train, dev, header, words
):
    with pytest.raises(ValueError, match=words):
        glue.own_task(write_own(tmp_path / "mine", train, dev, header)).load("")


def test_a_regression_label_that_is_no_number_is_named(tmp_path):
    for text in ("x", "1_0"):
        folder = write_own(tmp_path / text, ["a\t1.5", f"b\t{text}"])
        with pytest.raises(ValueError, match=f"line 3: label '{text}', expected a number"):
            glue.own_task(folder, regression=True).load("")
    folder = write_own(tmp_path / "same", ["a\t1.5", "b\t1.5"])
    with pytest.raises(ValueError, match="it has ..1.5"):
        glue.own_task(folder, regression=True)


def test_a_file_of_one_row_leaves_nothing_to_train_on(tmp_path):
    write_task(tmp_path, "sst2", ["a\t1"])
    with pytest.raises(ValueError, match="SST-2/train.tsv: it needs 2 rows or more, and has 1"):
        glue.load("sst2", tmp_path)
