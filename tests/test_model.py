"""The encoder against logits that transformers 5.23 gave for the same weights, and reading Hugging
Face's files."""

import json
import struct

import pytest
import torch
from conftest import hf_config, hf_state, write_encoder

from condlora import adapt, adapter_parameters, merge_and_unload
from data import pretrained
from data.pretrained import read_safetensors
from model import Config, Transformer, relative_buckets

# transformers' BertForSequenceClassification, Roberta... and MPNet..., on conftest's weights
LOGITS = {
    "bert": [[0.260298, -0.920873], [0.915708, -0.847392]],
    "roberta": [[-0.220207, -1.34343], [-0.161204, -1.503876]],
    "mpnet": [[0.01159, -0.370819], [0.334978, -0.811706]],
}


def padded_batch(pad):
    input_ids = torch.tensor([[2, 5, 7, 10, 3, 8, 11, 3], [2, 6, 9, 3, pad, pad, pad, pad]])
    token_type_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8])
    return input_ids, token_type_ids, (torch.arange(8) < torch.tensor([[8], [4]])).long()


def safetensors(state, dtype, name):
    """The file as the format's description has it, written without the code under test."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, tensor in state.items():
        raw = tensor.to(dtype).view(torch.uint8 if tensor.dim() else dtype).numpy().tobytes()
        header[key] = {
            "dtype": name,
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("model_type", LOGITS)
def test_logits_are_transformers_own_with_padding_in_the_batch(tmp_path, model_type):
    model = pretrained.load(write_encoder(tmp_path / "m", model_type), n_out=2).eval()
    logits = model(*padded_batch(pad=model.config.pad_token_id))
    assert torch.allclose(logits, torch.tensor(LOGITS[model_type]), atol=2e-6)


@pytest.mark.parametrize("model_type", LOGITS)
def test_logits_in_training_are_the_same_where_dropout_drops_nothing(tmp_path, model_type):
    folder = write_encoder(
        tmp_path / "m", model_type, hidden_dropout_prob=1e-12, attention_probs_dropout_prob=1e-12
    )
    model = pretrained.load(folder, n_out=2).train()
    logits = model(*padded_batch(pad=model.config.pad_token_id))
    assert torch.allclose(logits, torch.tensor(LOGITS[model_type]), atol=2e-6)


def test_mpnets_buckets_are_t5s():
    # transformers' T5Attention._relative_position_bucket(bidirectional=True, 32, 128)
    buckets = {
        -500: 15,
        -128: 15,
        -100: 15,
        -64: 14,
        -33: 12,
        -32: 12,
        -16: 10,
        -12: 9,
        -11: 8,
        -8: 8,
        -7: 7,
        -1: 1,
        0: 0,
        1: 17,
        7: 23,
        8: 24,
        11: 24,
        12: 25,
        15: 25,
        16: 26,
        31: 27,
        32: 28,
        64: 30,
        127: 31,
        128: 31,
        300: 31,
    }
    table = relative_buckets(torch.arange(600) - torch.arange(600)[:, None])
    for offset, bucket in buckets.items():
        query = max(0, -offset)
        assert table[query, query + offset] == bucket


@pytest.mark.parametrize("model_type", LOGITS)
def test_the_first_tokens_state_is_the_same_without_computing_the_others(tmp_path, model_type):
    model = pretrained.load(write_encoder(tmp_path / "m", model_type)).eval()
    batch = padded_batch(pad=model.config.pad_token_id)
    every, first = (model.encode(*batch, first_only=only) for only in (False, True))
    assert every.shape == (2, 8, 8) and first.shape == (2, 1, 8)
    assert torch.allclose(first, every[:, :1], atol=1e-6)


@pytest.mark.parametrize("model_type", LOGITS)
@pytest.mark.parametrize(
    "dtype, name, tolerance",
    [(torch.float32, "F32", 2e-6), (torch.float16, "F16", 2e-3), (torch.bfloat16, "BF16", 2e-2)],
)
def test_safetensors_of_each_precision_load_with_extra_keys_and_without_prefix(
    tmp_path, model_type, dtype, name, tolerance
):
    folder = write_encoder(tmp_path / "m", model_type)
    (folder / "pytorch_model.bin").unlink()
    state = {
        key.removeprefix(model_type + "."): value for key, value in hf_state(model_type, 2).items()
    }
    state |= {
        "embeddings.position_ids": torch.arange(16.0),
        "cls.predictions.bias": torch.zeros(3),
        "lm_head.bias": torch.zeros(3),
    }
    (folder / "model.safetensors").write_bytes(safetensors(state, dtype, name))
    model = pretrained.load(folder, n_out=2).eval()
    logits = model(*padded_batch(pad=model.config.pad_token_id))
    assert torch.allclose(logits, torch.tensor(LOGITS[model_type]), atol=tolerance)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_first_berts_gamma_and_beta_are_weight_and_bias(tmp_path):
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in hf_state("bert", 2).items()
    }
    model = pretrained.load(write_encoder(tmp_path / "m", state=state)).eval()
    assert torch.allclose(model(*padded_batch(0)), torch.tensor(LOGITS["bert"]), atol=2e-6)


@pytest.mark.parametrize("model_type", LOGITS)
@pytest.mark.parametrize("classifier, n_out", [(0, 2), (3, 2), (2, 1)])
def test_a_head_that_is_absent_or_has_other_classes_is_drawn_anew(
    tmp_path, model_type, classifier, n_out
):
    folder = write_encoder(tmp_path / "m", model_type, state=hf_state(model_type, classifier))
    model = pretrained.load(folder, n_out)
    weight = model.head.out_proj.weight
    assert weight.shape == (n_out, 8) and 0 < weight.std() < 0.1
    assert torch.equal(model.head.out_proj.bias, torch.zeros(n_out))


@pytest.mark.parametrize("model_type", LOGITS)
def test_what_is_saved_reads_back_the_same(tmp_path, model_type):
    model = Transformer(
        Config(
            model_type=model_type,
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
            pad_token_id=1,
            n_out=3,
        )
    )
    pretrained.save(model, tmp_path)
    again = pretrained.load(tmp_path, n_out=3)
    assert again.config == model.config
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_robertas_positions_start_after_the_padding_id_and_skip_padding(bert_folder, tmp_path):
    roberta = pretrained.load(write_encoder(tmp_path / "r", "roberta")).eval()
    left, right = torch.tensor([[1, 1, 2, 5, 3]]), torch.tensor([[2, 5, 3, 1, 1]])
    states = [roberta.encode(ids, attention_mask=(ids != 1).long()) for ids in (left, right)]
    assert torch.allclose(
        states[0][:, 2:], states[1][:, :3], atol=1e-6
    )  # the same wherever the padding stands
    assert (
        roberta.config.max_len == 16
        and pretrained.load(bert_folder).config.max_len == 16
    )
    with pytest.raises(ValueError, match="17 tokens.*16 positions"):
        roberta(torch.full((1, 17), 5))


def without(key):
    return {k: v for k, v in hf_state("bert", 2).items() if k != key}


@pytest.mark.parametrize(
    "changes, state, words",
    [
        (
            {"model_type": "gpt2"},
            None,
            "config.json: model_type is 'gpt2': use a bert, roberta, mpnet model",
        ),
        ({"hidden_act": "relu"}, None, "config.json: hidden_act is 'relu'"),
        (
            {"position_embedding_type": "relative_key"},
            None,
            "position_embedding_type is 'relative_key'",
        ),
        ({"num_attention_heads": 3}, None, "hidden_size is not a multiple of num_attention_heads"),
        (
            {},
            without("bert.encoder.layer.1.attention.self.value.bias"),
            "bert.encoder.layer.1.attention.self.value.bias is missing",
        ),
        (
            {"intermediate_size": 20},
            None,
            r"intermediate.dense.bias is \(12,\), in the model \(20,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, state, words):
    with pytest.raises(ValueError, match=words):
        pretrained.load(write_encoder(tmp_path / "m", state=state, **changes))


def test_missing_and_damaged_files_are_named(bert_folder, tmp_path):
    weights = bert_folder / "pytorch_model.bin"
    weights.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a PyTorch file of plain tensors"):
        pretrained.load(bert_folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor pytorch_model"):
        pretrained.load(bert_folder)
    (bert_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: JSONDecodeError"):
        pretrained.load(bert_folder)
    with pytest.raises(FileNotFoundError, match="nowhere/config.json"):
        pretrained.load(tmp_path / "nowhere")


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    whole = safetensors(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, torch.float32, "F32"
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole)
    assert read_safetensors(file)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.safetensors"):
            read_safetensors(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
    ],
)
def test_a_safetensors_header_that_contradicts_the_file_is_refused(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="model.safetensors"):
        read_safetensors(tmp_path / "model.safetensors")


def test_an_adapted_model_is_saved_after_merge_and_unload_or_not_at_all(bert_folder, tmp_path):
    pretrained.save(pretrained.load(bert_folder).bfloat16(), tmp_path)  # as float32
    model = adapt(pretrained.load(tmp_path).eval(), "condlora", rank=2)
    for parameter in adapter_parameters(model):
        torch.nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="is adapted: save it after merge_and_unload"):
        pretrained.save(model, tmp_path)
    pretrained.save(merge_and_unload(model), tmp_path)
    ids = torch.tensor([[2, 5, 6, 3]])
    assert torch.equal(pretrained.load(tmp_path).eval()(ids), model(ids))
    names = read_safetensors(tmp_path / "model.safetensors")
    assert sorted(names) == sorted(hf_state("bert", 2))


def test_mpnets_positions_begin_after_1_whatever_its_config_says(tmp_path):
    """transformers' MPNetEmbeddings has a padding_idx of its own."""
    given, usual = (pretrained.load(write_encoder(tmp_path / str(pad), "mpnet", pad_token_id=pad))
                    for pad in (0, 1))
    ids = torch.tensor([[5, 6, 7]])
    assert given.config.max_len == usual.config.max_len
    assert torch.equal(given.eval().encode(ids), usual.eval().encode(ids))


def test_the_heads_dropout_is_classifier_dropout_where_the_config_has_one(tmp_path):
    for kind, expected in (("bert", 0.5), ("roberta", 0.5), ("mpnet", 0.1)):  # as transformers has
        folder = write_encoder(tmp_path / kind, kind, classifier_dropout=0.5)
        assert pretrained.load(folder).head.dropout.p == expected
    assert pretrained.load(write_encoder(tmp_path / "bert")).head.dropout.p == 0.1


def test_quantized_weights_are_refused(tmp_path):
    state = hf_state("bert", 2)
    state["bert.encoder.layer.0.attention.self.query.weight"] = torch.ones(8, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="attention.self.query.weight is torch.int8"):
        pretrained.load(write_encoder(tmp_path / "m", state=state))


def test_other_programs_are_told_that_the_file_is_pytorchs(bert_folder, tmp_path):
    """transformers before 4.49 refuses a file without it."""
    pretrained.save(pretrained.load(bert_folder), tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize(
    "name, value",
    [("hidden_size", -8), ("hidden_size", 10**18), ("hidden_size", 0), ("num_hidden_layers", [2]),
     ("num_hidden_layers", 10**7), ("hidden_dropout_prob", 1.5), ("layer_norm_eps", "x"),
     ("attention_probs_dropout_prob", 1.5), ("vocab_size", 10**8), ("max_position_embeddings", 0),
     ("type_vocab_size", 10**9), ("hidden_act", ["gelu"]), ("model_type", {}),
     ("is_decoder", True)])
def test_a_config_of_a_wrong_type_or_range_is_refused_in_one_line(bert_folder, name, value):
    (bert_folder / "config.json").write_text(json.dumps(hf_config("bert") | {name: value}))
    with pytest.raises(ValueError) as refused:
        pretrained.load(bert_folder)
    assert str(bert_folder) in str(refused.value) and len(str(refused.value)) < 400
