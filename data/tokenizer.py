"""Text to token ids: BERT's WordPiece and RoBERTa's byte-level BPE, token for token what Hugging Face's tokenizers give.

    tok = load("data/models/roberta-base")
    input_ids, token_type_ids = tok.encode("A first sentence.", "Perhaps a second.", max_len=128)

A tokenizer is two steps: text to words by fixed rules, then each word to pieces by a learned vocabulary. Words repeat, so
the second step is remembered for each word. WordPiece: Wu et al. 2016, arXiv:1609.08144. Byte-level BPE: Radford et al. 2019.
"""

import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path


class Tokenizer:
    """What the two share: special tokens, pairs, truncation. A child turns a piece of plain text into token ids."""

    def __init__(self, vocab, special, unk, cls, sep, pad, mask, seps_between):
        for token in (unk, cls, sep, pad, mask):
            if token not in vocab:
                raise ValueError(f"the vocabulary has no special token {token!r}")
        self.vocab, self.vocab_size = vocab, len(vocab)
        self.unk_id, self.cls_id, self.sep_id, self.pad_id, self.mask_id = (vocab[t] for t in (unk, cls, sep, pad, mask))
        self.seps_between = seps_between                              # 1: [CLS] a [SEP] b [SEP]; 2: <s> a </s></s> b </s>
        # a special token written out in the text stands for itself, as it does in Hugging Face's
        self.special = re.compile("(" + "|".join(special) + ")")
        self.ids_of_word = lru_cache(maxsize=1 << 18)(self.ids_of_word)

    def ids(self, text):
        """Token ids of a text, without the special tokens around it."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.vocab[part.strip()])
            elif part:
                for word in self.words(part):
                    ids += self.ids_of_word(word)
        return ids

    def encode(self, text, pair=None, max_len=128):
        """(input_ids, token_type_ids) of a sentence or a pair, special tokens included, at most max_len tokens long.

        Too long a pair loses tokens at the end of the longer part first ("longest first"). Raises ValueError where
        max_len leaves no room for a token.
        """
        a, b = self.ids(text), None if pair is None else self.ids(pair)
        room = max_len - (2 if b is None else 2 + self.seps_between)
        if room < 1:
            raise ValueError(f"max_len is {max_len}: the special tokens alone need {max_len - room}")
        if b is None:
            return [self.cls_id, *a[:room], self.sep_id], [0] * (min(len(a), room) + 2)
        if len(a) + len(b) > room:
            half = room // 2                                          # the longer gives way until both are half of the room
            if len(a) <= len(b):
                short = min(len(a), half)
                a, b = a[:short], b[:room - short]
            else:
                short = min(len(b), half)
                a, b = a[:room - short], b[:short]
        first = [self.cls_id, *a, self.sep_id]
        second = [*[self.sep_id] * (self.seps_between - 1), *b, self.sep_id]
        return first + second, [0] * len(first) + [self.second_type] * len(second)


class WordPiece(Tokenizer):
    """BERT: clean, lower-case and split the text, then cut each word into the longest pieces the vocabulary has."""

    second_type = 1

    def __init__(self, vocab, lower=True, strip_accents=None, split_chinese=True, **special):
        super().__init__(vocab, [re.escape(token) for token in special.values()], seps_between=1, **special)
        self.lower = lower
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.split_chinese = split_chinese

    def words(self, text):
        if not text.isascii():
            text = text.translate(CLEAN)
            if self.split_chinese:
                text = CHINESE.sub(r" \g<0> ", text)
            if self.strip_accents:
                text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
            if self.lower:
                text = text.replace("Σ", "σ")                         # else lower() would end a word in a final sigma
        else:
            text = text.translate(CLEAN)
        if self.lower:
            text = text.lower()
        for chunk in text.split():
            if chunk.isalnum():                                       # most words: nothing to split
                yield chunk
            else:
                yield from split_punctuation(chunk)

    def ids_of_word(self, word):
        if len(word) > 100:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                piece = self.vocab.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.unk_id]                                  # one unknown piece makes the whole word unknown
            ids.append(piece)
            start = end
        return ids


class ByteLevelBPE(Tokenizer):
    """RoBERTa: split the text, spaces kept, write each word as bytes, and join neighbours in the order learned."""

    second_type = 0

    def __init__(self, vocab, merges, add_prefix_space=False, **special):
        # <mask> takes the spaces before it along
        super().__init__(vocab, [(r"\s*" if name == "mask" else "") + re.escape(token) for name, token in special.items()],
                         seps_between=2, **special)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.add_prefix_space = add_prefix_space

    def words(self, text):
        if self.add_prefix_space and not text[0].isspace():
            text = " " + text
        # match on a copy in which every other script's letters are "a" and its digits "0": the lengths are the same
        classes = text if text.isascii() else text.translate(CLASSES)
        return (text[match.start():match.end()] for match in WORD.finditer(classes))

    def ids_of_word(self, word):
        parts = [BYTES[byte] for byte in word.encode("utf-8", errors="replace")]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: self.rank.get((parts[i], parts[i + 1]), len(self.rank)))
            if (parts[best], parts[best + 1]) not in self.rank:
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        return [self.vocab.get(part, self.unk_id) for part in parts]


# Rules about characters, each worked out the first time it is met ----------------------------------------------------

class Rule(dict):
    """For str.translate: what becomes of a character, by a function, remembered."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, code):
        self[code] = self.function(chr(code))
        return self[code]


def is_space(c):
    """Unicode's White_Space, which leaves out four control characters that Python's isspace takes in."""
    return c.isspace() and not "\x1c" <= c <= "\x1f"


def clean(c):
    if c in "\t\n\r":
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co"):
        return None
    return " " if c.isspace() else c


def class_of(c):
    if c.isascii() and not "\x1c" <= c <= "\x1f":
        return c
    if is_space(c):
        return "\t"
    return {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


CLEAN, CLASSES = Rule(clean), Rule(class_of)
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                     "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")
# GPT-2's words: an English contraction, or letters, digits or other signs with at most one space before, or spaces
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# GPT-2's alphabet: a printable character for each byte, its own where it has one
PRINTABLE = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
BYTES = [chr(byte) if byte in PRINTABLE else None for byte in range(256)]
for number, byte in enumerate(byte for byte in range(256) if BYTES[byte] is None):
    BYTES[byte] = chr(256 + number)


@lru_cache(maxsize=None)
def is_punctuation(c):
    return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"


def split_punctuation(chunk):
    start = 0
    for i, c in enumerate(chunk):
        if is_punctuation(c):
            if start < i:
                yield chunk[start:i]
            yield c
            start = i + 1
    if start < len(chunk):
        yield chunk[start:]


# Reading a folder ----------------------------------------------------------------------------------------------------

def load(path):
    """The tokenizer of a folder with vocab.txt (WordPiece) or with vocab.json and merges.txt (byte-level BPE).

    tokenizer_config.json and special_tokens_map.json are followed where they exist. Raises FileNotFoundError or
    ValueError, naming the folder, where a file is missing or damaged.
    """
    path = Path(path)
    settings = {}
    try:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                settings |= json.loads((path / name).read_text(encoding="utf-8"))

        def special(**defaults):
            chosen = {name: settings.get(f"{name}_token") or default for name, default in defaults.items()}
            return {name: t["content"] if isinstance(t, dict) else t for name, t in chosen.items()}

        if (path / "vocab.txt").is_file():
            lines = (path / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
            return WordPiece({token.rstrip("\r"): i for i, token in enumerate(lines)},
                             settings.get("do_lower_case", True), settings.get("strip_accents"),
                             settings.get("tokenize_chinese_chars", True),
                             **special(unk="[UNK]", cls="[CLS]", sep="[SEP]", pad="[PAD]", mask="[MASK]"))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
            lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            return ByteLevelBPE(vocab, merges, settings.get("add_prefix_space", False),
                                **special(unk="<unk>", cls="<s>", sep="</s>", pad="<pad>", mask="<mask>"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise FileNotFoundError(f"no vocab.txt, and no vocab.json with merges.txt, in {path}")
