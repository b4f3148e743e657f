"""LoRA against CondLoRA at the paper's size: the README's runs, one line of a CSV file each.

    python tests/experiment.py rate --init_from FOLDER         # which learning rate, by validation
    python tests/experiment.py seeds --init_from FOLDER        # four more seeds, there or near
    python tests/experiment.py long width collapse --init_from FOLDER
    python tests/experiment.py tables                          # what the CSV says
    python tests/experiment.py figure                          # assets/mpnet.svg

A stage runs what the CSV lacks, several runs side by side, the long ones first; it may be stopped
and started again, and others may follow it on one command line. Every run is train.py with batches
of 16 and its other defaults.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("rte", "mrpc", "stsb", "cola")  # by steps an epoch
METHODS = ("lora", "condlora", "head", "full")
STEPS = dict(zip(TASKS, (141, 207, 324, 482)))
RATES = (1e-4, 3e-4, 1e-3, 2e-3)
STAGES = ("rate", "seeds", "long", "width", "collapse")
QV = "query value"
ALL = "query key value out fc1 fc2"
SETTINGS = ("task", "method", "targets", "rank", "lr", "seed", "clip", "epochs")
RESULTS = ("best_epoch", "validation", "test", "last_loss", "seconds", "curve")


# What is run -------------------------------------------------------------------------------------

def runs_of(stage, rows):
    """A stage's runs, as dicts of SETTINGS."""
    run = lambda task, method, lr, targets=QV, rank=8, seed=0, clip=1.0, epochs=20: dict(
        zip(SETTINGS, (task, method, targets, rank, lr, seed, clip, epochs)))
    adapters, methods = METHODS[:2], METHODS[:3]
    each = itertools.product
    if stage == "rate":
        runs = [run(*settings) for settings in each(TASKS, methods, RATES)]
        # One step further where the largest rate was the best.
        runs += [run(task, method, 5e-3) for task, method in each(TASKS, methods)
                 if best_rate(rows, task, method) in (2e-3, 5e-3)]
        runs += [run(task, "full", lr) for task, lr in each(TASKS[:2], (1e-5, 3e-5, 1e-4))]
        return runs
    if stage == "seeds":
        runs = [run(task, method, best_rate(rows, task, method), seed=seed)
                for task, method, seed in each(TASKS, methods, (1, 2, 3, 4))]
        # There some runs collapse: one seed says little about a rate.
        near = [run(task, method, lr, seed=seed) for task, method, lr, seed
                in each(TASKS[:2], adapters, RATES[1:], (1, 2, 3, 4))]
        return runs + [run for run in near if run not in runs]
    if stage == "long":
        return [run(task, method, lr, seed=seed, epochs=80)
                for task, lrs in (("cola", (1e-3,)), ("rte", (3e-4, 1e-3)), ("mrpc", (1e-3,)))
                for lr, method, seed in each(lrs, adapters, (0, 1))]
    if stage == "width":
        runs = [run(task, "condlora", lr, rank=rank)
                for task, lrs in (("rte", (1e-4, 3e-4, 1e-3)), ("cola", (3e-4, 1e-3)))
                for rank, lr in each((16, 32, 64, 96), lrs)]
        return runs + [run(task, method, lr, targets=ALL)
                       for task, lrs in (("rte", (1e-4, 3e-4, 1e-3)), ("cola", (1e-4, 3e-4)))
                       for method, lr in each(adapters, lrs)]
    if stage == "collapse":
        return [run(task, method, lr, clip=0.0)
                for task, method, lr in each(("rte", "mrpc"), adapters, (3e-4, 1e-3, 2e-3))]
    raise ValueError(f"{stage} stands alone")


def do(run, args):
    """One run of train.py: its line of the CSV."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ckpt.pt"
        command = [
            sys.executable, ROOT / "train.py", "--init_from", args.init_from, "--out", out,
            "--data_dir", args.data_dir, "--task", run["task"], "--method", run["method"],
            "--targets", *run["targets"].split(), "--rank", run["rank"], "--lr", run["lr"],
            "--seed", run["seed"], "--grad_clip", run["clip"], "--epochs", run["epochs"],
        ]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "2"})
        if done.returncode:
            raise RuntimeError(f"{run}: {done.stderr.splitlines()[-1:]}")
        checkpoint = torch.load(out, weights_only=True)
    history = checkpoint["history"]
    main = lambda figures: f"{100 * next(iter(figures.values())):.2f}"
    results = (checkpoint["best_epoch"], main(checkpoint["results"]["validation"]),
               main(checkpoint["results"]["test"]), f"{history[-1]['loss']:.4f}",
               f"{sum(epoch['seconds'] for epoch in history):.1f}",
               " ".join(f"{float(main(epoch['validation'])):.1f}" for epoch in history))
    return run | dict(zip(RESULTS, results))


def key(row):
    return tuple(str(row[name]) for name in SETTINGS)


def read(file):
    if not file.is_file():
        return []
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def run_stages(args):
    rows = read(args.csv)
    known = {key(row) for row in rows}
    runs = []
    for stage in args.stages:
        missing = [run for run in runs_of(stage, rows) if key(run) not in known]
        runs += sorted(missing, key=lambda run: -STEPS[run["task"]] * run["epochs"])
    with open(args.csv, "a", newline="") as file, ThreadPoolExecutor(args.jobs) as pool:
        writer = csv.DictWriter(file, SETTINGS + RESULTS)
        if not rows:
            writer.writeheader()
        for done in as_completed([pool.submit(do, run, args) for run in runs]):
            try:
                row = done.result()
            except RuntimeError as error:  # the others go on
                print(error, flush=True)
                continue
            writer.writerow(row)
            file.flush()
            print(" ".join(str(row[name]) for name in SETTINGS + RESULTS[:-1]), flush=True)


# What is told ------------------------------------------------------------------------------------

def chosen(rows, task, method, targets=QV, rank=8, clip=1.0, epochs=20):
    """The runs at the best rate by mean validation, of those that were tried with most seeds."""
    rates = by_rate(rows, task, method, targets, rank, clip, epochs).values()
    return max(rates, key=lambda runs: (len(runs), mean_of(runs, "validation")), default=[])


def by_rate(rows, task, method, targets=QV, rank=8, clip=1.0, epochs=20):
    """{rate: its runs, all seeds}"""
    wanted = dict(task=task, method=method, targets=targets, rank=rank, clip=clip, epochs=epochs)
    rates = {}
    for row in sorted(rows, key=lambda row: (float(row["lr"]), row["seed"])):
        if all(row[k] == str(v) for k, v in wanted.items()):
            rates.setdefault(float(row["lr"]), []).append(row)
    return rates


def mean_of(runs, name):
    return np.mean([float(row[name]) for row in runs])


def best_rate(rows, task, method):
    runs = chosen(rows, task, method)
    return float(runs[0]["lr"]) if runs else None


def tests_of(runs):
    """{seed: test figure}"""
    return {row["seed"]: float(row["test"]) for row in sorted(runs, key=lambda row: row["seed"])}


def tables(args):
    rows = read(args.csv)
    print("by rate: mean validation (how many runs of how many ended at a constant answer)")
    for task, method, clip in itertools.product(TASKS, METHODS, (1.0, 0.0)):
        rates = by_rate(rows, task, method, clip=clip)
        cells = [f"{lr:g}: {mean_of(runs, 'validation'):.1f} "
                 f"({sum(map(collapsed, runs))}/{len(runs)})" for lr, runs in rates.items()]
        if cells:
            print(f"{task:6}{method:10}clip {clip:g}  ", "   ".join(cells))

    print("\ntest at the best rate, over seeds; CondLoRA - LoRA, paired, with its 95% interval")
    for task in TASKS:
        of = {method: tests_of(chosen(rows, task, method)) for method in METHODS[:3]}
        seeds = sorted(of["lora"].keys() & of["condlora"].keys())
        differences = [of["condlora"][seed] - of["lora"][seed] for seed in seeds]
        print(f"{task:6}", *map(spread, of.values()), interval(differences), sep="  ")

    print("\nlonger and wider, each at its best rate: test by seed (mean validation)")
    kinds = {(row["task"], row["method"], row["targets"], row["rank"], row["epochs"])
             for row in rows if row["clip"] == "1.0" and row["method"] in METHODS[:2]}
    for task, method, targets, rank, epochs in sorted(kinds, key=lambda k: (k[0], k[2:], k[1])):
        runs = chosen(rows, task, method, targets, rank, 1.0, epochs)
        if (targets, rank, epochs) != (QV, "8", "20"):
            which = "query value" if targets == QV else "all linear"
            print(f"{task:6}{method:10}{which:13}rank {rank:3} epochs {epochs:3} rate "
                  f"{runs[0]['lr']:7}", *tests_of(runs).values(),
                  f"({mean_of(runs, 'validation'):.1f})")


def collapsed(row):
    """Whether the last training loss is a constant answer's: train.constant_loss of the task."""
    constant = {"rte": 0.6931, "mrpc": 0.6311, "cola": 0.6063, "stsb": 2.1387}
    return float(row["last_loss"]) > 0.98 * constant[row["task"]]


def spread(figures):
    """Mean and standard deviation over seeds."""
    values = list(figures.values())
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

COLOURS = {"lora": "#3b82c4", "condlora": "#d9822b", "head": "#888888", "full": "#5a9e5a"}
NAMES = {"lora": "LoRA", "condlora": "CondLoRA", "head": "head alone", "full": "every weight"}


def parameters_of(row, d=768, layers=12, every_weight=108_895_872):
    """How many numbers train beside the head."""
    if row["method"] in ("head", "full"):
        return every_weight if row["method"] == "full" else 0
    per_rank = 2 * 2 * d if row["targets"] == QV else 4 * 2 * d + 2 * 5 * d
    return per_rank * int(row["rank"]) * (layers if row["method"] == "lora" else 1)


def figure(args):
    """Test figure against trained numbers, a panel a task, and a learning curve."""
    rows = read(args.csv)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 560" role="img" '
             'font-family="system-ui, sans-serif"><style>.paper{fill:#ffffff} .ink{fill:#1f2328} '
             ".line{stroke:#8c959f} @media (prefers-color-scheme: dark){.paper{fill:#0d1117} "
             '.ink{fill:#e6edf3}}</style><rect class="paper" width="900" height="560"/>']

    def write(x, y, text, size=11, anchor="start"):
        parts.append(f'<text class="ink" x="{x:.0f}" y="{y:.0f}" font-size="{size}" '
                     f'text-anchor="{anchor}">{text}</text>')

    def panel(left, top, width, title, low, high, ticks):
        """Draw the axes; returns functions from values to places."""
        write(left, top - 10, title, 13)
        parts.append(f'<path class="line" fill="none" d="M{left} {top}V{top + 180}h{width}"/>')
        x = lambda share: left + width * share
        y = lambda value: top + 180 * (1 - (value - low) / (high - low))
        for value in (low, (low + high) / 2, high):
            write(left - 5, y(value) + 4, f"{value:g}", 10, "end")
        for share, text in ticks:
            write(x(share), top + 195, text, 10, "middle")
        return x, y

    powers = [(power / 4.3, "10" + digit)
              for power, digit in enumerate("⁴⁵⁶⁷⁸")]
    titles = {"cola": ("CoLA, Matthews", 45, 65), "rte": ("RTE, accuracy", 45, 75),
              "mrpc": ("MRPC, accuracy", 80, 90), "stsb": ("STS-B, Pearson", 85, 91)}
    for number, (task, (title, low, high)) in enumerate(titles.items()):
        x, y = panel(50 + 285 * (number % 2), 50 + 260 * (number // 2), 235, title, low, high,
                     powers)
        settings = {(row["method"], row["targets"], row["rank"]) for row in rows
                    if row["task"] == task and row["epochs"] == "20" and row["clip"] == "1.0"}
        for method, targets, rank in sorted(settings):
            runs = chosen(rows, task, method, targets, rank)
            values = list(tests_of(runs).values())
            n, mean = parameters_of(runs[0]), np.mean(values)
            if not n or mean < low:
                continue
            where = x((np.log10(n) - 4) / 4.3)
            hollow = targets != QV
            parts.append(
                f'<path stroke="{COLOURS[method]}" d="M{where:.1f} {y(min(values)):.1f}'
                f'V{y(max(values)):.1f}"/><circle cx="{where:.1f}" cy="{y(mean):.1f}" r="5" '
                f'stroke="{COLOURS[method]}" fill="{"none" if hollow else COLOURS[method]}">'
                f"<title>{NAMES[method]}, rank {rank}, {n:,} numbers: {mean:.1f}</title></circle>")
    x, y = panel(640, 50, 235, "CoLA: validation by epoch", 20, 65,
                 [(epoch / 80, epoch) for epoch in (0, 20, 40, 60, 80)])
    for row in rows:
        if (row["task"], row["epochs"], row["seed"]) == ("cola", "80", "0"):
            points = " ".join(f"{x((i + 1) / 80):.1f},{y(max(float(value), 20)):.1f}"
                              for i, value in enumerate(row["curve"].split()))
            parts.append(f'<polyline fill="none" stroke="{COLOURS[row["method"]]}" '
                         f'stroke-width="1.5" points="{points}"/>')
    write(50, 528, "Numbers trained beside the head, on a logarithmic scale. A bar spans five "
                   "seeds; a point without one is seed 0.", 12)
    for number, method in enumerate(("lora", "condlora", "full")):
        parts.append(f'<circle cx="650" cy="{320 + 22 * number}" r="5" fill="{COLOURS[method]}"/>')
        write(662, 324 + 22 * number, NAMES[method], 12)
    write(645, 324 + 66, "\u25cf query and value; \u25cb all linear layers", 12)
    (args.csv.with_suffix(".svg")).write_text("\n".join([*parts, "</svg>"]) + "\n", "utf-8")
    print(args.csv.with_suffix(".svg"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("stages", nargs="+", choices=(*STAGES, "tables", "figure"))
    add("--init_from", default="sentence-transformers/all-mpnet-base-v2")
    add("--data_dir", default=ROOT / "data/glue", type=Path)
    add("--jobs", type=int, default=5, help="runs side by side; default 5")
    add("--csv", type=Path, default=ROOT / "assets/mpnet.csv")
    args = parser.parse_args()
    if args.stages == ["tables"]:
        tables(args)
    elif args.stages == ["figure"]:
        figure(args)
    else:
        run_stages(args)


if __name__ == "__main__":
    main()
