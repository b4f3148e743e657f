"""Text to token ids, as Hugging Face's tokenizers give them: WordPiece and byte-level BPE.

    tok = load("data/models/roberta-base")
    input_ids, token_type_ids = tok.encode("A first sentence.", "Perhaps a second.", max_len=128)

A tokenizer is two steps: text to words by fixed rules (CLEAN, WORD and so on, below the classes),
then each word to pieces by a learned vocabulary. Words repeat, so the second step is remembered for
each word. WordPiece is BERT's and MPNet's (Wu et al. 2016, arXiv:1609.08144), byte-level BPE
RoBERTa's (Radford et al. 2019).
"""

import re
import unicodedata
from functools import lru_cache
from itertools import count
from pathlib import Path

from model import check, read_json, short


class Tokenizer:
    """What the two share: special tokens, pairs, truncation. A child has words and ids_of_word.

    vocab: {token: id}. patterns: regular expressions that find the special tokens in a text.
    """

    seps_between = 2  # <s> a </s></s> b </s>; 1 for [CLS] a [SEP] b [SEP]
    second_type = 0  # the token type of b

    def __init__(self, vocab, patterns, unk, cls, sep, pad, mask):
        for token in (unk, cls, sep, pad, mask):
            if token not in vocab:
                raise ValueError(f"the vocabulary has no special token {short(token)}")
        self.vocab, self.vocab_size = vocab, max(vocab.values()) + 1
        self.unk_id, self.cls_id, self.sep_id = vocab[unk], vocab[cls], vocab[sep]
        self.pad_id, self.mask_id = vocab[pad], vocab[mask]
        # A special token written out in the text stands for itself.
        self.special = re.compile("(" + "|".join(patterns) + ")")
        # A cache for each tokenizer; a decorator's would be shared.
        self.ids_of_word = lru_cache(maxsize=1 << 18)(self.ids_of_word)

    def ids(self, text):
        """Token ids of a text, without the special tokens around it."""
        ids = []
        # Splitting by a group gives plain text, special token, plain text, and so on.
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.vocab[part.strip()])
            elif part:
                for word in self.words(part):
                    ids += self.ids_of_word(word)
        return ids

    def encode(self, text, pair=None, max_len=128):
        """(input_ids, token_type_ids) of a sentence or a pair, special tokens included.

        They are at most max_len long: too long a pair loses tokens at the end of its longer part
        first ("longest first"). Raises ValueError where max_len leaves no room for a token.
        """
        a = self.ids(text)
        b = None if pair is None else self.ids(pair)
        room = max_len - (2 if b is None else 2 + self.seps_between)
        if room < 1:
            raise ValueError(f"max_len is {max_len}: "
                             f"the special tokens alone need {max_len - room}")
        if b is None:
            a = a[:room]
            return [self.cls_id, *a, self.sep_id], [0] * (len(a) + 2)
        # The longer gives way until both are half of the room; of two halves that differ by one
        # token, the larger is the longer part's.
        half_of_a = (room + (len(a) > len(b))) // 2
        keep = max(half_of_a, room - len(b))
        a = a[:keep]
        b = b[:room - len(a)]
        first = [self.cls_id, *a, self.sep_id]
        second = [self.sep_id] * (self.seps_between - 1) + [*b, self.sep_id]
        return first + second, [0] * len(first) + [self.second_type] * len(second)


class WordPiece(Tokenizer):
    """BERT's: clean, lower-case and split the text; cut words into the longest known pieces."""

    seps_between = 1
    second_type = 1
    more_special = ()

    def __init__(self, vocab, lower=True, strip_accents=None, split_chinese=True, **special):
        patterns = [re.escape(token) for token in (*special.values(), *self.more_special)]
        super().__init__(vocab, patterns, **special)
        self.lower = lower
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.split_chinese = split_chinese

    def words(self, text):
        text = text.translate(CLEAN)
        if not text.isascii():
            if self.split_chinese:
                text = CHINESE.sub(r" \g<0> ", text)
            if self.strip_accents:
                text = "".join(c for c in unicodedata.normalize("NFD", text)
                               if unicodedata.category(c) != "Mn")
            if self.lower:
                # Python's lower() gives a final sigma at a word's end, Hugging Face's does not.
                text = text.replace("\u03a3", "\u03c3")
        if self.lower:
            text = text.lower()
        return text.translate(SPACED).split()

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
                return [self.unk_id]  # one unknown piece makes the whole word unknown
            ids.append(piece)
            start = end
        return ids


class MPNetWordPiece(WordPiece):
    """BERT's words and pieces between RoBERTa's special tokens."""

    seps_between = 2
    second_type = 0
    more_special = ("<unk>",)  # beside [UNK], which is the one it uses


class ByteLevelBPE(Tokenizer):
    """RoBERTa's: split the text, spaces kept; write each word as bytes; join learned neighbours."""

    def __init__(self, vocab, merges, add_prefix_space=False, **special):
        patterns = {name: re.escape(token) for name, token in special.items()}
        patterns["mask"] = r"\s*" + patterns["mask"]  # <mask> takes the spaces before it along
        super().__init__(vocab, patterns.values(), **special)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.add_prefix_space = add_prefix_space

    def words(self, text):
        if self.add_prefix_space and not text[0].isspace():
            text = " " + text
        # WORD knows ASCII only. It is matched on a shadow of the text, in which every other letter
        # is an "a", every other digit a "0", and every other sign a "!". The lengths are the same:
        #     text     Naïve π ≥ ٣        words   "Naïve", " π", " ≥", " ٣"
        #     shadow   Naave a ! 0        words   "Naave", " a", " !", " 0"
        shadow = text if text.isascii() else text.translate(CLASSES)
        return (text[match.start():match.end()] for match in WORD.finditer(shadow))

    def ids_of_word(self, word):
        parts = [BYTES[byte] for byte in word.encode("utf-8", errors="replace")]
        while len(parts) > 1:
            # Join the first of the neighbours that were learned earliest.
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:])]
            best = ranks.index(min(ranks))
            if ranks[best] == len(self.rank):
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        return [self.vocab.get(part, self.unk_id) for part in parts]


# Rules about characters, each worked out the first time it is met --------------------------------

class Rule(dict):
    """For str.translate: what becomes of a character, by a function, remembered."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, code):
        self[code] = self.function(chr(code))
        return self[code]


def clean(c):
    """BERT's: white space becomes a space, control characters vanish."""
    if c in "\t\n\r":
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co"):
        return None
    return " " if c.isspace() else c


def class_of(c):
    """An ASCII character of the same class: letter, digit, space or other sign."""
    if "\x1c" <= c <= "\x1f":  # control characters, which Python's isspace takes in
        return "!"
    if c.isascii():
        return c
    if c.isspace():
        return "\t"  # and no " ", which WORD joins to the word after it
    return {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


def spaced(c):
    """BERT's: a sign is a word of its own: Unicode's punctuation, and all of ASCII's signs."""
    if c.isascii():
        is_sign = c.isprintable() and not c.isalnum() and c != " "
    else:
        is_sign = unicodedata.category(c)[0] == "P"
    return f" {c} " if is_sign else c


CLEAN, CLASSES, SPACED = Rule(clean), Rule(class_of), Rule(spaced)
# Hugging Face's ranges, though the last but one begins 256 characters after Unicode's.
CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")
# GPT-2's words: an English contraction, or letters, digits or other signs with at most one space
# before them, or spaces.
WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# GPT-2's alphabet: a printable character for each byte, its own where it has one.
PRINTABLE = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
others = count(256)
BYTES = [chr(byte if byte in PRINTABLE else next(others)) for byte in range(256)]


# Reading a folder --------------------------------------------------------------------------------

def load(path):
    """The tokenizer of a folder: vocab.txt is WordPiece's, vocab.json with merges.txt BPE's.

    tokenizer_config.json and special_tokens_map.json are followed where they exist. Raises
    FileNotFoundError or ValueError, naming the folder, where a file is missing or damaged.
    """
    path = Path(path)
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            settings |= read_settings(path / name)
    try:
        if (path / "vocab.txt").is_file():
            return read_wordpiece(path, settings)
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return read_bpe(path, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise FileNotFoundError(f"no vocab.txt, and no vocab.json with merges.txt, in {path}")


def read_settings(file):
    """What the tokenizers know of a JSON file's settings; a null leaves the default."""
    known = {}
    for name, value in read_json(file).items():
        if name in SETTINGS and value is not None:
            if isinstance(value, dict):  # a special token with how it is to be found
                value = value.get("content")
            check(value, SETTINGS[name], f"{file}: {name}")
            known[name] = value
    return known


SETTINGS = {
    "do_lower_case": bool, "strip_accents": bool, "tokenize_chinese_chars": bool,
    "add_prefix_space": bool, "unk_token": str, "cls_token": str, "sep_token": str,
    "pad_token": str, "mask_token": str,
}
BERT_TOKENS = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
ROBERTA_TOKENS = {"unk": "<unk>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>"}


def special_tokens(settings, defaults):
    """{"unk": "[UNK]", ...}, as the folder's settings have them or else the defaults."""
    return {name: settings.get(f"{name}_token") or default for name, default in defaults.items()}


def read_wordpiece(path, settings):
    lines = (path / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    vocab = {token: i for i, token in enumerate(lines)}
    child, tokens = WordPiece, BERT_TOKENS
    if "<s>" in vocab and "</s>" in vocab:
        child, tokens = MPNetWordPiece, ROBERTA_TOKENS | {"unk": "[UNK]"}
    return child(vocab, settings.get("do_lower_case", True), settings.get("strip_accents"),
                 settings.get("tokenize_chinese_chars", True), **special_tokens(settings, tokens))


def read_bpe(path, settings):
    vocab = read_json(path / "vocab.json")
    check(vocab, {str: (int, 0, len(vocab) - 1)}, "vocab.json")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines
              if line and not line.startswith("#version")]
    for merge in merges:
        if len(merge) != 2:
            raise ValueError(f"merges.txt: {short(' '.join(merge))} is no pair")
    return ByteLevelBPE(vocab, merges, settings.get("add_prefix_space", False),
                        **special_tokens(settings, ROBERTA_TOKENS))
