"""LoRA against CondLoRA at the paper's size: the README's runs, one line of a CSV file each.

    python tests/experiment.py rate --init_from FOLDER         # which learning rate, by validation
    python tests/experiment.py seeds --init_from FOLDER        # four more seeds at the best rate
    python tests/experiment.py tables                          # what the CSV says

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
STEPS = dict(zip(TASKS, (141, 207, 324, 482)))
RATES = (1e-4, 3e-4, 1e-3, 2e-3)
QV = "query value"
ALL = "query key value out fc1 fc2"
SETTINGS = ("task", "method", "targets", "rank", "lr", "seed", "clip", "epochs")
RESULTS = ("best_epoch", "validation", "test", "last_loss", "seconds", "curve")


# What is run -------------------------------------------------------------------------------------

def runs_of(stage, rows):
    """A stage's runs, as dicts of SETTINGS."""
    run = lambda task, method, lr, targets=QV, rank=8, seed=0, clip=1.0, epochs=20: dict(
        zip(SETTINGS, (task, method, targets, rank, lr, seed, clip, epochs)))
    adapters, methods = ("lora", "condlora"), ("lora", "condlora", "head")
    each = itertools.product
    if stage == "rate":
        runs = [run(*settings) for settings in each(TASKS, methods, RATES)]
        # One step further where the largest rate was the best.
        runs += [run(task, method, 5e-3) for task, method in each(TASKS, methods)
                 if best_rate(rows, task, method) in (2e-3, 5e-3)]
        runs += [run(task, "full", lr) for task, lr in each(TASKS[:2], (1e-5, 3e-5, 1e-4))]
        return runs
    if stage == "seeds":
        return [run(task, method, best_rate(rows, task, method), seed=seed)
                for task, method, seed in each(TASKS, methods, (1, 2, 3, 4))]
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
    raise ValueError(f"no stage {stage}")


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

def best_rate(rows, task, method, rank=8, targets=QV, epochs=20):
    """The rate with the best validation figure of seed 0, None where there is no run."""
    wanted = (task, method, targets, str(rank), "0", "1.0", str(epochs))
    found = [row for row in rows
             if tuple(row[name] for name in SETTINGS if name != "lr") == wanted]
    best = max(found, key=lambda row: float(row["validation"]), default=None)
    return best and float(best["lr"])


def figures(rows, **wanted):
    """{seed: test figure} of the runs with these settings."""
    return {row["seed"]: float(row["test"]) for row in rows
            if all(row[name] == str(value) for name, value in wanted.items())}


def tables(args):
    rows = read(args.csv)
    common = dict(targets=QV, rank=8, clip=1.0, epochs=20)
    print("validation, seed 0, by rate")
    for task, method in itertools.product(TASKS, ("lora", "condlora", "head", "full")):
        found = sorted((float(row["lr"]), row["validation"]) for row in rows if row["seed"] == "0"
                       and all(row[k] == str(v) for k, v in common.items())
                       and (row["task"], row["method"]) == (task, method))
        print(f"{task:6}{method:10}", *(f"{lr:g}: {value}  " for lr, value in found))
    print("\ntest, at the best rate: mean and deviation over seeds; CondLoRA - LoRA, paired, and "
          "its 95% interval")
    for task in TASKS:
        of = {method: figures(rows, task=task, method=method, lr=best_rate(rows, task, method),
                              **common) for method in ("lora", "condlora", "head")}
        cells = [f"{np.mean(list(x.values())):.1f} ± {np.std(list(x.values()), ddof=1):.1f}"
                 if len(x) > 1 else "-" for x in of.values()]
        seeds = sorted(of["lora"].keys() & of["condlora"].keys())
        differences = [of["condlora"][seed] - of["lora"][seed] for seed in seeds]
        print(f"{task:6}", *cells, interval(differences), sep="  ")


# Student's t: the 97.5% point for 1 to 9 degrees of freedom.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def interval(differences):
    n = len(differences)
    if n < 2:
        return "-"
    mean, half = np.mean(differences), T[n - 2] * np.std(differences, ddof=1) / n ** 0.5
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("stages", nargs="+", choices=("rate", "seeds", "long", "width", "collapse", "tables"))
    add("--init_from", default="sentence-transformers/all-mpnet-base-v2")
    add("--data_dir", default=ROOT / "data/glue", type=Path)
    add("--jobs", type=int, default=5, help="runs side by side; default 5")
    add("--csv", type=Path, default=ROOT / "assets/mpnet.csv")
    args = parser.parse_args()
    tables(args) if args.stages == ["tables"] else run_stages(args)


if __name__ == "__main__":
    main()
