"""GLUE (Wang et al. 2019, arXiv:1804.07461) and data of your own: TSV files, and their metrics.

    splits = load("rte", "data/glue")          # reads data/glue/RTE/train.tsv and dev.tsv
    splits["train"].texts[0], splits["train"].labels[0]
    metrics("rte", predictions, labels)        # {"accuracy": ...}

GLUE does not publish its test labels. As in the CondLoRA paper, a fixed tenth of the training file
is held out to choose the epoch ("validation"), and what GLUE calls dev is reported as "test".
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from .command import reading

# Metrics of class ids (n,), or of scores (n,), a task's main one first ----------------------------

def accuracy(predictions, labels):
    return {"accuracy": float(np.mean(predictions == labels))}


def accuracy_and_f1(predictions, labels):
    return accuracy(predictions, labels) | {"f1": f1(predictions == 1, labels == 1)}


def accuracy_and_macro_f1(predictions, labels):
    """Macro-F1 is the mean over the classes that were either given or predicted."""
    f1s = [f1(predictions == c, labels == c) for c in np.union1d(predictions, labels)]
    return accuracy(predictions, labels) | {"macro_f1": float(np.mean(f1s))}


def matthews_and_accuracy(predictions, labels):
    # Of two binary variables, Matthews' correlation is Pearson's.
    return {"matthews": pearson(predictions, labels)} | accuracy(predictions, labels)


def correlations(predictions, labels):
    return {"pearson": pearson(predictions, labels),
            "spearman": pearson(ranks(predictions), ranks(labels))}


def f1(predicted, given):
    """Harmonic mean of precision and recall, from two boolean arrays; 0 if both are all False."""
    either = np.sum(predicted) + np.sum(given)
    return float(2 * np.sum(predicted & given) / either) if either else 0.0


def pearson(x, y):
    """Pearson's correlation; 0 if one side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = (v / np.abs(v).max() for v in (x, y))  # or squares of very large ones would overflow
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def ranks(x):
    """Ranks from 1; equal values share the average of theirs."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return np.where(np.isnan(x), np.nan, (np.cumsum(count) - (count - 1) / 2)[which])


# Tasks -------------------------------------------------------------------------------------------

class Split(NamedTuple):
    texts: list  # of tuples: (sentence,) or (sentence, sentence)
    labels: list  # of class ids, or of scores


@dataclass
class Task:
    """Where a task's rows are, what its labels mean, and how it is scored."""

    folder: str  # under GLUE's folder, or the absolute path of one's own
    texts: tuple  # the columns with the sentence, or the two sentences
    label: str  # the column with the label
    classes: tuple  # by id; empty for scores
    metrics: Callable  # of (predictions, labels)
    devs: tuple = ("dev",)
    scores: tuple = (0.0, 5.0)  # lowest and highest

    def load(self, root):
        """{"train", "validation", "test"} of Splits; MNLI also has "test_mismatched".

        Raises ValueError or FileNotFoundError saying which file and line is wrong.
        """
        files = [Path(root) / self.folder / f"{part}.tsv" for part in ("train", *self.devs)]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} not found. Run `python data/download.py "
                                        f"{self.folder}`, or pass --data_dir.")
        splits = held_out(self.read(files[0]), files[0])
        for split, file in zip(("test", "test_mismatched"), files[1:]):
            splits[split] = self.read(file)
        return splits

    def read(self, file):
        """The Split in a file."""
        with reading(file):
            rows = self.rows(file)
            return Split([texts for _, texts, _ in rows],
                         [self.label_of(label, number) for number, _, label in rows])

    def rows(self, file):
        """[(line number, texts, label as it is written)]"""
        # Lines end at \n and nowhere else, columns at \t; a double quote is a character like any
        # other. MRPC begins with a byte-order mark, which utf-8-sig removes.
        with open(file, encoding="utf-8-sig", newline="\n") as opened:
            lines = list(enumerate((line.rstrip("\r\n").split("\t") for line in opened), 1))
        while lines and lines[-1][1] == [""]:
            lines.pop()
        if self.folder == "CoLA":  # the one file without a header
            header = ["source", "label", "original_label", "sentence"]
        elif not lines:
            raise ValueError("it is empty")
        else:
            header = lines.pop(0)[1]
        for column in (*self.texts, self.label):
            if header.count(column) != 1:
                number = "two columns" if column in header else "no column"
                raise ValueError(f"{number} {column!r} in line 1, which has "
                                 f"{', '.join(map(repr, header)):.80}; tabs separate columns")
        if not lines:
            raise ValueError("it has no rows")
        text_columns = [header.index(name) for name in self.texts]
        label_column = header.index(self.label)
        result = []
        for number, row in lines:
            is_short = len(row) <= max(label_column, *text_columns)
            # GLUE's own files have rows of odd lengths.
            if is_short or (self.is_own and len(row) != len(header)):
                raise ValueError(f"line {number}: {len(row)} columns, expected {len(header)}")
            label = row[label_column].strip()
            if not label:
                raise ValueError(f"line {number}: the label is empty")
            result.append((number, tuple(row[i] for i in text_columns), label))
        return result

    def label_of(self, text, number):
        """The class id or the score that a label in a file stands for."""
        if self.classes:
            if text not in self.classes:
                hint = "; for scores add --regression" * look_like_scores(self.classes)
                raise ValueError(f"line {number}: label {text!r:.40}, expected one of "
                                 f"{', '.join(self.classes):.100}{hint}")
            return self.classes.index(text)
        low, high = self.scores
        try:
            score = float(text.replace("_", "?"))  # Python would read 1_0 as ten
        except ValueError:
            score = math.nan
        if not low <= score <= high:
            raise ValueError(f"line {number}: score {text!r:.40}, expected a number from {low:g} "
                             f"to {high:g}")
        return score

    @property
    def is_own(self):
        return Path(self.folder).is_absolute()


BINARY = ("0", "1")
SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
MRPC_TEXTS, QQP_TEXTS = ("#1 String", "#2 String"), ("question1", "question2")
MNLI_DEVS = ("dev_matched", "dev_mismatched")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, matthews_and_accuracy),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, accuracy),
    "mrpc": Task("MRPC", MRPC_TEXTS, "Quality", BINARY, accuracy_and_f1),
    "stsb": Task("STS-B", SENTENCES, "score", (), correlations),
    "qqp": Task("QQP", QQP_TEXTS, "is_duplicate", BINARY, accuracy_and_f1),
    "mnli": Task("MNLI", SENTENCES, "gold_label", NLI, accuracy, MNLI_DEVS),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, accuracy),
    "rte": Task("RTE", SENTENCES, "label", ENTAILMENT, accuracy),
    "wnli": Task("WNLI", SENTENCES, "label", BINARY, accuracy),
}


def own_task(folder, regression=False):
    """The Task of a folder with train.tsv and perhaps dev.tsv, the test.

    Their first line names the columns: `text`, or `text1` and `text2`, and `label`. Labels are
    classes, in sorted order, or with `regression` numbers.
    """
    folder = Path(folder).resolve()
    file = folder / "train.tsv"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: a task's folder has a train.tsv")
    with reading(file):
        with open(file, encoding="utf-8-sig", newline="\n") as opened:
            header = opened.readline().rstrip("\r\n").split("\t")
        if "text" in header and "text1" in header:
            raise ValueError("line 1 has the columns text and text1: name one text, or two")
        texts = ("text1", "text2") if {"text1", "text2"} & {*header} else ("text",)
        task = Task(str(folder), texts, "label", (),
                    correlations if regression else accuracy_and_macro_f1,
                    ("dev",) if (folder / "dev.tsv").is_file() else (), (-1e15, 1e15))
        labels = sorted({label for _, _, label in task.rows(file)})
        if len(labels) < 2:
            raise ValueError(f"it has one label only, {labels[0]!r:.40}")
    return task if regression else replace(task, classes=tuple(labels))


def find_task(name, regression=False):
    """The Task of a name: "rte", "RTE", "sst2", "SST-2", ..., or of a folder of one's own."""
    task = TASKS.get(name.lower().replace("-", ""))
    if not task and not os.path.isdir(name):  # False also of a name that is too long
        if Path(name).is_absolute():
            raise ValueError(f"folder {name:.150} not found: say where it is with --task")
        raise ValueError(f"{name!r:.100} is neither a folder nor one of {', '.join(TASKS)}")
    return task or own_task(name, regression)


def load(task, root):
    """The splits of a GLUE task ("cola", "sst2", ...) whose folder is in `root`: Task.load."""
    return find_task(task).load(root)


def metrics(task, predictions, labels):
    """The task's metrics, its main one first: {"accuracy": 0.9}, {"pearson": -0.1, ...}, ...

    predictions: class ids (n,), or scores (n,) for STS-B; labels likewise. Raises ValueError if
    their lengths differ.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions of shape {predictions.shape} "
                         f"for labels of shape {labels.shape}")
    return find_task(task).metrics(predictions, labels)


def read_lines(file, n_texts):
    """A Split with labels 0: each line of a file ("-" for standard input) is a text, or two."""
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--predict {file} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"--predict {file} cannot be read: {error.strerror}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    texts = [tuple(line.removesuffix("\r").split("\t")) for line in lines]
    for number, columns in enumerate(texts, 1):
        if len(columns) != n_texts:
            plural = "texts" if len(columns) > 1 else "text"
            needed = "2, separated by a tab" if n_texts == 2 else "1"
            raise ValueError(f"{file}, line {number}: found {len(columns)} {plural}; this model "
                             f"needs {needed}")
    if not texts:
        raise ValueError(f"{file} has no lines")
    return Split(texts, [0] * len(texts))


def look_like_scores(classes):
    """Whether these names of classes are many numbers."""
    try:
        return len([float(name) for name in classes]) > 10
    except ValueError:
        return False


def held_out(whole, file):
    """{"train", "validation"}: a fixed tenth of the rows is held out; both in the file's order."""
    if len(whole.texts) < 2:
        raise ValueError(f"{file} has one row: at least one more is needed, to be held out")
    order = np.random.default_rng(0).permutation(len(whole.texts))
    size = max(1, len(order) // 10)
    pick = lambda rows: Split([whole.texts[i] for i in rows], [whole.labels[i] for i in rows])
    return {"train": pick(sorted(order[size:])), "validation": pick(sorted(order[:size]))}
