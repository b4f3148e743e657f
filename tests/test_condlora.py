"""Claims about the method, each against the paper's formulas or a reckoning by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

import train
from condlora import (
    CondLoRALinear,
    LoRALinear,
    adapt,
    adapted_layers,
    adapter_parameters,
    convert,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    unmerge,
)
from model import Config, Transformer

METHODS = ("lora", "condlora", "tied", "random")


def encoder(layers=3, d=16, seed=0):
    torch.manual_seed(seed)
    config = Config(
        vocab_size=40,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * d,
        max_position_embeddings=12,
        initializer_range=0.3,
    )
    return Transformer(config).eval()


def trained(model):
    """As after training: every adapter parameter away from where it started."""
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_(std=0.3)
    return model


IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 30, 31, 3, 0]])


@pytest.mark.parametrize(
    "d, layers, lora, condlora", [(768, 12, 294_912, 24_576), (384, 6, 73_728, 12_288)]
)
def test_condlora_has_one_lth_of_loras_parameters(d, layers, lora, condlora):
    """RoBERTa-base and all-MiniLM-L6-v2, query and value, rank 8. The controls have CondLoRA's."""
    counts = {"lora": lora} | dict.fromkeys(("condlora", "tied", "random"), condlora)
    for method, expected in counts.items():
        with torch.device("meta"):
            model = nn.ModuleList(
                nn.ModuleDict({"query": nn.Linear(d, d), "value": nn.Linear(d, d)})
                for _ in range(layers)
            )
            adapt(model, method, rank=8)
        assert sum(p.numel() for p in adapter_parameters(model)) == expected


def test_condloras_factors_of_a_square_weight_by_hand():
    model = adapt(nn.ModuleDict({"query": nn.Linear(2, 2)}), targets="query", rank=1, alpha=3)
    layer = model["query"]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        conversion = layer.conversion
        conversion.theta_A.copy_(torch.tensor([[1.0, -1]]))
        conversion.theta_B.copy_(torch.tensor([[2.0, 1]]))
    A, B = layer.factors()
    assert A.tolist() == [[-1, -1]]  # rows of W0 times (1, -1): 1 - 2, 3 - 4
    assert B.tolist() == [[4], [10]]  # rows of W0 times (2, 1): 2 + 2, 6 + 4
    assert layer.delta().tolist() == [[-12, -12], [-30, -30]]  # 3 / 1 * B A


def test_condloras_factors_of_a_2x3_weight_by_hand():
    model = adapt(nn.ModuleDict({"fc": nn.Linear(3, 2)}), targets="fc", rank=1, alpha=1)
    layer = model["fc"]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        conversion = layer.conversion
        conversion.theta_A.copy_(torch.tensor([[1.0, 10]]))  # reads the columns of W0
        conversion.theta_B.copy_(torch.tensor([[1.0, 0, 2]]))  # reads its rows
    A, B = layer.factors()
    assert A.tolist() == [[41, 52, 63]]  # 1 + 40, 2 + 50, 3 + 60
    assert B.tolist() == [[7], [16]]  # 1 + 6, 4 + 12
    x = torch.tensor([[1.0, 0, 1]])
    assert torch.allclose(
        layer(x) - nn.functional.linear(x, layer.weight, layer.bias), torch.tensor([[728.0, 1664]])
    )  # (41 + 63) B


@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_zero_at_the_start_and_the_output_unchanged(method):
    model = encoder()
    before = model(IDS)
    adapt(model, method)
    assert torch.equal(model(IDS), before)
    layers = adapted_layers(model).values()
    assert len(layers) == 6
    assert all(torch.equal(layer.delta(), torch.zeros(16, 16)) for layer in layers)
    A = adapter_parameters(model)[0]
    assert (
        0 < A.abs().max() <= 16**-0.5
    )  # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_adapter_and_the_head_and_nothing_else(method):
    model = trained(adapt(encoder(), method))
    model.head.requires_grad_(True)
    model(IDS).sum().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in [*adapter_parameters(model), *model.head.parameters()]}


def test_condloras_gradient_is_that_of_the_written_out_formula():
    model = trained(adapt(encoder(layers=2)))
    plain = encoder(layers=2)
    model(IDS).square().sum().backward()
    theta = {
        f"{target}.{name}": p.detach().clone().requires_grad_()
        for target in ("query", "value")
        for name, p in getattr(model.layers[0].attention, target).conversion.named_parameters()
    }
    weights = {}
    for i in range(2):
        for target in ("query", "value"):
            name = f"layers.{i}.attention.{target}.weight"
            W0 = plain.state_dict()[name]
            A, B = (
                (W0 @ theta[f"{target}.theta_A"].T).T,
                W0 @ theta[f"{target}.theta_B"].T,
            )
            weights[name] = W0 + B @ A
    torch.func.functional_call(plain, weights, (IDS,)).square().sum().backward()
    for target in ("query", "value"):
        for name, p in getattr(model.layers[1].attention, target).conversion.named_parameters():
            assert torch.allclose(p.grad, theta[f"{target}.{name}"].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_summed_weights_give_the_same_outputs_and_gradients(method):
    rectangular = ("fc1", "fc2") if method in ("lora", "condlora") else ("key",)
    model = trained(adapt(encoder(), method, targets=("query", *rectangular), alpha=3))
    found = []
    for forward in (model, train.with_summed_weights(model, torch.float32)):
        output = forward(IDS)
        gradients = torch.autograd.grad(output.square().sum(), adapter_parameters(model))
        found.append((output, *gradients))
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    trained(model)  # afterwards each forward reads the parameters again
    assert not torch.equal(model(IDS), found[0][0])


def test_an_update_smaller_than_bfloat16s_steps_is_not_lost():
    """Between 0.5 and 1 bfloat16 steps by 1/256. An update of 0.0002 everywhere moves some weights
    by a whole step, and all by 0.0002 on average."""
    torch.manual_seed(0)
    model = adapt(nn.ModuleDict({"query": nn.Linear(256, 256)}), "lora", "query", rank=1, alpha=1)
    layer, summed = model["query"], []
    model.forward = lambda: summed.append(layer.merged)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1)
        layer.A.fill_(0.02)
        layer.B.fill_(0.01)
        train.with_summed_weights(model, torch.bfloat16)()
    moved = summed[0].double() - layer.weight.double()
    assert layer.merged is None and moved.mean().item() == pytest.approx(0.0002, abs=0.00002)
    assert moved.std().item() == pytest.approx(1 / 256 / 12**0.5, rel=0.02)  # rounding's


def test_a_state_dict_holds_each_theta_once():
    model = adapt(encoder(layers=3), targets=("query", "value", "fc1"))
    names = [name for name in model.state_dict() if "theta" in name]
    assert sorted(names) == [
        f"layers.0.{key}.conversion.theta_{x}"  # the first layer registers it for all
        for key in ("attention.query", "attention.value", "fc1")
        for x in "AB"
    ]
    other = adapt(encoder(layers=3), targets=("query", "value", "fc1"))
    other.load_state_dict(trained(model).state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_layers_share_a_theta_only_where_target_name_and_shape_agree():
    model = nn.Sequential(
        nn.ModuleDict({"dense": nn.Linear(4, 4)}),
        nn.ModuleDict({"dense": nn.Linear(4, 8)}),
        nn.ModuleDict({"dense": nn.Linear(4, 4)}),
    )
    adapt(model, targets="dense", rank=2)
    assert model[0]["dense"].conversion is model[2]["dense"].conversion
    assert model[1]["dense"].conversion is not model[0]["dense"].conversion
    assert [tuple(f.shape) for f in model[1]["dense"].factors()] == [(2, 4), (8, 2)]


def test_a_target_of_two_parts_chooses_among_layers_of_one_name():
    model = encoder()
    model.head = nn.ModuleDict({"out": nn.Linear(16, 2)})
    adapt(model, targets=("attention.out", "fc1"), rank=2)
    expected = [f"layers.{l}.{name}" for l in range(3) for name in ("attention.out", "fc1")]
    assert [name for name, m in model.named_modules() if isinstance(m, CondLoRALinear)] == expected
    assert len(adapter_parameters(model)) == 2 * 2


def test_a_copy_of_the_model_shares_its_own_theta():
    model = trained(adapt(encoder()))
    twin = copy.deepcopy(model)
    trained(twin)
    assert twin.layers[0].attention.query.conversion is twin.layers[2].attention.query.conversion
    assert not torch.equal(twin(IDS), model(IDS))


@pytest.mark.parametrize("method", ["lora", "condlora"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_merge_keeps_the_output_and_unmerge_gives_every_weight_back(method, dtype, tolerance):
    model = trained(adapt(encoder().to(dtype), method, targets=("query", "value", "fc1")))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(IDS)
    merge(merge(model))  # merging what is merged changes nothing
    assert model.state_dict().keys() == before.keys()  # W0 + dW is no part of it
    assert torch.allclose(model(IDS), expected, atol=tolerance)
    # No adapter arithmetic is left: the factors may be anything.
    merged, kept = model(IDS), [p.clone() for p in adapter_parameters(model)]
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.fill_(float("nan"))
        assert torch.equal(model(IDS), merged)
        for p, value in zip(adapter_parameters(model), kept):
            p.copy_(value)
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_merging_rounds_once_also_in_bfloat16(method):
    """W0 + dW is summed wider and then rounded to the nearest bfloat16."""
    model = trained(adapt(encoder().to(torch.bfloat16), method))
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    expected = [
        layer.weight.double() + (layer.scale * factor_product(layer))
        for layer in adapted_layers(model).values()
    ]
    for layer, exact in zip(adapted_layers(merge(model)).values(), expected):
        # To the nearest: bfloat16 has 8 bits, so half a step below 2^e is 2^(e - 9).
        half_step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        assert ((layer.merged.double() - exact).abs() <= half_step + 1e-6).all()


def factor_product(layer):
    A, B = (factor.detach().double() for factor in layer.factors())
    return B @ A


@pytest.mark.parametrize("method", ["lora", "condlora"])
def test_a_merged_and_unloaded_model_is_a_plain_one_with_the_same_output(method):
    model = trained(adapt(encoder(), method, targets=("query", "fc1")))
    expected = model(IDS)
    merge_and_unload(model)
    plain = encoder()
    plain.load_state_dict(model.state_dict())  # strict: no adapter is left
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}
    assert torch.allclose(plain(IDS), expected, atol=1e-5)


def test_no_conversion_is_left_where_the_adapted_model_is_a_part_of_another():
    whole = nn.ModuleDict({"encoder": trained(adapt(encoder()))})
    merge_and_unload(whole)
    assert list(whole.state_dict()) == [f"encoder.{name}" for name in encoder().state_dict()]


@pytest.mark.parametrize("mode", [True, False])
def test_an_adapted_layer_is_in_the_mode_of_the_layer_it_replaces(mode):
    model = adapt(encoder().train(mode), "condlora")
    for change in (lambda model: model, merge_and_unload):
        layers = [layer.attention.query for layer in change(model).layers]
        assert {layer.training for layer in layers} == {mode}


@pytest.mark.parametrize("method", ["lora", "condlora"])
def test_a_sequential_model_stays_one(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    expected = model(x)
    adapt(model, method, ("0", "2"), rank=2)
    assert len(model) == 3 and torch.equal(model(x), expected)


def test_loading_into_a_merged_model_merges_what_was_loaded(tmp_path):
    model = trained(adapt(encoder(), "lora"))
    save_adapter(model, tmp_path / "adapter.pt")
    expected = model(IDS)
    other = merge(trained(adapt(encoder(), "lora")))
    with torch.no_grad():
        adapter_parameters(other)[0].zero_()
    load_adapter(merge(other), tmp_path / "adapter.pt")
    assert torch.allclose(other(IDS), expected, atol=1e-5)
    partly = trained(adapt(encoder(), "lora"))
    merge(partly.layers[1])
    load_adapter(partly, tmp_path / "adapter.pt")
    assert torch.allclose(partly(IDS), expected, atol=1e-5)
    merged = [layer.merged is not None for layer in adapted_layers(partly).values()]
    assert merged == [False, False, True, True, False, False]


def test_every_part_must_have_the_settings_of_the_file(tmp_path):
    save_adapter(adapt(encoder(), "lora", "query"), tmp_path / "adapter.pt")
    other = encoder()
    adapt(other.layers[0], "lora", "query")
    adapt(other.layers[1:], "lora", "query", alpha=16)
    with pytest.raises(ValueError, match="different settings"):
        load_adapter(other, tmp_path / "adapter.pt")


def test_a_layer_that_is_not_a_plain_linear_is_named_with_its_class_also_in_a_mixture():
    class Special(nn.Linear):
        pass

    class Conv1D(nn.Module):  # as in transformers' GPT-2
        def __init__(self):
            super().__init__()
            self.nx = self.nf = 4
            self.weight = nn.Parameter(torch.ones(4, 4))

    for other in (Special(4, 4), Conv1D()):
        model = nn.ModuleList(nn.ModuleDict({"query": x}) for x in (nn.Linear(4, 4), other))
        with pytest.raises(ValueError, match=f"1.query is a {type(other).__name__}"):
            adapt(model, "lora", "query", rank=2)
    with pytest.raises(ValueError, match="out_proj is a NonDynamicallyQuantizableLinear"):
        adapt(nn.MultiheadAttention(8, 2), "lora", "out_proj", rank=2)


def test_a_layer_under_two_names_is_adapted_under_both():
    shared = nn.Linear(4, 4)
    model = adapt(
        nn.ModuleDict(
            {"a": nn.ModuleDict({"query": shared}), "b": nn.ModuleDict({"query": shared})}
        ),
        "lora",
        "query",
        rank=2,
    )
    assert model["a"]["query"] is model["b"]["query"] and isinstance(
        model["a"]["query"], LoRALinear
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"targets": ("query", "q_proj")}, "'q_proj': the model has dense, fc1, fc2, key, out, "),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0}, "rank is 0.*from 1 to 16"),
        ({"rank": 17}, "rank is 17.*layers.0.attention.query.*from 1 to 16"),
        ({"method": "dora"}, "'dora': use lora, condlora, tied, random"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"method": "tied", "targets": "fc1"}, "layers.0.fc1 is not square: method tied"),
    ],
)
def test_a_wrong_argument_is_named_and_leaves_the_model_as_it_was(arguments, words):
    model = encoder()
    with pytest.raises(ValueError, match=words):
        adapt(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())
    assert not adapted_layers(model)


def test_adapting_twice_is_refused():
    with pytest.raises(ValueError, match="already adapted"):
        adapt(adapt(encoder(), "lora"), "condlora", targets="key")


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_a_fresh_model_the_same_output_head_included(tmp_path, method):
    model = trained(adapt(encoder(), method, ("query", "key"), np.int64(2), np.float64(3), seed=5))
    nn.init.normal_(model.head.requires_grad_(True).out_proj.weight)
    save_adapter(model, tmp_path / "adapter.pt")
    fresh = load_adapter(encoder(), tmp_path / "adapter.pt")
    assert torch.equal(fresh(IDS), model(IDS))
    assert all(p.requires_grad for p in fresh.head.parameters())
    # The order of the targets is not a setting; neither is the seed, unless matrices depend on it.
    seed = 5 if method == "random" else 0
    other = adapt(encoder(), method, ("key", "query"), rank=2, alpha=3, seed=seed)
    assert torch.equal(load_adapter(other, tmp_path / "adapter.pt")(IDS), model(IDS))
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)["weights"]
    trains = [*adapter_parameters(model), *model.head.parameters()]
    assert sum(w.numel() for w in saved.values()) == sum(p.numel() for p in trains)


def test_tied_layers_use_one_a_and_b_which_the_identity_in_w0s_place_gives():
    model = trained(adapt(encoder(), "tied"))
    layers = [layer.attention.query for layer in model.layers]
    for A, B in (layer.factors() for layer in layers):
        assert A is layers[0].conversion.theta_A
        assert B.data_ptr() == layers[0].conversion.theta_B.data_ptr()
    A, B = layers[0].factors()
    I = torch.eye(16)
    by_identity = convert(I, layers[0].conversion.theta_A, layers[0].conversion.theta_B)
    assert torch.equal(A, by_identity[0]) and torch.equal(B, by_identity[1])


def test_randoms_matrices_are_the_same_under_any_default_dtype():
    W0s = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        model = encoder()
        torch.set_default_dtype(default)
        try:
            layers = adapted_layers(adapt(model, "random")).values()
        finally:
            torch.set_default_dtype(torch.float32)
        W0s.append(torch.stack([layer.M for layer in layers]))
    assert W0s[0].dtype == torch.float32 and all(torch.equal(x, W0s[0]) for x in W0s)


def test_randoms_matrices_differ_by_layer_and_seed_and_have_w0s_mean_square():
    layers, again, other = (list(adapted_layers(adapt(encoder(d=64), "random", seed=s)).values())
                            for s in (1, 1, 2))
    for number, layer in enumerate(layers):
        assert torch.equal(layer.M, again[number].M) and not torch.equal(layer.M, other[number].M)
        assert not any(torch.equal(layer.M, later.M) for later in layers[number + 1:])
        mean_square = layer.weight.square().mean().item()
        assert layer.M.square().mean().item() == pytest.approx(mean_square, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_makes_another_model_compute_the_same(method):
    model, other = trained(adapt(encoder(), method, seed=1)), adapt(encoder(seed=9), method, seed=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_an_adapter_that_does_not_fit_is_refused_and_the_reason_named(tmp_path):
    file = tmp_path / "adapter.pt"
    model = trained(adapt(encoder(), "lora", rank=2, alpha=3))
    save_adapter(model, file)
    for change, words in (
        ({"method": "condlora"}, "method is lora, in the model condlora"),
        ({"alpha": 6}, "alpha is 3.0, in the model 6.0"),
        ({"rank": 4}, "rank is 2, in the model 4"),
        ({"targets": ("query",)}, "layers is .*, in the model "),
    ):
        settings = {"method": "lora", "rank": 2, "alpha": 3} | change
        with pytest.raises(ValueError, match=words):
            load_adapter(adapt(encoder(), **settings), file)
    for layers in (2, 4):  # CondLoRA's, too: its tensors alone would fit any number of layers
        save_adapter(adapt(encoder(layers), "condlora", rank=2), tmp_path / "condlora.pt")
        with pytest.raises(ValueError, match="layers is .*, in the model"):
            load_adapter(encoder(), tmp_path / "condlora.pt")
    with pytest.raises(ValueError, match=r"is \(2, 16\), in the model \(2, 32\)"):
        load_adapter(encoder(d=32), file)
    with pytest.raises(ValueError, match="adapter.pt.*no nn.Linear is named 'query'"):
        load_adapter(nn.ModuleDict({"key": nn.Linear(4, 4)}), file)
    with_head = adapt(encoder(), "lora", rank=2, alpha=3)
    with_head.head.requires_grad_(True)
    with pytest.raises(ValueError, match="head.dense.bias is missing, in the model"):
        load_adapter(with_head, file)
    torch.save(encoder().state_dict(), file)
    with pytest.raises(ValueError, match="reading it failed .KeyError"):
        load_adapter(encoder(), file)
    with pytest.raises(ValueError, match="holds no adapter.*IsADirectoryError"):
        load_adapter(encoder(), tmp_path)
    file.write_text("x")
    with pytest.raises(ValueError, match="adapter.pt holds no adapter"):
        load_adapter(encoder(), file)
    with pytest.raises(ValueError, match="the model has no adapter"):
        save_adapter(encoder(), file)


def test_what_a_file_could_not_give_back_is_not_saved(tmp_path):
    model = encoder()
    adapt(model.layers[0], "lora", alpha=4)
    adapt(model.layers[1], "lora", alpha=8)
    with pytest.raises(ValueError, match="adapted with different settings"):
        save_adapter(model, tmp_path / "adapter.pt")
    model = adapt(encoder())
    del model.layers[0]
    for use in (adapter_parameters, lambda model: save_adapter(model, tmp_path / "adapter.pt")):
        with pytest.raises(ValueError, match="holds layers.0.attention.query.s thetas was rem"):
            use(model)


def test_hooks_and_sizes_survive_adapting_and_unloading():
    model, seen = encoder(), []
    query = model.layers[1].attention.query
    handle = query.register_forward_hook(lambda module, x, y: seen.append(type(module).__name__))
    for change in (lambda model: trained(adapt(model, "lora")), merge_and_unload):
        change(model)(IDS)
        layer = model.layers[1].attention.query
        assert (layer.in_features, layer.out_features) == (16, 16)
    assert seen == ["LoRALinear", "Linear"]
    handle.remove()
    model(IDS)
    assert len(seen) == 2


def test_autocast_does_not_narrow_an_update():
    model = trained(adapt(encoder()))
    layer = model.layers[0].attention.query
    expected = layer.delta()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta(), expected)
        merge(model)
    assert torch.equal(layer.merged, layer.weight + expected)


@pytest.mark.parametrize("method", ["lora", "condlora"])
def test_a_weight_that_another_module_holds_too_stays_that_modules(method):
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(20, 8), "lm_head": nn.Linear(8, 20, bias=False)}
    )
    model["lm_head"].weight = model["embedding"].weight
    W0 = model["embedding"].weight.clone()
    trained(adapt(model, method, "lm_head", rank=2))
    x = torch.randn(3, 8)
    expected = model["lm_head"](x)
    merge_and_unload(model)
    assert torch.allclose(model["lm_head"](x), expected, atol=1e-5)
    assert torch.equal(model["embedding"].weight, W0)


def test_a_weight_that_is_not_the_layers_own_to_read_is_refused():
    hooked = nn.ModuleDict({"query": nn.utils.spectral_norm(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match="query has a hook"):
        adapt(hooked, targets="query", rank=2)
    wrapped = nn.ModuleDict({"query": nn.Linear(4, 4)})
    wrapped["query"].forward = lambda x: x  # as accelerate hooks a layer
    with pytest.raises(ValueError, match="query has a hook"):
        adapt(wrapped, targets="query", rank=2)
    whole = nn.ModuleDict({"query": nn.Linear(4, 4)}).requires_grad_(False)
    whole["query"].weight.data = whole["query"].weight.data.to(torch.int8)
    with pytest.raises(ValueError, match="weight of query is torch.int8, not floating point"):
        adapt(whole, targets="query", rank=2)
    fast = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(
        ValueError, match="layers.0.linear1: nn.TransformerEncoderLayer's fast"
    ):
        adapt(fast, targets="linear1", rank=2)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_whatever_the_models_and_the_default_dtype(default):
    for method in ("lora", "condlora"):
        model = encoder().bfloat16()
        torch.set_default_dtype(default)
        try:
            adapt(model, method)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
        assert model(IDS).dtype == torch.bfloat16
