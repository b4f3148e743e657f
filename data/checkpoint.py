"""Checkpoints: what train.py writes, and train.py, analyze.py and condlora.load_adapter read."""

import hashlib
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from condlora import copy_tensors, trained_tensors

from . import pretrained, tokenizer
from .command import reading, write

SETTINGS = {  # train.py's options
    "task": str, "regression": bool, "data_dir": str, "max_len": int, "pretrain_steps": int,
    "method": str, "targets": [str], "rank": int, "alpha": float, "lr": float, "epochs": int,
    "batch_size": int, "warmup": float, "weight_decay": float, "grad_clip": float, "patience": int,
    "seed": int, "dtype": ("float32", "bfloat16"),
}
# The entries of a checkpoint. Once training has ended, it also has "results": {split: metrics}.
FORMAT = {
    "task": str,  # its name or its folder
    "classes": [str],  # none: a regression
    "n_texts": int,  # sentences a row
    "data": str,  # the SHA-256 of the training and validation texts and labels
    "settings": SETTINGS,
    "encoder": {"path": str, "sha256": str},  # the folder; sha256() of it
    "layers": [str],  # the names of the adapted layers
    "history": [{"epoch": int, "loss": float, "seconds": float, "validation": {str: float}}],
    "best_epoch": int,
    "weights": {str: Tensor},  # all that trains, of the best epoch
    "last": {str: Tensor},  # the same of the last epoch, to resume
    "optimizer": {int: {str: Tensor}},  # AdamW's state
}


def save(checkpoint, file):
    """Write the dict as a file that `load` reads."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(file, buffer.getvalue())


def load(file):
    """The dict that `save` wrote. Raises FileNotFoundError or ValueError if it is not one."""
    with reading(file), open(file, "rb") as opened:
        # torch.load does not look at the checksums.
        if not zipfile.is_zipfile(opened) or zipfile.ZipFile(opened).testzip():
            raise ValueError("not a checkpoint of train.py, or damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for name, kind in FORMAT.items():
            if not fits(checkpoint, {name: kind}):
                raise ValueError(f"no checkpoint of this train.py: {name!r} is missing or damaged")
        history, best = checkpoint["history"], checkpoint["best_epoch"]
        if ([epoch["epoch"] for epoch in history] != [*range(1, len(history) + 1)]
                or not 1 <= best <= len(history)
                or not all(epoch["validation"] and epoch["seconds"] > 0 for epoch in history)):
            raise ValueError("its history is damaged")
    return checkpoint


def fits(value, kind):
    """Whether a value is of a kind: a type, (texts), [of each], {name: its} or {type: its}."""
    if isinstance(kind, type):
        return type(value) is kind and (kind is not Tensor or value.layout is torch.strided)
    if isinstance(kind, tuple):
        return type(value) is str and value in kind
    if isinstance(kind, list):
        return type(value) is list and all(fits(item, kind[0]) for item in value)
    return type(value) is dict and all(
        name in value and fits(value[name], its) if isinstance(name, str) else
        all(fits(key, name) and fits(item, its) for key, item in value.items())
        for name, its in kind.items())


def sha256(folder):
    """SHA-256 of what is read from a pretrained model's folder."""
    names, digest = ("config.json", *tokenizer.FILES), hashlib.sha256()
    for file in (pretrained.weights_file(folder), *(Path(folder) / name for name in names)):
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def verified_encoder(checkpoint, name=None):
    """The folder of the checkpoint's encoder, or of another name, if its files are the same."""
    folder = pretrained.find(name) if name else Path(checkpoint["encoder"]["path"])
    if not folder.is_dir() or sha256(folder) != checkpoint["encoder"]["sha256"]:
        raise ValueError(f"{str(folder)[:150]} does not hold the encoder that it was trained with, "
                         f"unchanged: say where that is with --init_from")
    return folder


def restore_last_epoch(checkpoint, model, optimizer):
    """Put the last epoch's weights into the model, and the optimizer's state back."""
    copy_tensors(checkpoint["last"], trained_tensors(model))
    [group], state = optimizer.param_groups, checkpoint["optimizer"]
    for i, p in enumerate(group["params"]):
        shapes = {name: x.shape for name, x in state.get(i, {}).items()}
        expected = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        if shapes != expected or state[i]["step"] < 0:
            raise ValueError("its optimizer's state does not fit the model")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
