"""Checkpoints: what train.py writes, and train.py and analyze.py read."""

import hashlib
import io
from pathlib import Path

import torch

from condlora import copy_tensors
from model import Config, check, weights_file

from .command import write

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


def sha256(folder):
    """SHA-256 of the weights in a pretrained model's folder."""
    with open(weights_file(folder), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verified_encoder(checkpoint, init_from=None):
    """The folder of the checkpoint's encoder, or `init_from`, if its weights are the same."""
    folder = Path(init_from or checkpoint["encoder"]["path"])
    try:
        is_the_same = sha256(folder) == checkpoint["encoder"]["sha256"]
    except OSError:
        raise FileNotFoundError(f"its encoder is not at {str(folder)[:100]}: "
                                f"say where it is with --init_from") from None
    if not is_the_same:
        raise ValueError(f"{weights_file(folder)} is not its encoder: the SHA-256 differs. "
                         f"Say where that one is with --init_from")
    return folder


def trained_weights(model):
    """{name: parameter} of what trains: adapter and head, each shared theta once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pack_state(model, optimizer):
    """What a run needs to go on: the last weights and the optimizer's state, on the CPU."""
    weights = {name: p.detach().cpu().clone() for name, p in trained_weights(model).items()}
    state = {number: {name: value.cpu() for name, value in values.items()}
             for number, values in optimizer.state_dict()["state"].items()}
    return {"last": weights, "optimizer": state}


def unpack_state(checkpoint, model, optimizer):
    """Put what pack_state packed back in its place."""
    copy_tensors(checkpoint["last"], trained_weights(model))
    [group] = optimizer.param_groups
    state = checkpoint["optimizer"]
    expected = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                for i, p in enumerate(group["params"])}
    # AdamW has floats only: whatever else there is must not equal what is expected.
    given = {i: {name: x.shape for name, x in values.items() if x.is_floating_point()}
             for i, values in state.items()}
    if given != expected:
        raise ValueError("its optimizer's state does not fit the model")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
