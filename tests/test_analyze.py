"""The analysis against its formulas, numpy's reckoning, and the command line."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, write_encoder

import analyze
import train
from data import picture
from analyze import conversion_matrices, subspace_similarity
from data.pretrained import read_safetensors, write_safetensors
from test_data import write_task


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_phi_is_one_for_the_same_subspace_whatever_the_basis_and_zero_for_orthogonal_ones():
    X = gaussian(20, 4)
    assert subspace_similarity(X, X @ gaussian(4, 4, seed=1), 4, 4) == pytest.approx(1)
    Q = torch.linalg.qr(gaussian(20, 8))[0]
    assert subspace_similarity(
        Q[:, :4] @ gaussian(4, 4), Q[:, 4:] @ gaussian(4, 4, seed=1), 4, 4
    ) == pytest.approx(0, abs=1e-12)
    assert subspace_similarity(Q[:, :4] @ gaussian(4, 4), Q, 4, 8) == pytest.approx(
        1
    )  # one spans the other


def test_phi_of_random_subspaces_is_about_j_over_d():
    d, i, j = 64, 4, 8
    values = [
        subspace_similarity(gaussian(d, i, seed=s), gaussian(d, j, seed=1000 + s), i, j)
        for s in range(200)
    ]
    assert np.mean(values) == pytest.approx(j / d, rel=0.05)


def test_phi_is_the_lora_papers_formula_on_either_side():
    X, Y = gaussian(9, 5).numpy(), gaussian(9, 5, seed=1).numpy()
    (U, _, Vh), (P, _, Qh) = np.linalg.svd(X), np.linalg.svd(Y)
    assert subspace_similarity(X, Y, 2, 3) == pytest.approx(
        np.linalg.norm(U[:, :2].T @ P[:, :3]) ** 2 / 2
    )
    assert subspace_similarity(X, Y, 2, 3, side="right") == pytest.approx(
        np.linalg.norm(Vh[:2] @ Qh[:3].T) ** 2 / 2
    )
    for i, j, words in ((0, 1, "i is 0"), (1, 6, "j is 6: a matrix of shape .9, 5. has 5")):
        with pytest.raises(ValueError, match=words):
            subspace_similarity(X, Y, i, j)
    with pytest.raises(ValueError, match="lengths 9 and 8"):
        subspace_similarity(X, Y[:8], 1, 1)


def test_conversion_matrices_turn_w0_into_the_factors():
    W0, A, B = gaussian(12, 12), gaussian(3, 12, seed=1), gaussian(12, 3, seed=2)
    C = conversion_matrices(W0.float(), A, B)
    W0 = W0.float().double()
    assert (
        torch.allclose(W0 @ C["A"], A.T)
        and torch.allclose(W0 @ C["B"], B)
        and torch.allclose(W0 @ C["BA"], B @ A)
    )
    assert {c.dtype for c in C.values()} == {torch.float64}


def test_condloras_conversion_matrix_is_theta():
    W0, theta_A, theta_B = gaussian(12, 12), gaussian(3, 12, seed=1), gaussian(3, 12, seed=2)
    C = conversion_matrices(W0, (W0 @ theta_A.T).T, W0 @ theta_B.T)
    assert torch.allclose(C["A"], theta_A.T) and torch.allclose(C["B"], theta_B.T)


@pytest.mark.parametrize("shape, rank_of_W0", [((12, 12), 9), ((16, 12), 12), ((12, 16), 12)])
def test_singular_and_rectangular_weights_go_through_numpys_least_squares(shape, rank_of_W0):
    d_out, d_in = shape
    W0 = gaussian(d_out, rank_of_W0) @ gaussian(rank_of_W0, d_in, seed=1)
    A, B = gaussian(3, d_in, seed=2), gaussian(d_out, 3, seed=3)
    C = conversion_matrices(W0, A, B)
    C_B = np.linalg.lstsq(W0.numpy(), B.numpy(), rcond=None)[0]
    assert np.allclose(
        C["A"], np.linalg.lstsq((W0 if d_out == d_in else W0.T).numpy(), A.T.numpy(), rcond=None)[0]
    )
    assert np.allclose(C["B"], C_B) and np.allclose(C["BA"], C_B @ A.numpy())


# The command line --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, bert_folder):
    """checkpoint(method, ...) trains a little one and returns its file."""
    monkeypatch.chdir(tmp_path)
    write_task(
        tmp_path / "glue",
        "sst2",
        [f"the cat {('not ' * (i % 3))}sleeps\t{i % 2}" for i in range(30)],
    )

    def make(method, *more, out=None):
        out = out or f"{method}.pt"
        options = f"--task sst2 --init_from {bert_folder} --data_dir {tmp_path / 'glue'} --rank 3"
        options += f" --device cpu --epochs 1 --lr 0.02 --method {method} --out {out}"
        train.main([*options.split(), *more])
        return tmp_path / out

    return make


def run(capsys, *arguments):
    capsys.readouterr()
    analyze.main([str(a) for a in arguments])
    return capsys.readouterr().out


def fails(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(a) for a in arguments])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([line for line in error if line]) == 1
    return error[-1]


@pytest.mark.parametrize("i, j, side", [(3, 3, "left"), (1, 2, "left"), (2, 2, "right")])
def test_the_tables_figures_are_a_ten_line_numpy_reckoning(
    checkpoint, capsys, bert_folder, i, j, side
):
    file = checkpoint("lora")
    run(capsys, file, "--i", i, "--j", j, "--side", side, "--json", "out.json")
    weights = {
        name: w.double().numpy()
        for name, w in torch.load(file, weights_only=True)["weights"].items()
    }
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    result = json.load(open("out.json"))
    for target in ("query", "value"):
        assert ("BA" in result["similarity"][target]) == (
            (i, j, side) != (3, 3, "left")
        )  # else it is B's
        C = {"A": [], "B": [], "BA": []}
        raw = {"A": [], "B": [], "BA": []}
        for layer in range(2):
            W0 = (
                encoder[f"bert.encoder.layer.{layer}.attention.self.{target}.weight"]
                .double()
                .numpy()
            )
            A, B = (weights[f"layers.{layer}.attention.{target}.{x}"] for x in "AB")
            for name, X in (("A", A.T), ("B", B), ("BA", B @ A)):
                C[name].append(np.linalg.solve(W0, X))
                raw[name].append(X)
            assert result["condition"][target][layer] == pytest.approx(np.linalg.cond(W0))
        for name in result["similarity"][target]:
            for kind, matrices in (("trained", C), ("raw", raw)):
                U, V = [np.linalg.svd(X)[0 if side == "left" else 2] for X in matrices[name]]
                U, V = (U, V) if side == "left" else (U.T, V.T)
                pairs = [
                    np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j),
                    np.linalg.norm(V[:, :i].T @ U[:, :j]) ** 2 / min(i, j),
                ]
                assert result["similarity"][target][name][kind] == pytest.approx(
                    np.mean(pairs), abs=1e-8
                )


def phi_by_hand(X, Y):
    U, V = np.linalg.svd(X)[0][:, :3], np.linalg.svd(Y)[0][:, :3]
    return np.linalg.norm(U.T @ V) ** 2 / 3


def controls_by_hand(bert_folder, target, make, draws=400):
    """Mean and deviation of phi between the two layers, where make(W0s, rng) gives both pairs."""
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    W0s = [encoder[f"bert.encoder.layer.{l}.attention.self.{target}.weight"].double().numpy()
           for l in range(2)]
    rng, values = np.random.default_rng(0), {"A": [], "B": []}
    for _ in range(draws):
        one, two = make(W0s, rng)
        for name, X, Y in zip("AB", one, two):
            values[name].append(phi_by_hand(X, Y))
    return {name: (np.mean(x), np.std(x, ddof=1)) for name, x in values.items()}


def agree(control, expected, draws=100):
    """Two samples of one distribution: means within four standard errors, deviations by a third."""
    (mean, deviation), (expected_mean, expected_deviation) = control, expected
    return (abs(mean - expected_mean) < 4 * expected_deviation * (1 / draws + 1 / 400) ** 0.5
            and abs(deviation / expected_deviation - 1) < 1 / 3)


def uniform(rng, *shape):
    return rng.uniform(-1, 1, shape) / shape[-1] ** 0.5


def test_loras_control_is_untrained_factors_through_the_same_w0(checkpoint, capsys, bert_folder):
    run(capsys, checkpoint("lora"), "--json", "out.json")
    make = lambda W0s, rng: [(np.linalg.solve(W0, uniform(rng, 3, 8).T),
                              np.linalg.solve(W0, rng.normal(size=(8, 3)))) for W0 in W0s]
    for target in ("query", "value"):
        row = json.load(open("out.json"))["similarity"][target]
        for name, expected in controls_by_hand(bert_folder, target, make).items():
            assert agree(row[name]["control"], expected)
            for z, value, baseline in (("z", "trained", "control"), ("raw_z", "raw", "raw_random")):
                mean, deviation = row[name][baseline]
                assert row[name][z] == pytest.approx((row[name][value] - mean) / deviation)
            for baseline in ("random", "raw_random"):  # of dimension 3 in 8
                assert row[name][baseline][0] == pytest.approx(3 / 8, abs=0.05)


def test_condloras_factors_are_compared_with_untrained_thetas_through_the_same_w0(
    checkpoint, capsys, bert_folder
):
    file = checkpoint("condlora")
    run(capsys, file, "--json", "out.json")

    def make(W0s, rng):
        theta_A, theta_B = uniform(rng, 3, 8), rng.normal(size=(3, 8))
        return [(W0 @ theta_A.T, W0 @ theta_B.T) for W0 in W0s]

    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    trained = torch.load(file, weights_only=True)["weights"]
    for target in ("query", "value"):
        row = json.load(open("out.json"))["similarity"][target]
        for name, expected in controls_by_hand(bert_folder, target, make).items():
            assert agree(row[name]["control"], expected)
            theta = trained[f"layers.0.attention.{target}.conversion.theta_{name}"].double()
            factors = [
                encoder[f"bert.encoder.layer.{l}.attention.self.{target}.weight"].double() @ theta.T
                for l in range(2)
            ]
            assert row[name]["trained"] == pytest.approx(subspace_similarity(*factors, 3, 3))


def test_untrained_factors_are_kaiming_uniform_and_gaussian():
    shapes = {"A": torch.empty(2, 50, 400), "B": torch.empty(2, 400, 50)}
    target = analyze.Target([], None, *shapes.values(), 1.0, (), None, None, None)
    target = target.untrained(torch.Generator().manual_seed(0))
    A, B = target.A, target.B
    assert (
        0.99 / 20 < A.abs().max() <= 1 / 20
    )  # uniform within 1 / sqrt(fan_in), so its deviation is
    assert A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert B.std().item() == pytest.approx(1, rel=0.02)
    assert (B.abs() > 2).double().mean().item() == pytest.approx(0.0455, rel=0.1)  # two sigmas


def test_amplification_is_the_lora_papers(checkpoint, capsys, bert_folder):
    file = checkpoint("lora", "--alpha", "6")
    run(capsys, file, "--json", "out.json")
    weights = torch.load(file, weights_only=True)["weights"]
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    W0 = encoder["bert.encoder.layer.1.attention.self.value.weight"].double().numpy()
    A, B = (weights[f"layers.1.attention.value.{x}"].double().numpy() for x in "AB")
    delta = 6 / 3 * B @ A
    U, S, Vh = np.linalg.svd(delta)
    row = json.load(open("out.json"))["amplification"]["value"]
    kept = np.linalg.norm(U[:, :3].T @ W0 @ Vh[:3].T)
    assert row["own"][1] == pytest.approx(np.linalg.norm(delta) / kept)
    # Of W0's 8 x 8 directions random ones keep 3 x 3 on average.
    random = 3 / 8 * np.linalg.norm(W0)
    assert row["random"][1] == pytest.approx(np.linalg.norm(delta) / random, rel=0.1)


@pytest.mark.parametrize("method", ["lora", "condlora"])
def test_the_picture_has_trained_pairs_above_the_diagonal_and_the_control_below(
    checkpoint, capsys, tmp_path, method
):
    out = run(capsys, checkpoint(method), "--json", "out.json")
    assert f"{tmp_path / method}.svg" in out
    tree = ElementTree.parse(f"{method}.svg")
    tables = json.load(open("out.json"))["similarity"]
    titles = {rect[0].text: rect.get("fill") for rect in
              tree.iter("{http://www.w3.org/2000/svg}rect") if len(rect) and rect[0].text}
    assert len(titles) == 2 * 2 * 2  # targets, A and B, trained and untrained of the one pair
    for target, rows in tables.items():
        low = min(row["random"][0] for row in rows.values())
        high = max(row[kind][0][1] for row in rows.values() for kind in ("map", "control_map"))
        for name, row in rows.items():
            for what, key in (("trained", "map"), ("untrained", "control_map")):
                value = row[key][0][1]
                title = f"{target} {name}, layers 0 and 1, {what}: {value:.4f}"
                assert titles[title] == picture.colour(value, low, max(high, low + 1e-6))
        words = "".join(tree.getroot().itertext())
        assert f"{low:.3f} (random)" in words
    run(capsys, f"{method}.pt", "--svg", "other.svg")
    assert (tmp_path / "other.svg").is_file()


def test_a_title_with_signs_of_xml_leaves_the_picture_whole():
    row = {"map": [[1.0, 0.2], [0.2, 1.0]], "control_map": [[1.0, 0.1], [0.1, 1.0]], "z": 0.0}
    table = {"query": {"A": row | {"random": (0.1, 0.0)}}}
    drawn = picture.maps("Nothing < 3 sd", "R&D <one>", table, ["0", "1"])
    assert "R&D <one>" in "".join(ElementTree.fromstring(drawn).itertext())


def test_colours_run_over_the_scale_and_stop_at_its_ends():
    scale = [(0, 0, 0), (100, 200, 50), (255, 255, 255)]
    assert [picture.colour(x, 2, 4, scale) for x in (1, 2, 2.5, 3, 4, 9)] == [
        "#000000", "#000000", "#326419", "#64c832", "#ffffff", "#ffffff"]


def test_a_condlora_checkpoint_has_one_conversion_matrix_in_every_layer(checkpoint, capsys):
    out = run(capsys, checkpoint("condlora"), "--json", "out.json")
    assert all(deviation < 1e-9 for deviation in json.load(open("out.json"))["theta"].values())
    assert "query: in every layer C_A and C_B are theta^T, to" in out


def test_two_checkpoints_compare_in_either_order(checkpoint, capsys):
    lora, condlora = checkpoint("lora"), checkpoint("condlora")
    found = []
    for one, two in ((lora, condlora), (condlora, lora), (lora, lora)):
        run(capsys, one, "--compare", two, "--json", "out.json")
        found.append(json.load(open("out.json"))["compare"]["query"])
    assert (
        found[0]["A"]["phi"] == pytest.approx(found[1]["A"]["phi"])
        and 0 < found[0]["C_B"]["phi"] < 1
    )
    assert {which: row["phi"] for which, row in found[2].items()} == pytest.approx(
        dict.fromkeys(("A", "B", "C_A", "C_B"), 1)
    )
    # The control draws apart for the two sides: untrained ones differ, even through one W0.
    assert found[2]["C_A"]["control"][0] < 0.99 and found[2]["C_B"]["control"][0] < 0.99
    weights = torch.load(lora, weights_only=True)["weights"]
    thetas = torch.load(condlora, weights_only=True)["weights"]
    theta = thetas["layers.0.attention.query.conversion.theta_A"]
    model = torch.load(lora, weights_only=True)["encoder"]["path"]
    encoder = torch.load(f"{model}/pytorch_model.bin", weights_only=True)
    by_hand = [
        subspace_similarity(
            torch.linalg.solve(
                encoder[f"bert.encoder.layer.{l}.attention.self.query.weight"].double(),
                weights[f"layers.{l}.attention.query.A"].T.double(),
            ),
            theta.T,
            3,
            3,
        )
        for l in range(2)
    ]
    assert found[0]["C_A"]["phi"] == pytest.approx(np.mean(by_hand))
    W0 = [encoder[f"bert.encoder.layer.{l}.attention.self.query.weight"].double() for l in range(2)]
    theta_B = thetas["layers.0.attention.query.conversion.theta_B"]
    by_hand = [
        subspace_similarity(
            weights[f"layers.{l}.attention.query.B"].double(), W0[l] @ theta_B.T.double(), 3, 3
        )
        for l in range(2)
    ]
    assert found[0]["B"]["phi"] == pytest.approx(np.mean(by_hand))


def test_of_a_rectangular_target_of_full_rank_all_directions_say_nothing(checkpoint, capsys):
    for target in ("fc1", "fc2"):  # 8 -> 12 and 12 -> 8
        lora = checkpoint("lora", "--targets", target, "--rank", "8")
        assert "phi is 1 by definition" in fails(capsys, lora)
        out = run(capsys, lora, "--i", "7", "--j", "7")
        assert f"{target} A" in out and f"{target} B" in out


def test_rectangular_targets_are_marked_as_least_squares(checkpoint, capsys):
    out = run(capsys, checkpoint("lora", "--targets", "fc1", "query"), "--json", "out.json")
    assert json.load(open("out.json"))["least_squares"] == {"query": [], "fc1": ["0", "1"]}
    assert "rectangular or singular, so by least squares: fc1" in out
    out = run(capsys, checkpoint("condlora", "--targets", "fc1", "fc2"), "--json", "out.json")
    assert set(json.load(open("out.json"))["theta"]) == {"fc1", "fc2"}
    assert "theta^T" not in out and "unrelated ones as in the column 'random'" in out
    # fc2 is 8x12, so that random C_A (8, 3) is as like as 3 of 8 dimensions, A (3, 12) as 3 of 12.
    run(capsys, "condlora.pt", "--compare", "condlora.pt", "--json", "out.json")
    compared = json.load(open("out.json"))["compare"]["fc2"]
    random = {name: compared[name]["random"][0] for name in ("A", "C_A", "B", "C_B")}
    assert random == pytest.approx({"A": 3 / 12, "C_A": 3 / 8, "B": 3 / 8, "C_B": 3 / 12}, abs=0.07)


def test_the_verdict_names_what_is_beyond_its_control_and_what_is_the_same_by_construction():
    row = lambda **changes: {"trained": 0.1, "z": 0.0, "raw": 0.1, "raw_z": 0.0} | changes
    say = lambda **rows: " ".join(analyze.verdict({"value": rows}, is_condlora=False))
    assert "No row exceeds its control by 3 sd" in say(A=row(z=2.9))
    assert "exceed random by more than 3 sd: nowhere" in say(A=row(z=2.9))
    text = say(A=row(z=3.1), B=row(z=-4.0, raw_z=20.0))
    assert "Beyond the control by more than 3 sd: value A." in text
    assert "exceed random by more than 3 sd: value B." in text
    assert "conversion matrices, as in CondLoRA by con" in say(A=row(trained=1.0, z=165.0))
    assert "Beyond the control" not in say(A=row(trained=1.0, z=165.0))
    assert "by construction" not in say(A=row(trained=0.995, z=1.2))  # as in a small space


def test_an_exported_condlora_is_known_for_what_it_is(checkpoint, capsys, tmp_path, bert_folder):
    train.main(["--eval_only", str(checkpoint("condlora")), "--export", str(tmp_path / "peft")])
    out = run(capsys, tmp_path / "peft", "--init_from", bert_folder)
    finding = "All layers have the same conversion matrices, as in CondLoRA by construction: query"
    assert finding in out and finding in (tmp_path / "peft.svg").read_text()


def test_a_mistake_gets_one_line_and_exit_status_2(checkpoint, capsys, tmp_path, bert_folder):
    lora = checkpoint("lora")
    (tmp_path / "not.pt").write_text("x")
    assert "not.pt: " in fails(capsys, "not.pt")
    assert "no checkpoint gone.pt" in fails(capsys, "gone.pt")
    assert "head.pt: --method head has no analysis: train lora or condlora" in (
        fails(capsys, checkpoint("head"))
    )
    for method in ("full", "tied", "random"):
        assert f"--method {method}" in fails(capsys, checkpoint(method))
    assert "--i 4 --j 3: both must be from 1 to the rank, 3" in fails(capsys, lora, "--i", 4)
    assert "--i 3 --j -1: both must be" in fails(capsys, lora, "--j", -1)
    assert "of different shapes: query of layers 0 1, 8x8 rank 3" in fails(
        capsys, lora, "--compare", checkpoint("lora", "--rank", "2", out="two.pt")
    )
    assert "--device: invalid choice: 'tpu'" in fails(capsys, lora, "--device", "tpu")
    assert "invalid choice: 'top'" in fails(capsys, lora, "--side", "top")
    assert "--json x cannot be written: it is also another output" in fails(
        capsys, lora, "--svg", "x", "--json", "./x"
    )
    (tmp_path / "hand.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    assert "another kind of file" in fails(capsys, lora, "--svg", "hand.svg")
    for option in ("--svg", "--json"):
        assert f"{option} lora.pt cannot be written" in fails(capsys, "lora.pt", option, "lora.pt")
    for name, change in (("zero", lambda w: w.zero_()), ("nan", lambda w: w.fill_(float("nan")))):
        damaged = torch.load(lora, weights_only=True)
        change(damaged["weights"]["layers.1.attention.value.B"])
        torch.save(damaged, f"{name}.pt")
    assert "the B of layers.1.attention.value is zero, as before t" in fails(capsys, "zero.pt")
    assert "attention.value is zero, as before training, or not f" in fails(capsys, "nan.pt")
    config = bert_folder / "config.json"
    assert "or part of a model's folder" in fails(capsys, lora, "--json", config)
    moved = bert_folder.rename(tmp_path / "moved")
    assert "does not hold" in (line := fails(capsys, lora)) and "--init_from" in line
    assert "mean over pairs" in run(capsys, lora, "--init_from", moved)
    state = torch.load(moved / "pytorch_model.bin", weights_only=True)
    state["bert.embeddings.LayerNorm.bias"] += 1
    write_encoder(moved, state=state)
    line = fails(capsys, lora, "--init_from", moved)
    assert "does not hold the encoder that it was trained with, unchanged" in line


def test_a_peft_adapter_is_analysed_as_the_checkpoint_that_it_was_exported_from(
    checkpoint, capsys, tmp_path, bert_folder
):
    lora = checkpoint("lora", "--targets", "query", "fc2")
    train.main(["--eval_only", str(lora), "--export", str(tmp_path / "peft")])
    tables = [
        json.load(open("out.json"))
        for arguments in ([lora], [tmp_path / "peft", "--init_from", bert_folder])
        if run(capsys, *arguments, "--json", "out.json")
    ]
    for name in ("condition", "similarity", "amplification"):
        assert tables[0][name] == tables[1][name]
    assert "say where the encoder of PEFT's" in fails(capsys, tmp_path / "peft")
    line = fails(capsys, bert_folder, "--init_from", bert_folder)
    assert "adapter_config.json: No such file" in line
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for changes, words in (
        ({"use_dora": True}, "use_dora is True: only plain LoRA"),
        ({"lora_bias": True}, "lora_bias is True: only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes W0"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes W0"),
        ({"some_future_variant": 1}, "some_future_variant is 1"),
    ):
        (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | changes))
        assert words in fails(capsys, tmp_path / "peft", "--init_from", bert_folder)
    for start in (True, False, "gaussian", "orthogonal", "eva"):
        changes = {"init_lora_weights": start}
        (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | changes))
        run(capsys, tmp_path / "peft", "--init_from", bert_folder)
    tensors = read_safetensors(tmp_path / "peft/adapter_model.safetensors")
    word = {"base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(2, 2)}
    write_safetensors(tmp_path / "peft/adapter_model.safetensors", tensors | word)
    assert "it has embeddings.word_embeddings.weight, unlike plain" in fails(
        capsys, tmp_path / "peft", "--init_from", bert_folder)


def test_a_reader_that_leaves_early_is_no_error(checkpoint, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    lora = checkpoint("lora")
    with os.fdopen(write_end, "w", buffering=1) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        analyze.main([str(lora)])


def test_a_terminal_that_knows_only_ascii_gets_the_tables(checkpoint):
    command = [sys.executable, ROOT / "analyze.py", checkpoint("lora")]
    done = subprocess.run(command, capture_output=True, env=os.environ | {
        "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0 and b"Subspace similarity ? between layers" in done.stdout


@pytest.mark.parametrize("side, i, expected", [("right", 3, ["BA"]), ("right", 1, ["A", "B", "BA"]),
                                               ("left", 3, ["A", "B"])])
def test_a_row_whose_phi_is_1_by_definition_is_left_out(checkpoint, capsys, side, i, expected):
    """Of a factor of rank 3, three right singular vectors are all there are."""
    run(capsys, checkpoint("lora"), "--side", side, "--i", i, "--j", i, "--json", "out.json")
    assert list(json.load(open("out.json"))["similarity"]["query"]) == expected


def test_layers_that_cannot_be_paired_are_refused(checkpoint, capsys):
    unequal = checkpoint("lora", "--targets", "query", "1.attention.value")
    assert "query of layers 0 1, 8x8 rank 3, value of layers 1, 8x8" in fails(capsys, unequal)
    apart = checkpoint("condlora", "--targets", "0.attention.query", "1.attention.query")
    assert "layers.1.attention.query have different thetas" in fails(capsys, apart)


@pytest.mark.parametrize("first", ["condlora", "lora"])
def test_a_comparisons_control_is_untrained_factors_of_each_sides_own_kind(
    checkpoint, capsys, bert_folder, first
):
    """One untrained theta for all layers of CondLoRA, A of its own for each layer of LoRA."""
    run(capsys, checkpoint(first), "--compare", checkpoint("condlora"), "--json", "out.json")
    row = json.load(open("out.json"))["compare"]["query"]["C_A"]
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    W0s = [encoder[f"bert.encoder.layer.{l}.attention.self.query.weight"].double().numpy()
           for l in range(2)]
    rng, values = np.random.default_rng(0), []
    for _ in range(400):
        if first == "lora":
            C = [np.linalg.solve(W0, uniform(rng, 3, 8).T) for W0 in W0s]
        else:
            C = [uniform(rng, 3, 8).T] * 2
        theta_A = uniform(rng, 3, 8).T
        values.append(np.mean([phi_by_hand(c, theta_A) for c in C]))
    assert agree(row["control"], (np.mean(values), np.std(values, ddof=1)))
