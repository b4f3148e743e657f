"""WordPiece and byte-level BPE split a text into words by rules, and words into learned pieces.

WordPiece is BERT's and MPNet's (Wu et al. 2016, arXiv:1609.08144), byte-level BPE is RoBERTa's
(Radford et al. 2019). A few characters newer than Unicode 8 split otherwise in Hugging Face's.
"""

import re
import unicodedata
from heapq import heappop, heappush


class WordPiece:
    """BERT's: clean, lower-case and split the text; cut words into the longest known pieces.

    vocab: {piece: id}. A piece that continues a word begins with "##".
    """

    def __init__(self, vocab, unk_id, lower, strip_accents, split_chinese):
        self.vocab, self.unk_id = vocab, unk_id
        self.lower, self.split_chinese = lower, split_chinese
        self.strip_accents = lower if strip_accents is None else strip_accents

    def normalize(self, text):
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
        return text.lower() if self.lower else text

    def words(self, text):
        return text.translate(SPACED).split()

    def ids_of_word(self, word):
        if len(word) > 100:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if prefix + word[start:end] in self.vocab:
                    break
            else:
                return [self.unk_id]  # one unknown piece makes the whole word unknown
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids


class ByteLevelBPE:
    """RoBERTa's: split the text, spaces kept; write each word as bytes; join learned neighbours.

    vocab: {piece: id}. merges: [(piece, piece)], in the order in which they were learned.
    """

    def __init__(self, vocab, merges, add_prefix_space):
        self.vocab, self.add_prefix_space = vocab, add_prefix_space
        self.rank = {pair: i for i, pair in enumerate(merges)}

    normalize = str  # which leaves a text as it is

    def words(self, text):
        if self.add_prefix_space and not text.startswith(" "):
            text = " " + text
        # WORD knows ASCII only. It is matched on a shadow of the text, in which every other letter
        # is an "a", every other digit a "0", and every other sign a "!". The lengths are the same:
        #     text     Naïve π ≥ ٣        words   "Naïve", " π", " ≥", " ٣"
        #     shadow   Naave a ! 0        words   "Naave", " a", " !", " 0"
        shadow = text if text.isascii() else text.translate(CLASSES)
        return (text[match.start():match.end()] for match in WORD.finditer(shadow))

    def ids_of_word(self, word):
        letters = (BYTES[byte] for byte in word.encode("utf-8", errors="replace"))
        parts = [None, *(letter for letter in letters if letter in self.vocab), None]
        after, before = [*range(1, len(parts) + 1)], [*range(-1, len(parts) - 1)]  # a linked list
        heap = []  # of (rank, i): the parts at i and after[i] can be joined

        def push(i):
            if (parts[i], parts[after[i]]) in self.rank:
                heappush(heap, (self.rank[parts[i], parts[after[i]]], i))
        for i in range(len(parts) - 1):
            push(i)
        while heap:
            # Join the first of the neighbours that were learned earliest.
            rank, i = heappop(heap)
            j = after[i]
            if self.rank.get((parts[i], parts[j])) != rank:
                continue  # one of the two has been joined to another part since
            parts[i], parts[j], after[i] = parts[i] + parts[j], None, after[j]
            before[after[i]] = i
            push(before[i])
            push(i)
        return [self.vocab[part] for part in parts if part is not None]


# Rules about characters --------------------------------------------------------------------------

class Rule(dict):
    """A table for str.translate that asks a function about each character once."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, code):
        return self.setdefault(code, self.function(chr(code)))


def clean(c):
    """BERT's: white space becomes a space, control characters vanish."""
    if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"):
        return " " if c.isspace() else c if c != "\ufffd" else None


def class_of(c):
    """An ASCII character of the same class: letter, digit, space or other sign."""
    if "\x1c" <= c <= "\x1f":  # control characters, which isspace includes
        return "!"
    if c.isascii():
        return c
    if c.isspace():
        return "\t"  # not " ", which WORD joins to the word after it
    return {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


def spaced(c):
    """BERT's: Unicode's punctuation and all of ASCII's signs are words of their own."""
    is_sign = unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"
    return f" {c} " if is_sign else c


CLEAN, CLASSES, SPACED = Rule(clean), Rule(class_of), Rule(spaced)
# Unicode's white space, without four control characters that Python's isspace includes.
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")
# The ranges of _is_chinese_char in Google's tokenization.py for BERT, as Hugging Face's tokenizers
# has them: it begins the last but one (CJK Extension E) at U+2B920, Google and Unicode at U+2B820.
CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")
# GPT-2's words: an English contraction, or letters, digits or other signs with at most one space
# before them, or spaces.
WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# GPT-2's alphabet: a printable character for each byte, its own if it has one.
PRINTABLE = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}
others = iter(range(256, 512))
BYTES = [chr(byte if byte in PRINTABLE else next(others)) for byte in range(256)]
