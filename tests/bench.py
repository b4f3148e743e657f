"""How fast a step is, beside transformers + PEFT in the same run where they are installed.

    python tests/bench.py                      # what this machine has: CUDA or CPU, the analysis
    python tests/bench.py --init_from FOLDER --data_dir FOLDER       # and epochs of real tasks
    python tests/bench.py --only step epoch --compile --json out.json

Times are medians, with the quartiles beside those of the steps. No test: nothing here asserts.

Shares of the peak. An encoder of N weights is counted as 4 N floating-point operations a token:
forward, and backward through the activations alone. (What train.py does is within 1% of that,
attention aside: the last layer's saved positions and the gradients of W0 + dW weigh the same.) The
peak is what a bf16 product of 8192 x 8192 matrices runs at, repeated as often as the steps: a GPU
slows down when it is kept busy. On one H200 that was 666 TFLOP/s, 776 on a rested GPU; the shares
of that stand beside. The recorded steps' quartiles lay within 2% of the median, the others', which
wait for Python, within 13%.

What makes a step fast. A small batch's thousand kernels take longer to launch than to run: plain
loop 36.0 ms, recorded as a CUDA graph 5.2 (batch 32). An adapter's thin products wait for memory:
forming W0 + dW for all layers at once and doing one product with it replaces three. Frozen weights
are bfloat16; no mask is made where nothing is padded; the last layer is computed for the first
token only. MPNet's position bias costs 8 to 10%, once it is contiguous: without that, attention
falls back to its slowest kernel and the step takes 1.65 to 1.9 times RoBERTa's. The deterministic
mode costs 2%, 6% where padded. torch.compile needs a minute to start.

On two CPU cores, batches of 16 of RTE with all-MiniLM-L6-v2, by turns: transformers + PEFT 346 ms,
LoRA 276, CondLoRA 277, ratios 1.30 and 1.26. There the layers keep their thin products, since a CPU
waits for arithmetic. The analysis takes 14 ms for phi of the 66 pairs of 12 layers of 768 x 768;
decomposing both matrices anew for every pair takes 12.4 s.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import analyze  # noqa: E402
import train  # noqa: E402
from condlora import adapt  # noqa: E402
from data.batches import Encoded, shuffled  # noqa: E402
from data import glue, tokenizer  # noqa: E402
from model import Config, Transformer  # noqa: E402

try:
    import transformers
    from peft import LoraConfig, get_peft_model
except ImportError:
    transformers = None

BASE = dict(
    vocab_size=50265,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
)


def timed(steps, rounds=24, run=5):
    """Seconds of each of the steps, warm ones, in each round. They run five in a row, as in training without waiting for each, and by
    turns, so that what else goes on in the machine meets all alike."""
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for step, its in zip(steps, seconds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(run):
                step()
            torch.cuda.synchronize()
            its.append((time.perf_counter() - began) / run)
    return seconds


def measured_peak(device):
    """Floating-point operations a second of a bf16 product: in the median round, and in the
    fastest."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = lambda: a @ b
    timed([product], rounds=1)  # warm
    [seconds] = timed([product])
    return 2 * 8192**3 / median(seconds), 2 * 8192**3 / min(seconds)


def options(**changes):
    return SimpleNamespace(
        **dict(
            model_type="roberta",
            method="lora",
            targets=["query", "value"],
            rank=8,
            alpha=8.0,
            lr=1e-3,
            weight_decay=0.01,
            grad_clip=1.0,
            no_graphs=False,
            compile=False,
            dtype="bfloat16",
            batch_size=16,
            max_len=128,
        )
        | changes
    )


class Anything:
    """A tokenizer's stand-in: 128 random tokens, whatever the text."""

    pad_id = 1

    def encode(self, *text, max_len):
        return np.random.default_rng(len(text)).integers(5, 50000, 128).tolist(), [0] * 128


def our_step(args, device, n):
    torch.manual_seed(0)
    model = Transformer(Config(model_type=args.model_type, **BASE))
    if args.method != "head":
        adapt(model, args.method, args.targets, args.rank, args.alpha)
    model.head.requires_grad_(True)
    model.to(device).train()
    data = Encoded(glue.Split([("x",)] * n, [i % 2 for i in range(n)]), Anything(), 128, device)
    step = our_training_step(model, train.fast_forward(model, args, device), data, args)
    [batch] = data.batches([np.arange(n)])
    return lambda: step(*batch)


def our_training_step(model, forward, split, args):
    return train.fastest(
        train.Step(forward, split, train.make_optimizer(model, args), args.grad_clip), args
    )


def peer_model(folder=None, n_out=2):
    """transformers' encoder with PEFT's LoRA."""
    if folder:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=n_out, dtype=torch.float32
        )
    else:
        model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BASE))
    return get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"])
    )


def peer_step(model, device, batch, compiled=False):
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    forward = torch.compile(model) if compiled else model
    precision = (
        (lambda: torch.autocast("cuda", torch.bfloat16))
        if device.type == "cuda"
        else contextlib.nullcontext
    )

    def step():
        inputs, labels = batch()
        with precision():
            loss = forward(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            optimizer.param_groups[0]["params"], 1.0
        )  # as its Trainer does
        optimizer.step()
        return loss

    return step


def condlora_in_transformers(model):
    model = model.unload() if hasattr(model, "unload") else model
    adapt(model, "condlora")
    model.classifier.requires_grad_(True)
    return model


def bench_step(args, device, results):
    """Training steps of RoBERTa-base's shape, 128 tokens wide, bf16."""
    time.sleep(2)  # to begin with a rested GPU
    peak, rested = measured_peak(device)
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    name = torch.cuda.get_device_name()
    print(
        f"\n{name}, torch {torch.__version__}, a bf16 product of 8192x8192 matrices runs at {peak / 1e12:.0f} TFLOP/s, in its fastest round at {rested / 1e12:.0f}"
    )
    results["step"] = {"device": name, "peak": peak, "rested_peak": rested, "rows": []}
    for n in (32, 128):
        print(
            f"\none step, RoBERTa-base's shape, {n} x 128 tokens, bf16{'':15}ms    quartiles  examples/s   of peak (rested)   GiB   to PEFT eager   to LoRA"
        )
        groups = []
        if transformers:
            ids = torch.randint(5, 50000, (n, 128), device=device)
            batch = lambda: (
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                torch.zeros(n, dtype=torch.long, device=device),
            )
            groups.append(
                {
                    "transformers + PEFT LoRA, eager": lambda: peer_step(
                        peer_model(), device, batch
                    ),
                    "transformers, CondLoRA, eager": lambda: peer_step(
                        condlora_in_transformers(peer_model()), device, batch
                    ),
                }
            )
            if args.compile:
                groups.append(
                    {
                        "transformers + PEFT LoRA, compiled": lambda: peer_step(
                            peer_model(), device, batch, True
                        )
                    }
                )
        for kind, settings in {
            "plain loop": dict(no_graphs=True),
            "CUDA graph": {},
            **({"CUDA graph, compiled": dict(compile=True)} if args.compile else {}),
        }.items():
            groups.append(
                {
                    f"train.py {method}, {kind}": lambda method=method, settings=settings: our_step(
                        options(method=method, **settings), device, n
                    )
                    for method in ("lora", "condlora")
                }
            )
            groups[-1][f"train.py lora on MPNet, {kind}"] = lambda settings=settings: our_step(
                options(model_type="mpnet", **settings), device, n
            )
        first = None
        for group in groups:
            steps, memory = [], []
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            for make in group.values():
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                steps.append(make())
                for _ in range(8):  # to warm up, compile and record
                    steps[-1]()
                memory.append(torch.cuda.max_memory_allocated() - before)
            times = timed(steps)
            for label, its, most in zip(group, times, memory):
                low, seconds, high = quantiles(its)
                first = first or seconds
                rate = 4 * weights * n * 128 / seconds
                row = {
                    "batch": n,
                    "what": label,
                    "ms": 1000 * seconds,
                    "quartiles": (1000 * low, 1000 * high),
                    "examples_per_s": n / seconds,
                    "of_peak": rate / peak,
                    "of_rested_peak": rate / rested,
                    "GiB": most / 2**30,
                    "to_first": first / seconds,
                    "to_lora": median(a / b for a, b in zip(its, times[0])),
                }  # of the same round
                results["step"]["rows"].append(row)
                print(
                    f"{label:55}{row['ms']:8.2f}{1000 * low:7.2f}-{1000 * high:5.2f}{row['examples_per_s']:12,.0f}{row['of_peak']:10.1%} ({rate / rested:6.1%})"
                    f"{row['GiB']:6.2f}{row['to_first']:16.2f}{row['to_lora']:10.3f}",
                    flush=True,
                )


def bench_epoch(args, device, results):
    """Epochs of CoLA and STS-B, batch 16, evaluation included, from texts that are tokenized
    already."""
    results["epoch"] = []
    print(
        f"\none epoch with its evaluation, batch 16, {args.init_from.name:30}first s  second s  third s  examples/s (2nd)"
    )
    for task in ("cola", "stsb"):
        splits, n_out, metrics = train.load_task(task, args.data_dir)
        tok = tokenizer.load(args.init_from)
        rows = {}
        if transformers:
            rows["transformers + PEFT LoRA, eager"] = lambda: peer_epochs(
                args, device, splits, tok, n_out, metrics, task
            )
        for method in ("lora", "condlora"):
            rows[f"train.py {method}"] = lambda method=method: our_epochs(
                options(method=method), args, device, splits, tok, n_out, metrics
            )
        for label, run in rows.items():
            gc.collect()
            torch.cuda.empty_cache()
            seconds = run()
            results["epoch"].append({"task": task, "what": label, "seconds": seconds})
            print(
                f"{task:6}{label:65}"
                + "".join(f"{s:9.2f}" for s in seconds)
                + f"{len(splits['train'].labels) / seconds[1]:12,.0f}",
                flush=True,
            )


def our_epochs(settings, args, device, splits, tok, n_out, metrics):
    torch.manual_seed(0)
    model = train.build(settings, args.init_from, n_out).to(device)
    forward = train.fast_forward(model, settings, device)
    data = {name: Encoded(split, tok, 128, device) for name, split in splits.items()}
    step = our_training_step(model, forward, data["train"], settings)
    seconds = []
    for epoch in range(3):
        began = time.perf_counter()
        model.train()
        for batch in data["train"].batches(shuffled(data["train"].widths, 16, [0, epoch])):
            step(*batch)
        train.evaluate(model, forward, data["validation"], metrics, 16)
        seconds.append(time.perf_counter() - began)
    return seconds


def peer_epochs(args, device, splits, tok, n_out, metrics, task):
    """The same with random batches, each padded to its longest row, as the Trainer's collator does.
    """
    encoded = {name: [tok.encode(*text) for text in split.texts] for name, split in splits.items()}

    def batch(name, rows):
        width = max(len(encoded[name][i][0]) for i in rows)
        ids, types, mask = (
            torch.tensor(
                [encode(encoded[name][i]) + [0] * (width - len(encoded[name][i][0])) for i in rows]
            )
            for encode in (lambda e: e[0], lambda e: e[1], lambda e: [1] * len(e[0]))
        )
        labels = torch.tensor([splits[name].labels[i] for i in rows])
        inputs = {
            "input_ids": ids.to(device),
            "token_type_ids": types.to(device),
            "attention_mask": mask.to(device),
        }
        return inputs, labels.to(device)

    model = peer_model(args.init_from, n_out)
    current = []
    step = peer_step(model, device, lambda: batch("train", current[0]))
    seconds, rng = [], np.random.default_rng(0)
    for epoch in range(2 if device.type == "cuda" else 1):
        began = time.perf_counter()
        order = rng.permutation(len(encoded["train"]))
        model.train()
        for i in range(0, len(order), 16):
            current[:] = [order[i : i + 16]]
            step()
        model.eval()
        outputs, n = [], len(encoded["validation"])
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            for i in range(0, n, 16):
                outputs.append(model(**batch("validation", range(i, min(i + 16, n)))[0]).logits)
        outputs = torch.cat(outputs).float().cpu().numpy()
        metrics(
            outputs.argmax(1) if n_out > 1 else outputs[:, 0], np.array(splits["validation"].labels)
        )
        seconds.append(time.perf_counter() - began)
    return seconds


def bench_cpu(args, device, results):
    """The same batches of RTE, by turns, in float32."""
    splits, n_out, _ = train.load_task("rte", args.data_dir)
    tok = tokenizer.load(args.init_from)
    data = Encoded(splits["train"], tok, 128, device)
    batches = data.batches(shuffled(data.widths, 16, 0)[:12])
    at = [0]

    def batch():
        (input_ids, token_type_ids, attention_mask), labels = data.batch(
            *batches[at[0]][:2], padded=True
        )
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask.long(),
        }, labels

    steps = {}
    if transformers:
        steps["transformers + PEFT LoRA"] = peer_step(
            peer_model(args.init_from, n_out), device, batch
        )
    for method in ("lora", "condlora"):
        settings = options(method=method, dtype="float32")
        torch.manual_seed(0)
        model = train.build(settings, args.init_from, n_out).train()
        step = our_training_step(model, model, data, settings)
        steps[f"train.py {method}"] = lambda step=step: step(*batches[at[0]])
    seconds = {label: [] for label in steps}
    for k in range(-2, len(batches)):  # the first two to warm up
        at[0] = max(k, 0)
        for label, step in steps.items():
            began = time.perf_counter()
            step()
            if k >= 0:
                seconds[label].append(time.perf_counter() - began)
    print(
        f"\none step of RTE, batch 16, float32, {torch.get_num_threads()} CPU threads{'':10}median ms  examples/s  to the first row (median of the ratios)"
    )
    first = next(iter(seconds.values()))
    results["cpu"] = []
    for label, times in seconds.items():
        row = {
            "what": label,
            "ms": 1000 * median(times),
            "examples_per_s": 16 / median(times),
            "to_first": median(a / b for a, b in zip(first, times)),
        }
        results["cpu"].append(row)
        print(
            f"{label:55}{row['ms']:11.0f}{row['examples_per_s']:12.1f}{row['to_first']:10.2f}",
            flush=True,
        )


def bench_analysis(args, device, results):
    """phi of all pairs of 12 layers of 768 x 768 at rank 8, A, B and BA: each matrix decomposed once, and, as the paper's script has it,
    both whole matrices decomposed for every pair. The second is timed on as many pairs as make 10 s and scaled up."""
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    C_A, C_B, A = rand(12, 768, 8), rand(12, 768, 8), rand(12, 8, 768)
    began = time.perf_counter()
    ours = analyze.similarity_maps(analyze.Matrices(C_A, C_B, A), 8, 8, "left")
    our_seconds = time.perf_counter() - began
    pairs = [(a, b) for a in range(12) for b in range(a)]
    began, worst, done = time.perf_counter(), 0.0, 0
    for a, b in pairs:
        for name, X, Y in (
            ("A", C_A[a], C_A[b]),
            ("B", C_B[a], C_B[b]),
            ("BA", C_B[a] @ A[a], C_B[b] @ A[b]),
        ):
            U, V = (torch.linalg.svd(M)[0][:, :8] for M in (X, Y))
            worst = max(worst, abs((U.T @ V).norm().item() ** 2 / 8 - ours[name][a, b].item()))
        done += 1
        if time.perf_counter() - began > 10:
            break
    theirs = (time.perf_counter() - began) * len(pairs) / done
    results["analysis"] = {
        "seconds": our_seconds,
        "pairwise_seconds": theirs,
        "ratio": theirs / our_seconds,
        "largest_difference": worst,
    }
    print(
        f"\nphi of {len(pairs)} pairs of layers, 768 x 768, rank 8, {torch.get_num_threads()} CPU threads: {our_seconds * 1000:.0f} ms; decomposing both "
        f"matrices for every pair {theirs:.1f} s ({done} pairs timed), {theirs / our_seconds:.0f} times as long; largest difference {worst:.0e}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.partition("\n")[2],
    )
    parser.add_argument(
        "--init_from", type=Path, help="a pretrained encoder's folder, for the epochs"
    )
    parser.add_argument("--data_dir", type=Path, default=train.DATA / "glue")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("step", "epoch", "cpu", "analysis"),
        default=("step", "epoch", "cpu", "analysis"),
    )
    parser.add_argument("--compile", action="store_true", help="rows under torch.compile too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, results = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    if not transformers:
        print("transformers and peft are not installed: only this project's rows")
    train.be_deterministic(device)  # as train.py runs; the peers run with it, too
    if device.type == "cuda" and "step" in args.only:
        bench_step(args, device, results)
    if device.type == "cuda" and "epoch" in args.only and args.init_from:
        bench_epoch(args, device, results)
    if "cpu" in args.only and args.init_from and device.type == "cpu":
        bench_cpu(args, device, results)
    if "analysis" in args.only:
        bench_analysis(args, device, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
