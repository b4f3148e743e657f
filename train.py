"""Fine-tune a frozen encoder with CondLoRA or LoRA, on the toy language or on GLUE.

    python train.py --method condlora                        # from scratch, in minutes
    python data/download.py mrpc roberta-base
    python train.py --task mrpc --init_from roberta-base     # GLUE
    python train.py --task FOLDER --init_from roberta-base   # your own train.tsv and dev.tsv
    python train.py --eval_only ckpt.pt                      # its figures again
    python train.py --eval_only ckpt.pt --predict FILE       # its answers, line by line

Protocol of the CondLoRA paper (Kim et al. 2024, section 4): a tenth of the training set is held
out and chooses the epoch; GLUE's dev set, seen once at the end, is the test. To see how training
works, read the first two parts. The third is the command line; the last, "What makes it fast",
wraps the same step and changes no result.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

# cuBLAS gives the same sums each time only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
import torch.distributed as dist
# AdamW imports this, too. Imported after the process group began, it would keep that alive past its
# end.
import torch.distributed.nn
import torch.nn.functional as F
from tqdm import tqdm

from condlora import adapt, adapted_layers, adapter_parameters, convert, copy_tensors, unmerge
from data import checkpoint as checkpoints
from data import glue, peft_format, tokenizer, toy
from data.batches import Encoded, by_width, shuffled
from data.command import between, check_writable, naming, one_line, parser_of
from model import Config, Transformer, short, weights_file

DATA = Path(__file__).resolve().parent / "data"

# Several processes under torchrun share out each batch; number 0 prints and writes.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IS_MASTER = PROCESS == 0
NO_BAR = None if IS_MASTER else True  # tqdm: True hides the bar, None only where no terminal is

# Defaults, chosen on the validation sets of the toy tasks and of GLUE.
LEARNING_RATE = {
    "toy": {"condlora": 5e-3, "lora": 4e-3, "full": 1e-3, "head": 1e-2},
    "glue": {"condlora": 1e-3, "lora": 1e-3, "full": 3e-5, "head": 2e-3},
}
EPOCHS = {"toy": 14, "glue": 20}
BATCH_SIZE = {"toy": 32, "glue": 16}
TARGETS = ("query", "key", "value", "out", "fc1", "fc2")
# Options that a checkpoint does not store.
NOT_KEPT = ("init_from", "device", "no_graphs", "out", "log", "resume", "eval_only", "predict",
            "export")


# Training ----------------------------------------------------------------------------------------

def train(model, forward, data, metrics, args, checkpoint):
    """Train for args.epochs epochs, or those that the dict `checkpoint` lacks.

    forward(*inputs) gives the model's logits, as fast_forward makes them. After each epoch the
    checkpoint is filled in and saved.
    """
    split, history = data["train"], checkpoint["history"]
    device, n = split.labels.device, len(split.labels)
    optimizer = make_optimizer(model, args)
    if history:
        checkpoints.unpack_state(checkpoint, model, optimizer)
    elif args.log and IS_MASTER:
        args.log.write_text("")
    step = make_step(forward, split, optimizer, args.grad_clip)
    if device.type == "cuda" and not args.no_graphs:
        step = Recorded(step)
    steps_per_epoch = math.ceil(n / args.batch_size)
    steps, done = args.epochs * steps_per_epoch, len(history) * steps_per_epoch
    bar = tqdm(total=steps, initial=done, desc=f"{args.task} {args.method}", disable=NO_BAR)
    for epoch in range(len(history) + 1, args.epochs + 1):
        if args.patience and history and epoch - best_of(history)["epoch"] > args.patience:
            break
        model.train()
        # An epoch has the same dropout, whether or not the run was stopped before it.
        dropout_seed = np.random.default_rng([args.seed, epoch, PROCESS]).integers(2 ** 63)
        torch.manual_seed(int(dropout_seed))
        began, loss = time.perf_counter(), torch.zeros((), device=device)
        for batch in split.batches(shuffled(split.widths, args.batch_size, [args.seed, epoch])):
            lr = args.lr * schedule(done, steps, args.warmup)
            set_learning_rate(optimizer, lr)
            loss += step(*batch)
            done += 1
            bar.update()
        loss = sum_over_processes(loss).item() / n
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch}: "
                             f"try --lr lower than {args.lr:g}")

        figures = evaluate(model, forward, data["validation"], metrics, args.batch_size)
        history.append({"epoch": epoch, "loss": loss, "seconds": seconds, "validation": figures})
        checkpoint.update(checkpoints.pack_state(model, optimizer))  # "last", "optimizer"
        is_best = best_of(history)["epoch"] == epoch
        if is_best:
            checkpoint.update(best_epoch=epoch, weights=checkpoint["last"])
        if IS_MASTER:
            checkpoints.save(checkpoint, args.out)
            tqdm.write(f"epoch {epoch:2d}  loss {loss:.3f}  validation {text_of(figures)}"
                       + ("  best so far" if is_best else ""))
            if args.log:
                line = {"epoch": epoch, "step": done, "loss": loss, **figures, "lr": lr,
                        "examples_per_second": n / seconds}
                with open(args.log, "a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
    bar.close()
    constant = constant_loss(split.labels.cpu())
    if IS_MASTER and history[-1]["loss"] > 0.98 * constant:
        print(f"the last training loss, {history[-1]['loss']:.3f}, is hardly better than a "
              f"constant answer's, {constant:.3f}: try an --lr lower than {args.lr:g}, or more "
              f"--epochs")


def make_step(forward, split, optimizer, grad_clip):
    """A function of a batch of `split`: one training step, which returns the summed loss."""
    [group] = optimizer.param_groups

    def step(rows, *shape):
        share = rows[PROCESS::PROCESSES]  # all of them, where there is one process
        inputs, labels = split.batch(share, *shape)
        loss = summed_loss(forward(*inputs), labels)
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        if PROCESSES > 1:
            sum_gradients(group["params"])
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(group["params"], grad_clip)
        optimizer.step()
        return loss.detach()
    return step


def make_optimizer(model, args):
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    # On CUDA the rate is a tensor, which a recorded step reads anew each time.
    lr = torch.tensor(args.lr, device=parameters[0].device) if on_cuda else args.lr
    return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay,
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
    return torch.special.entr(labels.bincount() / len(labels)).sum().item()


def schedule(step, steps, warmup):
    """Factor on the learning rate: a linear rise in a share `warmup` of the steps, a fall to 0."""
    rise = warmup * steps
    return min((step + 1) / rise if rise else 1.0, (steps - step) / max(steps - rise, 1.0), 1.0)


def set_learning_rate(optimizer, lr):
    [group] = optimizer.param_groups
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def evaluate(model, forward, split, metrics, batch_size):
    """The metrics of a split."""
    outputs = outputs_of(model, forward, split, batch_size)
    predictions = outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0]
    return metrics(predictions.numpy(), split.labels.cpu().numpy())


@torch.inference_mode()
def outputs_of(model, forward, split, batch_size):
    """(n, n_out) on the CPU. The processes share out the batches, each of 8 * batch_size rows."""
    model.eval()
    outputs = torch.zeros(len(split.labels), model.config.n_out, device=split.labels.device)
    for rows, *shape in split.batches(by_width(split.widths, 8 * batch_size))[PROCESS::PROCESSES]:
        inputs, _ = split.batch(rows, *shape)
        outputs[rows] = forward(*inputs).float()
    return sum_over_processes(outputs).cpu()


def best_of(history):
    """The epoch with the best validation figure, of the task's main (first) metric."""
    return max(history, key=lambda epoch: next(iter(epoch["validation"].values())))


def text_of(figures):
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items())


# The task and the model --------------------------------------------------------------------------

def names_a_folder(task):
    return task not in toy.TASKS and task.lower().replace("-", "") not in glue.TASKS


def load_task(args):
    """(splits, names of the classes or (), metrics(predictions, labels)) of a task."""
    if args.task in toy.TASKS:
        return toy.load(args.task), ("0", "1"), glue.accuracy
    if not names_a_folder(args.task):
        metrics = lambda predictions, labels: glue.metrics(args.task, predictions, labels)
        classes = glue.TASKS[glue.canonical(args.task)].classes
        return glue.load(args.task, args.data_dir), classes, metrics
    if not os.path.isdir(args.task):  # False, too, of a name that is too long
        known = ", ".join((*toy.TASKS, *glue.TASKS))
        raise ValueError(f"--task {args.task[:100]} is neither a folder nor one of {known}")
    splits, classes = glue.load_folder(args.task, args.regression)
    return splits, classes, glue.accuracy_and_macro_f1 if classes else glue.correlations


def build(args, folder, n_out):
    """The encoder, adapted; what shall train requires a gradient, nothing else does."""
    model = Transformer.from_pretrained(folder, n_out)
    if args.method in ("condlora", "lora"):
        adapt(model, args.method, args.targets, args.rank, args.alpha)
    elif args.method == "head":
        model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def find_encoder(args, checkpoint, device):
    """The folder with the pretrained encoder."""
    if args.init_from is None and checkpoint:
        return checkpoints.verified_encoder(checkpoint)
    if args.init_from is None and args.task in toy.TASKS:
        return toy_encoder(args.pretrain_steps, device)
    name = args.init_from or "roberta-base"
    for folder in (Path(name), DATA / "models" / name):
        if folder.is_dir():
            return checkpoints.verified_encoder(checkpoint, folder) if checkpoint else folder
    raise FileNotFoundError(f"no folder {name}, here or under {DATA / 'models'}: "
                            f"python data/download.py {name} fetches a model of that name")


def toy_encoder(steps, device):
    """Folder of the encoder pretrained on the toy language, made the first time and kept."""
    folder = DATA / "models" / f"toy-{steps}"
    if IS_MASTER and not (folder / "config.json").is_file():
        vocabulary = toy.vocabulary()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        # BERT's initializer_range 0.02 is for d = 768. With it, at d = 64, attention would take
        # 1,500 steps to become useful.
        config = Config(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=4,
                        num_attention_heads=4, intermediate_size=256, max_position_embeddings=32,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                        initializer_range=0.1)
        pretrain(config, tokenizer.load(folder), steps, device).save_pretrained(folder)
    if PROCESSES > 1:
        dist.barrier()  # the others wait for it
    return folder


def pretrain(config, tok, steps, device):
    """Masked-language modelling (Devlin et al. 2019): hide a fifth of the words and guess them."""
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    corpus = Encoded(glue.Split(toy.corpus(20000), [0] * 20000), tok, config.max_len, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    bar = tqdm(range(steps), f"pretraining the toy encoder, once, on {device}", disable=NO_BAR)
    for step in bar:
        [batch] = corpus.batches([rng.integers(len(corpus.widths), size=64)])
        (input_ids, token_type_ids, mask), _ = corpus.batch(*batch)
        is_word = (input_ids != tok.pad_id) & (input_ids != tok.cls_id) & (input_ids != tok.sep_id)
        hidden = (torch.rand(input_ids.shape, device=device) < 0.2) & is_word
        states = model.encode(input_ids.masked_fill(hidden, tok.mask_id), token_type_ids, mask)
        logits = F.linear(states[hidden], model.embeddings.word.weight)  # inputs' and outputs'
        loss = F.cross_entropy(logits, input_ids[hidden])
        set_learning_rate(optimizer, 3e-3 * schedule(step, steps, 0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


# The command line --------------------------------------------------------------------------------

def run(argv):
    args, checkpoint = arguments(argv)
    device = pick_device(args.device)
    be_deterministic(device)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with naming(args.resume or args.eval_only):
        settle(args, device)
        if args.predict or args.export:
            predict_or_export(args, checkpoint, device)
        else:
            train_and_report(args, checkpoint, device)
    if PROCESSES > 1:
        dist.destroy_process_group()


def train_and_report(args, checkpoint, device):
    """Train, but for --eval_only; print the table of figures and write it to the checkpoint."""
    splits, classes, metrics = load_task(args)
    kind = {"classes": list(classes), "n_texts": len(splits["train"].texts[0])}
    if checkpoint and {name: checkpoint[name] for name in kind} != kind:
        raise ValueError(f"it was trained on {checkpoint['n_texts']} texts a row and the classes "
                         f"{', '.join(checkpoint['classes']):.60}, {args.task} has others")
    folder, model = load_model(args, checkpoint, len(classes) or 1, device)
    forward = fast_forward(model, args, device)
    n_examples = len(splits["train"].labels)
    if args.eval_only:
        del splits["train"]
    data = tokenize(splits, folder, model, args, device)
    if not checkpoint:
        settings = {name: str(value) if isinstance(value, Path) else value
                    for name, value in vars(args).items() if name not in NOT_KEPT}
        encoder = {"path": str(folder.resolve()), "sha256": checkpoints.sha256(folder)}
        checkpoint = {"task": args.task, **kind, "settings": settings, "encoder": encoder,
                      "config": vars(model.config), "history": []}
    if not args.eval_only:
        train(model, forward, data, metrics, args, checkpoint)
    copy_tensors(checkpoint["weights"], checkpoints.trained_weights(model))  # of the best epoch
    figures = {name: evaluate(model, forward, split, metrics, args.batch_size)
               for name, split in data.items() if name != "train"}
    if IS_MASTER:
        if not args.eval_only:
            checkpoints.save(checkpoint | {"results": figures}, args.out)
        report(args, model, checkpoint, figures, n_examples)


def predict_or_export(args, checkpoint, device):
    """Export a checkpoint's model, or print what it predicts."""
    classes = checkpoint["classes"]
    folder, model = load_model(args, checkpoint, len(classes) or 1, device)
    copy_tensors(checkpoint["weights"], checkpoints.trained_weights(model))
    if args.export:
        peft_format.export(model, folder, args.export)
        print(args.export)
        return
    lines = {"lines": read_texts(args.predict, checkpoint["n_texts"])}
    forward = fast_forward(model, args, device)
    data = tokenize(lines, folder, model, args, device)
    for logits in outputs_of(model, forward, data["lines"], args.batch_size):
        if classes:
            probability, label = logits.softmax(0).max(0)
            print(f"{classes[label]}\t{probability:.4f}")
        else:
            print(f"{logits[0]:.4f}")


def load_model(args, checkpoint, n_out, device):
    """(the encoder's folder, the model with the adapter as it begins)."""
    folder = find_encoder(args, checkpoint, device)
    if weights_file(folder).resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out} is the encoder itself")
    torch.manual_seed(args.seed)
    model = build(args, folder, n_out).to(device)
    if checkpoint and vars(model.config) != checkpoint["config"]:
        raise ValueError(f"{folder / 'config.json'} has changed since")
    return folder, model


def tokenize(splits, folder, model, args, device):
    """{name: Encoded split}"""
    tok = tokenizer.load(folder)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tok.vocab_size} tokens, "
                         f"the model {model.config.vocab_size}")
    max_len = min(args.max_len, model.config.max_len)
    return {name: Encoded(split, tok, max_len, device) for name, split in splits.items()}


def report(args, model, checkpoint, figures, n_examples):
    count = lambda parameters: sum(p.numel() for p in parameters)
    adapter = count(adapter_parameters(model))
    encoder = count(model.parameters()) - count(model.head.parameters()) - adapter
    trained = encoder if args.method == "full" else adapter
    history = checkpoint["history"]
    speed = n_examples * len(history) / sum(epoch["seconds"] for epoch in history)
    rows = {
        "task": args.task,
        "method": args.method + (f", rank {args.rank}" if adapter else ""),
        "all weights" if args.method == "full" else "adapter parameters":
            f"{trained:,} ({trained / encoder:.2%} of the encoder's {encoder:,})",
        **{name.replace("_", " "): text_of(values) for name, values in figures.items()},
        "best epoch": f"{checkpoint['best_epoch']} of {len(history)}",
        "training speed": f"{speed:,.0f} examples/s",
        "checkpoint": args.eval_only or args.out,
    }
    for name, value in rows.items():
        print(f"{name:20}{value}")


def read_texts(file, n_texts):
    """A Split without labels: each line of a file ("-" for standard input) is a text, or two."""
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"--predict {file} cannot be read: {error.strerror}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    texts = [tuple(line.removesuffix("\r").split("\t")) for line in lines]
    for number, columns in enumerate(texts, 1):
        if len(columns) != n_texts:
            raise ValueError(f"{file}, line {number}: {len(columns)} texts, the model was trained "
                             f"on {n_texts}, with a tab between")
    if not texts:
        raise ValueError(f"{file} has no lines")
    return glue.Split(texts, [0] * len(texts))


def arguments(argv):
    """(options, the checkpoint that --resume or --eval_only names or None)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    file = args.resume or args.eval_only
    if (args.predict or args.export) and (not args.eval_only or PROCESSES > 1):
        raise ValueError("--predict and --export ask a trained model, in one process: say which "
                         "with --eval_only")
    if not file:
        return args, None
    checkpoint = checkpoints.load(file)
    # The checkpoint's settings, as words, stand before the command line's own.
    words = [f"--out={file}"]
    for name, value in checkpoint["settings"].items():
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if name not in vars(args) or name in NOT_KEPT or any(v.startswith("-") for v in values):
            raise ValueError(f"{file} has a setting that is none: {name!r:.40} {short(value)}")
        if value is not None and value is not False:  # but 0 is kept
            words += [f"--{name}"] if value is True else [f"--{name}", *values]
    with naming(file):
        kept = parser.parse_args(words)
    args = parser.parse_args([*words, *argv])
    for name in checkpoint["settings"]:
        given, value = getattr(args, name), getattr(kept, name)
        is_folder = name == "task" and names_a_folder(given) and names_a_folder(value)
        may_differ = is_folder or name == "data_dir" or (name == "dtype" and args.eval_only)
        if given != value and not may_differ:
            raise ValueError(f"--{name} {given} contradicts {file}, trained with {value}: "
                             f"leave it out")
    return args, checkpoint


def make_parser():
    parser, rate = parser_of(__doc__), between(float, 1e-30, 1e30)
    add, count = parser.add_argument, between(int, 1, 10 ** 9)
    add("--task", default="toy", type=task_name, help=f"{', '.join(toy.TASKS)} (made up, needs no "
        f"files), GLUE's {', '.join(glue.TASKS)}, or a folder of yours with train.tsv and perhaps "
        f"dev.tsv, whose first line is text (or text1, text2) and label; default toy")
    add("--regression", action="store_true",
        help="the labels of your own data are numbers; default no, they are classes")
    add("--method", default="condlora", choices=("condlora", "lora", "full", "head"),
        help="what trains beside the head: the adapter, every weight (full), or nothing (head); "
        "default condlora")
    add("--init_from", help="pretrained encoder: a folder, or a name under data/models; default "
        "the toy encoder, or roberta-base")
    add("--data_dir", default=DATA / "glue", type=lambda text: Path(text).resolve(),
        help="folder with GLUE's CoLA, SST-2, ...; default data/glue")
    add("--rank", type=count, default=8, help="r, the adapter's rank; default 8")
    add("--alpha", type=rate, default=8.0, help="the update is scaled by alpha / rank; default 8")
    add("--targets", nargs="+", default=["query", "value"],
        help=f"linear layers to adapt, of {', '.join(TARGETS)}; default query value")
    add("--lr", type=rate, help=f"highest learning rate; default by method, {LEARNING_RATE}")
    add("--epochs", type=count, help=f"default {EPOCHS}")
    add("--batch_size", type=count, help=f"default {BATCH_SIZE}")
    add("--max_len", type=count, default=128,
        help="longest input, in tokens, at most the encoder's positions; default 128")
    add("--warmup", type=between(float, 0, 1), default=0.1,
        help="share of the steps in which the rate rises, then it falls to 0; default 0.1")
    add("--weight_decay", type=between(float, 0, 1e30), default=0.1, help="AdamW's; default 0.1")
    add("--grad_clip", type=between(float, 0, 1e30), default=1.0,
        help="largest global norm of the gradient, 0 for any; default 1")
    add("--patience", type=count,
        help="stop after so many epochs without a better validation figure; default never")
    add("--seed", type=between(int, 0, 2 ** 32 - 1), default=0,
        help="the same seed on the same machine gives the same figures; default 0")
    add("--device", help="cuda, cpu or mps; default the best there is")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in; what trains stays "
        "float32. Default bfloat16 on cuda, else float32")
    add("--pretrain_steps", type=count, default=1500,
        help="of the toy encoder, where it is not there yet; default 1500")
    add("--no_graphs", action="store_true", help="on cuda, launch every kernel of every step; "
        "default no, CUDA graphs are replayed")
    add("--out", default=Path("ckpt.pt"), type=Path, help="checkpoint to write; default ckpt.pt")
    add("--log", type=Path, metavar="FILE", help="a line of JSON for each epoch; default none")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", type=Path, metavar="CKPT",
        help="go on with the run that wrote this checkpoint; default a new run")
    earlier.add_argument("--eval_only", type=Path, metavar="CKPT",
        help="report the figures of this checkpoint, nothing is trained; default train")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--predict", metavar="FILE",
        help="with --eval_only: answer each line of a file, or of standard input (-), with a label "
        "and its probability; two texts have a tab between them")
    use.add_argument("--export", type=Path, metavar="FOLDER",
        help="with --eval_only: write the adapter and the head as PEFT reads them")
    return parser


def task_name(text):
    """The task, or the whole path of a folder of one's own."""
    return str(Path(text).resolve()) if names_a_folder(text) and os.path.isdir(text) else text


def settle(args, device):
    """Fill in what the command line leaves open; raise ValueError where it cannot be done."""
    kind = "toy" if args.task in toy.TASKS else "glue"
    args.lr = args.lr or LEARNING_RATE[kind][args.method]
    args.epochs = args.epochs or EPOCHS[kind]
    args.batch_size = args.batch_size or BATCH_SIZE[kind]
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.regression and not names_a_folder(args.task):
        raise ValueError(f"--regression is for your own data, --task is {args.task}")
    for target in args.targets:
        if target.rpartition(".")[2] not in TARGETS:
            raise ValueError(f"--targets {target:.40} names no linear layer of the encoder: "
                             f"use {', '.join(TARGETS)}")
    if IS_MASTER and not args.eval_only:
        # As checkpoints.save begins it; what is resumed is a checkpoint, whoever wrote it.
        check_writable(args.out, "--out", b"PK" if args.resume else b"archive/data.pkl")
        if args.log:
            check_writable(args.log, "--log", b'{"epoch"')
            if args.log.resolve() == args.out.resolve():
                raise ValueError(f"--log and --out are one file, {args.log}")


def pick_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kinds = [kind for kind in there if there[kind]] + ["cpu"]
    name = name or kinds[0]
    if PROCESSES > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in (*kinds, *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        raise ValueError(f"--device {name} is not there: use {' or '.join(kinds)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams and graphs are the current device's
    return torch.device(name)


def be_deterministic(device):
    """The same seed gives the same numbers, for a few percent of a step's time on CUDA."""
    if device.type != "mps":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def main(argv=None):
    with one_line("train.py", "stopped. If an epoch was done, --resume with its file goes on"):
        try:
            run(sys.argv[1:] if argv is None else argv)
        except torch.OutOfMemoryError:
            raise ValueError("the device is out of memory: try a smaller --batch_size or "
                             "--max_len") from None


# What makes it fast: the same forward and the same step, wrapped ---------------------------------

def fast_forward(model, args, device):
    """forward(*inputs), the model's logits, computed in args.dtype and as suits the device."""
    bfloat16 = args.dtype == "bfloat16"
    if device.type == "cuda":
        # Of the float32 products, which are the head's.
        torch.set_float32_matmul_precision("high" if bfloat16 else "highest")
    if bfloat16 and args.method == "full":
        return torch.autocast(device.type, torch.bfloat16)(model.forward)
    if bfloat16:
        narrow_frozen_weights(model)
    if bfloat16 or device.type == "cuda":
        return with_summed_weights(model, getattr(torch, args.dtype))
    return model


def narrow_frozen_weights(model):
    """Keep frozen weights in bfloat16: half the memory, and no casts in a step.

    What trains stays float32, and so does W0, to which an update is added.
    """
    W0 = {id(layer.weight) for layer in adapted_layers(model)}
    for p in model.parameters():
        if not p.requires_grad and id(p) not in W0:
            p.data = p.data.to(torch.bfloat16)


def with_summed_weights(model, dtype):
    """forward(*inputs), in which each adapted layer does one product, with its W0 + dW.

    On a GPU the thin products with A and B wait for memory, forward and backward. All layers'
    W0 + dW are formed by a few large products instead, in `dtype`; the sum itself is float32, where
    small updates are not lost, and rounded once.
    """
    alike = {}  # layers of one shape, and of one conversion if any
    for layer in adapted_layers(model):
        key = layer.weight.shape, getattr(layer, "conversion", None)
        alike.setdefault(key, []).append(layer)
    groups = []
    for (_, conversion), layers in alike.items():
        # One tensor (L, d_out, d_in) holds their W0 from now on, so that none is held twice.
        W0 = torch.stack([layer.weight.detach() for layer in layers])
        for layer, weight in zip(layers, W0):
            layer.weight.data = weight
        groups.append((layers, W0, conversion, W0.to(dtype) if conversion else None))

    def forward(*inputs):
        for layers, W0, conversion, narrow_W0 in groups:
            if conversion:
                A, B = convert(narrow_W0, conversion.theta_A.to(dtype),
                               conversion.theta_B.to(dtype))
            else:
                A = torch.stack([layer.A for layer in layers]).to(dtype)
                B = torch.stack([layer.B for layer in layers]).to(dtype)
            summed = torch.add(W0, B @ A, alpha=layers[0].scale).to(dtype)
            for layer, weight in zip(layers, summed.unbind()):
                layer.merged = weight
        try:
            return model(*inputs)
        finally:
            unmerge(model)
    return forward


class Recorded:
    """Calls step(rows, *shape), on CUDA, by replaying a CUDA graph for each shape of batch.

    A small batch's thousand kernels take longer to launch than to run. A shape's first call runs
    as it is, which also sets up what CUDA sets up at first use; the second is recorded.
    """

    def __init__(self, step):
        self.step, self.graphs, self.pool = step, {}, torch.cuda.graph_pool_handle()

    def __call__(self, rows, *shape):
        key = len(rows), *shape
        if key not in self.graphs:
            self.graphs[key] = None
            return self.on_another_stream(rows, *shape)
        if self.graphs[key] is None:
            graph, place = torch.cuda.CUDAGraph(), rows.clone()
            # Another thread, which watches over NCCL, may go on asking CUDA things.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = self.step(place, *shape)
            self.graphs[key] = graph, place, result
        graph, place, result = self.graphs[key]
        place.copy_(rows)
        graph.replay()
        return result

    def on_another_stream(self, *arguments):
        """As CUDA wants it of what will be recorded later."""
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            result = self.step(*arguments)
        usual.wait_stream(stream)
        return result


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


if __name__ == "__main__":
    main()
