"""A made-up language, small enough to pretrain an encoder in half a minute.

    load()["train"].texts[0]         # two sentences: does the first entail the second?

A noun has a kind; verbs and adjectives go with the nouns of one kind; determiner and verb agree
with the noun in number. Each noun has a synonym, and each kind a name. The corpus is texts of two
sentences, of which the second says again who does what in the first, perhaps with the noun's
synonym or the kind's name. So an encoder that fills in masked words learns kinds, number and
synonyms, and nothing in it is tuned to the task.

The task is like RTE. A second sentence that is not entailed is a good sentence with another noun of
the same kind or another verb. The second sentence alone gives 57%, since a true one has a kind's
name more often.
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
NUMBERS = range(2)  # 0 singular, 1 plural
CONCEPTS = range(2)  # nouns of a kind, each with a synonym
VERBS = range(2)  # of a kind
# A letter of each; the last may be missing.
SYLLABLES = ("bdfgjklmnprstvz", "aeiou", "bdfgklmnprst", "aeiou", "klmnrst ")


def made_up_words():
    """An endless stream of different words of two syllables."""
    rng, seen = np.random.default_rng(7), set()
    while True:
        word = "".join(rng.choice(list(letters)) for letters in SYLLABLES).strip()
        if word not in seen:
            seen.add(word)
            yield word


class Lexicon:
    """The words. The innermost lists hold two each: synonyms, or a kind's two verbs."""

    def __init__(self):
        new = made_up_words()
        two = lambda: [next(new), next(new)]
        self.determiners = [two() for number in NUMBERS]
        self.prepositions = two()
        self.names = [next(new) for kind in KINDS]
        self.nouns = [[two() for concept in CONCEPTS] for kind in KINDS]
        self.adjectives = [two() for kind in KINDS]
        self.verbs = [[two() for number in NUMBERS] for kind in KINDS]


LEXICON = Lexicon()


def vocabulary():
    """Lines of a vocab.txt: BERT's special tokens, then the words."""
    def flat(x):
        return [x] if isinstance(x, str) else [word for y in x for word in flat(y)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *flat(vars(LEXICON).values())]


class Speaker:
    """Says sentences, by a random generator of its own."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def one_of(self, choices):
        return choices[self.rng.integers(len(choices))]

    def thing(self):
        """What a noun phrase speaks of: (kind, concept, number)."""
        return self.one_of(KINDS), self.one_of(CONCEPTS), self.one_of(NUMBERS)

    def noun_phrase(self, thing, by_name=False):
        """Words for a thing; by_name says its kind's name instead of the noun."""
        kind, concept, number = thing
        adjective = []
        if self.rng.random() < 0.5:
            adjective = [self.one_of(LEXICON.adjectives[kind])]
        noun = LEXICON.names[kind] if by_name else self.one_of(LEXICON.nouns[kind][concept])
        return [self.one_of(LEXICON.determiners[number]), *adjective, noun]

    def sentence(self, thing, beside=None, verb=0, by_name=False):
        """`thing`, perhaps beside another thing, does something: its kind's verb 0 or 1."""
        words = self.noun_phrase(thing, by_name)
        if beside:
            words += [self.one_of(LEXICON.prepositions), *self.noun_phrase(beside)]
        kind, _, number = thing
        return " ".join([*words, LEXICON.verbs[kind][number][verb]])

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


def corpus(n):
    """n texts of two sentences, to pretrain on."""
    speaker = Speaker(seed=0)
    return [speaker.example(True) for _ in range(n)]


def load():
    """{"train", "validation", "test"} of Splits, labels 1 (true) and 0. No example appears twice.
    """
    speaker, examples = Speaker(seed=[1, 0]), {}  # not the corpus's seed
    while len(examples) < ROWS["test"].stop:
        label = speaker.one_of((0, 1))
        examples.setdefault(speaker.example(label), label)
    texts, labels = list(examples), list(examples.values())
    return {name: Split(texts[rows], labels[rows]) for name, rows in ROWS.items()}


# The encoder -------------------------------------------------------------------------------------

# BERT's initializer_range 0.02 is for d = 768. With it, at d = 64, attention would take 1,500 steps
# to become useful.
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
    encoded = Encoded(Split(corpus(20000), [0] * 20000), tok, config.max_len, device)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, steps + 1, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False)
    rng = np.random.default_rng(0)
    what = f"pretraining the toy encoder, once, on {device}"
    bar = tqdm(range(steps), what, disable=None)  # a bar on a terminal, else one line
    if bar.disable:
        print(f"{what}: {steps} steps", flush=True)
    for step in bar:
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
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model
