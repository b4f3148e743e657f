"""A made-up language, small enough to pretrain an encoder in half a minute: words, a corpus, and two tasks like GLUE's.

    load("toy")["train"].texts[0]         # two sentences: does the first entail the second?

A noun has a kind; verbs and adjectives go with the nouns of one kind; determiner and verb agree with the noun in number. Each
noun has a synonym, and each kind a name. The corpus is texts of two sentences, of which the second says again a part of
the first, with a synonym or the kind's name for the noun. So an encoder that fills in masked words learns kinds, number and
synonyms, and nothing in it is tuned to a task.

    toy           two sentences, like RTE: does the first entail the second? A false second one is a good sentence, too, with
                  another noun of the same kind or another verb. Neither sentence alone tells the answer.
    toy-agree     one sentence, like CoLA: is it well-formed? In a false one the verb has the number of the noun that stands
                  nearer to it, which is never the subject's. Every two neighbours go together: only the whole is wrong.
"""

import numpy as np

from .glue import Split

TASKS = ("toy", "toy-agree")
CONCEPTS = 2                        # nouns in a kind, each with a synonym beside it


def made_up_words():
    """An endless stream of different words of two syllables."""
    rng, seen = np.random.default_rng(7), set()
    while True:
        word = "".join(rng.choice(list(letters)) for letters in ("bdfgjklmnprstvz", "aeiou", "bdfgklmnprst", "aeiou", "klmnrst "))
        if word.strip() not in seen:
            seen.add(word.strip())
            yield word.strip()


class Lexicon:
    """The words, by kind (0 to 3) and number (0 singular, 1 plural)."""

    def __init__(self):
        new = made_up_words()
        self.determiners = [[next(new), next(new)] for number in range(2)]
        self.prepositions = [next(new), next(new)]
        self.names = [next(new) for kind in range(4)]                                                       # of the kind itself
        self.nouns = [[[next(new), next(new)] for concept in range(CONCEPTS)] for kind in range(4)]         # synonyms
        self.adjectives = [[next(new), next(new)] for kind in range(4)]
        self.verbs = [[[next(new), next(new)] for number in range(2)] for kind in range(4)]

    def words(self):
        def flat(x):
            return [x] if isinstance(x, str) else [word for y in x for word in flat(y)]
        return flat([self.determiners, self.prepositions, self.names, self.nouns, self.adjectives, self.verbs])


LEXICON = Lexicon()


def vocabulary():
    """Lines of a vocab.txt: BERT's special tokens, then the words."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LEXICON.words()]


class Speaker:
    """Says sentences, by a random generator of its own."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def any(self, choices):
        return choices[self.rng.integers(len(choices))]

    def thing(self):
        """What a noun phrase speaks of: (kind, concept, number)."""
        return int(self.rng.integers(4)), int(self.rng.integers(CONCEPTS)), int(self.rng.integers(2))

    def noun_phrase(self, thing, name=False):
        kind, concept, number = thing
        adjective = [self.any(LEXICON.adjectives[kind])] if self.rng.random() < 0.5 else []
        noun = LEXICON.names[kind] if name else self.any(LEXICON.nouns[kind][concept])
        return [self.any(LEXICON.determiners[number]), *adjective, noun]

    def sentence(self, thing, beside=None, verb=0, number=None, name=False):
        """`thing`, perhaps beside another thing, does something: verb is the index among its kind's verbs."""
        words = self.noun_phrase(thing, name)
        if beside:
            words += [self.any(LEXICON.prepositions), *self.noun_phrase(beside)]
        return " ".join([*words, LEXICON.verbs[thing[0]][thing[2] if number is None else number][verb]])

    def entailment(self, true):
        subject, beside, verb = self.thing(), self.thing(), int(self.rng.integers(2))
        while beside[:2] == subject[:2]:
            beside = self.thing()
        first = self.sentence(subject, beside, verb)
        if true:
            return first, self.sentence(subject, verb=verb, name=self.rng.random() < 0.3)
        if self.rng.random() < 0.5:
            return first, self.sentence(subject, verb=1 - verb, name=self.rng.random() < 0.3)
        kind, concept, number = subject
        other = (concept + 1 + int(self.rng.integers(CONCEPTS - 1))) % CONCEPTS
        return first, self.sentence((kind, other, number), verb=verb)

    def agreement(self, true):
        subject, beside, verb = self.thing(), self.thing(), int(self.rng.integers(2))
        beside = (*beside[:2], 1 - subject[2])                        # the nearer noun always has the other number
        return (self.sentence(subject, beside, verb, number=subject[2] if true else beside[2]),)


def corpus(n, seed=0):
    """n texts of two sentences, to pretrain on."""
    speaker = Speaker(seed)
    return [speaker.entailment(True) for _ in range(n)]


def load(task="toy", train=6000, validation=500, test=2000):
    """{"train", "validation", "test"} of Splits of the sizes asked for, labels 1 (true) and 0, no example twice."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: the toy language has {', '.join(TASKS)}")
    speaker = Speaker([1, TASKS.index(task)])
    example = speaker.entailment if task == "toy" else speaker.agreement
    examples = {}
    while len(examples) < train + validation + test:
        label = int(speaker.rng.integers(2))
        examples.setdefault(example(label), label)
    texts, labels = list(examples), list(examples.values())
    ends = {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, len(texts))}
    return {name: Split(texts[a:b], labels[a:b]) for name, (a, b) in ends.items()}
