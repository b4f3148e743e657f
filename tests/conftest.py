"""What several test files use: small pretrained folders in Hugging Face's layout."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Hugging Face's names and shapes of a model of 2 layers, d = 8, written down from transformers.
SQUARE = {
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense"),
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
}
NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
}
SQUARE["roberta"], NORMS["roberta"] = SQUARE["bert"], NORMS["bert"]
POSITIONS = {"bert": 16, "roberta": 18, "mpnet": 18}
WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog bird sees sleeps not warm cold ##s ##ing "
         ". , \" '").split()


def hf_shapes(kind, classifier):
    norm = lambda name: {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    linear = lambda name, d_out, d_in: {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}
    layer = {}
    for name in SQUARE[kind]:
        layer |= linear(name, 8, 8)
    layer |= norm(NORMS[kind][0])
    layer |= linear("intermediate.dense", 12, 8) | linear("output.dense", 8, 12)
    layer |= norm(NORMS[kind][1])
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), 8),
              "embeddings.position_embeddings.weight": (POSITIONS[kind], 8)}
    if kind != "mpnet":
        shapes["embeddings.token_type_embeddings.weight"] = (2, 8)
    shapes |= norm("embeddings.LayerNorm")
    shapes |= {f"encoder.layer.{i}.{name}": shape
               for i in range(2) for name, shape in layer.items()}
    if kind == "mpnet":
        shapes["encoder.relative_attention_bias.weight"] = (32, 2)
    shapes = {f"{kind}.{name}": shape for name, shape in shapes.items()}
    shapes |= linear("bert.pooler.dense" if kind == "bert" else "classifier.dense", 8, 8)
    if classifier:
        out = "classifier" if kind == "bert" else "classifier.out_proj"
        shapes |= linear(out, classifier, 8)
    return shapes


def hf_state(kind, classifier):
    """Weights anyone can make again: sines of a squared counter, scaled."""
    state, start = {}, 0
    for name, shape in hf_shapes(kind, classifier).items():
        n = torch.Size(shape).numel()
        wave = torch.sin(torch.arange(start, start + n, dtype=torch.float64) ** 2)
        wave = wave * (0.5 if len(shape) > 1 else 0.1) + name.endswith("LayerNorm.weight")
        state[name] = wave.float().view(shape)
        start += n
    return state


def hf_config(kind, **changes):
    is_bert = kind == "bert"
    return {"model_type": kind, "vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 12,
            "max_position_embeddings": POSITIONS[kind], "type_vocab_size": 2,
            "pad_token_id": 0 if is_bert else 1, "layer_norm_eps": 1e-12 if is_bert else 1e-5,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            } | changes


def write_encoder(folder, kind="bert", state=None, **changes):
    """A folder as the hub has it: config.json, pytorch_model.bin, vocab.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(kind, **changes)))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save(hf_state(kind, 2) if state is None else state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def bert_folder(tmp_path):
    return write_encoder(tmp_path / "bert")
