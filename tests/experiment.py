"""LoRA, CondLoRA and its controls at the paper's size: the README's runs, one line of a CSV each.

    python tests/experiment.py rate --init_from FOLDER         # which learning rate, by validation
    python tests/experiment.py seeds --init_from FOLDER        # four more seeds, there or near
    python tests/experiment.py analysis long sst2 --init_from FOLDER
    python tests/experiment.py small --init_from FOLDER      # the 6-layer encoder
    python tests/experiment.py tables                          # what the CSV files say
    python tests/experiment.py figure                          # assets/mpnet.svg

A stage runs what the CSV lacks, several runs side by side on every GPU, the long ones first; it may
be stopped and started again, and others may follow it on one command line. Every run is train.py
with batches of 16 and its other defaults. "analysis" also runs analyze.py on LoRA trained with the
given labels and with shuffled ones, both after the last epoch.
"""

import argparse
import csv
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from html import escape
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import glue
from data.picture import Picture

TASKS = ("stsb", "cola", "mrpc", "rte")
METHODS = ("lora", "condlora", "tied", "random", "head")
ADAPTERS = METHODS[:4]
# Steps an epoch, to start long runs first.
STEPS = {"rte": 141, "mrpc": 207, "stsb": 324, "cola": 482, "sst2": 3789}
RATES = (3e-4, 1e-3, 2e-3)
FURTHER = {3e-4: 1e-4, 2e-3: 5e-3}  # one step further if the edge is the best
STAGES = ("rate", "seeds", "analysis", "long", "sst2", "small")
SETTINGS = dict(encoder="mpnet", task="", method="", targets="query value", rank=8, lr=0.0, seed=0,
                clip=1.0, weight_decay=0.1, max_len=128, epochs=20)
RESULTS = ("best_epoch", "validation", "test", "last_loss", "seconds", "curve")
ANALYSIS = ("task", "labels", "seed", "lr", "matrix", "trained", "control", "control_sd", "z",
            "raw", "raw_random", "raw_sd", "raw_z")


# What is run -------------------------------------------------------------------------------------

def runs_of(stage, rows):
    """A stage's runs, as dicts of SETTINGS."""
    each = itertools.product
    run = lambda task, method, lr, **more: SETTINGS | dict(task=task, method=method, lr=lr, **more)
    rate = lambda task, method: best_rate(rows, task, method)
    if stage == "rate":
        runs = [run(*settings) for settings in each(TASKS, METHODS, RATES)]
        runs += [run(task, method, FURTHER[rate(task, method)])
                 for task, method in each(TASKS, METHODS) if rate(task, method) in FURTHER]
        # For two tasks full fine-tuning as well, at rates of its own.
        return runs + [run(task, "full", lr) for task, lr in each(("mrpc", "rte"),
                                                                 (1e-5, 3e-5, 1e-4))]
    if stage == "seeds":
        runs = [run(task, method, rate(task, method), seed=seed)
                for task, method, seed in each(TASKS, METHODS, (1, 2, 3, 4))]
        # There some runs collapse: one seed says little about a rate.
        near = [run(task, method, lr, seed=seed) for task, method, lr, seed
                in each(("mrpc", "rte"), ADAPTERS, RATES, (1, 2, 3, 4))]
        return runs + [run for run in near if run not in runs]
    if stage == "long":
        runs = [run(task, method, lr, seed=seed, epochs=80) for task, lr, method, seed
                in each(("rte",), (3e-4, 1e-3), ADAPTERS[:3], (0, 1))]
        runs += [run("cola", method, 1e-3, seed=seed, epochs=80)
                 for method, seed in each(ADAPTERS[:3], (0, 1))]
        authors = dict(epochs=100, weight_decay=0.0, max_len=512)
        return runs + [run("rte", method, lr, seed=seed, **authors) for (method, lr), seed
                       in each((("lora", 7.7e-5), ("condlora", 1.6e-4)), (0, 1))]
    if stage == "sst2":
        return [run("sst2", method, 2e-3 if method == "head" else 1e-3, seed=seed, epochs=3)
                for method, seed in each(METHODS, (0, 1, 2))]
    if stage == "small":
        return [run(task, method, 1e-3, seed=seed, epochs=2 if task == "sst2" else 10,
                    encoder="minilm")
                for task, method, seed in each(STEPS, ("lora", "condlora", "tied"), (0, 1, 2))]
    if stage == "analysis":
        return [run(task, "lora", rate(task, "lora"), seed=seed, labels=labels)
                for task, seed, labels in each(TASKS, (0, 1, 2), ("given", "shuffled"))]
    raise ValueError(f"{stage} cannot be combined with others")


def shuffle_labels(task, seed, source, target):
    """Write the task's folder into `target`, with train.tsv's labels in a random order."""
    about = glue.TASKS[task]
    folder = Path(target) / about.folder
    folder.mkdir()
    (folder / "dev.tsv").write_bytes((Path(source) / about.folder / "dev.tsv").read_bytes())
    text = (Path(source) / about.folder / "train.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.rstrip("\n").split("\n")]
    header = [] if task == "cola" else lines.pop(0)
    column = 1 if task == "cola" else [name.strip("\r\ufeff") for name in header].index(about.label)
    labels = [line[column] for line in lines]
    for line, k in zip(lines, np.random.default_rng(seed).permutation(len(lines))):
        line[column] = labels[k]
    text = "\n".join("\t".join(line) for line in ([header] if header else []) + lines)
    (folder / "train.tsv").write_text(text + "\n", encoding="utf-8", newline="\n")


def do(run, args, gpus):
    """One run of train.py: its lines of the CSV."""
    if time.time() > args.until:
        return []
    gpu = gpus.get()
    with tempfile.TemporaryDirectory() as folder:
        out, data_dir = Path(folder) / "ckpt.pt", args.data_dir
        if run.get("labels") == "shuffled":
            shuffle_labels(run["task"], run["seed"], data_dir, folder)
            data_dir = folder
        command = [
            ROOT / "train.py", "--init_from", args.init_from, "--out", out, "--data_dir", data_dir,
            "--task", run["task"], "--method", run["method"], "--targets", *run["targets"].split(),
            "--rank", run["rank"], "--lr", run["lr"], "--seed", run["seed"], "--grad_clip",
            run["clip"], "--weight_decay", run["weight_decay"], "--max_len", run["max_len"],
            "--epochs", run["epochs"],
        ]
        try:
            python(command, gpu)
            ckpt = torch.load(out, weights_only=True)
            if "labels" in run:
                torch.save(ckpt | {"weights": ckpt["last"]}, out)
                return analysis_of(run, out, gpu)
        finally:
            gpus.put(gpu)
    history = ckpt["history"]
    main = lambda scores: f"{100 * next(iter(scores.values())):.2f}"
    results = (ckpt["best_epoch"], main(ckpt["results"]["validation"]),
               main(ckpt["results"]["test"]), f"{history[-1]['loss']:.4f}",
               f"{sum(epoch['seconds'] for epoch in history):.1f}",
               " ".join(f"{float(main(epoch['validation'])):.1f}" for epoch in history))
    return [run | dict(zip(RESULTS, results))]


def analysis_of(run, out, gpu):
    device = ["--device", "cuda"] if torch.cuda.is_available() else []
    python([ROOT / "analyze.py", out, "--json", out.with_suffix(".json"), *device], gpu)
    tables = json.loads(out.with_suffix(".json").read_text())["similarity"]
    return [{name: run[name] for name in ("task", "labels", "seed", "lr")}
            | {"matrix": f"{target} {name}", "control": row["control"][0],
               "control_sd": row["control"][1], "raw_random": row["raw_random"][0],
               "raw_sd": row["raw_random"][1]}
            | {key: row[key] for key in ("trained", "z", "raw", "raw_z")}
            for target, table in tables.items() for name, row in table.items()]


def python(command, gpu):
    environment = os.environ | {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": str(gpu)}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env=environment)
    if done.returncode:
        raise RuntimeError(f"{command[0]} {command[8:14]}: {done.stderr.splitlines()[-1:]}")


def key(row, names=SETTINGS):
    return tuple(str(row[name]) for name in names)


def read(file):
    if not file.is_file():
        return []
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def run_stage(stage, args):
    is_analysis = stage == "analysis"
    file = args.csv.with_name("analysis.csv") if is_analysis else args.csv
    columns = ANALYSIS if is_analysis else (*SETTINGS, *RESULTS)
    rows = read(args.csv)
    names = ("task", "labels", "seed") if is_analysis else tuple(SETTINGS)
    known = {key(row, names) for row in read(file)}
    runs = [run for run in runs_of(stage, rows)
            if key(run, names) not in known and run["method"] in args.only]
    print(f"{stage}: {len(runs)} runs are not in {file} yet")
    runs.sort(key=lambda run: -STEPS[run["task"]] * run["epochs"])
    gpus = queue.Queue()
    for _ in range(args.jobs):
        for gpu in range(max(1, torch.cuda.device_count())):
            gpus.put(gpu)
    with open(file, "a", newline="") as opened, ThreadPoolExecutor(gpus.qsize()) as pool:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        if not known:
            writer.writeheader()
        for done in as_completed([pool.submit(do, run, args, gpus) for run in runs]):
            try:
                lines = done.result()
            except RuntimeError as error:  # the others go on
                print(error, flush=True)
                continue
            writer.writerows(lines)
            opened.flush()
            for line in lines:
                print(*(line[name] for name in columns if name != "curve"), flush=True)


# What is told ------------------------------------------------------------------------------------

def chosen(rows, task, method, **settings):
    """The runs at the best rate by mean validation, of those that were tried with most seeds."""
    rates = by_rate(rows, task, method, **settings).values()
    return max(rates, key=lambda runs: (len(runs), mean_of(runs, "validation")), default=[])


def by_rate(rows, task, method, **settings):
    """{rate: its runs, all seeds}"""
    wanted = SETTINGS | dict(task=task, method=method) | settings
    rates = {}
    for row in sorted(rows, key=lambda row: (float(row["lr"]), row["seed"])):
        if all(row[k] == str(v) for k, v in wanted.items() if k not in ("lr", "seed")):
            rates.setdefault(float(row["lr"]), []).append(row)
    return rates


def mean_of(runs, name):
    return np.mean([float(row[name]) for row in runs])


def best_rate(rows, task, method):
    runs = chosen(rows, task, method)
    return float(runs[0]["lr"]) if runs else None


def tests_of(runs):
    """{seed: test score}"""
    return {row["seed"]: float(row["test"]) for row in sorted(runs, key=lambda row: row["seed"])}


def table_of(rows, tasks, **settings):
    """Print mean and deviation of each method's test score, and paired differences."""
    for task in tasks:
        of = {method: tests_of(chosen(rows, task, method, **settings)) for method in METHODS}
        print(f"{task:6}", *(f"{method} {spread(scores)}" for method, scores in of.items()),
              sep="  ")
        for one, other in (("condlora", "lora"), ("tied", "lora"), ("random", "lora"),
                           ("tied", "condlora"), ("random", "condlora")):
            seeds = sorted(of[one].keys() & of[other].keys())
            print(f"        {one} - {other}: "
                  f"{interval([of[one][seed] - of[other][seed] for seed in seeds])}")


def tables(args):
    rows = read(args.csv)
    print("by rate: mean validation (how many runs of how many ended at a constant answer)")
    for task, method in itertools.product(TASKS, (*METHODS, "full")):
        cells = [f"{lr:g}: {mean_of(runs, 'validation'):.1f} "
                 f"({sum(map(collapsed, runs))}/{len(runs)})"
                 for lr, runs in by_rate(rows, task, method).items()]
        if cells:
            print(f"{task:6}{method:10}", "   ".join(cells))

    print("\ntest at the best rate, over seeds; differences paired by seed, with 95% intervals")
    table_of(rows, TASKS)
    print("\nSST-2, 3 epochs, three seeds")
    table_of(rows, ["sst2"], epochs=3)
    print("\nthe 6-layer encoder, 10 epochs (SST-2: 2), three seeds")
    for task in STEPS:
        table_of(rows, [task], encoder="minilm", epochs=2 if task == "sst2" else 10)

    print("\nother settings: test by seed (mean validation)")
    others = ("targets", "rank", "weight_decay", "max_len", "epochs")
    usual = {key(SETTINGS, others)}
    kinds = {key(row, ("task", "method", "lr", *others)) for row in rows
             if key(row, others) not in usual and row["encoder"] == "mpnet"}
    for kind in sorted(kinds):
        runs = [row for row in rows if key(row, ("task", "method", "lr", *others)) == kind
                and row["encoder"] == "mpnet"]
        print(*kind, "test", *tests_of(runs).values(), f"({mean_of(runs, 'validation'):.1f})")

    print("\nsimilarity of conversion matrices, and of A and B, on 12 layers: mean over seeds")
    rows = read(args.csv.with_name("analysis.csv"))
    for task, matrix, labels in sorted({key(r, ("task", "matrix", "labels")) for r in rows}):
        some = [r for r in rows if key(r, ("task", "matrix", "labels")) == (task, matrix, labels)]
        values = {name: [float(r[name]) for r in some]
                  for name in ("trained", "control", "z", "raw", "raw_random", "raw_z")}
        print(f"{task:6}{matrix:9}{labels:9}", *(f"{name} {np.mean(x):.4f}" if "z" not in name else
              f"{name} {min(x):+.1f} to {max(x):+.1f}" for name, x in values.items()), sep="  ")


def collapsed(row):
    """Whether the last training loss is a constant answer's: train.constant_loss of the task."""
    constant = {"rte": 0.6931, "mrpc": 0.6311, "cola": 0.6063, "stsb": 2.1387}
    return float(row["last_loss"]) > 0.98 * constant[row["task"]]


def spread(scores):
    """Mean and standard deviation over seeds."""
    values = list(scores.values())
    return f"{np.mean(values):.1f} \u00b1 {np.std(values, ddof=1):.1f}" if len(values) > 1 else "-"


# Student's t: the 97.5% point for 1 to 9 degrees of freedom.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def interval(differences):
    n = len(differences)
    if n < 2:
        return "-"
    mean, half = np.mean(differences), T[n - 2] * np.std(differences, ddof=1) / n ** 0.5
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


# The picture -------------------------------------------------------------------------------------

COLOURS = {"lora": "#3b82c4", "condlora": "#d9822b", "tied": "#8a63d2", "random": "#c2507a",
           "full": "#5a9e5a"}
NAMES = {"lora": "LoRA", "condlora": "CondLoRA: M = W0", "tied": "tied: M = identity",
         "random": "random M", "full": "full fine-tuning, one seed"}
# Query and value, d = 768, rank 8, 12 layers; 108,895,872 weights in the encoder.
PARAMETERS = {"lora": 294_912, "condlora": 24_576, "tied": 24_576, "random": 24_576,
              "full": 108_895_872}
PANELS = {"rte": ("RTE, accuracy", 45, 80, 5), "cola": ("CoLA, Matthews", 48, 60, 4),
          "mrpc": ("MRPC, accuracy", 80, 90, 2), "stsb": ("STS-B, Pearson", 88, 90, 0.5),
          "sst2": ("SST-2, accuracy", 91, 95, 1)}


class Plot(Picture):
    def dot(self, x, y, colour, title=""):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{colour}" '
                          f'fill="{colour}"><title>{escape(title)}</title></circle>')

    def line(self, points, colour=None, dashed=False):
        """A line through [(x, y), ...], in a quiet grey unless a colour is given."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        paint = f'stroke="{colour}"' if colour else 'class="line"'
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline fill="none" {paint} stroke-width="1"{dashes} '
                          f'points="{path}"/>')


def figure(args):
    """Test score against trainable parameters, a panel a task."""
    rows, drawing = read(args.csv), Plot(860, 840)
    drawing.text(20, 30, "CondLoRA's controls score alike without W0; on RTE tied is better", 17)
    drawing.text(20, 52, "Test score, epoch chosen on validation, all-mpnet-base-v2. A bar spans "
                         "the seeds, a dashed line is the head alone, if it is in range.", 12)
    drawing.text(20, 70, "CondLoRA, tied and random have 24,576 parameters each, and stand side by "
                         "side.", 12)
    for number, (task, (title, low, high, step)) in enumerate(PANELS.items()):
        left, top, width, height = 60 + 410 * (number % 2), 120 + 250 * (number // 2), 340, 160
        settings = {"epochs": 3} if task == "sst2" else {}
        x = lambda n: left + width * (np.log10(n) - 4) / 4.5
        y = lambda value: top + height * (1 - (value - low) / (high - low))
        drawing.text(left, top - 10, title, 14)
        drawing.line([(left, top), (left, top + height), (left + width, top + height)])
        for value in np.arange(low, high + step / 2, step):
            drawing.text(left - 6, y(value) + 4, f"{value:g}", 10, "end")
        for power, words in zip(range(4, 9), "\u2074\u2075\u2076\u2077\u2078"):
            drawing.text(x(10 ** power), top + height + 16, f"10{words}", 10, "middle")
        drawing.text(left + width, top + height + 32, "trainable parameters, without the head", 11,
                     "end")
        head = np.mean(list(tests_of(chosen(rows, task, "head", **settings)).values()))
        if head > low:
            drawing.line([(left, y(head)), (left + width, y(head))], dashed=True)
        for shift, method in enumerate(COLOURS):
            values = list(tests_of(chosen(rows, task, method, **settings)).values())
            if not values:
                continue
            # The three with one count stand side by side.
            place = x(PARAMETERS[method]) + (14 * (shift - 2) if 1 <= shift <= 3 else 0)
            drawing.line([(place, y(min(values))), (place, y(max(values)))], COLOURS[method])
            drawing.dot(place, y(np.mean(values)), COLOURS[method],
                        f"{NAMES[method]}: {np.mean(values):.1f}, {len(values)} seeds")
    for number, (method, name) in enumerate(NAMES.items()):
        drawing.dot(500, 640 + 30 * number, COLOURS[method])
        drawing.text(512, 644 + 30 * number, name, 12)
    file = args.csv.with_name("mpnet.svg")
    file.write_text(str(drawing), "utf-8")
    print(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("stages", nargs="+", choices=(*STAGES, "tables", "figure"))
    add("--init_from", default="sentence-transformers/all-mpnet-base-v2")
    add("--data_dir", default=ROOT / "data/glue", type=Path)
    add("--jobs", type=int, default=5, help="runs side by side on a GPU; default: 5")
    add("--only", nargs="+", default=(*METHODS, "full"), help="run these methods only")
    add("--minutes", type=float, default=1e6, help="start no run after so many minutes")
    add("--csv", type=Path, default=ROOT / "assets/runs.csv")
    args = parser.parse_args()
    args.until = time.time() + 60 * args.minutes
    for stage in args.stages:
        if stage in ("tables", "figure"):
            {"tables": tables, "figure": figure}[stage](args)
        else:
            run_stage(stage, args)


if __name__ == "__main__":
    main()
