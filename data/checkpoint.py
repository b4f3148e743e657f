"""Checkpoints: what train.py writes, and train.py, analyze.py and condlora.load_adapter read.

A checkpoint is a dict of plain containers and tensors:

    task, classes, n_texts    the task's name, its classes (none: a regression), sentences a row
    settings                  train.py's options, by name
    data                      SHA-256 of the training and validation texts and labels
    encoder, config           its folder ("path") and its weights' "sha256"; model.Config's fields
    layers                    the names of the adapted layers
    history, best_epoch       of each epoch: "epoch", "loss", "seconds", "validation" metrics
    weights                   {name: tensor} of all that trains, of the best epoch
    last, optimizer           the same of the last epoch and AdamW's state, to resume
    results                   {split: metrics}, once training has ended
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import torch

from condlora import copy_tensors, trained_tensors

from .command import reading, write
from .pretrained import weights_file


def save(checkpoint, file):
    """Write the dict as a file that `load` reads."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(file, buffer.getvalue())


def load(file):
    """The dict that `save` wrote. Raises FileNotFoundError or ValueError if it is not one."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint {file}: python train.py writes one")
    with reading(file):
        # torch.load does not look at the checksums.
        if not zipfile.is_zipfile(file) or zipfile.ZipFile(file).testzip():
            raise ValueError("not a checkpoint of train.py, or damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        check(checkpoint)
    return checkpoint


def check(checkpoint):
    """Raise TypeError or ValueError now if an entry is of a type that would fail later."""
    def all_are(kinds, *values):
        for value in values:
            if type(value) not in kinds:
                raise TypeError(f"not a checkpoint of train.py: {value!r:.60} is not of type "
                                f"{kinds[0].__name__}")

    if not isinstance(checkpoint, dict) or "history" not in checkpoint:
        raise ValueError("not a checkpoint of train.py")
    c, settings, history = checkpoint, checkpoint["settings"], checkpoint["history"]
    all_are([dict], settings, c["config"], c["encoder"], c["weights"], c["last"], c["optimizer"])
    all_are([list], history, c["classes"], c["layers"], settings["targets"])
    all_are([str], c["task"], settings["method"], c["encoder"]["path"], *c["encoder"].values(),
            *c["classes"], *c["layers"], *settings["targets"], *settings)
    all_are([int], c["n_texts"], settings["rank"], settings["seed"])
    all_are([bool], settings["regression"])
    all_are([str, int, float, bool, type(None)],
            *(value for name, value in settings.items() if name != "targets"))
    states = [c["weights"], c["last"], *c["optimizer"].values()]
    all_are([dict], *states)
    all_are([torch.Tensor], *(tensor for state in states for tensor in state.values()))
    for name, tensor in (*c["weights"].items(), *c["last"].items()):
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{name:.60} is not of finite numbers")
    for number, epoch in enumerate(history, 1):
        all_are([float], epoch["loss"], epoch["seconds"], *epoch["validation"].values())
        if epoch["epoch"] != number or not epoch["validation"] or not epoch["seconds"] > 0:
            raise ValueError(f"its history is damaged at epoch {number}")
    if c["best_epoch"] not in range(1, len(history) + 1):
        raise ValueError("its best epoch is not one of its history's")


def sha256(folder):
    """SHA-256 of the weights in a pretrained model's folder."""
    with open(weights_file(folder), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def data_sha256(splits):
    """SHA-256 of the texts and labels that a run trains on and chooses its epoch by."""
    rows = [splits[name] for name in ("train", "validation")]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def verified_encoder(checkpoint, folder=None):
    """The folder of the checkpoint's encoder, or `folder`, if its weights are the same."""
    folder = Path(folder or checkpoint["encoder"]["path"])
    try:
        is_the_same = sha256(folder) == checkpoint["encoder"]["sha256"]
    except OSError:
        raise ValueError(f"the encoder is not at {str(folder)[:100]}: "
                         f"say where it is with --init_from") from None
    if not is_the_same:
        raise ValueError(f"{weights_file(folder)} is another encoder: its SHA-256 differs. "
                         f"Say where the right one is with --init_from")
    return folder


def pack_state(model, optimizer):
    """What a run needs to resume: the last weights and the optimizer's state, on the CPU."""
    weights = {name: p.detach().cpu().clone() for name, p in trained_tensors(model).items()}
    state = {number: {name: value.cpu() for name, value in values.items()}
             for number, values in optimizer.state_dict()["state"].items()}
    return {"last": weights, "optimizer": state}


def unpack_state(checkpoint, model, optimizer):
    """Put what pack_state packed back in its place."""
    copy_tensors(checkpoint["last"], trained_tensors(model))
    [group] = optimizer.param_groups
    state = checkpoint["optimizer"]
    expected = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                for i, p in enumerate(group["params"])}
    shapes = {i: {name: x.shape for name, x in values.items() if x.is_floating_point()}
              for i, values in state.items()}
    if shapes != expected:
        raise ValueError("its optimizer's state does not fit the model")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
