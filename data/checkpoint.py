"""Checkpoints: what train.py writes, and train.py and analyze.py read."""

import hashlib
import io
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from condlora import copy_tensors
from model import Config, check, weights_file

TENSORS = {str: torch.Tensor}
EPOCH = {"epoch": int, "loss": float, "seconds": (float, 1e-9, 1e9), "validation": {str: float}}
CHECKPOINT = {
    "task": str,
    "classes": [str],  # none: a regression
    "n_texts": (int, 1, 2),
    "settings": {"method": str, "targets": [str], "rank": int, "alpha": float},  # and others
    "config": {"n_out": int},  # and model.Config's other fields
    "encoder": {"path": str, "sha256": str},
    "history": [EPOCH],
    "best_epoch": int,
    "weights": TENSORS,  # of the best epoch: adapter and head
    "last": TENSORS,  # of the last epoch
    "optimizer": {int: TENSORS},
}


def save(checkpoint, file):
    """Write the dict as a file that `load` reads."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(file, buffer.getvalue())


def write(file, data):
    """Write bytes beside `file`, then rename that: a stopped run leaves the last whole one."""
    partial = beside(file)
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error.strerror}") from None


def check_writable(file, option, needed=()):
    """Raise ValueError now where `write` could not write what `option` names later.

    Or where it should not, since that is one of the files `needed`.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        if file.resolve() in [Path(other).resolve() for other in needed]:
            raise ValueError("the file is needed for something else")
        beside(file).write_bytes(b"")
        beside(file).unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{option} {str(file)[:150]} cannot be written: {reason}") from None


def beside(file):
    return file.with_name(file.name + ".part")


def load(file):
    """The dict that `save` wrote. Raises FileNotFoundError or ValueError where it is not one."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint {file}: python train.py writes one")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds: not PyTorch's, not plain tensors, cut short
        raise ValueError(f"{file} is not a checkpoint of train.py") from None
    try:
        check(checkpoint, CHECKPOINT, "it")
        Config(**checkpoint["config"])
        history = checkpoint["history"]
        if not history or not all(epoch["validation"] for epoch in history):
            raise ValueError("its history has no validation figures")
        if [epoch["epoch"] for epoch in history] != list(range(1, len(history) + 1)):
            raise ValueError("its history is not of epochs 1, 2, ...")
        check(checkpoint["best_epoch"], (int, 1, len(history)), "its best epoch")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a checkpoint of this train.py: "
                         f"{str(error)[:150]}") from None
    return checkpoint


@contextmanager
def naming(file):
    """An error in this block begins with the checkpoint's file, if there is one."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{file}: {error}" if file else str(error)) from None


def sha256(folder):
    """SHA-256 of the weights in a pretrained model's folder."""
    with open(weights_file(folder), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def find_encoder(checkpoint, file, init_from=None):
    """The folder of the checkpoint's encoder, or `init_from`, if its weights are the same."""
    folder = Path(init_from or checkpoint["encoder"]["path"])
    try:
        is_the_same = sha256(folder) == checkpoint["encoder"]["sha256"]
    except OSError:
        raise FileNotFoundError(f"the encoder of {file} is not at {str(folder)[:100]}: "
                                f"say where it is with --init_from") from None
    if not is_the_same:
        raise ValueError(f"{weights_file(folder)} is not the encoder of {file}: its SHA-256 "
                         f"differs. Say where that one is with --init_from")
    return folder


def trained_weights(model):
    """Copies, on the CPU, of what trains, by name: adapter and head, each shared theta once."""
    return {name: p.detach().cpu().clone()
            for name, p in model.named_parameters() if p.requires_grad}


def load_weights(weights, model, file):
    """Put `weights`, of the checkpoint in `file`, into what trains of `model`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    copy_tensors(weights, parameters, file)


def pack_state(model, optimizer):
    """What a run needs to go on: the last weights and the optimizer's state, on the CPU."""
    state = {number: {name: value.cpu() for name, value in values.items()}
             for number, values in optimizer.state_dict()["state"].items()}
    return {"last": trained_weights(model), "optimizer": state}


def unpack_state(checkpoint, model, optimizer, file):
    """Put what pack_state packed back in its place."""
    load_weights(checkpoint["last"], model, file)
    [group] = optimizer.param_groups
    state = checkpoint["optimizer"]
    expected = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                for i, p in enumerate(group["params"])}
    given = {i: {name: x.shape for name, x in values.items() if x.is_floating_point()}
             for i, values in state.items()}
    if given != expected:
        raise ValueError(f"{file}: its optimizer's state does not fit the model")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
