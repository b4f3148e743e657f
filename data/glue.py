"""GLUE (Wang et al. 2019, arXiv:1804.07461): nine tasks read from the benchmark's own TSV files, and their metrics.

    splits = load("rte", "data/glue")          # reads data/glue/RTE/train.tsv and dev.tsv
    splits["train"].texts[0], splits["train"].labels[0]
    metrics("rte", predictions, labels)        # {"accuracy": ...}

GLUE keeps its test labels to itself. As in the CondLoRA paper, a fixed tenth of the training file is held out to choose
the epoch ("validation"), and what GLUE calls dev is reported as "test".
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    folder: str
    texts: tuple            # columns, by header name: one sentence or two
    label: str              # column
    classes: tuple          # in the order of their ids; none: a score, that is a regression
    devs: tuple = ("dev",)


YES_NO = ("0", "1")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", YES_NO),
    "sst2": Task("SST-2", ("sentence",), "label", YES_NO),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", YES_NO),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", ()),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", YES_NO),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
                 ("dev_matched", "dev_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment")),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", YES_NO),
}


class Split(NamedTuple):
    texts: list             # of tuples: (sentence,) or (sentence, sentence)
    labels: list            # of class ids, or of scores from 0 to 5


def load(task, root):
    """{"train", "validation", "test"} of Splits; MNLI's "test" is its matched dev set, "test_mismatched" the other.

    task "cola", "sst2", ... or the folder's name. Raises ValueError or FileNotFoundError saying which file and line.
    """
    task = TASKS[canonical(task)]
    train = read(task, Path(root) / task.folder / "train.tsv")
    order = np.random.default_rng(0).permutation(len(train.texts))
    held_out = max(1, len(order) // 10)
    part = lambda rows: Split([train.texts[i] for i in sorted(rows)], [train.labels[i] for i in sorted(rows)])
    splits = {"train": part(order[held_out:]), "validation": part(order[:held_out])}
    for name, dev in zip(("test", "test_mismatched"), task.devs):
        splits[name] = read(task, Path(root) / task.folder / f"{dev}.tsv")
    return splits


def canonical(task):
    name = task.lower().replace("-", "")
    if name not in TASKS:
        raise ValueError(f"task is {task!r}: GLUE has {', '.join(TASKS)}")
    return name


def read(task, file):
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: python data/download.py {canonical(task.folder)} fetches it, --data_dir says where it is")
    # Lines end at \n and nowhere else, columns at \t; a double quote is a character like any other; MRPC begins with a
    # byte-order mark, which utf-8-sig takes off.
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            rows = [line.rstrip("\r\n").split("\t") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    if task.folder == "CoLA":                                         # the one file without a header
        header, first = ["source", "label", "original_label", "sentence"], 1
    else:
        header, first = rows.pop(0) if rows else [], 2
    for column in (*task.texts, task.label):
        if column not in header:
            raise ValueError(f"{file}, line 1: no column {column!r} in the header")
    if not rows:
        raise ValueError(f"{file} has no rows")
    text_columns, label_column = [header.index(name) for name in task.texts], header.index(task.label)
    needed = 1 + max(label_column, *text_columns)
    texts, labels = [], []
    for number, row in enumerate(rows, first):
        if len(row) < needed:
            raise ValueError(f"{file}, line {number}: {len(row)} columns, expected {len(header)}")
        texts.append(tuple(row[i] for i in text_columns))
        labels.append(read_label(task, row[label_column], f"{file}, line {number}"))
    return Split(texts, labels)


def read_label(task, text, where):
    if task.classes:
        if text not in task.classes:
            raise ValueError(f"{where}: label {text!r}, expected one of {', '.join(task.classes)}")
        return task.classes.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: score {text!r}, expected a number from 0 to 5")
    return score


# Metrics -------------------------------------------------------------------------------------------------------------

def metrics(task, predictions, labels):
    """The task's metrics, its main one first: {"accuracy": 0.9} and so on, each a fraction and not a percentage.

    predictions: class ids (n,), or scores (n,) for STS-B; labels alike. Raises ValueError where their lengths differ.
    """
    task = canonical(task)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions of shape {predictions.shape} for labels of shape {labels.shape}")
    if task == "stsb":
        return {"pearson": pearson(predictions, labels), "spearman": pearson(ranks(predictions), ranks(labels))}
    accuracy = float((predictions == labels).mean())
    if task == "cola":
        # of two binary variables, Matthews' correlation is Pearson's
        return {"matthews": pearson(predictions, labels), "accuracy": accuracy}
    if task in ("mrpc", "qqp"):
        return {"accuracy": accuracy, "f1": f1(predictions, labels)}
    return {"accuracy": accuracy}


def f1(predictions, labels):
    """Harmonic mean of precision and recall of class 1; 0 where neither side has one."""
    hits, either = np.sum((predictions == 1) & (labels == 1)), np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / either) if either else 0.0


def pearson(x, y):
    """Pearson's correlation; 0 where one side is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def ranks(x):
    """Ranks from 1; equal values share the average of theirs."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[which]
