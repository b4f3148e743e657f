"""The analysis against its formulas, numpy's reckoning, and the command line."""

import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from conftest import write_encoder

import analyze
import train
from analyze import conversion_matrices, subspace_similarity
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
        assert ("BA" in result["likeness"][target]) == (
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
        for name in result["likeness"][target]:
            for kind, matrices in (("trained", C), ("raw", raw)):
                U, V = [np.linalg.svd(X)[0 if side == "left" else 2] for X in matrices[name]]
                U, V = (U, V) if side == "left" else (U.T, V.T)
                pairs = [
                    np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j),
                    np.linalg.norm(V[:, :i].T @ U[:, :j]) ** 2 / min(i, j),
                ]
                assert result["likeness"][target][name][kind] == pytest.approx(
                    np.mean(pairs), abs=1e-8
                )


def control_of(file, encoder, target, make):
    """Mean and deviation of phi between the two layers over ten draws, each C made by `make`."""
    values = {"A": [], "B": []}
    draw = torch.Generator().manual_seed(0)
    weights = [
        encoder[f"bert.encoder.layer.{l}.attention.self.{target}.weight"].double().numpy()
        for l in range(2)
    ]
    draws = make(
        weights,
        lambda A, B: [
            x.numpy() for x in analyze.untrained_factors(torch.empty(A), torch.empty(B), draw)
        ],
    )
    for one, two in draws:
        for name, X, Y in zip("AB", one, two):
            U, V = np.linalg.svd(X)[0][:, :3], np.linalg.svd(Y)[0][:, :3]
            values[name].append(np.linalg.norm(U.T @ V) ** 2 / 3)
    return {name: [np.mean(x), np.std(x, ddof=1)] for name, x in values.items()}


def test_loras_control_is_untrained_factors_through_the_same_w0(checkpoint, capsys, bert_folder):
    file = checkpoint("lora")
    run(capsys, file, "--json", "out.json")
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)

    def make(weights, factors):
        draws = [[factors((3, 8), (8, 3)) for _ in weights] for _ in range(10)]
        return [
            [
                (np.linalg.solve(W0, A.T), np.linalg.solve(W0, B))
                for W0, (A, B) in zip(weights, layers)
            ]
            for layers in draws
        ]

    for target in ("query", "value"):
        row = json.load(open("out.json"))["likeness"][target]
        for name, expected in control_of(file, encoder, target, make).items():
            assert row[name]["control"] == pytest.approx(expected)
            assert row[name]["distance"] == pytest.approx(
                (row[name]["trained"] - expected[0]) / expected[1]
            )
            assert row[name]["random"][0] == pytest.approx(3 / 8, abs=0.15)  # of dimension 3 in 8


def test_condloras_factors_are_compared_beside_untrained_thetas_through_the_same_w0(
    checkpoint, capsys, bert_folder
):
    file = checkpoint("condlora")
    run(capsys, file, "--json", "out.json")
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)

    def make(weights, factors):
        thetas = [factors((3, 8), (3, 8)) for _ in range(10)]
        return [[(W0 @ theta_A.T, W0 @ theta_B.T) for W0 in weights] for theta_A, theta_B in thetas]

    trained = torch.load(file, weights_only=True)["weights"]
    for target in ("query", "value"):
        row = json.load(open("out.json"))["likeness"][target]
        for name, expected in control_of(file, encoder, target, make).items():
            assert row[name]["control"] == pytest.approx(expected)
            theta = trained[f"layers.0.attention.{target}.conversion.theta_{name}"].double()
            factors = [
                encoder[f"bert.encoder.layer.{l}.attention.self.{target}.weight"].double() @ theta.T
                for l in range(2)
            ]
            assert row[name]["trained"] == pytest.approx(subspace_similarity(*factors, 3, 3))


def test_untrained_factors_are_kaiming_uniform_and_gaussian():
    A, B = analyze.untrained_factors(
        torch.empty(50, 400), torch.empty(400, 50), torch.Generator().manual_seed(0)
    )
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
    row = json.load(open("out.json"))["amplification"]["value"][1]
    assert row["delta"] == pytest.approx(np.linalg.norm(delta)) and row["W0"] == pytest.approx(
        np.linalg.norm(W0)
    )
    assert row["kept"] == pytest.approx(np.linalg.norm(U[:, :3].T @ W0 @ Vh[:3].T))
    assert row["factor"] == pytest.approx(row["delta"] / row["kept"])
    # Of W0's 8 x 8 directions random ones keep 3 x 3 on average.
    assert row["random"] == pytest.approx(3 / 8 * row["W0"], rel=0.25)
    assert row["random_factor"] == pytest.approx(row["delta"] / row["random"])


@pytest.mark.parametrize("method", ["lora", "condlora"])
def test_the_picture_has_a_cell_for_each_two_layers_coloured_from_random_to_the_largest(
    checkpoint, capsys, tmp_path, method
):
    out = run(capsys, checkpoint(method), "--json", "out.json")
    assert f"picture: {tmp_path / method}.svg" in out
    tree = ElementTree.parse(f"{method}.svg")
    cells = [e for e in tree.iter("{http://www.w3.org/2000/svg}rect") if len(e)]
    assert len(cells) == 2 * 2 * 3 * 2  # targets, A and B, three maps, pairs without the diagonal
    rows = [
        row for rows in json.load(open("out.json"))["likeness"].values() for row in rows.values()
    ]
    low, high = (
        min(row["random"][0] for row in rows),
        max(row[kind][0][1] for row in rows for kind in ("map", "control_map")),
    )
    high = max(high, low + 1e-6)
    shown = {
        float(re.search(r"[-\d.]+$", cell[0].text)[0]): cell.get("fill")
        for cell in cells[:2] + cells[2:4]
    }
    for value, fill in shown.items():
        assert (
            fill == analyze.colour(value, low, high, analyze.VIRIDIS)
            or abs(value - low) < 1e-3
            or abs(value - high) < 1e-3
        )
    words = "".join(tree.getroot().itertext())
    assert f"{low:.3f} (random)" in words and f"{high:.3f}" in words
    run(capsys, f"{method}.pt", "--svg", "other.svg")
    assert (tmp_path / "other.svg").is_file()


def test_a_title_with_signs_of_xml_leaves_the_picture_whole():
    row = {"map": [[1.0, 0.2], [0.2, 1.0]], "control_map": [[1.0, 0.1], [0.1, 1.0]]}
    drawn = analyze.svg({"query": {"A": row | {"random": (0.1, 0.0)}}}, "R&D <one>", ["0", "1"])
    assert "R&D <one>" in "".join(ElementTree.fromstring(drawn).itertext())


def test_colours_run_over_the_scale_and_stop_at_its_ends():
    scale = [(0, 0, 0), (100, 200, 50), (255, 255, 255)]
    assert [analyze.colour(x, 2, 4, scale) for x in (1, 2, 2.5, 3, 4, 9)] == [
        "#000000",
        "#000000",
        "#326419",
        "#64c832",
        "#ffffff",
        "#ffffff",
    ]


def test_a_condlora_checkpoint_has_one_conversion_matrix_in_every_layer(checkpoint, capsys):
    run(capsys, checkpoint("condlora"), "--json", "out.json")
    found = json.load(open("out.json"))["theta"]
    theta = torch.load("condlora.pt", weights_only=True)["weights"]
    theta = theta["layers.0.attention.value.conversion.theta_B"]
    assert all(row["largest_deviation"] < 1e-9 for rows in found.values() for row in rows.values())
    assert found["value"]["B"]["singular_values"] == pytest.approx(
        np.linalg.svd(theta.double().numpy())[1].tolist()
    )


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


def test_rectangular_targets_are_marked_as_least_squares(checkpoint, capsys):
    out = run(capsys, checkpoint("lora", "--targets", "fc1", "query"), "--json", "out.json")
    assert json.load(open("out.json"))["least_squares"] == {"query": [], "fc1": ["0", "1"]}
    assert "* rectangular or singular: least squares, which" in out
    out = run(capsys, checkpoint("condlora", "--targets", "fc1", "fc2"), "--json", "out.json")
    assert set(json.load(open("out.json"))["theta"]) == {"fc1", "fc2"}
    # fc2 is 8x12, so that random C_A (8, 3) is as like as 3 of 8 dimensions, A (3, 12) as 3 of 12.
    run(capsys, "condlora.pt", "--compare", "condlora.pt", "--json", "out.json")
    compared = json.load(open("out.json"))["compare"]["fc2"]
    random = {name: compared[name]["random"][0] for name in ("A", "C_A", "B", "C_B")}
    assert random == pytest.approx({"A": 3 / 12, "C_A": 3 / 8, "B": 3 / 8, "C_B": 3 / 12}, abs=0.07)


def test_the_verdict_names_what_is_beyond_the_control():
    assert "Nowhere more alike" in analyze.verdict({"value": {"A": {"distance": 2.9}}})
    text = analyze.verdict({"value": {"A": {"distance": 3.1}, "B": {"distance": -4}}})
    assert "value A" in text and "value B" not in text


def test_a_mistake_gets_one_line_and_exit_status_2(checkpoint, capsys, tmp_path, bert_folder):
    lora = checkpoint("lora")
    (tmp_path / "not.pt").write_text("x")
    assert "not.pt is not a checkpoint" in fails(capsys, "not.pt")
    assert "no checkpoint gone.pt" in fails(capsys, "gone.pt")
    assert "head.pt: --method head has no A and B: train one with --method lora or condlora" in (
        fails(capsys, checkpoint("head"))
    )
    assert "--method full" in fails(capsys, checkpoint("full"))
    assert "--i 4 --j 3: A and B of rank 3" in fails(capsys, lora, "--i", 4)
    assert "--i 3 --j -1: A and B" in fails(capsys, lora, "--j", -1)
    assert "of different shapes: query of layers 0 1, 8x8 rank 3" in fails(
        capsys, lora, "--compare", checkpoint("lora", "--rank", "2", out="two.pt")
    )
    assert "--device tpu is not there: use" in fails(capsys, lora, "--device", "tpu")
    assert "invalid choice: 'top'" in fails(capsys, lora, "--side", "top")
    assert "--svg and --json are one file" in fails(capsys, lora, "--svg", "x", "--json", "./x")
    for option in ("--svg", "--json"):
        assert f"{option} lora.pt cannot be written" in fails(capsys, "lora.pt", option, "lora.pt")
    for name, change in (("zero", lambda w: w.zero_()), ("nan", lambda w: w.fill_(float("nan")))):
        damaged = torch.load(lora, weights_only=True)
        change(damaged["weights"]["layers.1.attention.value.B"])
        torch.save(damaged, f"{name}.pt")
    for name in ("zero.pt", "nan.pt"):
        assert "the B of layers.1.attention.value is zero, as before t" in fails(capsys, name)
    moved = bert_folder.rename(tmp_path / "moved")
    assert "not at" in (line := fails(capsys, lora)) and "--init_from" in line
    assert "mean phi" in run(capsys, lora, "--init_from", moved)
    state = torch.load(moved / "pytorch_model.bin", weights_only=True)
    state["bert.embeddings.LayerNorm.bias"] += 1
    write_encoder(moved, state=state)
    assert "SHA-256 differs" in fails(capsys, lora, "--init_from", moved)


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
    for name in ("condition", "likeness", "amplification"):
        assert tables[0][name] == tables[1][name]
    assert "say where its encoder is" in fails(capsys, tmp_path / "peft")
    assert "no adapter_config.json in" in fails(capsys, bert_folder, "--init_from", bert_folder)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora is True, which is not plain LoRA" in fails(
        capsys, tmp_path / "peft", "--init_from", bert_folder
    )


def test_a_reader_that_leaves_early_is_no_error(checkpoint, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    lora = checkpoint("lora")
    with os.fdopen(write_end, "w", buffering=1) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        analyze.main([str(lora)])


def test_layers_that_cannot_be_paired_are_refused(checkpoint, capsys):
    unequal = checkpoint("lora", "--targets", "query", "1.attention.value")
    assert "query of layers 0 1, 8x8 rank 3, value of layers 1, 8x8" in fails(capsys, unequal)
    apart = checkpoint("condlora", "--targets", "0.attention.query", "1.attention.query")
    assert "layers named query have different thetas" in fails(capsys, apart)


@pytest.mark.parametrize("first", ["condlora", "lora"])
def test_a_comparisons_control_is_untrained_factors_of_each_sides_own_kind(
    checkpoint, capsys, bert_folder, first
):
    """One untrained theta for all layers of CondLoRA, A of its own for each layer of LoRA."""
    run(capsys, checkpoint(first), "--compare", checkpoint("condlora"), "--json", "out.json")
    row = json.load(open("out.json"))["compare"]["query"]["C_A"]
    encoder = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    W0 = [encoder[f"bert.encoder.layer.{l}.attention.self.query.weight"].double() for l in range(2)]
    draw, values = torch.Generator().manual_seed(2), []
    drawn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    drawn(10, 2, 2, 8, 3), drawn(10, 2, 2, 8, 3)  # the random baselines of A and B come before
    untrained = lambda *B: analyze.untrained_factors(torch.empty(3, 8), torch.empty(B), draw)[0].T
    for _ in range(10):
        if first == "lora":
            C = [torch.linalg.solve(W, untrained(8, 3)) for W in W0]
        else:
            C = [untrained(3, 8)] * 2
        theta_A = untrained(3, 8).T
        values.append(np.mean([subspace_similarity(c, theta_A.T, 3, 3) for c in C]))
    assert row["control"] == pytest.approx([np.mean(values), np.std(values, ddof=1)])
