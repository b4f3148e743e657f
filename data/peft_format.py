"""Adapters as Hugging Face's PEFT stores them: adapter_config.json, adapter_model.safetensors.

    export(model, encoder_folder, folder)     # PeftModel.from_pretrained reads it
    read(folder, model)                       # adapts a model with anyone's LoRA adapter
"""

import itertools
import json
import math
from pathlib import Path

from condlora import adapt, adapted_layers, copy_tensors, settings_of, trained_tensors

from .command import reading, write
from .pretrained import hf_name, read_safetensors, write_safetensors

BASE = "base_model.model."  # before each name in PEFT's file
# Settings that are read below, or that say how an adapter was trained, not what it computes.
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "use_rslora", "bias", "modules_to_save", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "megatron_core", "eva_config", "qalora_group_size", "runtime_config",
}
# Other initializations ("pissa", "olora", ...) subtract B A from W0, or turn it into another one.
KEEP_W0 = (None, True, False, "gaussian", "orthogonal", "eva")


def export(model, encoder, folder):
    """Write the adapter, CondLoRA's as the LoRA that it makes, and the head into `folder`.

    It is for transformers' AutoModelForSequenceClassification of `encoder`, with as many labels
    as the head has outputs. Raises ValueError if the model has none, or the folder is not new.
    """
    kind = model.config.model_type
    # hf_name knows "attention.out." by its dot.
    layers = {hf_name(f"{name}.", kind)[:-1]: layer
              for name, layer in adapted_layers(model).items()}
    if not layers:
        raise ValueError("--method head and full have no adapter to export: use another method")
    if any(layer in model.head.modules() for layer in layers.values()):
        raise ValueError("the head is adapted: PEFT cannot also save it whole")
    tensors = {}
    for name, layer in layers.items():
        for letter, factor in zip("AB", layer.factors()):
            tensors[f"{BASE}{name}.lora_{letter}.weight"] = factor
    for name, parameter in model.head.named_parameters():
        tensors[BASE + hf_name(f"head.{name}", kind)] = parameter
    shared = settings_of(model)
    settings = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": str(Path(encoder).resolve()), "target_modules": list(layers),
        "r": shared["rank"], "lora_alpha": shared["alpha"], "lora_dropout": 0.0,
        "modules_to_save": ["pooler", "classifier"] if kind == "bert" else ["classifier"],
    }
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--export {folder} exists already: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write(folder / "adapter_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def read(folder, model):
    """Adapt `model` in place with A and B, but not head or biases, of PEFT's LoRA; returns it.

    Raises FileNotFoundError, or ValueError if it is not plain LoRA of this encoder with one rank.
    """
    folder, kind = Path(folder), model.config.model_type
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    with reading(config):
        settings = json.loads(config.read_text(encoding="utf-8"))
        if settings["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {settings['peft_type']!r:.40}, not 'LORA'")
        start = settings.get("init_lora_weights")
        if start not in KEEP_W0:
            raise ValueError(f"init_lora_weights is {start!r:.40}, which changes W0: the encoder's "
                             f"own W0 does not belong to this A and B")
        for name, value in settings.items():
            if value and name not in KNOWN:
                raise ValueError(f"{name:.40} is {value!r:.40}: only plain LoRA can be read")
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        # rsLoRA divides by the root of the rank: Kalajdzievski 2023, arXiv:2312.03732.
        alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1
    with reading(file):
        # PEFT has the "roberta." only where it wrapped a model with a head.
        tensors = {name.removeprefix(BASE).removeprefix(f"{kind}."): tensor
                   for name, tensor in read_safetensors(file).items()}
        factors = {}  # {"layers.0.attention.query.A": A (r, d_in), ...}
        for (name, _), letter in itertools.product(model.named_modules(), "AB"):
            key = hf_name(f"{name}.", kind).removeprefix(f"{kind}.") + f"lora_{letter}.weight"
            if key in tensors:
                factors[f"{name}.{letter}"] = tensors.pop(key)
        # What is left may be a head, or biases: they leave W0 alone, and are not loaded.
        for name in tensors:
            is_head = name.startswith(("classifier.", "pooler."))
            if ".lora_" in name or not (is_head or name.endswith(".bias")):
                raise ValueError(f"it has {name:.80}, unlike plain LoRA of this encoder, a {kind}")
        if not factors:
            raise ValueError(f"it adapts no layer of this encoder, a {kind}")
        layers = {name.rpartition(".")[0] for name in factors}
        adapt(model, "lora", sorted(layers), rank, alpha)
        copy_tensors(factors, trained_tensors(model))
    return model
