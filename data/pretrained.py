"""Hugging Face's folders of RoBERTa, BERT and MPNet: config.json and the weights.

    model = load("data/models/roberta-base", n_out=2)      # a model.Transformer
    save(model, "folder")                                  # transformers reads it
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from condlora import adapted_layers, copy_tensors
from model import BUCKETS, Config, Transformer

from .command import reading, write

# Our names and theirs, by parts. No replacement contains another name, so order does not matter:
# "attention.out." has a dot, else it would also match "attention.output".
NAMES = {
    "embeddings.norm": "embeddings.LayerNorm", "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "relative_bias": "encoder.relative_attention_bias", "layers.": "encoder.layer.",
    "fc1": "intermediate.dense", "fc2": "output.dense", "norm2": "output.LayerNorm",
}
ATTENTION = {  # BERT's and RoBERTa's, MPNet's
    "attention.query": ("attention.self.query", "attention.attn.q"),
    "attention.key": ("attention.self.key", "attention.attn.k"),
    "attention.value": ("attention.self.value", "attention.attn.v"),
    "attention.out.": ("attention.output.dense.", "attention.attn.o."),
    "norm1": ("attention.output.LayerNorm", "attention.LayerNorm"),
}
BERT = NAMES | {ours: bert for ours, (bert, _) in ATTENTION.items()}
HF_NAMES = {
    "bert": BERT | {"head.dense": "pooler.dense", "head.out_proj": "classifier"},
    "roberta": BERT | {"head": "classifier"},
    "mpnet": NAMES | {ours: mpnet for ours, (_, mpnet) in ATTENTION.items()} |
             {"head": "classifier"},
}
WEIGHTS = "model.safetensors", "pytorch_model.bin"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def hf_name(name, model_type):
    """layers.0.norm1.bias -> bert.encoder.layer.0.attention.output.LayerNorm.bias, and so on."""
    for ours, hf in HF_NAMES[model_type].items():
        name = name.replace(ours, hf)
    return name if name.startswith("classifier") else f"{model_type}.{name}"


def load(path, n_out=2):
    """The Transformer of a folder with config.json and model.safetensors or pytorch_model.bin.

    Names may lack the prefix "bert.", "roberta." or "mpnet."; weights become float32. A head of
    another size is re-initialized. Raises FileNotFoundError or ValueError, naming the file.
    """
    path = Path(path)
    config = read_config(path / "config.json", n_out)
    file = weights_file(path)
    with reading(file):
        tensors = (read_safetensors(file) if file.suffix == ".safetensors" else
                   torch.load(file, map_location="cpu", weights_only=True))
        d, layer = config.hidden_size, 4 * config.hidden_size + 2 * config.intermediate_size
        rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
        weights = d * (rows + config.num_hidden_layers * layer)
        weights += config.max_len ** 2 * (config.model_type == "mpnet")  # its buckets
        if weights > file.stat().st_size:  # before anything of that size is allocated
            raise ValueError(f"config.json asks for {weights:,} weights or more, the file has only "
                             f"{file.stat().st_size:,} bytes")
        given, kind = {}, config.model_type
        for name, tensor in tensors.items():
            # The first releases of BERT call a layer norm's weight and bias gamma and beta.
            name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
            has_prefix = name.startswith((f"{kind}.", "classifier."))
            given[name if has_prefix else f"{kind}.{name}"] = tensor
        model = Transformer(config)
        parameters = {hf_name(name, kind): p for name, p in model.named_parameters()}
        for name, p in model.head.named_parameters():
            key = hf_name(f"head.{name}", kind)
            if key not in given or given[key].shape != p.shape:
                del parameters[key]
        copy_tensors({key: given[key] for key in parameters if key in given}, parameters)
    return model


def save(model, path):
    """Write what `load` reads, in float32. config.json comes last: then the folder is complete.

    Raises ValueError if the model is adapted, since the files could not hold the adapter.
    """
    if adapted_layers(model):
        raise ValueError("the model is adapted: save it after merge_and_unload")
    tensors = {hf_name(name, model.config.model_type): p for name, p in model.named_parameters()}
    write_safetensors(Path(path) / "model.safetensors", tensors)
    settings = dataclasses.asdict(model.config)
    settings["num_labels"] = settings.pop("n_out")
    write(Path(path) / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def read_config(file, n_out=2):
    """The Config of a config.json. Settings that would make another model are refused by name."""
    with reading(file):
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings.get("model_type")
        if kind not in list(HF_NAMES):
            raise ValueError(f"model_type is {kind!r:.40}: use a {', '.join(HF_NAMES)} model")
        only = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
                "relative_attention_num_buckets": BUCKETS, "add_cross_attention": False}
        for name, value in only.items():
            if settings.get(name) not in (None, value):
                raise ValueError(f"{name} is {settings[name]!r:.40}: this encoder has {value}")
        defaults = Config(kind, pad_token_id=0 if kind == "bert" else 1, n_out=n_out)
        kinds = {field.name: type(getattr(defaults, field.name)) for field in
                 dataclasses.fields(Config)} | {"classifier_dropout": float}
        given = {name: kinds[name](settings[name]) for name in kinds
                 if settings.get(name) is not None and name != "n_out"}
        if kind == "mpnet":  # transformers' has these whatever config.json says
            given |= {"pad_token_id": 1, "classifier_dropout": None}
        config = dataclasses.replace(defaults, **given)
        sizes = [value for name, value in vars(config).items()
                 if type(value) is int and name != "pad_token_id"]
        if (min(*sizes, config.max_len, config.pad_token_id + 1) < 1
                or config.hidden_size % config.num_attention_heads
                or not 0 <= config.attention_probs_dropout_prob < 1):
            raise ValueError("a size is less than 1, hidden_size is not a multiple of "
                             "num_attention_heads, or a dropout is not from 0 to 1")
    return config


def find(name):
    """The folder of a model: `name`, or data/models/NAME, where download.py puts it."""
    models = Path(__file__).resolve().parent / "models"
    for folder in (Path(name), models / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {name}, here or under {models}. `python data/download.py "
                            f"NAME` fetches a model.")


def weights_file(path):
    """The file in the folder `path` that holds the weights."""
    for name in WEIGHTS:
        if (Path(path) / name).is_file():
            return Path(path) / name
    raise FileNotFoundError(f"{path} has neither {' nor '.join(WEIGHTS)}; "
                            f"sharded weights are not supported")


def read_safetensors(file):
    """{name: tensor} of a .safetensors file.

    8 bytes are the header's length; the JSON header has each tensor's dtype, shape and place.
    """
    with reading(file):
        raw = np.memmap(file, mode="c")
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header, body = json.loads(raw[8:8 + length].tobytes()), torch.from_numpy(raw[8 + length:])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            numbers = body[begin:end].clone()  # aligned
            tensors[name] = numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def write_safetensors(file, tensors):
    """Write {name: tensor} in float32, as read_safetensors and other programs read it."""
    header, body, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in tensors.items():
        body.append(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
        begin, end = end, end + len(body[-1])
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    write(file, len(text).to_bytes(8, "little") + text + b"".join(body))
