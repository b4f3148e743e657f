"""Fine-tune a frozen encoder with CondLoRA or LoRA, on the toy language or on GLUE.

    python train.py --method condlora                        # the toy task, in a minute
    python data/download.py mrpc roberta-base
    python train.py --task mrpc --init_from roberta-base     # GLUE
    python train.py --task FOLDER --init_from roberta-base   # your own train.tsv and dev.tsv
    python train.py --eval_only ckpt.pt                      # evaluate a checkpoint
    python train.py --eval_only ckpt.pt --predict FILE       # a label and its probability a line

Protocol of the CondLoRA paper (Kim et al. 2024, section 4): a tenth of the training set is held
out and chooses the epoch; GLUE's dev set, seen once at the end, is the test. The first three parts
of this file are how training works. The command line follows; the last part, "What makes it fast",
wraps the same step, and in float32 computes the same, up to rounding.
"""

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

# cuBLAS is deterministic only with this setting.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.distributed as dist
# AdamW imports this if nothing else has; after init_process_group, that ends in a warning.
import torch.distributed.nn
import torch.nn.functional as F
from tqdm import tqdm

from condlora import (METHODS, adapt, adapted_layers, adapter_parameters, convert, copy_tensors,
                      trained_tensors, unmerge)
from data import checkpoint, glue, peft_format, pretrained, tokenizer, toy
from data.batches import Encoded, by_width, shuffled
from data.command import check_outputs, one_line, parser_of, reading
from model import Transformer

DATA = Path(__file__).resolve().parent / "data"

# Several processes under torchrun share each batch; number 0 prints and writes.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IS_MASTER = PROCESS == 0
HIDE_BAR = None if IS_MASTER else True  # tqdm: None hides a bar unless it is on a terminal

# Defaults, chosen on the validation sets of the toy task and of GLUE. "full" is full fine-tuning,
# "head" trains nothing but the head.
TOY_DEFAULTS = {"epochs": 14, "batch_size": 32,
                "lr": dict.fromkeys(METHODS, 5e-3) | {"lora": 4e-3, "full": 1e-3, "head": 1e-2}}
GLUE_DEFAULTS = {"epochs": 20, "batch_size": 16,
                 "lr": dict.fromkeys(METHODS, 1e-3) | {"full": 3e-5, "head": 2e-3}}
LIMITS = {  # of options: from, to
    **dict.fromkeys(("rank", "epochs", "batch_size", "max_len", "pretrain_steps"), (1, 10 ** 9)),
    "patience": (0, 10 ** 9), "seed": (0, 2 ** 32 - 1), "warmup": (0, 1), "alpha": (1e-30, 1e30),
    "lr": (1e-30, 1e30), "weight_decay": (0, 1e30), "grad_clip": (0, 1e30),
}


# Training ----------------------------------------------------------------------------------------

def train(model, forward, data, metrics, args, ckpt):
    """Train for args.epochs epochs, or to resume, for those that ckpt["history"] lacks.

    forward(*inputs) gives logits: it is the model, or what `prepare` makes of it. data["train"] and
    data["validation"] are Encoded: texts as padded token ids, on the device; each row's width is
    its number of tokens, or a bit more. A batch is (rows, width, padded): ([7, 2, 9], 24, True) is
    rows 7, 2 and 9, cut at 24 tokens, of which some have fewer, so that a mask is needed.

    ckpt, a dict, is the checkpoint. Each epoch appends to its "history", replaces "last" (what
    trains) and "optimizer", and, if it is the best so far, "weights" and "best_epoch".
    """
    split, history = data["train"], ckpt["history"]
    device, n = split.labels.device, len(split.labels)
    optimizer = make_optimizer(model, args)
    if history:  # resumed; load_model has put the best epoch's weights into the model
        with reading(args.resume):  # errors name the file
            checkpoint.restore_last_epoch(ckpt, model, optimizer)
    step = make_step(forward, split, optimizer, args.grad_clip)
    if device.type == "cuda" and not args.no_graphs:
        step = Recorded(step)  # the same, faster: see the end of this file
    steps_per_epoch = math.ceil(n / args.batch_size)
    steps, done = args.epochs * steps_per_epoch, len(history) * steps_per_epoch
    bar = tqdm(total=steps, initial=done, desc=f"{args.task} {args.method}", disable=HIDE_BAR)
    for epoch in range(len(history) + 1, args.epochs + 1):
        if history and 0 < args.patience <= len(history) - best_of(history)["epoch"]:
            break
        model.train()
        # Seeded by epoch, so that a resumed run is the same; dropout also by process.
        dropout_seed = np.random.default_rng([args.seed, epoch, PROCESS]).integers(2 ** 63)
        torch.manual_seed(int(dropout_seed))
        # Each batch's row numbers: rows of similar width together, batches in random order.
        row_lists = shuffled(split.widths, args.batch_size, [args.seed, epoch])
        began, loss_sum = time.perf_counter(), torch.zeros((), device=device)
        for rows, width, padded in split.batches(row_lists):
            lr = args.lr * schedule(done, steps, args.warmup)
            optimizer.param_groups[0]["lr"].fill_(lr)  # a tensor: see make_optimizer
            loss_sum += step(rows, width, padded)
            done += 1
            bar.update()
        loss = sum_over_processes(loss_sum).item() / n
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch}: try --lr below {args.lr:g}")
        scores = evaluate(model, forward, data["validation"], metrics, args.batch_size)
        history.append({"epoch": epoch, "loss": loss, "seconds": seconds, "validation": scores})
        last = {name: p.detach().cpu().clone() for name, p in trained_tensors(model).items()}
        ckpt.update(last=last, optimizer=optimizer.state_dict()["state"])
        if best_of(history)["epoch"] == epoch:
            ckpt.update(best_epoch=epoch, weights=last)
        if IS_MASTER:
            checkpoint.save(ckpt, args.out)
            tqdm.write(f"epoch {epoch:2d}  loss {loss:.3f}  validation {text_of(scores)}"
                       + "  * best" * (ckpt["best_epoch"] == epoch))
            if args.history:
                args.history.write_text("".join(json.dumps(line) + "\n" for line in history))
    bar.close()
    constant = constant_loss(split.labels.cpu())
    if IS_MASTER and history[-1]["loss"] > 0.98 * constant:
        print(f"the last training loss, {history[-1]['loss']:.3f}, is hardly better than a "
              f"constant prediction's, {constant:.3f}: try a lower --lr, or more --epochs")


def make_step(forward, split, optimizer, grad_clip):
    """step(rows, width, padded): one training step; returns the sum of this process's losses."""
    [group] = optimizer.param_groups

    def step(rows, width, padded):
        # This process's rows: all, if it is the only one; or none, which give a loss of 0.
        share = rows[PROCESS::PROCESSES]
        inputs, labels = split.batch(share, width, padded)
        loss = summed_loss(forward(*inputs), labels)
        optimizer.zero_grad()
        # Over the whole batch's rows: the shares' gradients add up to those of the batch's mean.
        (loss / len(rows)).backward()  # not len(share)
        if PROCESSES > 1:
            sum_gradients(group["params"])
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(group["params"], grad_clip)
        optimizer.step()
        return loss.detach()
    return step


def sum_gradients(parameters):
    """Give every process the sum of all processes' gradients, in one exchange."""
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(gradient)
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


def sum_over_processes(tensor):
    if PROCESSES > 1:
        dist.all_reduce(tensor)
    return tensor


def make_optimizer(model, args):
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    # A CUDA graph (Recorded, at the end) replays the numbers of its recording. So the rate is a
    # tensor, which AdamW takes without foreach; capturable keeps its count of steps on the GPU.
    lr = torch.tensor(args.lr, device=parameters[0].device)
    return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay, foreach=False,
                             fused=on_cuda, capturable=on_cuda)


def summed_loss(logits, labels):
    """Cross entropy, or squared errors of a single output (STS-B), summed over the batch."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0].float(), labels, reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def constant_loss(labels):
    """The mean loss of the best answer that is the same for every input."""
    if labels.is_floating_point():
        return labels.var(correction=0).item()
    frequencies = labels.bincount() / len(labels)
    return torch.special.entr(frequencies).sum().item()  # their entropy


def schedule(step, steps, warmup):
    """Factor on the learning rate: linear warmup over a share of the steps, then linear decay."""
    rise = warmup * steps
    up = (step + 1) / rise if rise else 1.0
    down = (steps - step) / max(steps - rise, 1.0)
    return min(up, down, 1.0)


def evaluate(model, forward, split, metrics, batch_size):
    """The metrics of a split."""
    outputs = outputs_of(model, forward, split, batch_size)
    predictions = outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0]
    return metrics(predictions.numpy(), split.labels.cpu().numpy())


@torch.inference_mode()
def outputs_of(model, forward, split, batch_size):
    """Logits (n, n_out) on the CPU. Each process fills its batches' rows, and these are summed."""
    model.eval()
    outputs = torch.zeros(len(split.labels), model.config.n_out, device=split.labels.device)
    batches = split.batches(by_width(split.widths, 8 * batch_size))[PROCESS::PROCESSES]
    for rows, width, padded in tqdm(batches, "evaluating", leave=False, delay=2, disable=HIDE_BAR):
        inputs, _ = split.batch(rows, width, padded)
        outputs[rows] = forward(*inputs).float()
    outputs = sum_over_processes(outputs).cpu()
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs are not finite: train it with a lower --lr")
    return outputs


def best_of(history):
    """The first epoch with the best validation score, by the task's main metric."""
    main_score = lambda epoch: next(iter(epoch["validation"].values()))  # the main one is first
    return max(history, key=main_score)


def text_of(scores):
    """Format scores, times 100 as GLUE has them: "accuracy 68.4, f1 70.1"."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in scores.items())


# The task and the model --------------------------------------------------------------------------

def load_task(args, ckpt):
    """({"train", "validation", "test": Split(texts, labels)}, metrics(predictions, labels), about)

    A text is a tuple of one or two sentences. Of GLUE, validation is a tenth of train.tsv, and test
    is dev.tsv, if there is one (MNLI has two). `about` has a checkpoint's entries on the data:
    ValueError if `ckpt` has others.
    """
    file = args.resume or args.eval_only
    with reading(file):  # errors name it, if there is one
        if args.task == "toy":
            splits, classes, metrics = toy.load(), ("0", "1"), glue.accuracy
        else:
            task = glue.find_task(args.task, args.regression)
            splits, classes, metrics = task.load(args.data_dir), task.classes, task.metrics
    rows = json.dumps([splits["train"], splits["validation"]]).encode()
    about = {"task": args.task, "classes": list(classes), "n_texts": len(splits["train"].texts[0]),
             "data": hashlib.sha256(rows).hexdigest()}
    # Other rows will do to evaluate, but not to resume.
    fixed = ("classes", "n_texts", "data") if args.resume else ("classes", "n_texts")
    changed = [name for name in fixed if ckpt and ckpt[name] != about[name]]
    if changed:
        raise ValueError(f"{file} was trained on other data: {', '.join(changed)} changed")
    if IS_MASTER and os.path.isabs(args.task) and glue.look_like_scores(classes):  # own data
        print(f"{len(classes)} labels, all numbers: if they are scores, add --regression")
    return splits, metrics, about


def build(args, model):
    """Adapt a pretrained encoder: only what should train requires a gradient."""
    model.requires_grad_(args.method == "full")
    if args.method in METHODS:  # only the encoder's layers are adapted, the head trains as it is
        adapt(model.layers, args.method, args.targets, args.rank, args.alpha, args.seed)
    model.head.requires_grad_(True)
    return model


def load_model(args, ckpt, n_out, device):
    """(the encoder's folder, its tokenizer, the model with the best epoch's weights if trained)"""
    with reading(args.resume or args.eval_only):  # errors name the checkpoint
        folder = find_encoder(args, ckpt, device)
        tok = tokenizer.load(folder)
        torch.manual_seed(args.seed)
        model = build(args, pretrained.load(folder, n_out=n_out)).to(device)
        if tok.vocab_size > model.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {tok.vocab_size} tokens, the model "
                             f"{model.config.vocab_size}")
        if ckpt:
            copy_tensors(ckpt["weights"], trained_tensors(model))
    return folder, tok, model


def find_encoder(args, ckpt, device):
    """The encoder's folder: --init_from, a checkpoint's, the toy's, or by default roberta-base."""
    if ckpt:
        return checkpoint.verified_encoder(ckpt, args.init_from)
    if args.task == "toy" and not args.init_from:
        return toy_encoder(args, device)
    return pretrained.find(args.init_from or "roberta-base")


def toy_encoder(args, device):
    """The folder of the encoder pretrained on the toy language, made once and kept."""
    folder = DATA / "models" / f"toy-encoder-{args.pretrain_steps}"
    if IS_MASTER and not (folder / "config.json").is_file():
        build(args, Transformer(toy.CONFIG))  # a wrong --rank fails now, not after pretraining
        toy.make_encoder(folder, args.pretrain_steps, device)
    if PROCESSES > 1:
        dist.barrier()  # the others wait until it is made
    return folder


# A run -------------------------------------------------------------------------------------------

def run(argv):
    args, ckpt = arguments(argv)
    device = pick_device(args.device)
    if device.type != "mps":  # same seed, same results; costs a few percent on CUDA
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which would take time
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    settle(args, device)
    if args.predict is not None or args.export:
        predict_or_export(args, ckpt, device)
    else:
        train_and_report(args, ckpt, device)
    if PROCESSES > 1:
        dist.destroy_process_group()


def train_and_report(args, ckpt, device):
    """Train and write the scores to the checkpoint, unless --eval_only is given; print them."""
    splits, metrics, about = load_task(args, ckpt)
    folder, tok, model = load_model(args, ckpt, len(about["classes"]) or 1, device)
    forward = prepare(model, args, device)  # also gives the model's weights other dtypes
    max_len = min(args.max_len, model.config.max_len)
    data = {name: Encoded(split, tok, max_len, device) for name, split in splits.items()
            if not (name == "train" and args.eval_only)}
    if not args.eval_only:
        ckpt = ckpt or new_checkpoint(args, about, folder, model)
        train(model, forward, data, metrics, args, ckpt)  # which fills ckpt
        copy_tensors(ckpt["weights"], trained_tensors(model))  # of the best epoch
    scores = {name: evaluate(model, forward, split, metrics, args.batch_size)
              for name, split in data.items() if name != "train"}
    if IS_MASTER:
        if not args.eval_only:
            checkpoint.save(ckpt | {"results": scores}, args.out)
        report(args, model, ckpt, folder, scores, splits["train"].labels, device)


def new_checkpoint(args, about, folder, model):
    """What a checkpoint holds before the first epoch; `train` adds the rest."""
    settings = {name: getattr(args, name) for name in checkpoint.SETTINGS}
    encoder = {"path": str(folder.resolve()), "sha256": checkpoint.sha256(folder)}
    return about | {"settings": settings, "encoder": encoder, "history": [],
                    "layers": list(adapted_layers(model))}


def predict_or_export(args, ckpt, device):
    """Export a checkpoint's model, or print what it predicts."""
    classes = ckpt["classes"]
    folder, tok, model = load_model(args, ckpt, len(classes) or 1, device)
    if args.export:
        peft_format.export(model, folder, args.export)
        print(f"saved to {args.export}")
        return
    lines = Encoded(glue.read_lines(args.predict, ckpt["n_texts"]), tok,
                    min(args.max_len, model.config.max_len), device)
    for logits in outputs_of(model, prepare(model, args, device), lines, args.batch_size):
        if classes:
            probability, label = logits.softmax(0).max(0)
            print(f"{classes[label]}\t{probability:.4f}")
        else:
            print(f"{logits[0]:.4f}")


def report(args, model, ckpt, folder, scores, train_labels, device):
    """Print a table: what was trained on what, and how well it does."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    adapter = count(adapter_parameters(model))
    encoder = count(model.parameters()) - count(model.head.parameters()) - adapter
    trained = encoder if args.method == "full" else adapter
    classes, history = ckpt["classes"], ckpt["history"]
    seconds = sum(epoch["seconds"] for epoch in history)
    rows = {"task": args.task}
    if os.path.isabs(args.task) and classes:
        rows["classes"] = ", ".join(f"{name} ({train_labels.count(i)})"
                                    for i, name in enumerate(classes))
    rows |= {"method": args.method + (f", rank {args.rank}" if adapter else ""),
             "encoder": folder.resolve(),
             "trained parameters": f"{trained:,} ({trained / encoder:.2%} of the encoder's "
                                   f"{encoder:,}), and the head"}
    rows |= {name.replace("_", " "): text_of(values) for name, values in scores.items()}
    rows["best epoch"] = f"{ckpt['best_epoch']} of {len(history)}"
    if not args.eval_only:
        rate = len(train_labels) * len(history) / seconds
        rows |= {"learning rate": f"{args.lr:g}", "device": f"{device}, {args.dtype}",
                 "training time": f"{seconds:.0f} s ({rate:,.0f} examples/s)",
                 "saved to": args.out}
        if args.method in ("lora", "condlora"):
            rows["next"] = f"python analyze.py {args.out}"
    for name, value in rows.items():
        print(f"{name:20}{value}")


# The command line --------------------------------------------------------------------------------

def arguments(argv):
    """(options, the checkpoint that --resume or --eval_only names or None)

    A checkpoint's settings replace the defaults. What is typed must agree with them (--rank 4 is an
    error, if it was trained with 8), but for the data's folder and, with --eval_only, --dtype.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    file, ckpt, settings = args.resume or args.eval_only, None, {}
    if (args.predict is not None or args.export) and (not args.eval_only or PROCESSES > 1):
        raise ValueError("--predict and --export use a trained model, in one process: name it "
                         "with --eval_only")
    if file:
        ckpt = checkpoint.load(file)
        settings = {name: ckpt["settings"][name] for name in checkpoint.SETTINGS}
        parser.set_defaults(**settings, out=file)
        args = parser.parse_args(argv)  # again: what now differs from the settings was typed
    with reading(file):  # errors name it, if there is one
        for name, (low, high) in LIMITS.items():
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} is {value}, which is not from {low} to {high}")
    has_moved = os.path.isabs(args.task) and os.path.isabs(settings.get("task", ""))  # own folders
    may_change = {"data_dir": True, "task": has_moved, "dtype": bool(args.eval_only)}
    for name, value in settings.items():
        if getattr(args, name) != value and not may_change.get(name, False):
            raise ValueError(f"--{name} {getattr(args, name)} contradicts {file}, trained with "
                             f"{value}: leave it out")
    return args, ckpt


def make_parser():
    parser = parser_of(__doc__, "train.py [options]")
    add = parser.add_argument
    add("--task", default="toy", type=task_name, help="toy (made up, needs no files; the "
        f"default), GLUE's {', '.join(glue.TASKS)}, or a folder of yours with train.tsv and "
        "perhaps dev.tsv, whose first line is text (or text1, text2) and label")
    add("--regression", action="store_true", help="your own data's labels are numbers, not classes")
    add("--method", default="condlora", choices=(*METHODS, "full", "head"),
        help="what trains with the head: lora; condlora, the default; its controls tied (one A and "
        "B for all layers) and random (random matrices for W0); all weights (full); nothing (head)")
    add("--init_from", help="pretrained encoder: a folder, or a name under data/models; default: "
        "the toy encoder, or roberta-base")
    add("--data_dir", default=f"{DATA}/glue", type=os.path.abspath, help="GLUE; default: data/glue")
    add("--rank", type=int, default=8, help="r, the adapter's rank; default: 8")
    add("--alpha", type=float, default=8.0, help="dW is scaled by alpha / rank; default: 8")
    add("--targets", nargs="+", default=["query", "value"],
        help="linear layers to adapt, of query, key, value, out, fc1, fc2; default: query value")
    add("--lr", type=float, help="highest learning rate; default for condlora: toy 5e-3, GLUE 1e-3")
    add("--epochs", type=int, help="default: toy 14, GLUE 20")
    add("--batch_size", type=int, help="default: toy 32, GLUE 16")
    add("--max_len", type=int, default=128, help="longest input, in tokens; default: 128")
    add("--warmup", type=float, default=0.1, help="share of steps in which lr rises; default: 0.1")
    add("--weight_decay", type=float, default=0.1, help="AdamW's; default: 0.1")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm, 0: any; default: 1")
    add("--patience", type=int, default=0, help="stop after so many epochs without gain; 0: never")
    add("--seed", type=int, default=0, help="same seed, same results (not on mps); default: 0")
    add("--device", help="cuda, cpu or mps; default: the best available")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation; what trains stays "
        "float32. Default: bfloat16 on cuda, else float32")
    add("--pretrain_steps", type=int, default=1500, help="of the toy encoder; default: 1500")
    add("--no_graphs", action="store_true", help="on cuda, launch each kernel, without CUDA graphs")
    add("--out", default=Path("ckpt.pt"), type=Path, help="checkpoint to write; default: ckpt.pt")
    add("--history", type=Path, metavar="FILE", help="also write a line of JSON for each epoch")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", type=Path, metavar="CKPT",
                         help="resume the interrupted run that wrote this checkpoint")
    earlier.add_argument("--eval_only", type=Path, metavar="CKPT",
                         help="report this checkpoint's scores instead of training")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--predict", metavar="FILE", help="with --eval_only: label and probability "
                     "for each line of a file, or of - (standard input); a tab separates two texts")
    use.add_argument("--export", type=Path, metavar="FOLDER",
                     help="with --eval_only: write the adapter and the head as PEFT reads them")
    return parser


def task_name(text):
    """The task's name, or the absolute path of a folder of one's own."""
    is_name = text == "toy" or text.lower().replace("-", "") in glue.TASKS
    return text if is_name or not os.path.isdir(text) else str(Path(text).resolve())


def settle(args, device):
    """Fill in what the command line leaves open; raise ValueError now if it cannot be done."""
    defaults = TOY_DEFAULTS if args.task == "toy" else GLUE_DEFAULTS
    args.lr = args.lr or defaults["lr"][args.method]
    args.epochs = args.epochs or defaults["epochs"]
    args.batch_size = args.batch_size or defaults["batch_size"]
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.eval_only and (args.history or args.out != args.eval_only):
        raise ValueError("--out and --history record training, and --eval_only does not train")
    if args.regression and not os.path.isabs(args.task):
        raise ValueError(f"--regression is for your own data, --task is {args.task}")
    if IS_MASTER and not args.eval_only:
        # A file is replaced only if these bytes, torch.save's or a history's, are near its start.
        check_outputs({"--out": (args.out, b"data.pkl"), "--history": (args.history, b'{"epoch"')})
        if args.out.exists() and not args.resume:
            print(f"{args.out} will be replaced after the first epoch")


def pick_device(name):
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kinds = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    name = name or kinds[0]
    if PROCESSES > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in (*kinds, *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        raise ValueError(f"--device {name} is not available: use {' or '.join(kinds)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams and graphs are the current device's
    return torch.device(name)


def main(argv=None):
    with one_line("train.py", "interrupted. If an epoch was completed, --resume continues from it"):
        try:
            run(sys.argv[1:] if argv is None else argv)
        except torch.OutOfMemoryError:
            raise ValueError("the device is out of memory: try a smaller --batch_size or "
                             "--max_len") from None


# What makes it fast: the same forward and the same step, wrapped ---------------------------------

def prepare(model, args, device):
    """forward(*inputs) that gives the model's logits fast; changes the model in place.

    float32                  the model as it is; on CUDA with_summed_weights
    bfloat16                 with_summed_weights (W0 stays float32); other frozen weights bfloat16
    bfloat16, --method full  autocast, since everything trains
    """
    bfloat16 = args.dtype == "bfloat16"
    if device.type == "cuda":  # next to bfloat16 only the head computes in float32: TF32 will do
        torch.set_float32_matmul_precision("high" if bfloat16 else "highest")
    if bfloat16 and args.method == "full":
        def forward(*inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return model(*inputs)
        return forward
    if bfloat16:
        W0_ids = {id(layer.weight) for layer in adapted_layers(model).values()}
        for p in model.parameters():
            if not p.requires_grad and id(p) not in W0_ids:
                p.data = p.data.to(torch.bfloat16)
    if bfloat16 or device.type == "cuda":
        return with_summed_weights(model, getattr(torch, args.dtype))
    return model


def stacks_of(model, dtype):
    """[(layers, W0, conversion, M)], stacks of adapted layers.

    layers      L layers of one shape and Conversion, whose weights are views of W0 from now on
    W0          (L, d_out, d_in), float32
    conversion  CondLoRA's or a control's; None in LoRA, where all layers of a shape are a stack
    M           (L, d_out, d_in), a copy of the layers' M in `dtype`; None in LoRA and for "tied"
    """
    groups = {}
    for layer in adapted_layers(model).values():
        key = layer.weight.shape, getattr(layer, "conversion", None)
        groups.setdefault(key, []).append(layer)
    stacks = []
    for (_, conversion), layers in groups.items():
        W0, M = torch.stack([layer.weight.detach() for layer in layers]), None
        for layer, weight in zip(layers, W0):
            layer.weight.data = weight  # a view of W0: its own memory is freed
        if conversion and layers[0].M is not None:
            M = torch.stack([layer.M.detach() for layer in layers]).to(dtype)
        stacks.append((layers, W0, conversion, M))
    return stacks


def with_summed_weights(model, dtype):
    """forward(*inputs) in which an adapted layer computes x (W0 + dW)^T: one product, not three.

    The thin products with A and B are memory-bound on a GPU. Here a few products give every layer's
    B A, in `dtype`. W0 + dW is summed in float32, then rounded. (Added to a bfloat16 W0, a small
    update would be lost. This way it changes those entries that are near a rounding boundary.)
    Layers have the sum as `merged` during the call; gradients reach A and B through it.
    """
    stacks = stacks_of(model, dtype)

    def forward(*inputs):
        for layers, W0, conversion, M in stacks:
            if conversion:  # A (L, r, d_in) and B (L, d_out, r); "tied"'s have no L
                A, B = convert(M, conversion.theta_A.to(dtype), conversion.theta_B.to(dtype))
            else:
                A = torch.stack([layer.A for layer in layers]).to(dtype)
                B = torch.stack([layer.B for layer in layers]).to(dtype)
            summed = torch.add(W0, B @ A, alpha=layers[0].scale).to(dtype)  # (L, d_out, d_in)
            for layer, weight in zip(layers, summed.unbind()):
                layer.merged = weight
        try:
            return model(*inputs)
        finally:
            unmerge(model)  # autograd keeps what backward needs
    return forward


class Recorded:
    """Calls step(rows, width, padded) on CUDA, in the end by replaying a graph for each shape.

    A small batch's thousand kernels take longer to launch than to run. A graph holds those of the
    whole step, from the forward pass to AdamW's, and launches them at once. It reads and writes the
    same memory each time: the parameters, AdamW's state, the learning rate, and a tensor of row
    numbers, which is filled before each replay. Dropout still differs from replay to replay.
    """

    def __init__(self, step):
        self.step, self.seen, self.graphs = step, set(), {}
        self.pool = torch.cuda.graph_pool_handle()  # all graphs' memory: they run one at a time

    def __call__(self, rows, width, padded):
        shape = len(rows), width, padded
        if shape not in self.seen:  # a shape's first call
            self.seen.add(shape)
            return self.warm_up(rows, width, padded)
        if shape not in self.graphs:  # its second, which is recorded, then replayed as all others
            self.graphs[shape] = self.record(rows, width, padded)
        graph, input_rows, loss = self.graphs[shape]
        input_rows.copy_(rows)
        graph.replay()
        return loss  # until another replay, which may use the same memory

    def warm_up(self, rows, width, padded):
        """Take the step on a side stream, as PyTorch asks before a capture."""
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            loss = self.step(rows, width, padded)
        usual.wait_stream(stream)
        return loss

    def record(self, rows, width, padded):
        """(the graph of a step, the rows it reads, the loss it writes); does not take the step."""
        graph, input_rows = torch.cuda.CUDAGraph(), rows.clone()
        # NCCL's watchdog thread may call CUDA during capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.step(input_rows, width, padded)
        return graph, input_rows, loss


if __name__ == "__main__":
    main()
