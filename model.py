"""A post-layer-norm transformer encoder: RoBERTa, BERT and MPNet, from Hugging Face's files.

    model = Transformer.from_pretrained("data/models/roberta-base", n_out=2)
    logits = model(input_ids, token_type_ids, attention_mask)       # (batch, n_out)

BERT: Devlin et al. 2019, arXiv:1810.04805. RoBERTa: Liu et al. 2019, arXiv:1907.11692; its
positions start elsewhere, and its classification head has a different structure. MPNet: Song et al.
2020, arXiv:2004.09297; it is RoBERTa with a relative position bias on the attention scores and
without token types. Every other number is in config.json.

Shapes: B sequences of T tokens, d = hidden_size, nh heads of size hs = d / nh.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Sizes and settings, named as in Hugging Face's config.json; the defaults are BERT-base's.

    Raises ValueError where one is of another type or out of range (`check`, below).
    """

    model_type: str = "bert"  # or "roberta" or "mpnet"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    # In RoBERTa and MPNet this includes pad_token_id + 1 positions that no token uses.
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    n_out: int = 2  # classes, or 1 for regression

    def __post_init__(self):
        limits = {int: (int, 1, 10 ** 8), float: (float, 0.0, 0.999), str: str}
        for field in dataclasses.fields(self):
            if field.name != "pad_token_id":
                check(getattr(self, field.name), limits[field.type], field.name)
        check(self.pad_token_id, (int, 0, self.max_position_embeddings - 2), "pad_token_id")
        if self.model_type not in HF_NAMES:
            raise ValueError(f"model_type is {short(self.model_type)}, "
                             f"not {' or '.join(HF_NAMES)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of "
                             f"num_attention_heads {self.num_attention_heads}")

    @property
    def max_len(self):
        """The longest sequence that has positions, in tokens."""
        unused = 0 if self.model_type == "bert" else self.pad_token_id + 1
        return self.max_position_embeddings - unused


class Dropout(nn.Dropout):
    """Like nn.Dropout, but twice as fast on a CPU, where drawing what to drop takes the time."""

    def forward(self, x):
        if x.is_cuda or not self.training or not self.p:
            return super().forward(x)
        kept = torch.rand(x.shape, device=x.device).ge_(self.p)
        return (x * kept.div_(1 - self.p)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(self, x, context, mask):
        """x (B, t, d) attends to context (B, T, d).

        mask is added to the scores: (B, 1, 1, T), or (B, nh, t, T) with MPNet's bias, or None.
        """
        q = self.heads(self.query(x))  # (B, nh, t, hs)
        k = self.heads(self.key(context))  # (B, nh, T, hs)
        v = self.heads(self.value(context))  # (B, nh, T, hs)
        p = self.dropout.p if self.training else 0.0
        if p and not x.is_cuda:
            # PyTorch's attention has no fused form with dropout on a CPU. With Dropout's faster
            # draws a step is 1.3 times as fast as PEFT's instead of 1.2 (tests/bench.py).
            scores = q @ k.mT / math.sqrt(q.shape[-1]) + (0 if mask is None else mask)
            y = self.dropout(F.softmax(scores, -1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, p)  # (B, nh, t, hs)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, t, d)

    def heads(self, x):  # (B, T, d) -> (B, nh, T, hs)
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(d, eps)
        self.fc1 = nn.Linear(d, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, d)
        self.norm2 = nn.LayerNorm(d, eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x, mask, first_only=False):
        """(B, T, d) -> (B, T, d), or (B, 1, d) with first_only: the first token, for the head."""
        context = x
        if first_only:
            x = x[:, :1].contiguous()  # let go of the other tokens' memory
            mask = None if mask is None else mask[:, :, :1]
        # Post-layer-norm: each norm comes after the sum.
        x = self.norm1(x + self.dropout(self.attention(x, context, mask)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.word = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.max_position_embeddings, d)
        if config.model_type != "mpnet":
            self.token_type = nn.Embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):  # both (B, T) -> (B, T, d)
        if self.config.model_type == "bert":
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            # Count the tokens that are no padding, from pad + 1; padding itself is at pad.
            pad = self.config.pad_token_id
            real = (input_ids != pad).long()
            positions = real.cumsum(1) * real + pad
        x = self.word(input_ids)
        if self.config.model_type != "mpnet":
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            x = x + self.token_type(token_type_ids)
        return self.dropout(self.norm(x + self.position(positions)))


BUCKETS = 32


def relative_buckets(offset):
    """The bucket of key position - query position (T5's rule: Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys before the query, half for those after. The 8 nearest distances
    have a bucket each; farther ones share buckets that widen logarithmically, up to 128 and more.
    """
    distance = offset.abs()
    half = BUCKETS // 2
    exact = half // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(128 / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class Head(nn.Module):
    """RoBERTa's and MPNet's classification head, or BERT's pooler and classifier."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.n_out)
        self.dropout = Dropout(config.hidden_dropout_prob)
        # All but BERT drop the dense layer's input, too.
        self.dropout_first = config.model_type != "bert"

    def forward(self, x):  # (B, T, d) -> (B, n_out)
        # The head may train in float32 on a bfloat16 encoder.
        x = x[:, 0].to(self.dense.weight.dtype)
        if self.dropout_first:
            x = self.dropout(x)
        return self.out_proj(self.dropout(torch.tanh(self.dense(x))))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config)
        if config.model_type == "mpnet":
            self.relative_bias = nn.Embedding(BUCKETS, config.num_attention_heads)
            # Of every offset that positions can have: buckets[k] is for k - (max_len - 1).
            offsets = torch.arange(1 - config.max_len, config.max_len)
            self.register_buffer("buckets", relative_buckets(offsets), persistent=False)
        self.apply(self.initialize)

    def initialize(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, input_ids, token_type_ids=None, attention_mask=None, first_only=False):
        """Last hidden states (B, T, d) of token ids (B, T).

        attention_mask (B, T) is 1 for tokens and 0 for padding; without it every position is
        attended to. first_only gives the first token's state, (B, 1, d), and saves most of the last
        layer. Raises ValueError where T is more than the model's positions.
        """
        if input_ids.shape[1] > self.config.max_len:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than the "
                             f"{self.config.max_len} positions of the model")
        x = self.embeddings(input_ids, token_type_ids)
        mask = None
        if attention_mask is not None:
            # Added to the scores: 0, or so low that softmax gives 0.
            mask = torch.zeros_like(attention_mask, dtype=x.dtype)
            mask.masked_fill_(attention_mask == 0, torch.finfo(x.dtype).min)
            mask = mask[:, None, None, :]  # (B, 1, 1, T)
        if self.config.model_type == "mpnet":
            position = torch.arange(input_ids.shape[1], device=x.device)
            offset = position[None, :] - position[:, None]  # (T, T), key - query
            bias = self.relative_bias(self.buckets[offset + self.config.max_len - 1])  # (T, T, nh)
            # Contiguous, as attention's fast kernels on a GPU want it.
            bias = bias.permute(2, 0, 1).contiguous()[None]
            mask = bias if mask is None else mask + bias  # (1 or B, nh, T, T)
        for layer in self.layers:
            x = layer(x, mask, first_only and layer is self.layers[-1])
        return x

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        """Logits (B, n_out); the arguments are encode's."""
        return self.head(self.encode(input_ids, token_type_ids, attention_mask, first_only=True))

    @classmethod
    def from_pretrained(cls, path, n_out=2):
        """Read a folder of Hugging Face's: config.json, model.safetensors or pytorch_model.bin.

        Weights are found with and without the prefix "bert.", "roberta." or "mpnet.", and kept in
        float32. A head that is absent or has another number of outputs than n_out is drawn anew;
        other keys (the MLM head) are passed over. Raises FileNotFoundError or ValueError, naming
        the file and what is missing or does not fit.
        """
        path = Path(path)
        config = read_config(path / "config.json", n_out)
        file = weights_file(path)
        tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file)
        # Before anything of that size is allocated: a layer alone has 4 d^2 numbers.
        size = (config.vocab_size + 4 * config.num_hidden_layers * config.hidden_size
                + config.max_position_embeddings) * config.hidden_size
        if size > file.stat().st_size:
            raise ValueError(f"{path / 'config.json'} says that the encoder has {size:,} numbers "
                             f"or more, {file} has only {file.stat().st_size:,} bytes")
        model = cls(config)
        for name, parameter in model.named_parameters():
            key = hf_name(name, config.model_type)
            # The first releases of BERT call a layer norm's weight and bias gamma and beta.
            old_key = key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            prefix = f"{config.model_type}."
            keys = (key, key.removeprefix(prefix), old_key, old_key.removeprefix(prefix))
            tensor = next((tensors[k] for k in keys if k in tensors), None)
            if name.startswith("head.") and (tensor is None or tensor.shape != parameter.shape):
                continue
            if tensor is None:
                raise ValueError(f"{file} has no weight {key.removeprefix(prefix)}, "
                                 f"with or without the prefix '{prefix}'")
            if tensor.shape != parameter.shape:
                raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, "
                                 f"config.json says {tuple(parameter.shape)}")
            parameter.data.copy_(tensor)
        return model

    def save_pretrained(self, path):
        """Write what from_pretrained reads, in float32: transformers reads it too.

        config.json comes last: where it is, the folder is whole. Of a model that condlora adapted
        and merged, W0 + dW is written. Raises ValueError where it is adapted and not merged, since
        the files could not hold the adapter.
        """
        tensors = {}
        for name, module in self.named_modules():
            weights = dict(module.named_parameters(recurse=False))
            if hasattr(module, "merged"):  # an adapted layer
                if module.merged is None:
                    raise ValueError(f"{name} is adapted: merge the model, then save it")
                weights["weight"] = module.merged
            for last in ("weight", "bias"):
                if last in weights:
                    key = hf_name(f"{name}.{last}", self.config.model_type)
                    tensors[key] = weights[last].detach().float().cpu()
        write_safetensors(Path(path) / "model.safetensors", tensors)
        settings = dataclasses.asdict(self.config)
        settings["num_labels"] = settings.pop("n_out")
        (Path(path) / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


# Hugging Face's files ----------------------------------------------------------------------------

# Our names and theirs, by parts. No replacement contains another name, so order does not matter:
# "attention.out." has a dot, else it would match "attention.output", too.
NAMES = {
    "embeddings.norm": "embeddings.LayerNorm",
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "relative_bias": "encoder.relative_attention_bias",
    "layers.": "encoder.layer.",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
BERT_ATTENTION = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out.": "attention.output.dense.",
    "norm1": "attention.output.LayerNorm",
}
MPNET_ATTENTION = {
    "attention.query": "attention.attn.q",
    "attention.key": "attention.attn.k",
    "attention.value": "attention.attn.v",
    "attention.out.": "attention.attn.o.",
    "norm1": "attention.LayerNorm",
}
BERT_HEAD = {"head.dense": "pooler.dense", "head.out_proj": "classifier"}
ROBERTA_HEAD = {"head": "classifier"}
HF_NAMES = {
    "bert": NAMES | BERT_ATTENTION | BERT_HEAD,
    "roberta": NAMES | BERT_ATTENTION | ROBERTA_HEAD,
    "mpnet": NAMES | MPNET_ATTENTION | ROBERTA_HEAD,
}


def hf_name(name, model_type):
    """layers.0.norm1.bias -> bert.encoder.layer.0.attention.output.LayerNorm.bias, and so on."""
    for ours, hf in HF_NAMES[model_type].items():
        name = name.replace(ours, hf)
    return name if name.startswith("classifier") else f"{model_type}.{name}"


def read_config(file, n_out):
    settings = read_json(file)
    if settings.get("model_type") not in list(HF_NAMES):  # it may be of any type
        raise ValueError(f"{file}: model_type is {short(settings.get('model_type'))}, "
                         f"not {' or '.join(HF_NAMES)}")
    for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
                       ("relative_attention_num_buckets", BUCKETS)):
        if settings.get(name) not in (None, only):
            raise ValueError(f"{file}: {name} is {short(settings[name])}: this encoder has {only}")
    known = {field.name for field in dataclasses.fields(Config)} - {"n_out"}
    given = {name: settings[name] for name in known if settings.get(name) is not None}
    if settings["model_type"] != "bert":
        given.setdefault("pad_token_id", 1)
    try:
        return Config(n_out=n_out, **given)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def weights_file(path):
    """The file in the folder `path` that holds the weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (Path(path) / name).is_file():
            return Path(path) / name
    raise FileNotFoundError(f"neither model.safetensors nor pytorch_model.bin in {path}")


def read_bin(file):
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # torch.load raises half a dozen kinds
        reason = str(error).split("\n")[0][:80]
        raise ValueError(f"{file} is not a PyTorch file of plain tensors: {reason}") from None


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(file):
    """{name: tensor} of a .safetensors file.

    The file is 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and
    place in bytes, then the numbers. Raises ValueError where these contradict each other.
    """
    name = "its header"  # for the error below
    try:
        raw = np.memmap(file, mode="c")
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header, body = json.loads(raw[8:8 + length].tobytes()), torch.from_numpy(raw[8 + length:])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(body):
                raise ValueError(f"bytes {begin} to {end} of {len(body)}")
            numbers = body[begin:end].clone()  # aligned
            tensors[name] = numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        return tensors
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError,
            OverflowError) as error:
        raise ValueError(f"{file} is cut short, damaged or no safetensors file, at {short(name)}: "
                         f"{type(error).__name__} {str(error)[:80]}") from None


def write_safetensors(file, tensors):
    """Write {name: float32 tensor}, on the CPU, as read_safetensors reads it."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    partial = Path(f"{file}.part{os.getpid()}")
    with open(partial, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.contiguous().numpy().astype("<f4").tobytes())
    partial.replace(file)


# What is wrong with a file -----------------------------------------------------------------------

def read_json(file):
    """The object, that is the dict, in a JSON file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no {Path(file).name} in {Path(file).parent}")
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {str(error)[:80]}") from None
    check(settings, dict, f"{file}")
    return settings


def check(value, kind, where):
    """Raise ValueError, which begins with `where`, unless `value` is of this kind.

    A kind is a type; (type, lowest, highest); [kind] for a list; {str: kind} for a dict of any
    keys; {"name": kind, ...} for a dict that has at least these. An int may stand for a float.
    """
    if isinstance(kind, dict):
        check(value, dict, where)
        for name, inner in kind.items():
            if isinstance(name, type):
                for key, item in value.items():
                    check(key, name, f"a key of {where}")
                    check(item, inner, f"{where}: {short(key)}")
            elif name not in value:
                raise ValueError(f"{where} has no {name!r}")
            else:
                check(value[name], inner, f"{where}: {name}")
    elif isinstance(kind, list):
        check(value, list, where)
        for item in value:
            check(item, kind[0], f"an entry of {where}")
    elif isinstance(kind, tuple):
        of_type, low, high = kind
        check(value, of_type, where)
        if not low <= value <= high:
            raise ValueError(f"{where} is {short(value)}: it must be from {low} to {high}")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} is {short(value)}: it must be of type {kind.__name__}")


def short(value):
    """repr, cut where it is long."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__}"
    if type(value) is int and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
