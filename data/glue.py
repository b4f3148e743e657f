"""GLUE (Wang et al. 2019, arXiv:1804.07461) and data of your own: TSV files, and their metrics.

    splits = load("rte", "data/glue")          # reads data/glue/RTE/train.tsv and dev.tsv
    splits["train"].texts[0], splits["train"].labels[0]
    metrics("rte", predictions, labels)        # {"accuracy": ...}

GLUE keeps its test labels to itself. As in the CondLoRA paper, a fixed tenth of the training file
is held out to choose the epoch ("validation"), and what GLUE calls dev is reported as "test".
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    folder: str
    texts: tuple  # columns, by header name: one sentence or two
    label: str  # column
    classes: tuple | None  # in the order of their ids; (): a regression; None: labels stay text
    devs: tuple = ("dev",)
    scores: tuple = (0.0, 5.0)  # a regression's lowest and highest


BINARY = ("0", "1")
SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY),
    "stsb": Task("STS-B", SENTENCES, "score", ()),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY),
    "mnli": Task("MNLI", SENTENCES, "gold_label", NLI, ("dev_matched", "dev_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": Task("RTE", SENTENCES, "label", ENTAILMENT),
    "wnli": Task("WNLI", SENTENCES, "label", BINARY),
}


class Split(NamedTuple):
    texts: list  # of tuples: (sentence,) or (sentence, sentence)
    labels: list  # of class ids, or of scores


def load(task, root):
    """{"train", "validation", "test"} of Splits; MNLI also has "test_mismatched".

    task is "cola", "sst2", ... or the folder's name, root the folder that holds those folders.
    Raises ValueError or FileNotFoundError saying which file and line.
    """
    name = canonical(task)
    task = TASKS[name]
    files = [Path(root) / task.folder / f"{part}.tsv" for part in ("train", *task.devs)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: python data/download.py {name} fetches it, "
                                    f"--data_dir says where it is")
    splits = held_out(read_split(task, files[0]), files[0])
    for split, file in zip(("test", "test_mismatched"), files[1:]):
        splits[split] = read_split(task, file)
    return splits


def load_folder(folder, regression=False):
    """Data of your own: ({"train", "validation", and "test" if there is a dev.tsv}, class names).

    The first line of train.tsv and dev.tsv names the columns: `text`, or `text1` and `text2`, and
    `label`. Labels are classes, in sorted order, or with `regression` numbers, without classes.
    Raises ValueError or FileNotFoundError saying which file and line.
    """
    file, dev = Path(folder) / "train.tsv", Path(folder) / "dev.tsv"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: a task's folder has train.tsv")
    texts = ("text",) if "text" in rows_of(file)[0] else ("text1", "text2")
    task = Task("", texts, "label", () if regression else None, scores=(-1e15, 1e15))
    if not regression:
        # Read once for the names of the classes, and below for their ids.
        task = task._replace(classes=tuple(sorted(set(read_split(task, file).labels))))
        if len(task.classes) == 1:
            raise ValueError(f"{file} has one label only, {task.classes[0]!r:.40}")
    splits = held_out(read_split(task, file), file)
    if dev.is_file():
        splits["test"] = read_split(task, dev)
    return splits, task.classes


def held_out(whole, file):
    """{"train", "validation"}: a fixed tenth of the rows is held out; both in the file's order."""
    if len(whole.texts) < 2:
        raise ValueError(f"{file} has one row: one more is needed, to be held out")
    order = np.random.default_rng(0).permutation(len(whole.texts))
    size = max(1, len(order) // 10)
    pick = lambda rows: Split([whole.texts[i] for i in rows], [whole.labels[i] for i in rows])
    return {"train": pick(sorted(order[size:])), "validation": pick(sorted(order[:size]))}


def canonical(task):
    name = task.lower().replace("-", "")
    if name not in TASKS:
        raise ValueError(f"task is {task!r}: GLUE has {', '.join(TASKS)}")
    return name


def rows_of(file):
    """The lines of a TSV file, each as a list of its columns."""
    # Lines end at \n and nowhere else, columns at \t; a double quote is a character like any other.
    # MRPC begins with a byte-order mark, which utf-8-sig takes off.
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            rows = [line.rstrip("\r\n").split("\t") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    while rows and rows[-1] == [""]:
        rows.pop()
    if not rows:
        raise ValueError(f"{file} is empty")
    return rows


def read_split(task, file):
    rows = rows_of(file)
    if task.folder == "CoLA":  # the one file without a header
        header, first = ["source", "label", "original_label", "sentence"], 1
    else:
        header, first = rows.pop(0), 2
    for column in (*task.texts, task.label):
        if column not in header:
            raise ValueError(f"{file}, line 1: no column {column!r} in the header, "
                             f"which has {', '.join(header):.100}")
    if not rows:
        raise ValueError(f"{file} has no rows")
    text_columns = [header.index(name) for name in task.texts]
    label_column = header.index(task.label)
    is_own = not task.folder  # GLUE's own files have rows of odd lengths
    texts, labels = [], []
    for number, row in enumerate(rows, first):
        where = f"{file}, line {number}"
        if len(row) <= max(label_column, *text_columns) or (is_own and len(row) != len(header)):
            raise ValueError(f"{where}: {len(row)} columns, expected {len(header)}")
        texts.append(tuple(row[i] for i in text_columns))
        labels.append(read_label(task, row[label_column], where))
    return Split(texts, labels)


def read_label(task, text, where):
    if task.classes is None:
        return text
    if task.classes:
        if text not in task.classes:
            raise ValueError(f"{where}: label {text!r:.40}, "
                             f"expected one of {', '.join(task.classes):.100}")
        return task.classes.index(text)
    low, high = task.scores
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise ValueError(f"{where}: score {text!r:.40}, expected a number from {low:g} to {high:g}")
    return score


# Metrics -----------------------------------------------------------------------------------------

def metrics(task, predictions, labels):
    """The task's metrics, its main one first: {"accuracy": 0.9} and so on, each a fraction.

    predictions: class ids (n,), or scores (n,) for STS-B; labels alike. Raises ValueError where
    their lengths differ.
    """
    task = canonical(task)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions of shape {predictions.shape} "
                         f"for labels of shape {labels.shape}")
    if task == "stsb":
        return correlations(predictions, labels)
    if task == "cola":
        # Of two binary variables, Matthews' correlation is Pearson's.
        return {"matthews": pearson(predictions, labels)} | accuracy(predictions, labels)
    if task in ("mrpc", "qqp"):
        return accuracy(predictions, labels) | {"f1": f1(predictions == 1, labels == 1)}
    return accuracy(predictions, labels)


def accuracy(predictions, labels):
    return {"accuracy": float(np.mean(predictions == labels))}


def correlations(predictions, labels):
    return {"pearson": pearson(predictions, labels),
            "spearman": pearson(ranks(predictions), ranks(labels))}


def accuracy_and_macro_f1(predictions, labels):
    """Of data of your own; macro-F1 is the mean over the classes either given or predicted."""
    f1s = [f1(predictions == c, labels == c) for c in np.union1d(predictions, labels)]
    return accuracy(predictions, labels) | {"macro_f1": float(np.mean(f1s))}


def f1(predicted, given):
    """Harmonic mean of precision and recall, from two boolean arrays; 0 where neither has one."""
    either = np.sum(predicted) + np.sum(given)
    return float(2 * np.sum(predicted & given) / either) if either else 0.0


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
