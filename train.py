"""Fine-tune a frozen encoder with CondLoRA or LoRA, on the toy language or on GLUE.

    python train.py --method condlora                                         # everything from scratch, in a minute
    python train.py --task rte --init_from roberta-base --method lora         # after python data/download.py rte roberta-base
    python train.py --eval_only ckpt.pt                                       # its figures again

Protocol of the CondLoRA paper (Kim et al. 2024, section 4): a tenth of the training set is held out and chooses the epoch;
GLUE's dev set, seen once at the end, is the test. Figures are percentages.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")           # cuBLAS gives the same sums each time only with it

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn    # its functions have the process group for a default: imported by AdamW, later, they would keep it past its end
import torch.nn.functional as F
from tqdm import tqdm

from condlora import adapt, adapted_layers, adapter_parameters, weights_at_once
from data import glue, tokenizer, toy
from model import Config, Transformer, check_encoder, load_checkpoint, sha256

DATA = Path(__file__).resolve().parent / "data"

# torchrun starts WORLD processes, of which number 0 talks and writes. A batch is shared out among them: the weights come out the same.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TALKS = RANK == 0

# What the options are where the command line does not say. Chosen on the validation sets of the toy tasks and of GLUE.
LEARNING_RATE = {"toy": {"condlora": 5e-3, "lora": 4e-3, "full": 1e-3, "head": 1e-2},
                 "glue": {"condlora": 1e-3, "lora": 1e-3, "full": 5e-5, "head": 2e-3}}
EPOCHS = {"toy": 14, "glue": 10}
BATCH_SIZE = {"toy": 32, "glue": 16}


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(__doc__.split("\n")[1:]))
    add = parser.add_argument
    add("--task", default="toy", help=f"{', '.join(toy.TASKS)} (made up, needs no files), or GLUE's {', '.join(glue.TASKS)}; default toy")
    add("--method", default="condlora", choices=("condlora", "lora", "full", "head"),
        help="what trains beside the classification head: the adapter, every weight (full), or nothing (head)")
    add("--init_from", help="pretrained encoder: a folder, or a name under data/models; default the toy encoder, or roberta-base")
    add("--data_dir", default=DATA / "glue", type=full_path, help="folder with GLUE's CoLA, SST-2, ...; default data/glue")
    add("--rank", type=positive(int), default=8, help="r, the adapter's rank")
    add("--alpha", type=positive(float), default=8.0, help="the update is scaled by alpha / rank")
    add("--targets", nargs="+", default=["query", "value"], help="linear layers to adapt: query key value out fc1 fc2")
    add("--lr", type=positive(float), help=f"highest learning rate; default by method, {LEARNING_RATE}")
    add("--epochs", type=positive(int), help=f"default {EPOCHS['toy']} for the toy tasks, {EPOCHS['glue']} for GLUE")
    add("--batch_size", type=positive(int), help=f"default {BATCH_SIZE['toy']} for the toy tasks, {BATCH_SIZE['glue']} for GLUE")
    add("--max_len", type=positive(int), default=128, help="longest input, in tokens; never more than the encoder has positions")
    add("--warmup", type=share, default=0.06, help="share of the steps in which the learning rate rises; then it falls to 0")
    add("--weight_decay", type=float, default=0.01)
    add("--patience", type=positive(int), help="stop after so many epochs without a better validation figure; default never")
    add("--seed", type=int, default=0, help="the same seed on the same machine gives the same figures")
    add("--device", help="cuda, cpu or mps; default the best there is")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in; what trains stays float32. Default bfloat16 on cuda, else float32")
    add("--pretrain_steps", type=positive(int), default=1500, help="steps of pretraining where the toy encoder is not there yet")
    add("--no_graphs", action="store_true", help="on cuda, launch every kernel of every step instead of replaying CUDA graphs")
    add("--compile", action="store_true", help="torch.compile the encoder: about a minute to start, a faster step for long runs")
    add("--out", default=Path("ckpt.pt"), type=Path, help="checkpoint to write; default ckpt.pt")
    add("--resume", type=Path, metavar="CKPT", help="go on with the interrupted run that wrote this checkpoint")
    add("--eval_only", type=Path, metavar="CKPT", help="report the figures of this checkpoint; nothing is trained or written")
    parser.error = lambda message: sys.exit(fail(message))            # one line, without the usage
    args = parser.parse_args(argv)
    file = args.resume or args.eval_only
    if not file:
        return args, None
    checkpoint = load_checkpoint(file)
    parser.set_defaults(**checkpoint["settings"], out=file)
    args = parser.parse_args(argv)
    for name, value in checkpoint["settings"].items():
        if getattr(args, name) != value and name not in ("init_from", "data_dir", "dtype"):
            raise ValueError(f"--{name} {getattr(args, name)} contradicts {file}, trained with {value}: leave it out")
    return args, checkpoint


def full_path(text):
    return Path(text).resolve()


def positive(kind):
    def number(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value
    number.__name__ = f"positive {kind.__name__}"
    return number


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def pick_device(name):
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + ["cuda"] * torch.cuda.is_available()
    name = name or there[-1]
    kind, _, index = name.partition(":")
    if kind not in there or index not in ("", *map(str, range(torch.cuda.device_count() if kind == "cuda" else 1))):
        raise ValueError(f"--device {name} is not there: use {' or '.join(reversed(there))}")
    if WORLD > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    return torch.device(name)


def be_deterministic(device):
    """The same seed gives the same numbers; on an H100 that costs attention's fastest kernel, 2% of a step's time, of a padded one's 6%."""
    if device.type != "mps":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


# Data ----------------------------------------------------------------------------------------------------------------

class Encoded:
    """A split's token ids, padded, on the device from the start; batches are cut from it there.

    On CUDA rows count as long as the next multiple of 8, so that batches have few different widths.
    """

    def __init__(self, split, tok, max_len, device):
        rows = [tok.encode(*text, max_len=max_len) for text in tqdm(split.texts, "tokenizing", leave=False, delay=2, disable=not TALKS)]
        real = np.array([len(input_ids) for input_ids, _ in rows])
        multiple = 8 if device.type == "cuda" else 1
        self.real, self.lengths = real, np.minimum(-(-real // multiple) * multiple, max_len)
        shape = len(rows), self.lengths.max()
        input_ids, token_type_ids = np.full(shape, tok.pad_id), np.zeros(shape, np.int64)
        for i, (ids, types) in enumerate(rows):
            input_ids[i, :len(ids)], token_type_ids[i, :len(ids)] = ids, types
        mask = np.arange(shape[1]) < real[:, None]
        self.inputs = [torch.from_numpy(x).to(device) for x in (input_ids, token_type_ids, mask)]
        self.labels = torch.tensor(split.labels, device=device)

    def batch(self, rows, width, padded):
        """((input_ids, token_type_ids, attention_mask), labels) of the rows numbered in the tensor `rows`, `width` tokens wide.
        The mask is None where no row is padded: attention is faster without."""
        input_ids, token_type_ids, mask = (x[rows, :width] for x in self.inputs)
        return (input_ids, token_type_ids, mask if padded else None), self.labels[rows]

    def batches(self, order):
        """(rows on the device, width, padded) of each batch in `order`, a list of arrays of row numbers; all go there in one copy."""
        there = torch.from_numpy(np.concatenate(order)).to(self.labels.device).split([len(rows) for rows in order])
        widths = [int(self.lengths[numbers].max()) for numbers in order]
        return [(rows, width, bool((self.real[numbers] < width).any())) for rows, width, numbers in zip(there, widths, order)]


def shuffled_batches(lengths, size, seed):
    """Every row once, in batches of rows of about the same length: little padding, and still another order each epoch."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    pools = [order[i:i + 50 * size] for i in range(0, len(order), 50 * size)]
    batches = []
    for pool in pools:                                                # sorted by length within a pool of 50 batches only
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i:i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def load_task(task, data_dir):
    """(splits, number of outputs, metrics(predictions, labels)) of a task."""
    if task in toy.TASKS:
        return toy.load(task), 2, lambda predictions, labels: {"accuracy": float(np.mean(predictions == labels))}
    if task.lower().replace("-", "") not in glue.TASKS:
        raise ValueError(f"--task is {task!r}: there are {', '.join((*toy.TASKS, *glue.TASKS))}")
    return glue.load(task, data_dir), len(glue.TASKS[glue.canonical(task)].classes) or 1, lambda p, l: glue.metrics(task, p, l)


# The toy encoder -----------------------------------------------------------------------------------------------------

def toy_encoder(steps, device):
    """Folder of the encoder pretrained on the toy language, which is made the first time and kept."""
    folder = DATA / "models" / f"toy-{steps}"
    if (folder / "config.json").is_file():
        return folder
    vocabulary = toy.vocabulary()
    config = Config(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
                    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                    initializer_range=0.1)     # BERT's 0.02 is for d = 768: at d = 64 attention would take 1,500 steps to wake up
    partial = folder.with_name(folder.name + f".part{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        (partial / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        pretrain(config, tokenizer.load(partial), steps, device).save_pretrained(partial)
        if not folder.exists():                                       # another run may have been faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def pretrain(config, tok, steps, device, batch_size=64, lr=3e-3, masked=0.2):
    """Masked-language modelling (Devlin et al. 2019): a fifth of the words is hidden, the encoder says which they were."""
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    corpus = Encoded(glue.Split(toy.corpus(20000), [0] * 20000), tok, config.max_len, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rng = np.random.default_rng(0)
    bar = tqdm(range(steps), f"pretraining the toy encoder, once, on {device}", disable=not TALKS)
    for step in bar:
        [batch] = corpus.batches([rng.integers(len(corpus.lengths), size=batch_size)])
        (input_ids, *rest), _ = corpus.batch(*batch)
        words = (input_ids != tok.pad_id) & (input_ids != tok.cls_id) & (input_ids != tok.sep_id)
        hidden = (torch.rand(input_ids.shape, device=device) < masked) & words
        states = model.encode(input_ids.masked_fill(hidden, tok.mask_id), *rest)
        loss = F.cross_entropy(F.linear(states[hidden], model.embeddings.word.weight), input_ids[hidden])
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def schedule(step, steps, warmup):
    """Factor on the learning rate: a linear rise over the share `warmup` of the steps, then a linear fall to 0."""
    rise = warmup * steps
    return min((step + 1) / rise if rise else 1.0, (steps - step) / max(steps - rise, 1.0), 1.0)


# Training and evaluating ---------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(model, data, metrics, batch_size, precision):
    """The metrics of a split. Its batches, eight times the training ones, are shared out among the processes."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    order = [order[i:i + 8 * batch_size] for i in range(0, len(order), 8 * batch_size)]
    outputs = torch.zeros(len(data.labels), model.config.n_out, device=data.labels.device)
    for rows, *shape in data.batches(order)[RANK::WORLD]:
        with precision():
            outputs[rows] = model(*data.batch(rows, *shape)[0]).float()
    if WORLD > 1:
        dist.all_reduce(outputs)
    predictions = outputs.argmax(1) if outputs.shape[1] > 1 else outputs[:, 0]
    return metrics(predictions.cpu().numpy(), data.labels.cpu().numpy())


def loss_of(logits, labels):
    """The sum over the batch of cross entropy, or, of a single output (STS-B), of squared errors."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0].float(), labels, reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")


class Trainer:
    """Takes training steps. On CUDA each shape of batch becomes a CUDA graph: the GPU repeats a recorded step without being told its
    thousand kernels one by one, which for small batches takes longer than the arithmetic.

    The first batch of a shape runs as it is, which also sets up what CUDA and torch.compile set up at first use; the second is recorded
    and, like those after it, replayed. A recorded step reads its row numbers and the learning rate from the same place each time.
    """

    def __init__(self, model, data, args, precision):
        self.data = data
        device = data.labels.device
        self.on_cuda = device.type == "cuda"
        self.graphs = {} if self.on_cuda and not args.no_graphs else None

        def forward(inputs):
            with precision():
                return model(*inputs)
        self.forward = forward
        if args.compile:
            torch._dynamo.config.recompile_limit = 100                # it compiles anew for each shape of batch
            # dropout from PyTorch's own kernel: the compiled one draws four numbers to use one, and takes longer
            self.forward = torch.compile(forward, dynamic=False, options={"fallback_random": True})
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        lr = torch.tensor(args.lr, device=device) if self.on_cuda else args.lr
        self.optimizer = torch.optim.AdamW(self.parameters, lr, weight_decay=args.weight_decay, fused=self.on_cuda, capturable=self.on_cuda)
        if WORLD > 1:                                                 # one vector, for one call to sum it over the processes
            self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        self.loss = torch.zeros((), device=device)                    # summed over an epoch's rows

    def step(self, rows, width, padded, lr):
        """One step on the rows of the batch, of which this process takes its share."""
        n, rows = len(rows), rows[RANK::WORLD]
        group = self.optimizer.param_groups[0]
        if self.on_cuda:
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        shape = width, padded, n
        key = len(rows), *shape
        if self.graphs is None:
            self.compute(rows, *shape)
        elif key not in self.graphs:
            self.graphs[key] = None
            self.on_the_side(lambda: self.compute(rows, *shape))
        else:
            if self.graphs[key] is None:
                self.graphs[key] = self.record(rows, *shape)
            graph, its_rows = self.graphs[key]
            its_rows.copy_(rows)
            graph.replay()
        if WORLD > 1:
            dist.all_reduce(self.gradient)
            for p, part in zip(self.parameters, self.gradient.split([p.numel() for p in self.parameters])):
                p.grad = part.view_as(p)
            self.optimizer.step()

    def compute(self, rows, width, padded, n):
        """The step itself, on `rows`, which are all the batch's n or, in one process of several, some; the gradient is the batch's mean."""
        self.optimizer.zero_grad()
        if len(rows):
            inputs, labels = self.data.batch(rows, width, padded)
            loss = loss_of(self.forward(inputs), labels)
            (loss / n).backward()
            self.loss += loss.detach()
        if WORLD == 1:
            self.optimizer.step()
        elif len(rows):                                               # to be summed before the step, outside of the graph
            torch.cat([p.grad.flatten() for p in self.parameters], out=self.gradient)
        else:
            self.gradient.zero_()

    def record(self, rows, *shape):
        graph, its_rows = torch.cuda.CUDAGraph(), rows.clone()
        pool = next((made[0].pool() for made in self.graphs.values() if made), None)     # graphs run in turn: they share memory
        with torch.cuda.graph(graph, pool=pool):
            self.compute(its_rows, *shape)
        return graph, its_rows

    def on_the_side(self, work):
        """On another stream than the usual, as CUDA wants it of what will be recorded later."""
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            work()
        usual.wait_stream(stream)


def trained_weights(model):
    """What the checkpoint keeps, by name: adapter and head (or every weight), each shared theta once."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def save(checkpoint, file):
    """Written beside and renamed, so that a run that is stopped leaves the checkpoint before it."""
    if not TALKS:
        return
    partial = file.with_name(file.name + ".part")
    torch.save(checkpoint, partial)
    os.replace(partial, file)


def find_encoder(args, device):
    """The folder with the pretrained encoder."""
    if args.init_from is None and args.task in toy.TASKS:
        return toy_encoder(args.pretrain_steps, device)
    name = args.init_from or "roberta-base"
    for folder in (Path(name), DATA / "models" / name):
        if folder.is_dir():
            args.init_from = str(folder.resolve())
            return folder
    raise FileNotFoundError(f"no folder {name}, here or under {DATA / 'models'}: "
                            f"python data/download.py {name} fetches a model of that name")


def build(args, folder, n_out):
    """The encoder, adapted; what shall train requires a gradient, nothing else does."""
    model = Transformer.from_pretrained(folder, n_out)
    if args.method in ("condlora", "lora"):
        adapt(model, args.method, args.targets, args.rank, args.alpha)
    elif args.method == "head":
        model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def choose_precision(model, args, device):
    """A function that makes the context for forward passes, in args.dtype.

    bfloat16 with a frozen encoder: its weights are kept in bfloat16, as they are only ever used so, which halves the memory and leaves
    nothing to cast in a step. What trains stays float32, and so does the W0 that an update is added to. Where every weight trains,
    autocast casts.
    """
    narrow = args.dtype == "bfloat16"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if narrow else "highest")               # of the head's few products
    if narrow and args.method == "full":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    if narrow:
        wide = {id(layer.weight) for layer in adapted_layers(model)}
        for p in model.parameters():
            if not p.requires_grad and id(p) not in wide:
                p.data = p.data.to(torch.bfloat16)
    return weights_at_once(model, getattr(torch, args.dtype)) if narrow or device.type == "cuda" else contextlib.nullcontext


def text_of(figures):
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items())


def fit(model, data, metrics, args, precision, checkpoint):
    """Train for args.epochs epochs, or for those that `checkpoint` lacks; it is completed and written after each one."""
    device, n = data["train"].labels.device, len(data["train"].labels)
    trainer = Trainer(model, data["train"], args, precision)
    history = checkpoint["history"]
    if history:
        model.load_state_dict(checkpoint["last"], strict=False)       # the frozen weights are there already
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": checkpoint["optimizer"]})
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], device)
    else:
        torch.manual_seed(args.seed + RANK)                           # of dropout
    score = lambda epoch: next(iter(epoch["validation"].values()))    # the task's main metric
    per_epoch = -(-n // args.batch_size)
    step, steps = len(history) * per_epoch, args.epochs * per_epoch
    bar = tqdm(total=steps, initial=step, desc=f"{args.task} {args.method}", disable=not TALKS)
    for epoch in range(len(history) + 1, args.epochs + 1):
        model.train()
        began, seen = time.perf_counter(), 0
        trainer.loss.zero_()
        for batch in trainer.data.batches(shuffled_batches(trainer.data.lengths, args.batch_size, [args.seed, epoch])):
            trainer.step(*batch, args.lr * schedule(step, steps, args.warmup))
            step, seen = step + 1, seen + len(batch[0])
            bar.update()
            if TALKS and step % 100 == 0:                             # seldom: reading the loss waits for the device
                bar.set_postfix(loss=f"{trainer.loss.item() / -(-seen // WORLD):.3f}")
        if WORLD > 1:
            dist.all_reduce(trainer.loss)
        mean_loss = trainer.loss.item() / n
        seconds = time.perf_counter() - began
        if not np.isfinite(mean_loss):
            raise ValueError(f"the loss is {mean_loss} in epoch {epoch}: try --lr lower than {args.lr:g}")
        history.append({"epoch": epoch, "loss": mean_loss, "seconds": seconds,
                        "validation": evaluate(model, data["validation"], metrics, args.batch_size, precision)})
        best = max(history, key=score)                                # the first of equals
        if best["epoch"] == epoch:
            checkpoint["weights"] = trained_weights(model)
        generators = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
        state = {i: {name: x.cpu() for name, x in its.items()} for i, its in trainer.optimizer.state_dict()["state"].items()}
        checkpoint |= {"last": trained_weights(model), "optimizer": state,     # all on the CPU: it may be read where there is no GPU
                       "best_epoch": best["epoch"], "rng": generators}
        save(checkpoint, args.out)
        if TALKS:
            tqdm.write(f"epoch {epoch:2d}  loss {mean_loss:.3f}  validation {text_of(history[-1]['validation'])}"
                       + ("  best so far" if best["epoch"] == epoch else ""))
        if args.patience and epoch - best["epoch"] >= args.patience:
            break
    bar.close()


def run(argv):
    args, checkpoint = arguments(argv)
    device = pick_device(args.device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    kind = "toy" if args.task in toy.TASKS else "glue"
    args.lr = args.lr or LEARNING_RATE[kind][args.method]
    args.epochs = args.epochs or EPOCHS[kind]
    args.batch_size = args.batch_size or BATCH_SIZE[kind]
    if not args.out.absolute().parent.is_dir() or args.out.is_dir():
        raise ValueError(f"--out {args.out} cannot be written: it should be a file in a folder that exists")
    be_deterministic(device)
    splits, n_out, metrics = load_task(args.task, args.data_dir)
    if RANK:
        dist.barrier()                                                # the first process may have to pretrain the toy encoder
    folder = find_encoder(args, device)
    if WORLD > 1 and not RANK:
        dist.barrier()

    torch.manual_seed(args.seed)
    model = build(args, folder, n_out).to(device)
    precision = choose_precision(model, args, device)
    tok = tokenizer.load(folder)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tok.vocab_size} tokens, the model {model.config.vocab_size}")
    data = {name: Encoded(split, tok, min(args.max_len, model.config.max_len), device) for name, split in splits.items()}

    if checkpoint is None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                    if name not in ("device", "no_graphs", "compile", "out", "resume", "eval_only")}
        checkpoint = {"settings": settings, "task": args.task, "history": [], "config": vars(model.config),
                      "encoder": {"path": str(folder.resolve()), "sha256": sha256(folder)}}
    else:
        check_encoder(folder, checkpoint, args.resume or args.eval_only)
    if not args.eval_only:
        fit(model, data, metrics, args, precision, checkpoint)
    model.load_state_dict(checkpoint["weights"], strict=False)
    figures = {name: evaluate(model, data[name], metrics, args.batch_size, precision) for name in data if name != "train"}
    if not args.eval_only:
        checkpoint["results"] = figures
        save(checkpoint, args.out)

    adapter = sum(p.numel() for p in adapter_parameters(model))
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.head.parameters()) - adapter
    trained = own if args.method == "full" else adapter
    history = checkpoint["history"]
    speed = len(data["train"].lengths) * len(history) / sum(epoch["seconds"] for epoch in history)
    rows = [("task", args.task),
            ("method", args.method + (f", rank {args.rank}" if adapter else "")),
            ("all weights" if args.method == "full" else "adapter parameters",
             f"{trained:,} ({trained / own:.2%} of the encoder's {own:,})"),
            *((name.replace("_", " "), text_of(values)) for name, values in figures.items()),
            ("best epoch", f"{checkpoint['best_epoch']} of {len(history)}"),
            ("training speed", f"{speed:,.0f} examples/s"),
            ("checkpoint", args.eval_only or args.out)]
    if TALKS:
        print(*(f"{name:20}{value}" for name, value in rows), sep="\n")
    if WORLD > 1:
        dist.destroy_process_group()


def main(argv=None):
    try:
        run(argv)
    except (ValueError, OSError) as error:
        sys.exit(fail(error))
    except torch.OutOfMemoryError:
        sys.exit(fail("the device is out of memory: try a smaller --batch_size or --max_len"))
    except KeyboardInterrupt:
        sys.exit(fail("stopped. --resume with the checkpoint goes on after its last whole epoch"))


def fail(message):
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
