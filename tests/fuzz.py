"""Damaged files, by the thousand: every reader gives a result, or a ValueError or OSError that
names the file in at most 300 characters, within 2 seconds and a gigabyte.

    python tests/fuzz.py 10000        # each reader so often; prints what else came out
"""

import copy
import json
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import hf_config, hf_state, write_encoder

import analyze
import train
from data import glue, peft_format, pretrained, tokenizer
from data.pretrained import write_safetensors

ODD = [None, True, False, 0, 1, -1, 2, 7, 10 ** 9, 10 ** 18, 10 ** 40, 0.5, -0.1, 1.5, float("inf"),
       float("nan"), "", "x", "\u00e9" * 500, "12", "../x", [], [1], ["x"] * 3, [[]], {}, {"a": 1},
       {"content": "x"}, {"content": 3}]


def mutated(value, rng):
    """A deep copy with one or two places replaced, dropped or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.03:
            return copy.deepcopy(rng.choice(ODD))
        parent = value
        while isinstance(parent, (dict, list)) and parent:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = rng.choice(keys)
            child = parent[key]
            if isinstance(child, (dict, list)) and child and rng.random() < 0.8:
                parent = child
                continue
            action = rng.random()
            if action < 0.15:
                del parent[key]
            elif action < 0.25 and isinstance(parent, dict):
                parent[rng.choice(("x", "weights", "lr", "help", 5, "layers.0.x"))] = child
            elif isinstance(child, torch.Tensor) and action < 0.7:
                flat = child.flatten()
                parent[key] = rng.choice((flat[:0], flat, child.double(), child[None],
                                          child.bool(), torch.zeros(3)))
            else:
                parent[key] = copy.deepcopy(rng.choice(ODD))
            break
    return value


def scribbled(data, rng):
    """Bytes, cut, or with some replaced."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return bytes(data[:rng.randrange(len(data) + 1)])
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def text_of(value):
    return json.dumps(value) if isinstance(value, (dict, list)) else repr(value)


class Readers:
    """Each method damages one file, by `rng`, and reads it."""

    def __init__(self, folder):
        self.folder = folder
        self.encoder = write_encoder(folder / "encoder")
        self.state = {name: tensor for name, tensor in hf_state("bert", 2).items()}
        write_safetensors(folder / "whole.safetensors", self.state)
        self.safetensors = (folder / "whole.safetensors").read_bytes()
        rows = [f"the {noun} {word}\t{word == 'warm':d}" for noun in ("cat", "dog", "bird") * 4
                for word in ("cold", "warm")]
        self.tsv = ("sentence\tlabel\n" + "\n".join(rows) + "\n").encode()
        self.own_tsv = self.tsv.replace(b"sentence", b"text")
        (folder / "SST-2").mkdir()
        (folder / "own").mkdir()
        for name in ("train", "dev"):
            (folder / "SST-2" / f"{name}.tsv").write_bytes(self.tsv)
            (folder / "own" / f"{name}.tsv").write_bytes(self.own_tsv)
        self.checkpoints = {}
        for method in ("lora", "condlora"):
            file = folder / f"{method}.pt"
            train.main(["--task", str(folder / "own"), "--init_from", str(self.encoder), "--rank",
                        "2", "--method", method, "--epochs", "1", "--device", "cpu", "--out",
                        str(file)])
            self.checkpoints[method] = torch.load(file, weights_only=True)
        train.main(["--eval_only", str(file), "--export", str(folder / "peft"), "--device", "cpu"])
        self.peft = json.loads((folder / "peft/adapter_config.json").read_text())
        self.bpe = folder / "bpe"
        self.bpe.mkdir()
        vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a",
                                                     "b", "ab"])}
        self.vocab = vocab
        (self.bpe / "vocab.json").write_text(json.dumps(vocab))
        (self.bpe / "merges.txt").write_text("#version: 0.2\na b\n")

    def config(self, rng):
        file = self.encoder / "config.json"
        try:
            file.write_text(text_of(mutated(hf_config("bert"), rng)), encoding="utf-8")
            pretrained.load(self.encoder)
        finally:
            file.write_text(json.dumps(hf_config("bert")))

    def weights(self, rng):
        file = self.encoder / "model.safetensors"
        length, = struct.unpack("<Q", self.safetensors[:8])
        header = mutated(json.loads(self.safetensors[8:8 + length]), rng)
        text = text_of(header).encode()
        try:
            file.write_bytes(struct.pack("<Q", len(text)) + text + self.safetensors[8 + length:])
            if rng.random() < 0.2:
                file.write_bytes(scribbled(self.safetensors, rng))
            pretrained.load(self.encoder)
        finally:
            file.unlink()

    def tokenizer(self, rng):
        files = {
            "tokenizer_config.json": {"do_lower_case": True, "unk_token": "[UNK]", "cls_token":
                                      {"content": "[CLS]"}, "strip_accents": None},
            "special_tokens_map.json": {"pad_token": "[PAD]", "mask_token": {"content": "[MASK]"}},
        }
        name = rng.choice(list(files))
        try:
            (self.encoder / name).write_text(text_of(mutated(files[name], rng)), encoding="utf-8")
            tokenizer.load(self.encoder).encode("The cat sees.", max_len=9)
        finally:
            (self.encoder / name).unlink()

    def bpe_files(self, rng):
        try:
            if rng.random() < 0.6:
                (self.bpe / "vocab.json").write_text(text_of(mutated(self.vocab, rng)))
            else:
                (self.bpe / "merges.txt").write_bytes(scribbled(b"#version: 0.2\na b\n", rng))
            tokenizer.load(self.bpe).encode("ab ba", max_len=9)
        finally:
            (self.bpe / "vocab.json").write_text(json.dumps(self.vocab))
            (self.bpe / "merges.txt").write_text("#version: 0.2\na b\n")

    def checkpoint(self, rng):
        file = self.folder / "damaged.pt"
        method = rng.choice(("lora", "condlora"))
        torch.save(mutated(self.checkpoints[method], rng), file)
        if rng.random() < 0.05:
            file.write_bytes(scribbled((self.folder / f"{method}.pt").read_bytes(), rng))
        kind = rng.randrange(3)
        if kind == 0:
            analyze.read(file, None, "cpu")
        elif kind == 1:
            train.run(["--eval_only", str(file), "--device", "cpu"])
        else:
            train.run(["--resume", str(file), "--device", "cpu", "--out",
                       str(self.folder / "other.pt")])

    def glue_file(self, rng):
        file = self.folder / "SST-2/train.tsv"
        file.write_bytes(scribbled(self.tsv, rng))
        glue.load("sst2", self.folder)

    def own_file(self, rng):
        file = self.folder / "own" / rng.choice(("train.tsv", "dev.tsv"))
        try:
            file.write_bytes(scribbled(self.own_tsv, rng))
            glue.own_task(self.folder / "own", rng.random() < 0.3).load("")
        finally:
            file.write_bytes(self.own_tsv)

    def peft_adapter(self, rng):
        file = self.folder / "peft/adapter_config.json"
        file.write_text(text_of(mutated(self.peft, rng)), encoding="utf-8")
        peft_format.read(self.folder / "peft", pretrained.load(self.encoder))


READERS = [name for name in vars(Readers) if not name.startswith("_")]


def outcome(readers, name, seed):
    """None where all is as promised, else what is not."""
    rng, began = random.Random(seed), time.perf_counter()
    problem = None
    try:
        getattr(readers, name)(rng)
    except (ValueError, OSError) as error:
        text = str(error).replace(str(readers.folder), "")
        if type(error) in (UnicodeDecodeError, json.JSONDecodeError):
            problem = repr(error)[:200]
        elif str(readers.folder) not in str(error):
            problem = f"names no file: {text[:200]}"
        elif len(text) > 300:
            problem = f"{len(text)} characters: {text[:100]}..."
    except BaseException as error:
        problem = repr(error)[:300]
    seconds = time.perf_counter() - began
    return problem or (f"{seconds:.1f} s" if seconds > 2 else None)


def main():
    n = int(sys.argv[1])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 32, -1))  # threads' stacks, too
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        sys.stdout = open("/dev/null", "w")
        for name in sys.argv[2:] or READERS:
            problems = {}
            for seed in range(n):
                problem = outcome(readers, name, seed)
                if problem:
                    problems.setdefault(problem[:60], []).append((seed, problem))
            print(f"{name}: {sum(map(len, problems.values()))} of {n}", file=sys.stderr)
            for cases in list(problems.values())[:12]:
                print(f"    {len(cases)} x, seed {cases[0][0]}: {cases[0][1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
