"""Checkpoints: what train.py writes, and train.py and analyze.py read."""

import hashlib
import os
from pathlib import Path

import torch

from model import weights_file


def save(checkpoint, file):
    """Write the dict beside `file`, then rename it: a stopped run leaves the last whole one."""
    partial = file.with_name(file.name + ".part")
    torch.save(checkpoint, partial)
    os.replace(partial, file)


def load(file):
    """The dict that `save` wrote. Raises FileNotFoundError or ValueError where there is none."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint {file}: python train.py writes one")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["settings"], checkpoint["weights"], checkpoint["encoder"]["sha256"]
    except Exception:  # of many kinds: not PyTorch's, not plain tensors, or somebody else's file
        raise ValueError(f"{file} is not a checkpoint of train.py") from None
    return checkpoint


def sha256(folder):
    """Of the weights in a pretrained model's folder."""
    with open(weights_file(folder), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_encoder(folder, checkpoint, file):
    """Raise ValueError where `folder` does not hold the encoder of the checkpoint in `file`."""
    if sha256(folder) != checkpoint["encoder"]["sha256"]:
        raise ValueError(f"{weights_file(folder)} is not the encoder of {file}: its SHA-256 "
                         f"differs. Say where that one is with --init_from")


def pack_state(model, optimizer):
    """What a run needs to go on, beside its random generators: weights and optimizer's state."""
    state = {number: {name: value.cpu() for name, value in values.items()}
             for number, values in optimizer.state_dict()["state"].items()}
    return {"last": trained_weights(model), "optimizer": state}


def unpack_state(checkpoint, model, optimizer):
    """Put what pack_state packed back in its place."""
    model.load_state_dict(checkpoint["last"], strict=False)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})


def pack_generators(device):
    """The states of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_generators(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def trained_weights(model):
    """Copies, on the CPU, of what trains, by name: adapter and head, each shared theta once."""
    return {name: p.detach().cpu().clone()
            for name, p in model.named_parameters() if p.requires_grad}
