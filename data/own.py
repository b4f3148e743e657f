"""Your own data: a folder with train.tsv and, if you have a test set, dev.tsv.

The first line names the columns: `text`, or `text1` and `text2`, and `label`; a tab stands between.
Labels are classes, in sorted order, or numbers with --regression. As with GLUE a fixed tenth of
train.tsv chooses the epoch ("validation"), and dev.tsv is the test.
"""

import math
from pathlib import Path

import numpy as np

from . import glue


def load(folder, regression=False):
    """({"train", "validation", "test" if there is a dev.tsv} of Splits, class names, or ()).

    Raises ValueError or FileNotFoundError saying which file and line.
    """
    folder = Path(folder)
    file = folder / "train.tsv"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: a task's folder has train.tsv")
    header = glue.rows_of_file(file)[0]
    texts = ("text",) if "text" in header else ("text1", "text2")
    task = glue.Task(folder.name, texts, "label", None)
    whole = glue.read(task, file)
    classes = () if regression else tuple(sorted(set(whole.labels)))
    if len(classes) == 1:
        raise ValueError(f"{file} has one label only, {classes[0]!r:.40}")
    splits = glue.held_out(numbered(whole, classes, file), file)
    dev = folder / "dev.tsv"
    if dev.is_file():
        splits["test"] = numbered(glue.read(task, dev), classes, dev)
    return splits, classes


def numbered(split, classes, file):
    """The split with class ids, or numbers, for the labels' text."""
    labels = []
    for line, label in enumerate(split.labels, 2):
        if classes and label not in classes:
            raise ValueError(f"{file}, line {line}: label {label!r:.40} is not in train.tsv")
        labels.append(classes.index(label) if classes else number(label, f"{file}, line {line}"))
    return glue.Split(split.texts, labels)


def number(text, where):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e30:
        raise ValueError(f"{where}: label {text!r:.40} is no number, as --regression wants it")
    return value


def metrics(classes):
    """metrics(predictions, labels): accuracy and macro-F1, or without classes the correlations."""
    if not classes:
        return lambda predictions, labels: glue.metrics("stsb", predictions, labels)

    def accuracy_and_f1(predictions, labels):
        # As scikit-learn's: the mean over the classes that were either given or predicted.
        present = np.union1d(predictions, labels)
        f1s = [glue.f1(predictions == label, labels == label) for label in present]
        return {"accuracy": float(np.mean(predictions == labels)), "macro_f1": float(np.mean(f1s))}
    return accuracy_and_f1
