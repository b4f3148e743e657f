"""GLUE (Wang et al. 2019, arXiv:1804.07461) and data of your own: TSV files, and their metrics.

    splits = load("rte", "data/glue")          # reads data/glue/RTE/train.tsv and dev.tsv
    metrics("rte", predictions, labels)        # {"accuracy": ...}

GLUE does not publish its test labels. As in the CondLoRA paper, a fixed tenth of the training file
is held out to choose the epoch ("validation"), and what GLUE calls dev is reported as "test".
"""

import math
import os
import sys
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


class Task(NamedTuple):
    """Where a task's rows are, what its labels mean, and how it is scored."""

    folder: str  # under GLUE's folder, or the absolute path of one's own
    texts: tuple  # the columns with the sentence, or the two sentences
    label: str  # the column with the label
    classes: tuple  # by id; empty for scores
    metrics: Callable  # of (predictions, labels)
    devs: tuple = ("dev",)

    def load(self, root):
        """{"train", "validation", "test"} of Splits; MNLI also has "test_mismatched".

        Raises ValueError or FileNotFoundError saying which file and line is wrong.
        """
        folder = Path(root) / self.folder
        splits = held_out(self.read(folder / "train.tsv", at_least=2))
        for split, dev in zip(("test", "test_mismatched"), self.devs):
            splits[split] = self.read(folder / f"{dev}.tsv")
        return splits

    def read(self, file, at_least=1):
        """The Split in a file of so many rows or more."""
        with reading(file):
            rows = list(self.rows(file))
            if len(rows) < at_least:
                raise ValueError(f"it needs {at_least} rows or more, and has {len(rows)}")
            return Split([texts for texts, _, _ in rows],
                         [self.label_of(label, number) for _, label, number in rows])

    def rows(self, file):
        """(texts, label as it is written, line number) of each row."""
        lines = list(enumerate(table(file), 1))
        if self.folder == "CoLA":  # the one file without a header
            header = ["source", "label", "original_label", "sentence"]
        else:
            _, header = lines.pop(0)
        for column in (*self.texts, self.label):
            if header.count(column) != 1:
                raise ValueError(f"line 1 must name a column {column!r}, once; it has "
                                 f"{', '.join(map(repr, header)):.80}; tabs separate columns")
        text_columns = [header.index(name) for name in self.texts]
        label_column = header.index(self.label)
        for number, row in lines:
            is_short = len(row) <= max(label_column, *text_columns)
            # GLUE's own files have rows of odd lengths.
            if is_short or (os.path.isabs(self.folder) and len(row) != len(header)):
                raise ValueError(f"line {number}: {len(row)} columns, expected {len(header)}")
            label = row[label_column].strip()
            if not label:
                raise ValueError(f"line {number}: the label is empty")
            yield tuple(row[i] for i in text_columns), label, number

    def label_of(self, text, number):
        """The class id or the score that a label in a file stands for."""
        if text in self.classes:
            return self.classes.index(text)
        if not self.classes and abs(number_of(text)) < 1e15:
            return number_of(text)
        expected = f"one of {', '.join(self.classes):.100}" if self.classes else "a number"
        hint = "; for scores add --regression" * look_like_scores(self.classes)
        raise ValueError(f"line {number}: label {text!r:.40}, expected {expected}{hint}")


BINARY = ("0", "1")
SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, matthews_and_accuracy),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, accuracy),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, accuracy_and_f1),
    "stsb": Task("STS-B", SENTENCES, "score", (), correlations),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, accuracy_and_f1),
    "mnli": Task("MNLI", SENTENCES, "gold_label", NLI, accuracy, ("dev_matched", "dev_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, accuracy),
    "rte": Task("RTE", SENTENCES, "label", ENTAILMENT, accuracy),
    "wnli": Task("WNLI", SENTENCES, "label", BINARY, accuracy),
}


def own_task(folder, regression=False):
    """The Task of a folder's train.tsv and dev.tsv, if any: text (or text1, text2) and label."""
    folder = Path(folder).resolve()
    file = folder / "train.tsv"
    with reading(file):
        texts = ("text1", "text2") if {"text1", "text2"} & {*table(file)[0]} else ("text",)
        task = Task(str(folder), texts, "label", (),
                    correlations if regression else accuracy_and_macro_f1,
                    ("dev",) if (folder / "dev.tsv").is_file() else ())
        labels = sorted({label for _, label, _ in task.rows(file)})
        if len(labels) < 2:
            raise ValueError(f"two different labels or more are needed, it has {labels!r:.40}")
    return task if regression else task._replace(classes=tuple(labels))


def find_task(name, regression=False):
    """The Task of a name: "rte", "RTE", "sst2", "SST-2", ..., or of a folder of one's own."""
    task = TASKS.get(name.lower().replace("-", ""))
    if not task and not os.path.isdir(name):  # False also of a name that is too long
        raise ValueError(f"--task {name:.150} is neither a folder nor toy, {', '.join(TASKS)}")
    return task or own_task(name, regression)


def load(task, root):
    """The splits of a GLUE task ("cola", "sst2", ...) whose folder is in `root`: Task.load."""
    return find_task(task).load(root)


def metrics(task, predictions, labels):
    """The task's metrics, its main one first: {"accuracy": 0.9}, {"pearson": -0.1, ...}, ...

    Both are class ids (n,), or STS-B's scores (n,). Raises ValueError if their lengths differ.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"{predictions.shape} predictions for {labels.shape} labels")
    return find_task(task).metrics(predictions, labels)


def table(file):
    """[columns] of each line of a TSV file.

    Lines end at \\n and nowhere else, columns at \\t; a double quote is a character like any other.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found. For GLUE run `python data/download.py "
                                f"{file.parent.name}` or pass --data_dir; your own folder needs it")
    # MRPC begins with a byte-order mark, which utf-8-sig removes.
    text = file.read_bytes().decode("utf-8-sig").rstrip("\r\n")
    return [line.rstrip("\r").split("\t") for line in text.split("\n")]


def read_lines(file, n_texts):
    """A Split with labels 0: each line of a file ("-" for standard input) is a text, or two."""
    with reading(file):
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        if not data:
            raise ValueError("it has no lines")
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
        texts = [tuple(line.removesuffix("\r").split("\t")) for line in lines]
        for number, columns in enumerate(texts, 1):
            if len(columns) != n_texts:
                raise ValueError(f"line {number}: texts found: {len(columns)}, needed: {n_texts}; "
                                 f"tabs separate two texts")
    return Split(texts, [0] * len(texts))


def number_of(text):
    """The number that a text is, or nan."""
    try:
        return float(text.replace("_", "?"))  # Python would read 1_0 as ten
    except ValueError:
        return math.nan


def look_like_scores(classes):
    """Whether these names of classes are many numbers."""
    return len(classes) > 10 and not any(math.isnan(number_of(name)) for name in classes)


def held_out(whole):
    """{"train", "validation"}: a fixed tenth of the rows is held out; both in the file's order."""
    order = np.random.default_rng(0).permutation(len(whole.texts))
    size = max(1, len(order) // 10)
    pick = lambda rows: Split([whole.texts[i] for i in rows], [whole.labels[i] for i in rows])
    return {"train": pick(sorted(order[size:])), "validation": pick(sorted(order[:size]))}
