"""The command line, end to end: what a run prints, writes, and says when it cannot."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, hf_state, write_encoder
from test_data import write_own, write_task

import train
from condlora import adapt, load_adapter
from data import checkpoint, glue, peft_format, pretrained, tokenizer, toy
from data.batches import shuffled
from data.pretrained import read_safetensors


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def little(tmp_path, monkeypatch, bert_folder):
    """Arguments of a run on 60 made-up SST-2 sentences ("warm" is good, "cold" is not) with a two-
    layer encoder."""
    monkeypatch.chdir(tmp_path)
    nouns = ["cat", "dog", "bird", "cats", "dogs", "birds"]
    rows = [
        f"{'the ' * (i % 4)}{nouns[i % 6]} {'not ' * (i % 5)}{('cold', 'warm')[i % 2]}\t{i % 2}"
        for i in range(60)
    ]
    write_task(tmp_path / "glue", "sst2", sorted(set(rows)), dev=rows[:21])
    options = f"--task sst2 --init_from {bert_folder} --data_dir {tmp_path / 'glue'} --device cpu"
    return f"{options} --epochs 2 --rank 2 --lr 0.01".split()


def run(arguments, capsys):
    """(the table's rows as a dict, what was printed before it) of one run."""
    train.main([str(a) for a in arguments])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("task "))
    return dict(line.split(maxsplit=1) for line in lines[start:]), lines[:start]


def fails(arguments, capsys):
    """The one line on standard error of a run that ends with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in arguments])
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    return error[0]


def test_a_fresh_clone_pretrains_trains_and_reports(tmp_path):
    for file in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py")):
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    options = "--method condlora --device cpu --pretrain_steps 25 --epochs 1 --batch_size 500"
    done = subprocess.run(
        [sys.executable, "train.py", *options.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""  # bars are for terminals
    pretraining, epoch, *table = done.stdout.splitlines()
    assert pretraining == "pretraining the toy encoder, once, on cpu: 25 steps"
    table = dict(line.split(maxsplit=1) for line in table)
    assert epoch.startswith("epoch  1  loss 0.")
    assert table["task"] == "toy" and table["saved"] == "to            ckpt.pt"
    assert table["trained"] == "parameters  2,048 (1.00% of the encoder's 205,760), and the head"
    assert (tmp_path / "ckpt.pt").is_file() and not list(tmp_path.rglob("*.part*"))
    assert (tmp_path / "data/models/toy-encoder-25/config.json").is_file()


@pytest.mark.parametrize(
    "method, trained",
    [("condlora", 2 * 2 * 16), ("tied", 2 * 2 * 16), ("random", 2 * 2 * 16),
     ("lora", 2 * 2 * 16 * 2), ("head", 0), ("full", 328 + 2 * 532)],
)
def test_each_method_trains_what_it_says_and_no_more(little, capsys, method, trained):
    table, _ = run([*little, "--method", method], capsys)
    ckpt = torch.load("ckpt.pt", weights_only=True)
    head = 8 * 8 + 8 + 2 * 8 + 2
    assert sum(w.numel() for w in ckpt["weights"].values()) == trained + head
    assert f"{trained:,} (" in table["trained"]
    if method == "condlora":
        thetas = [f"{target}.conversion.theta_{x}" for target in ("query", "value") for x in "AB"]
        heads = [f"{layer}.{x}" for layer in ("dense", "out_proj") for x in ("bias", "weight")]
        assert sorted(ckpt["weights"]) == [
            *(f"head.{name}" for name in heads),
            *(f"layers.0.attention.{name}" for name in thetas),
        ]


def test_eval_only_reports_the_very_figures_of_the_run(little, capsys):
    table, _ = run(little, capsys)
    results = torch.load("ckpt.pt", weights_only=True)["results"]
    again, before = run(["--eval_only", "ckpt.pt", "--device", "cpu"], capsys)
    assert before == [] and again.items() <= table.items() and "training" not in again
    assert table["test"] == f"accuracy {100 * results['test']['accuracy']:.1f}"


def test_the_reported_test_figure_is_that_of_the_best_epochs_weights(
    little, capsys, bert_folder, tmp_path
):
    """Reckoned without train.py: load, adapt by hand, count the right answers one sentence at a
    time."""
    run([*little, "--method", "lora", "--epochs", "3"], capsys)
    ckpt = torch.load("ckpt.pt", weights_only=True)
    model, tok = pretrained.load(bert_folder).eval(), tokenizer.load(bert_folder)
    state = model.state_dict()
    for name, weight in ckpt["weights"].items():
        if name.startswith("head"):
            state[name].copy_(weight)
        elif name.endswith(".A"):
            state[name[:-1] + "weight"] += 8 / 2 * ckpt["weights"][name[:-1] + "B"] @ weight
    rows = [
        line.rpartition("\t")
        for line in (tmp_path / "glue/SST-2/dev.tsv").read_text().split("\n")[1:]
    ]
    right = [
        model(torch.tensor([tok.encode(text)[0]])).argmax().item() == int(label)
        for text, _, label in rows
    ]
    assert ckpt["results"]["test"]["accuracy"] == np.mean(right)
    scores = [epoch["validation"]["accuracy"] for epoch in ckpt["history"]]
    assert ckpt["best_epoch"] == 1 + int(np.argmax(scores)) and ckpt["results"][
        "validation"
    ]["accuracy"] == max(scores)


def test_a_regression_task_reports_the_correlations_of_its_predictions(
    little, capsys, tmp_path, bert_folder
):
    texts = [("the cat", "the " + "cat " * (i % 3) + ("cold", "warm")[i % 2]) for i in range(40)]
    write_task(
        tmp_path / "glue",
        "stsb",
        [
            f"0\tg\tf\ty\t1\tn\tn\t{a}\t{b}\t{(i % 2) * (i % 3) * 2.5}"
            for i, (a, b) in enumerate(texts)
        ],
    )
    run([*little, "--task", "stsb", "--method", "full"], capsys)
    ckpt = torch.load("ckpt.pt", weights_only=True)
    model, tok = (
        pretrained.load(bert_folder, n_out=1).eval(),
        tokenizer.load(bert_folder),
    )
    model.load_state_dict(ckpt["weights"])
    encoded = [tok.encode(a, b) for a, b in texts]
    predictions = [
        model(torch.tensor([ids]), torch.tensor([types])).item() for ids, types in encoded
    ]
    pearson = np.corrcoef(predictions, [(i % 2) * (i % 3) * 2.5 for i in range(40)])[0, 1]
    assert ckpt["results"]["test"]["pearson"] == pytest.approx(pearson, abs=1e-4)
    assert ckpt["history"][1]["loss"] < ckpt["history"][0]["loss"]


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(little, capsys):
    losses = []
    for seed in (3, 3, 4):
        run([*little, "--seed", seed], capsys)
        losses.append(
            [epoch["loss"] for epoch in torch.load("ckpt.pt", weights_only=True)["history"]]
        )
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_stopped_run_keeps_its_last_epoch_and_resumes_to_the_same_result(
    little, capsys, monkeypatch, device
):
    # A setting of 0 is a setting, too: it must not become the default again.
    little += f"--device {device} --warmup 0 --grad_clip 0 --weight_decay 0".split()
    run([*little, "--epochs", "4", "--out", "whole.pt"], capsys)
    save, saves = checkpoint.save, []

    def stop_after_two(ckpt, file):
        save(ckpt, file)
        saves.append(file)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_two)
        assert "--resume" in fails([*little, "--epochs", "4", "--out", "part.pt"], capsys)
    assert len(torch.load("part.pt", weights_only=True)["history"]) == 2
    run(["--resume", "part.pt", "--device", device], capsys)
    whole, part = (torch.load(file, weights_only=True) for file in ("whole.pt", "part.pt"))
    assert [epoch["loss"] for epoch in whole["history"]] == [
        epoch["loss"] for epoch in part["history"]
    ]
    assert whole["results"] == part["results"]
    assert all(torch.equal(whole["last"][name], part["last"][name]) for name in whole["last"])


def test_each_epoch_and_each_process_has_dropout_of_its_own(little, capsys, monkeypatch):
    seeds, evaluate = set(), train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda *args: seeds.add(torch.initial_seed()) or evaluate(*args)
    )
    for process in (0, 1):
        monkeypatch.setattr(train, "PROCESS", process)
        run(little, capsys)
    assert len(seeds) == 2 * 2


def test_a_run_that_ends_at_a_constant_answer_says_so(little, capsys):
    """sst2's labels here are half and half: a constant answer's loss is log 2."""
    out = "\n".join(run([*little, "--method", "head", "--lr", "1e-9"], capsys)[1])
    assert "hardly better than a constant prediction's, 0.69" in out and "--lr" in out
    out = "\n".join(run([*little, "--method", "full", "--lr", "1e-2", "--epochs", 6], capsys)[1])
    assert "constant prediction" not in out


def test_a_model_whose_outputs_are_not_finite_is_not_scored(little, capsys):
    line = fails([*little, "--method", "full", "--lr", "1e30", "--warmup", "0", "--batch_size",
                  "100", "--epochs", "1"], capsys)
    assert "the model's outputs are not finite: train it with a lower --lr" in line


def test_a_run_is_not_resumed_with_other_rows(little, capsys, tmp_path):
    run(little, capsys)
    file = tmp_path / "glue/SST-2/train.tsv"
    good = file.read_text()
    file.write_text(good.replace("\t0\n", "\t1\n", 1))
    assert "ckpt.pt was trained on other data" in fails(["--resume", "ckpt.pt"], capsys)
    run(["--eval_only", "ckpt.pt"], capsys)  # it may be evaluated


def test_a_checkpoint_is_not_used_with_another_vocabulary_or_configuration(
    little, capsys, bert_folder
):
    run(little, capsys)
    changes = ("vocab.txt", "warm\ncold", "cold\nwarm"), ("config.json", "gelu", "relu")
    for name, old, new in changes:
        file = bert_folder / name
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        for option in ("--resume", "--eval_only"):
            assert "does not hold the encoder" in fails([option, "ckpt.pt"], capsys)
        file.write_text(before)
    (bert_folder / "notes.txt").write_text("is not read")
    run(["--eval_only", "ckpt.pt"], capsys)


def test_a_full_or_head_checkpoint_is_not_taken_for_an_adapter(little, capsys, bert_folder):
    for method in ("full", "head"):
        run([*little, "--method", method], capsys)
        with pytest.raises(ValueError, match=f"method is '{method}'"):
            load_adapter(pretrained.load(bert_folder), "ckpt.pt")


def test_patience_ends_a_run_that_gets_no_better(little, capsys):
    _, lines = run(
        [*little, "--method", "head", "--lr", "1e-9", "--epochs", "9", "--patience", "2"], capsys
    )
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1", "2", "3"]
    _, lines = run(["--resume", "ckpt.pt"], capsys)
    assert not [line for line in lines if line.startswith("epoch")]


def test_every_row_is_seen_once_an_epoch_beside_rows_of_its_length():
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    one, two = (shuffled(lengths, 16, [0, epoch]) for epoch in (1, 2))
    assert sorted(np.concatenate(one)) == list(range(1003)) and len(one) == 63
    assert [list(b) for b in one] != [list(b) for b in two]
    padding = sum((lengths[b].max() - lengths[b]).sum() for b in one) / lengths.sum()
    assert (
        padding
        < 0.1
        < sum((lengths[i : i + 16].max() - lengths[i : i + 16]).sum() for i in range(0, 1003, 16))
        / lengths.sum()
    )


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_zero():
    # a tenth of 20 steps is 2: up in halves, then down by 1/18 a step
    factors = [train.schedule(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[-1] == pytest.approx(1 / 18)
    assert train.schedule(0, 10, 0) == 1 and train.schedule(9, 10, 1) == pytest.approx(1)


def test_padding_and_batch_size_do_not_change_an_evaluation(little, capsys, bert_folder):
    run(little, capsys)
    figures = [run(["--eval_only", "ckpt.pt", "--device", "cpu"], capsys)[0]["test"]]
    ckpt = torch.load("ckpt.pt", weights_only=True)
    ckpt["settings"]["batch_size"] = 1
    torch.save(ckpt, "one.pt")
    assert run(["--eval_only", "one.pt", "--device", "cpu"], capsys)[0]["test"] == figures[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--task", "xnli"], "xnli is neither a folder nor toy, cola, sst2"),
        (["--method", "dora"], "invalid choice: 'dora'"),
        (["--rank", "9"], "rank is 9: for 0.attention.query"),
        (["--rank", "0"], "--rank is 0, which is not from 1 to"),
        (["--lr", "nan"], "--lr is nan, which is not from"),
        (["--warmup", "2"], "--warmup is 2.0, which is not from 0 to 1"),
        (["--grad_clip", "-1"], "--grad_clip is -1.0, which is not from"),
        (["--targets", "q_proj"], "no nn.Linear is named 'q_proj': the model has fc1, fc2, key, o"),
        (["--targets", "head.dense"], "no nn.Linear is named 'head.dense': the model"),
        (["--resume", "a.pt", "--eval_only", "a.pt"], "not allowed with argument"),
        (["--device", "tpu"], "--device tpu is not available: use "),
        (["--device", "cuda:99"], "--device cuda:99 is not available: use "),
        (["--device", "cpu:x"], "--device cpu:x is not available: use "),
        (["--init_from", "nowhere"], "no folder nowhere.*`python data/download.py NAME` fetches"),
        (["--data_dir", "nowhere"], "tsv not found. For GLUE run `python data/download.py SST"),
        (["--max_len", "2"], "max_len is 2"),
        (["--out", "nowhere/ckpt.pt"], "--out nowhere/ckpt.pt cannot be written"),
        (["--eval_only", "nowhere.pt"], "nowhere.pt: No such file"),
        (["--lr", "1e30"], "the loss is .* in epoch"),
        (["--alpha", "1e300"], "--alpha is 1e.300, which is not from"),
        (["--seed", "-1"], "--seed is -1, which is not from 0 to 4294967295"),
        (["--out", "/dev/full"], "--out /dev/full cannot be written: it is another kind of file"),
        (["--out", "a" * 252 + ".pt"], "cannot be written: File name too long"),
        (["--history", "nowhere/log"], "--history nowhere/log cannot be written"),
        (["--history", "ckpt.pt"], "--history ckpt.pt cannot be written: it is also another outp"),
        (["--out", "bert/config.json"], "config.json cannot be written: it is another kind"),
        (["--history", "notes.txt"], "--history notes.txt cannot be written: it is another kind"),
        (["--out", "notes.txt"], "--out notes.txt cannot be written: it is another k"),
        (["--history", "glue/SST-2/dev.tsv"], "--history .* cannot be written: it is another kind"),
        (["--out", "bert/pytorch_model.bin"], "model.bin cannot be written: it is another kind"),
        (["--method", "tied", "--targets", "fc1"], "0.fc1 is not square: method tied is for"),
        (["--device", "cpu:"], "--device cpu: is not available"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_status_2(
    little, capsys, bert_folder, arguments, words
):
    import re

    (bert_folder.parent / "notes.txt").write_text("notes")
    assert re.search(words, fails([*little, *arguments], capsys))


def test_a_folder_of_ones_own_trains_and_predicts_labels_by_name(
    little, capsys, monkeypatch, tmp_path, bert_folder
):
    rows = [
        f"the cat {'not ' * (i % 4)}{('warm', 'cold')[i % 2]}\t{('good', 'bad')[i % 2]}"
        for i in range(40)
    ]
    write_own(tmp_path / "mine", rows, rows[:9])
    table, _ = run([*little, "--task", "mine", "--epochs", "4", "--history", "log.jsonl"], capsys)
    assert table["task"] == str(tmp_path / "mine") and "macro_f1" in table["test"]
    log = [json.loads(line) for line in open("log.jsonl")]
    history = torch.load("ckpt.pt", weights_only=True)["history"]
    assert log == history and [line["epoch"] for line in log] == [1, 2, 3, 4]

    model, tok = pretrained.load(bert_folder), tokenizer.load(bert_folder)
    load_adapter(model, "ckpt.pt")  # with its head
    texts = [row.split("\t")[0] for row in rows[:6]]
    expected = []
    for text in texts:
        logits = model.eval()(torch.tensor([tok.encode(text)[0]]))[0]
        expected.append(f"{('bad', 'good')[logits.argmax()]}\t{logits.softmax(0).max():.4f}")
    (tmp_path / "texts").write_text("\n".join(texts) + "\n")
    train.main(["--eval_only", "ckpt.pt", "--predict", "texts", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == expected
    monkeypatch.setattr("sys.stdin", open("texts"))
    train.main(["--eval_only", "ckpt.pt", "--predict", "-", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == expected
    (tmp_path / "texts").write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode() + b"\r\n")
    train.main(["--eval_only", "ckpt.pt", "--predict", "texts", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines() == expected  # as Windows writes them
    (tmp_path / "texts").write_text("a\tb\n")
    assert "texts: line 1: texts found: 2, needed: 1" in fails(
        ["--eval_only", "ckpt.pt", "--predict", "texts"], capsys
    )
    error = fails(["--eval_only", "ckpt.pt", "--predict", "gone"], capsys)
    assert error == "train.py: error: gone: No such file or directory"
    assert "record training, and --eval_only does not" in fails(
        ["--eval_only", "ckpt.pt", "--history", "x"], capsys)
    assert "name it with --eval_only" in fails(["--predict", "texts"], capsys)
    both = ["--eval_only", "ckpt.pt", "--predict", "texts", "--export", "x"]
    assert "not allowed with argument --predict" in fails(both, capsys)
    moved = (tmp_path / "mine").rename(tmp_path / "moved")
    (tmp_path / "texts").write_text(texts[0])
    train.main(["--eval_only", "ckpt.pt", "--predict", "texts", "--device", "cpu"])  # needs no data
    assert capsys.readouterr().out.splitlines() == expected[:1]
    assert "mine is neither a folder nor" in fails(["--eval_only", "ckpt.pt"], capsys)
    assert (
        run(["--eval_only", "ckpt.pt", "--task", "moved", "--device", "cpu"], capsys)[0]["test"]
        == table["test"]
    )
    (moved / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    (moved / "dev.tsv").unlink()
    assert "was trained on other data" in fails(
        ["--eval_only", "ckpt.pt", "--task", "moved"], capsys
    )


def test_a_history_is_not_emptied_by_a_run_that_does_not_start(little, capsys, tmp_path):
    (tmp_path / "log").write_text('{"epoch": 1}')
    fails([*little, "--history", "log", "--init_from", "nowhere"], capsys)
    assert (tmp_path / "log").read_text() == '{"epoch": 1}'


def test_ones_own_classes_are_named_with_their_counts(little, capsys, tmp_path):
    rows = [f"the cat {'not ' * (i % 4)}\t{('good', 'bad ')[i % 3 > 0]}" for i in range(30)]
    write_own(tmp_path / "mine", rows)
    table, _ = run([*little, "--task", "mine"], capsys)
    assert table["classes"] == "bad (17), good (10)"
    _, lines = run([*little, "--task", write_own(
        tmp_path / "scores", [f"the cat\t{i / 7}" for i in range(40)])], capsys)
    assert any("--regression" in line for line in lines)


def test_sentence_pairs_train_on_an_encoder_with_one_token_type(little, capsys, tmp_path):
    state = hf_state("bert", 2)
    name = "bert.embeddings.token_type_embeddings.weight"
    folder = write_encoder(tmp_path / "one", state=state | {name: state[name][:1]},
                           type_vocab_size=1)
    write_own(tmp_path / "mine", [f"the cat\ta dog\t{i % 2}" for i in range(20)],
              header="text1\ttext2\tlabel")
    run([*little, "--task", tmp_path / "mine", "--init_from", folder], capsys)


def test_a_regression_of_ones_own_predicts_numbers(little, capsys, tmp_path):
    write_own(
        tmp_path / "mine",
        [f"the cat\t{'warm ' * (i % 3)}\t{i % 3 - 1}" for i in range(30)],
        header="text1\ttext2\tlabel",
    )
    table, _ = run([*little, "--task", "mine", "--regression"], capsys)
    assert "pearson" in table["validation"] and "test" not in table
    (tmp_path / "texts").write_text("the cat\twarm\n")
    train.main(["--eval_only", "ckpt.pt", "--predict", "texts", "--device", "cpu"])
    assert abs(float(capsys.readouterr().out)) < 3
    assert "--regression is for your own data" in fails([*little, "--regression"], capsys)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_an_exported_adapter_has_pefts_names_and_the_checkpoints_update(
    little, capsys, tmp_path, kind
):
    folder = write_encoder(tmp_path / "encoder", kind)
    if kind == "roberta":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    if kind == "mpnet":
        (folder / "vocab.txt").write_text(
            "\n".join(["<s>", "</s>", "<pad>", "<mask>", "[UNK]", *WORDS[5:]]) + "\n"
        )
    run([*little, "--init_from", folder, "--targets", "query", "out", "fc1"], capsys)
    train.main(["--eval_only", "ckpt.pt", "--export", "peft", "--device", "cpu"])
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    tensors = read_safetensors(tmp_path / "peft/adapter_model.safetensors")
    # The names that PEFT 0.18 gives on transformers' three classifiers, written down from it.
    attention = (
        ("attention.attn.q", "attention.attn.o")
        if kind == "mpnet"
        else ("attention.self.query", "attention.output.dense")
    )
    modules = [
        f"{kind}.encoder.layer.{l}.{name}"
        for l in range(2)
        for name in (*attention, "intermediate.dense")
    ]
    head = (
        ["bert.pooler.dense", "classifier"]
        if kind == "bert"
        else ["classifier.dense", "classifier.out_proj"]
    )
    again = ["--eval_only", "ckpt.pt", "--export", "peft", "--device", "cpu"]
    assert "--export peft exists already" in fails(again, capsys)
    assert settings["target_modules"] == modules
    assert (settings["r"], settings["lora_alpha"]) == (2, 8)
    assert sorted(tensors) == sorted(
        [f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"]
        + [f"base_model.model.{m}.{x}" for m in head for x in ("weight", "bias")]
    )
    model = load_adapter(pretrained.load(folder), "ckpt.pt")
    A, B = (tensors[f"base_model.model.{modules[-1]}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(8 / 2 * B @ A, model.layers[1].fc1.delta().detach())
    assert "no adapter to export" in fails(
        ["--eval_only", head_checkpoint(little, capsys), "--export", "x"], capsys
    )


def test_an_adapted_head_is_not_exported(bert_folder, tmp_path):
    """PEFT would save it whole and adapt it at once."""
    model = adapt(pretrained.load(bert_folder), "lora", ["query", "dense"], rank=2)
    with pytest.raises(ValueError, match="the head is adapted"):
        peft_format.export(model, bert_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def head_checkpoint(little, capsys):
    run([*little, "--method", "head", "--out", "head.pt"], capsys)
    return "head.pt"


def toy_options(**changes):
    return Namespace(**dict(method="condlora", targets=["query"], rank=8, alpha=8.0, seed=0,
                            pretrain_steps=1) | changes)


def test_what_a_killed_pretraining_left_is_written_over(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DATA", tmp_path)
    folder = tmp_path / "models/toy-encoder-1"
    folder.mkdir(parents=True)
    for name in ("vocab.txt", "model.safetensors"):
        (folder / name).write_text("half")
    assert train.toy_encoder(toy_options(), torch.device("cpu")) == folder
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt"}
    assert pretrained.load(folder).config.hidden_size == 64


def test_a_rank_that_cannot_be_is_said_before_the_toy_encoder_is_pretrained(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "DATA", tmp_path)
    monkeypatch.setattr(toy, "make_encoder", None)
    with pytest.raises(ValueError, match="rank is 100"):
        train.toy_encoder(toy_options(rank=100), torch.device("cpu"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["settings"].update(rank=50), "rank is 50"),
        (lambda c: c["settings"].update(lr="x"), "'settings' is missing or damaged"),
        (lambda c: c["settings"].update(batch_size=-2), "--batch_size is -2, which is not from"),
        (lambda c: c["weights"].popitem(), "is missing"),
        (lambda c: c["last"].update(x=torch.ones(1)), "x is (1,), in the model missing"),
        (
            lambda c: c["optimizer"][0].update(exp_avg=torch.ones(1)),
            "optimizer's state does not fit",
        ),
        (lambda c: c["optimizer"][0].update(step=torch.tensor(-5.0)), "optimizer's state does not"),
        (lambda c: c["optimizer"].clear(), "optimizer's state does not"),
        (
            lambda c: c["optimizer"][0].update(exp_avg=c["optimizer"][0]["exp_avg"].to_sparse()),
            "'optimizer' is missing or damaged",
        ),
        (lambda c: c.update(last={k: x.int() for k, x in c["last"].items()}), "int32, not float"),
        (lambda c: c["settings"].update(alpha=float("nan")), "--alpha is nan, which is not from"),
        (lambda c: c["history"][0].update(validation={}), "its history is damaged"),
        (lambda c: c["history"].clear(), "its history is damaged"),
        (lambda c: c.update(best_epoch=9), "its history is damaged"),
        (lambda c: c.update(layers={}), "'layers' is missing or damaged"),
        (lambda c: c.pop("encoder"), "'encoder' is missing or damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_checkpoint_that_is_wrong_inside_is_refused_in_one_line(little, capsys, change, words):
    run([*little, "--out", "good.pt"], capsys)
    ckpt = torch.load("good.pt", weights_only=True)
    change(ckpt)
    torch.save(ckpt, "bad.pt")
    line = fails(["--resume", "bad.pt", "--epochs", "2", "--device", "cpu"], capsys)
    assert words in line and "bad.pt" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(little, capsys):
    assert "--device cuda is not available: use cpu" in fails([*little, "--device", "cuda"], capsys)


def test_a_checkpoint_that_does_not_fit_is_said(little, capsys, tmp_path, bert_folder):
    run(little, capsys)
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert "--rank 4 contradicts ckpt.pt, trained with 2" in fails(
        ["--eval_only", "ckpt.pt", "--rank", "4"], capsys
    )
    resume = ["--resume", "ckpt.pt", "--dtype", "bfloat16"]
    assert "--dtype bfloat16 contradicts ckpt.pt, trained with float32" in fails(resume, capsys)
    (tmp_path / "bad.pt").write_bytes(before[:1000])
    assert "bad.pt: " in fails(["--eval_only", "bad.pt"], capsys)
    (tmp_path / "bad.pt").write_bytes(before[:2000] + b"scribble" + before[2008:])
    assert "or damaged" in fails(["--eval_only", "bad.pt"], capsys)
    moved = tmp_path / "moved"
    bert_folder.rename(moved)
    assert "does not hold the encoder" in fails(["--eval_only", "ckpt.pt"], capsys)
    run(["--eval_only", "ckpt.pt", "--init_from", moved], capsys)
    state = torch.load(moved / "pytorch_model.bin", weights_only=True)
    state["bert.embeddings.word_embeddings.weight"] += 1
    write_encoder(moved, state=state)
    changed = ["--eval_only", "ckpt.pt", "--init_from", moved]
    assert "does not hold the encoder" in fails(changed, capsys)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_said(little, capsys, bert_folder):
    (bert_folder / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    assert "the tokenizer has 22 tokens, the model 21" in fails(little, capsys)


def no_dropout(bert_folder):
    write_encoder(bert_folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def by_hand(folder, splits, method, order, epochs, batch_size, lr, clip, decay, warmup):
    """AdamW, clipping and the schedule written out, on the formulas' own adapter.

    Returns the trained weights and each epoch's mean loss."""
    rank = 2
    model, tok = pretrained.load(folder).train(), tokenizer.load(folder)
    torch.manual_seed(0)
    model = train.build(
        Namespace(method=method, targets=["query", "value"], rank=rank, alpha=8.0, seed=0),
        pretrained.load(folder, 2),
    ).train()
    weights = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    steps, t = epochs * -(-len(splits.labels) // batch_size), 0
    means = []
    for epoch in range(1, epochs + 1):
        means.append(0)
        for rows in order(epoch):
            losses = []
            for i in rows:
                ids, types = tok.encode(*splits.texts[i])
                logits = model(torch.tensor([ids]), torch.tensor([types]))
                losses.append(-logits.log_softmax(1)[0, splits.labels[i]])
            model.zero_grad()
            torch.stack(losses).mean().backward()
            means[-1] += torch.stack(losses).sum().item() / len(splits.labels)
            gradients = {
                name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad
            }
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            rise = warmup * steps
            rate = lr * min((t + 1) / rise, (steps - t) / (steps - rise), 1)
            t += 1
            for name, g in gradients.items():
                g = g * factor
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                root = (v[name] / (1 - 0.999**t)).sqrt() + 1e-8
                step = rate * m[name] / (1 - 0.9**t) / root
                weights[name] = weights[name] * (1 - rate * decay) - step
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.requires_grad:
                        p.copy_(weights[name])
    return weights, means


@pytest.mark.parametrize("method", ["lora", "condlora"])
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_training_is_adamw_with_clipping_decay_and_schedule_as_written_out(
    little, capsys, tmp_path, bert_folder, method, clip
):
    no_dropout(bert_folder)
    options = f"--method {method} --grad_clip {clip} --weight_decay 0.3 --warmup 0.3"
    run([*little, *options.split()], capsys)
    ckpt = torch.load("ckpt.pt", weights_only=True)
    last = ckpt["last"]
    split = glue.load("sst2", tmp_path / "glue")["train"]
    tok = tokenizer.load(bert_folder)
    lengths = np.array([len(tok.encode(*text)[0]) for text in split.texts])
    order = lambda epoch: shuffled(lengths, 16, [0, epoch])
    settings = dict(epochs=2, batch_size=16, lr=0.01, clip=clip, decay=0.3, warmup=0.3)
    expected, losses = by_hand(bert_folder, split, method, order, **settings)
    assert [epoch["loss"] for epoch in ckpt["history"]] == pytest.approx(losses, abs=1e-4)
    assert last.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(last[name].double(), weight, atol=2e-4), name


def test_the_gradient_is_clipped_to_the_norm_that_was_asked_for():
    """AdamW hides the gradient's size; plain SGD at a rate of 1 moves by the gradient itself."""
    model = torch.nn.Linear(3, 2)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    batch = ((torch.full((4, 3), 100.0),), torch.tensor([0, 1, 1, 1]))
    split = Namespace(batch=lambda rows, width, padded: batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train.make_step(model, split, optimizer, 0.25)(torch.arange(4), 3, False)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_the_best_epochs_weights_are_kept_whatever_comes_later(little, capsys, monkeypatch):
    figures, lasts, save = iter([0.5, 0.9, 0.6, 0, 0]), [], checkpoint.save
    monkeypatch.setattr(train, "evaluate", lambda *_: {"accuracy": next(figures)})
    monkeypatch.setattr(
        checkpoint, "save", lambda c, file: lasts.append(c["last"]) or save(c, file)
    )
    run([*little, "--epochs", "3"], capsys)
    ckpt = torch.load("ckpt.pt", weights_only=True)
    assert ckpt["best_epoch"] == 2
    for name, weight in ckpt["weights"].items():
        assert torch.equal(weight, lasts[1][name]) and not torch.equal(weight, lasts[2][name])


@pytest.mark.parametrize("method", ["lora", "condlora", "head"])
def test_frozen_weights_do_not_move(little, capsys, monkeypatch, bert_folder, method):
    models, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *a: models.append(build(*a)) or models[-1])
    run([*little, "--method", method, "--lr", "0.1"], capsys)
    fresh = pretrained.load(bert_folder).state_dict()
    encoder = [name for name in fresh if not name.startswith("head.")]
    assert all(torch.equal(models[0].state_dict()[name], fresh[name]) for name in encoder)
    assert not torch.equal(models[0].head.out_proj.weight, fresh["head.out_proj.weight"])


def test_in_bfloat16_what_trains_and_w0_stay_float32(bert_folder):
    args = Namespace(
        method="condlora", targets="query", rank=2, alpha=8.0, seed=0, dtype="bfloat16"
    )
    model = train.build(args, pretrained.load(bert_folder))
    train.prepare(model, args, torch.device("cpu"))
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    W0 = {f"layers.{l}.attention.query.weight" for l in range(2)}
    assert wide == W0 | {name for name, p in model.named_parameters() if p.requires_grad}


def test_two_processes_get_the_weights_of_one(little, capsys, tmp_path, bert_folder):
    """The same batches, shared out by torchrun over gloo. The last of an epoch has one row, so that
    one of the two processes has none."""
    no_dropout(bert_folder)
    little += ["--grad_clip", "0.05", "--batch_size", "53", "--epochs", "3"]
    run([*little, "--out", "one.pt"], capsys)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [sys.executable, *torchrun, ROOT / "train.py", *little, "--out", "two.pt"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1  # one of the two talks
    one, two = (torch.load(file, weights_only=True) for file in ("one.pt", "two.pt"))
    for name, weight in one["last"].items():
        assert torch.allclose(two["last"][name], weight, rtol=0, atol=1e-5), name
    assert one["results"] == two["results"]
    losses = [[epoch["loss"] for epoch in run["history"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@needs_gpu
@pytest.mark.parametrize("method", ["lora", "condlora", "tied", "random", "full", "head"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_replayed_steps_are_the_plain_loops(little, capsys, bert_folder, method, dtype, tolerance):
    no_dropout(bert_folder)
    runs = []
    for more in (["--no_graphs"], []):
        options = f"--device cuda --epochs 4 --method {method} --dtype {dtype} --grad_clip 0.05"
        run([*little, *options.split(), *more], capsys)
        runs.append(torch.load("ckpt.pt", weights_only=True))
    plain, graph = runs
    assert [e["loss"] for e in graph["history"]] == pytest.approx(
        [e["loss"] for e in plain["history"]], abs=tolerance
    )
    assert all(
        torch.allclose(graph["last"][name], w, atol=tolerance) for name, w in plain["last"].items()
    )
