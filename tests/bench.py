"""How fast a step is, next to transformers + PEFT in the same run if they are installed.

    python tests/bench.py                      # what this machine has: CUDA or CPU, the analysis
    python tests/bench.py --init_from FOLDER --data_dir FOLDER       # and epochs of real tasks
    python tests/bench.py --only step epoch --compile --json out.json      # PEFT's compiled, too

Times are medians, with the quartiles beside those of the steps. No test: nothing here asserts.

Shares of the peak. An encoder of N weights is counted as 4 N floating-point operations a token:
forward, and backward through the activations alone. (What train.py does is within 1% of that,
attention aside: the last layer's saved positions and the gradients of W0 + dW weigh the same.) The
peak is what a bf16 product of 8192 x 8192 matrices runs at, repeated as often as the steps: a GPU
slows down when it is kept busy. On one H100 that was 702 TFLOP/s, 768 on a rested GPU, whose shares
are in parentheses. The recorded steps' quartiles lay within 1% of the median, the others', which
wait for Python, within 24%.

What makes a step fast. A small batch's thousand kernels take longer to launch than to run: plain
loop 27.4 ms, recorded as a CUDA graph 5.6 (batch 32). An adapter's thin products are memory-bound:
forming W0 + dW for all layers at once and doing one product with it replaces three. Frozen weights
are bfloat16; no mask is made where nothing is padded; the last layer is computed for the first
token only. MPNet's position bias costs 8%, once it is contiguous: without that, attention
falls back to its slowest kernel and the step takes 1.65 to 1.9 times RoBERTa's. The deterministic
mode costs 2%, 6% where padded.

On two CPU cores, batches of 16 of RTE with all-MiniLM-L6-v2, by turns: transformers + PEFT 353 ms,
LoRA 307, CondLoRA 302, ratios 1.19 and 1.19. There the layers keep their thin products, since a CPU
is bound by arithmetic. The analysis takes 7 ms for phi of the 66 pairs of 12 layers of 768 x 768;
decomposing both matrices again for every pair takes 9.6 s.
"""

import argparse
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
import analyze
import train
from condlora import adapt
from data import glue, pretrained, tokenizer
from data.batches import Encoded, shuffled
from model import Config, Transformer

try:
    import transformers
    from peft import LoraConfig, get_peft_model
except ImportError:
    transformers = None

ROBERTA_BASE = dict(
    vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    pad_token_id=1)
ENCODER_WEIGHTS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)


# Both sides of the comparison --------------------------------------------------------------------

def options(**changes):
    """What train.py's command line would give."""
    defaults = dict(
        model_type="roberta", method="lora", targets=["query", "value"], rank=8, alpha=8.0,
        lr=1e-3, weight_decay=0.1, grad_clip=1.0, seed=0, no_graphs=False,
        dtype="bfloat16", regression=False)
    return SimpleNamespace(**defaults | changes)


def our_training_step(model, forward, split, args):
    optimizer = train.make_optimizer(model, args)
    step = train.make_step(forward, split, optimizer, args.grad_clip)
    on_cuda = split.labels.is_cuda
    return train.Recorded(step) if on_cuda and not args.no_graphs else step


class RandomTokens:
    """A tokenizer's stand-in: 128 random tokens, whatever the text."""

    pad_id = 1

    def encode(self, *text, max_len):
        return np.random.default_rng(len(text)).integers(5, 50000, 128).tolist(), [0] * 128


def our_step(args, device, n):
    torch.manual_seed(0)
    model = Transformer(Config(model_type=args.model_type, **ROBERTA_BASE))
    adapt(model, args.method, args.targets, args.rank, args.alpha)
    model.head.requires_grad_(True)
    model.to(device).train()
    split = glue.Split([("x",)] * n, [i % 2 for i in range(n)])
    data = Encoded(split, RandomTokens(), 128, device)
    step = our_training_step(model, train.prepare(model, args, device), data, args)
    [batch] = data.batches([np.arange(n)])
    return lambda: step(*batch)


def peer_model(folder=None, n_out=2):
    """transformers' encoder with PEFT's LoRA."""
    if folder:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=n_out, dtype=torch.float32)
    else:
        config = transformers.RobertaConfig(**ROBERTA_BASE)
        model = transformers.RobertaForSequenceClassification(config)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"])
    return get_peft_model(model, lora)


def condlora_in_transformers():
    model = peer_model().unload()
    adapt(model, "condlora")
    model.classifier.requires_grad_(True)
    return model


def peer_step(model, device, batch, compiled=False):
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    forward = torch.compile(model) if compiled else model

    def step():
        inputs, labels = batch()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # as its Trainer does
        optimizer.step()
        return loss
    return step


def timed(steps, rounds=24, run=5):
    """Seconds of each of the steps, warm ones, in each round.

    They run five in a row, as in training without waiting for each, and by turns, so that what else
    goes on in the machine meets all alike.
    """
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for step, of_step in zip(steps, seconds):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(run):
                step()
            torch.cuda.synchronize()
            of_step.append((time.perf_counter() - began) / run)
    return seconds


# A step on a GPU ---------------------------------------------------------------------------------

def measured_peak(device):
    """Floating-point operations a second of a bf16 product: in the median and the fastest round."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = lambda: a @ b
    timed([product], rounds=1)  # warm
    [seconds] = timed([product])
    return 2 * 8192 ** 3 / median(seconds), 2 * 8192 ** 3 / min(seconds)


def groups_of_steps(args, device, n):
    """Dicts of {label: a function that makes a step}; those of a dict are timed by turns."""
    ids = torch.randint(5, 50000, (n, 128), device=device)
    labels = torch.zeros(n, dtype=torch.long, device=device)
    batch = lambda: ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
    if transformers:
        yield {
            "transformers + PEFT LoRA, eager": lambda: peer_step(peer_model(), device, batch),
            "transformers, CondLoRA, eager":
                lambda: peer_step(condlora_in_transformers(), device, batch),
        }
        if args.compile:
            yield {"transformers + PEFT LoRA, compiled":
                   lambda: peer_step(peer_model(), device, batch, True)}
    kinds = {"plain loop": dict(no_graphs=True), "CUDA graph": {}}
    models = {"lora": {}, "condlora": dict(method="condlora"),
              "lora on MPNet": dict(model_type="mpnet")}
    for kind, settings in kinds.items():
        yield {f"train.py {name}, {kind}":
               lambda changes=settings | changes: our_step(options(**changes), device, n)
               for name, changes in models.items()}


def bench_step(args, device, results):
    """Training steps of RoBERTa-base's shape, 128 tokens wide, bf16."""
    time.sleep(2)  # to begin with a rested GPU
    peak, rested = measured_peak(device)
    name = torch.cuda.get_device_name()
    results["step"] = {"device": name, "peak": peak, "rested_peak": rested, "rows": []}
    print(f"\n{name}, torch {torch.__version__}: a bf16 product of 8192x8192 matrices runs at "
          f"{peak / 1e12:.0f} TFLOP/s, in its fastest round at {rested / 1e12:.0f}")
    for n in (32, 128):
        print(f"\n{f'one step of {n} x 128 tokens':36}{'ms':>8}{'quartiles':>14}"
              f"{'examples/s':>12}{'of peak (rested)':>18}{'GiB':>7}{'to PEFT':>9}{'to LoRA':>9}")
        first = None
        for group in groups_of_steps(args, device, n):
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
            for label, of_step, most in zip(group, times, memory):
                low, seconds, high = quantiles(of_step)
                first = first or seconds
                rate = 4 * ENCODER_WEIGHTS * n * 128 / seconds
                row = {
                    "batch": n, "what": label, "ms": 1000 * seconds,
                    "quartiles": (1000 * low, 1000 * high), "examples_per_s": n / seconds,
                    "of_peak": rate / peak, "of_rested_peak": rate / rested, "GiB": most / 2 ** 30,
                    "to_first": first / seconds,
                    "to_lora": median(a / b for a, b in zip(of_step, times[0])),  # by round
                }
                results["step"]["rows"].append(row)
                print(f"{label:36}{row['ms']:8.2f}{1000 * low:7.2f}-{1000 * high:6.2f}"
                      f"{n / seconds:12,.0f}{rate / peak:9.1%} ({rate / rested:6.1%})"
                      f"{row['GiB']:7.2f}{row['to_first']:9.2f}{row['to_lora']:9.3f}", flush=True)


# Epochs of real tasks on a GPU -------------------------------------------------------------------

def bench_epoch(args, device, results):
    """Epochs of CoLA and STS-B, batch 16, evaluation included, from tokenized texts."""
    results["epoch"] = []
    print(f"\n{'one epoch with its evaluation, batch 16':45}first s  second s  examples/s (second)")
    for task in ("cola", "stsb"):
        about, splits = glue.TASKS[task], glue.load(task, args.data_dir)
        tok = tokenizer.load(args.init_from)
        common = args, device, splits, tok, len(about.classes) or 1, about.metrics
        rows = {}
        if transformers:
            rows["transformers + PEFT LoRA, eager"] = lambda: peer_epochs(*common)
        for method in ("lora", "condlora"):
            rows[f"train.py {method}"] = lambda method=method: our_epochs(method, *common)
        for label, run in rows.items():
            gc.collect()
            torch.cuda.empty_cache()
            seconds = run()
            results["epoch"].append({"task": task, "what": label, "seconds": seconds})
            print(f"{task:6}{label:36}{seconds[0]:10.2f}{seconds[1]:10.2f}"
                  f"{len(splits['train'].labels) / seconds[1]:12,.0f}", flush=True)


def our_epochs(method, args, device, splits, tok, n_out, metrics):
    settings = options(method=method)
    torch.manual_seed(0)
    model = train.build(settings, pretrained.load(args.init_from, n_out)).to(device)
    forward = train.prepare(model, settings, device)
    data = {name: Encoded(split, tok, 128, device) for name, split in splits.items()}
    step = our_training_step(model, forward, data["train"], settings)
    seconds = []
    for epoch in range(2):
        began = time.perf_counter()
        model.train()
        for batch in data["train"].batches(shuffled(data["train"].widths, 16, [0, epoch])):
            step(*batch)
        train.evaluate(model, forward, data["validation"], metrics, 16)
        seconds.append(time.perf_counter() - began)
    return seconds


def peer_epochs(args, device, splits, tok, n_out, metrics):
    """The same with random batches, each padded to its longest row, as the Trainer's collator does.
    """
    encoded = {name: [tok.encode(*text) for text in split.texts] for name, split in splits.items()}

    def batch(name, rows):
        width = max(len(encoded[name][i][0]) for i in rows)
        pad = lambda row: torch.tensor(row + [0] * (width - len(row)))
        ids, types = zip(*(encoded[name][i] for i in rows))
        columns = {"input_ids": ids, "token_type_ids": types,
                   "attention_mask": [[1] * len(row) for row in ids]}
        inputs = {key: torch.stack([pad(row) for row in column]).to(device)
                  for key, column in columns.items()}
        return inputs, torch.tensor([splits[name].labels[i] for i in rows]).to(device)

    model = peer_model(args.init_from, n_out)
    current = []
    step = peer_step(model, device, lambda: batch("train", current))
    seconds, rng = [], np.random.default_rng(0)
    for _ in range(2):
        began = time.perf_counter()
        order = rng.permutation(len(encoded["train"]))
        model.train()
        for i in range(0, len(order), 16):
            current[:] = order[i:i + 16]
            step()
        model.eval()
        outputs, n = [], len(encoded["validation"])
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            for i in range(0, n, 16):
                inputs, _ = batch("validation", range(i, min(i + 16, n)))
                outputs.append(model(**inputs).logits)
        outputs = torch.cat(outputs).float().cpu().numpy()
        predictions = outputs.argmax(1) if n_out > 1 else outputs[:, 0]
        metrics(predictions, np.array(splits["validation"].labels))
        seconds.append(time.perf_counter() - began)
    return seconds


# A step on a CPU, and the analysis ---------------------------------------------------------------

def bench_cpu(args, device, results):
    """The same batches of RTE, by turns, in float32."""
    splits = glue.load("rte", args.data_dir)
    data = Encoded(splits["train"], tokenizer.load(args.init_from), 128, device)
    batches = data.batches(shuffled(data.widths, 16, 0)[:14])
    current = [batches[0]]

    def batch():
        rows, width, _ = current[0]
        (input_ids, token_type_ids, mask), labels = data.batch(rows, width, padded=True)
        return {"input_ids": input_ids, "token_type_ids": token_type_ids,
                "attention_mask": mask.long()}, labels

    steps = {}
    if transformers:
        peer = peer_model(args.init_from, 2)
        steps["transformers + PEFT LoRA"] = peer_step(peer, device, batch)
    for method in ("lora", "condlora"):
        settings = options(method=method, dtype="float32")
        torch.manual_seed(0)
        model = train.build(settings, pretrained.load(args.init_from, 2)).train()
        step = our_training_step(model, model, data, settings)
        steps[f"train.py {method}"] = lambda step=step: step(*current[0])
    seconds = {label: [] for label in steps}
    for k, current[0] in enumerate(batches):
        for label, step in steps.items():
            began = time.perf_counter()
            step()
            if k > 1:  # the first two warm up
                seconds[label].append(time.perf_counter() - began)
    print(f"\n{f'RTE, batch 16, float32, {torch.get_num_threads()} CPU threads':45}median ms"
          f"  examples/s  to the first row (median of the ratios)")
    first = next(iter(seconds.values()))
    results["cpu"] = []
    for label, times in seconds.items():
        row = {"what": label, "ms": 1000 * median(times), "examples_per_s": 16 / median(times),
               "to_first": median(a / b for a, b in zip(first, times))}
        results["cpu"].append(row)
        print(f"{label:45}{row['ms']:9.0f}{row['examples_per_s']:12.1f}{row['to_first']:10.2f}",
              flush=True)


def bench_analysis(args, device, results):
    """phi of all pairs of 12 layers of 768 x 768 at rank 8, for A, B and BA.

    Ours decomposes each matrix once; the paper's script both whole matrices for every pair, which
    is timed on as many pairs as make 10 s and scaled up.
    """
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    C_A, C_B, A = rand(12, 768, 8), rand(12, 768, 8), rand(12, 8, 768)
    began = time.perf_counter()
    ours = analyze.similarity_maps({"A": C_A, "B": C_B}, A, 8, 8, "left")
    our_seconds = time.perf_counter() - began
    whole = {"A": C_A, "B": C_B, "BA": C_B @ A}
    pairs = [(a, b) for a in range(12) for b in range(a)]
    began, worst, done = time.perf_counter(), 0.0, 0
    while done < len(pairs) and time.perf_counter() - began < 10:
        a, b = pairs[done]
        for name, matrices in whole.items():
            U, V = (torch.linalg.svd(matrices[k])[0][:, :8] for k in (a, b))
            worst = max(worst, abs((U.T @ V).norm().item() ** 2 / 8 - ours[name][a, b].item()))
        done += 1
    pairwise = (time.perf_counter() - began) * len(pairs) / done
    results["analysis"] = {"seconds": our_seconds, "pairwise_seconds": pairwise,
                           "ratio": pairwise / our_seconds, "largest_difference": worst}
    print(f"\nphi of {len(pairs)} pairs of layers, 768 x 768, rank 8, {torch.get_num_threads()} "
          f"CPU threads: {our_seconds * 1000:.0f} ms; decomposing both matrices for every pair "
          f"{pairwise:.1f} s ({done} pairs timed), {pairwise / our_seconds:.0f} times as long; "
          f"largest difference {worst:.0e}")


def main():
    intro, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, kinds = parser.add_argument, ("step", "epoch", "cpu", "analysis")
    add("--init_from", type=Path, help="a pretrained encoder's folder, for epochs and the CPU")
    add("--data_dir", type=Path, default=train.DATA / "glue")
    add("--only", nargs="+", choices=kinds, default=kinds)
    add("--compile", action="store_true", help="a row of PEFT's under torch.compile, too")
    add("--json", type=Path)
    args = parser.parse_args()
    device, results = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    if not transformers:
        print("transformers and peft are not installed: only this project's rows")
    torch.use_deterministic_algorithms(True)  # as train.py runs; the peers run with it, too
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device.type == "cuda" and "step" in args.only:
        bench_step(args, device, results)
    if device.type == "cuda" and "epoch" in args.only and args.init_from:
        bench_epoch(args, device, results)
    if device.type == "cpu" and "cpu" in args.only and args.init_from:
        bench_cpu(args, device, results)
    if "analysis" in args.only:
        bench_analysis(args, device, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
