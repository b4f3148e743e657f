"""What several test files use: small pretrained folders in Hugging Face's layout, written by the tests themselves."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Hugging Face's names and shapes of a model of 2 layers, d = 8, written down from the transformers library.
HF_LAYER = {"attention.self.query.weight": (8, 8), "attention.self.query.bias": (8,), "attention.self.key.weight": (8, 8),
            "attention.self.key.bias": (8,), "attention.self.value.weight": (8, 8), "attention.self.value.bias": (8,),
            "attention.output.dense.weight": (8, 8), "attention.output.dense.bias": (8,), "attention.output.LayerNorm.weight": (8,),
            "attention.output.LayerNorm.bias": (8,), "intermediate.dense.weight": (12, 8), "intermediate.dense.bias": (12,),
            "output.dense.weight": (8, 12), "output.dense.bias": (8,), "output.LayerNorm.weight": (8,), "output.LayerNorm.bias": (8,)}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog bird sees sleeps not warm cold ##s ##ing . , \" '".split()


def hf_state(model_type, classifier):
    """Weights anyone can make again: sines of a squared counter, scaled."""
    positions = {"bert": 16, "roberta": 18}[model_type]
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), 8), "embeddings.position_embeddings.weight": (positions, 8),
              "embeddings.token_type_embeddings.weight": (2, 8), "embeddings.LayerNorm.weight": (8,), "embeddings.LayerNorm.bias": (8,)}
    shapes |= {f"encoder.layer.{i}.{name}": shape for i in range(2) for name, shape in HF_LAYER.items()}
    shapes = {f"{model_type}.{name}": shape for name, shape in shapes.items()}
    shapes |= {"bert": {"bert.pooler.dense.weight": (8, 8), "bert.pooler.dense.bias": (8,)},
               "roberta": {"classifier.dense.weight": (8, 8), "classifier.dense.bias": (8,)}}[model_type]
    if classifier:
        prefix = {"bert": "classifier", "roberta": "classifier.out_proj"}[model_type]
        shapes |= {f"{prefix}.weight": (classifier, 8), f"{prefix}.bias": (classifier,)}
    state, start = {}, 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        wave = torch.sin(torch.arange(start, start + n, dtype=torch.float64) ** 2) * (0.5 if len(shape) > 1 else 0.1)
        state[name] = (wave + name.endswith("LayerNorm.weight")).float().view(shape)
        start += n
    return state


def hf_config(kind, **changes):
    return {"model_type": kind, "vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 12, "max_position_embeddings": {"bert": 16, "roberta": 18}[kind], "type_vocab_size": 2,
            "pad_token_id": {"bert": 0, "roberta": 1}[kind], "layer_norm_eps": {"bert": 1e-12, "roberta": 1e-5}[kind],
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} | changes


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
