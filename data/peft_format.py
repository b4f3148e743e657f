"""Adapters as Hugging Face's PEFT stores them: adapter_config.json, adapter_model.safetensors.

    export(model, encoder_folder, folder)     # PeftModel.from_pretrained reads it
    factors = read(folder, model)             # A and B of somebody's LoRA adapter
"""

import json
import math
from pathlib import Path

import torch

from condlora import AdaptedLinear
from model import check, hf_name, read_json, read_safetensors, short, write_safetensors

BASE = "base_model.model."  # before each name in PEFT's file


def export(model, encoder, folder):
    """Write the adapter, CondLoRA's as the LoRA that it makes, and the head into `folder`.

    It is for transformers' AutoModelForSequenceClassification of `encoder`, with as many labels
    as the head has outputs. Raises ValueError where there is no adapter, or the folder is not new.
    """
    kind = model.config.model_type
    # hf_name knows "attention.out." by its dot.
    layers = {hf_name(f"{name}.", kind)[:-1]: layer for name, layer in model.named_modules()
              if isinstance(layer, AdaptedLinear)}
    if not layers:
        raise ValueError("--method head and full have no adapter to export: use lora or condlora")
    tensors = {}
    for name, layer in layers.items():
        for letter, factor in zip("AB", layer.factors()):
            tensors[f"{BASE}{name}.lora_{letter}.weight"] = factor.detach().cpu()
    for name, parameter in model.head.named_parameters():
        tensors[BASE + hf_name(f"head.{name}", kind)] = parameter.detach().cpu()
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(Path(encoder).resolve()),
        "inference_mode": True,
        "r": layer.settings["rank"],  # the last layer's, and so all layers'
        "lora_alpha": layer.settings["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layers),
        "modules_to_save": ["pooler", "classifier"] if kind == "bert" else ["classifier"],
    }
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--export {folder} is there already: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read(folder, model):
    """{name of a layer of `model`: (A (r, d_in), B (d_out, r), scale)} of PEFT's LoRA adapter.

    Raises ValueError or FileNotFoundError where the folder holds none, or one of another kind
    (DoRA, ranks that differ) or of another encoder.
    """
    folder, kind = Path(folder), model.config.model_type
    file = folder / "adapter_config.json"
    settings = read_json(file)
    check(settings, {"r": (int, 1, 10 ** 6), "lora_alpha": (float, 1e-30, 1e30)}, f"{file}")
    plain = {"peft_type": "LORA", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for name, value in plain.items():
        if (settings.get(name) or value) != value:
            raise ValueError(f"{file}: {name} is {short(settings[name])}, which is not plain LoRA")
    rank = settings["r"]
    # rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {folder}: it should be a LoRA adapter of PEFT")
    tensors = {}
    for name, tensor in read_safetensors(file).items():
        # PEFT has the "roberta." only where it wrapped a model with a head.
        tensors[name.removeprefix(BASE).removeprefix(f"{kind}.")] = tensor
    factors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        key = hf_name(f"{name}.", kind)[:-1].removeprefix(f"{kind}.")
        A, B = (tensors.pop(f"{key}.lora_{letter}.weight", None) for letter in "AB")
        if A is None and B is None:
            continue
        d_out, d_in = module.weight.shape
        for tensor, shape in ((A, (rank, d_in)), (B, (d_out, rank))):
            if tensor is None or tensor.shape != shape:
                given = "not there" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{file}: a factor of {key} is {given}, expected {shape}")
        factors[name] = A, B, scale
    left = [name for name in tensors if ".lora_" in name]
    if left or not factors:
        raise ValueError(f"{file} is not of this encoder, a {kind}: "
                         f"{short(left[0]) if left else 'it has no lora_A'}")
    return factors
