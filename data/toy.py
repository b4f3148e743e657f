"""A made-up language, small enough to pretrain an encoder in half a minute.

    load()["train"].texts[1]         # two sentences: does the first entail the second?
    ("det0a adj1a noun11b prepa det0a noun10a verb10b", "det0a noun11a verb10b")

A noun has a kind (here 1); verbs and adjectives go with the nouns of one kind; determiner and verb
agree with the noun in number (0). Each noun has a synonym (noun11a, noun11b), and each kind a name
(kind1). The corpus is texts of two sentences, of which the second says again who does what in the
first, perhaps with the noun's synonym or the kind's name: filling in masked words teaches these.

The task is like RTE. A second sentence that is not entailed has another noun of the same kind or
another verb. That sentence alone gives 57%, since a true one has a kind's name more often.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import Config, Transformer

from . import pretrained, tokenizer
from .batches import Encoded
from .glue import Split

ROWS = {"train": slice(6000), "validation": slice(6000, 6500), "test": slice(6500, 8500)}
KINDS = range(4)
# Singular and plural; the nouns of a kind, each with a synonym; the verbs of a kind.
NUMBERS = CONCEPTS = VERBS = range(2)


def vocabulary():
    """Lines of a vocab.txt: BERT's special tokens, then the words."""
    two = lambda stems: [stem + letter for stem in stems for letter in "ab"]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
            *two(f"det{number}" for number in NUMBERS), *two(["prep"]),
            *(f"kind{kind}" for kind in KINDS),
            *two(f"noun{kind}{concept}" for kind in KINDS for concept in CONCEPTS),
            *two(f"adj{kind}" for kind in KINDS),
            *two(f"verb{kind}{number}" for kind in KINDS for number in NUMBERS)]


class Speaker:
    """Says sentences, by a random generator of its own."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def one_of(self, choices):
        return choices[self.rng.integers(len(choices))]

    def thing(self):
        """What a noun phrase speaks of: (kind, concept, number)."""
        return self.one_of(KINDS), self.one_of(CONCEPTS), self.one_of(NUMBERS)

    def either(self, stem):
        return stem + self.one_of("ab")

    def noun_phrase(self, thing, by_name=False):
        """Words for a thing; by_name says its kind's name instead of the noun."""
        kind, concept, number = thing
        adjective = [self.either(f"adj{kind}")] if self.rng.random() < 0.5 else []
        noun = f"kind{kind}" if by_name else self.either(f"noun{kind}{concept}")
        return [self.either(f"det{number}"), *adjective, noun]

    def sentence(self, thing, beside=None, verb=0, by_name=False):
        """`thing`, perhaps beside another thing, does something: its kind's verb 0 or 1."""
        words = self.noun_phrase(thing, by_name)
        if beside:
            words += [self.either("prep"), *self.noun_phrase(beside)]
        kind, _, number = thing
        return " ".join([*words, f"verb{kind}{number}" + "ab"[verb]])

    def example(self, true):
        """(first sentence, second sentence): the first entails the second, if `true`."""
        subject, beside, verb = self.thing(), self.thing(), self.one_of(VERBS)
        while beside[:2] == subject[:2]:
            beside = self.thing()
        first = self.sentence(subject, beside, verb)
        if not true and self.rng.random() >= 0.5:  # another noun of the same kind
            kind, concept, number = subject
            return first, self.sentence((kind, 1 - concept, number), verb=verb)
        if not true:
            verb = 1 - verb
        return first, self.sentence(subject, verb=verb, by_name=self.rng.random() < 0.3)


def load():
    """{"train", "validation", "test"} of Splits, labels 1 (true) and 0; no example is in two."""
    speaker, examples = Speaker(seed=[1, 0]), {}  # pretrain has another seed
    while len(examples) < ROWS["test"].stop:
        label = speaker.one_of((0, 1))
        examples.setdefault(speaker.example(label), label)
    texts, labels = list(examples), list(examples.values())
    return {name: Split(texts[rows], labels[rows]) for name, rows in ROWS.items()}


# The encoder -------------------------------------------------------------------------------------

# BERT's initializer_range, 0.02, is for d = 768: at d = 64 attention would long remain useless.
CONFIG = Config(vocab_size=len(vocabulary()), hidden_size=64, num_hidden_layers=4,
                num_attention_heads=4, intermediate_size=256, max_position_embeddings=32,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1)


def make_encoder(folder, steps, device):
    """Pretrain the toy encoder for `steps` steps and write it to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    pretrained.save(pretrain(CONFIG, tokenizer.load(folder), steps, device), folder)


def pretrain(config, tok, steps, device):
    """Masked-language modelling (Devlin et al. 2019): hide a fifth of the words and guess them."""
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    speaker = Speaker(seed=0)
    corpus = Split([speaker.example(True) for _ in range(20000)], [0] * 20000)
    encoded = Encoded(corpus, tok, config.max_len, device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, steps + 1, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False)
    rng = np.random.default_rng(0)
    what = f"pretraining the toy encoder, once, on {device}"
    bar = tqdm(range(steps), what, disable=None)  # a bar on a terminal, else one line
    if bar.disable:
        print(f"{what}: {steps} steps", flush=True)
    for _ in bar:
        [batch] = encoded.batches([rng.integers(len(encoded.widths), size=64)])
        (input_ids, token_type_ids, mask), _ = encoded.batch(*batch)
        is_word = (input_ids != tok.pad_id) & (input_ids != tok.cls_id) & (input_ids != tok.sep_id)
        hidden = (torch.rand(input_ids.shape, device=device) < 0.2) & is_word
        states = model.encode(input_ids.masked_fill(hidden, tok.mask_id), token_type_ids, mask)
        # Input and output embeddings are tied.
        logits = F.linear(states[hidden], model.embeddings.word.weight)
        loss = F.cross_entropy(logits, input_ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
