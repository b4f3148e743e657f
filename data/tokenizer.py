"""Text to token ids, as Hugging Face's tokenizers give them.

    tok = load("data/models/roberta-base")
    input_ids, token_type_ids = tok.encode("A first sentence.", "Perhaps a second.", max_len=128)

data/pieces.py has WordPiece and byte-level BPE; here are special tokens, pairs and folders.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from .command import reading
from .pieces import SPACES, ByteLevelBPE, WordPiece


class Tokenizer:
    """An algorithm with what surrounds it: added tokens, special tokens, pairs, truncation.

    added: [{"content", "id", "lstrip", "normalized"}], tokens that stand for themselves wherever
    they are written in a text. ids: {token: id}. special: {"cls": "[CLS]", ...}. template: what a
    pair becomes, [("cls" or "sep" or "A" or "B", token type), ...]; a text, its first three.
    """

    def __init__(self, algorithm, added, ids, special, template, truncate_left):
        self.algorithm, self.template, self.truncate_left = algorithm, template, truncate_left
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (
            ids[special[name]] for name in ("cls", "sep", "pad", "mask"))
        self.vocab_size = max(ids.values()) + 1
        # Most added tokens are found as they are written, the others after normalization.
        self.written = AddedTokens(str, [t for t in added if not t["normalized"]])
        self.normalized = AddedTokens(algorithm.normalize, [t for t in added if t["normalized"]])
        # Words repeat. A cache for each tokenizer; a decorator's would be shared.
        self.ids_of_word = lru_cache(maxsize=1 << 18)(algorithm.ids_of_word)

    def ids(self, text):
        """Token ids of a text, without the special tokens around it."""
        ids = []
        for part, added_ids in self.written.split(text):
            for piece, inner_ids in self.normalized.split(self.algorithm.normalize(part)):
                for word in self.algorithm.words(piece) if piece else ():
                    ids += self.ids_of_word(word)
                ids += inner_ids
            ids += added_ids
        return ids

    def encode(self, text, pair=None, max_len=128):
        """(input_ids, token_type_ids) of a text or a pair of texts, special tokens included.

        Beyond max_len the longer part loses tokens first ("longest first"). Raises ValueError if
        max_len leaves no room for a token.
        """
        template = self.template[:3] if pair is None else self.template
        a, b = self.ids(text), [] if pair is None else self.ids(pair)
        n_special = len(template) - (1 if pair is None else 2)
        room = max_len - n_special
        if room < 1:
            raise ValueError(f"max_len is {max_len}: the special tokens alone need {n_special}")
        # The longer gives way until both are half of the room; of two halves that differ by one
        # token, the larger is the longer part's.
        half_of_a = (room + (len(a) > len(b))) // 2
        step = -1 if self.truncate_left else 1
        a = a[::step][:max(half_of_a, room - len(b))][::step]
        b = b[::step][:room - len(a)][::step]
        ids = {"cls": [self.cls_id], "sep": [self.sep_id], "A": a, "B": b}
        return ([i for part, _ in template for i in ids[part]],
                [token_type for part, token_type in template for _ in ids[part]])


class AddedTokens:
    """Finds tokens in a text: the leftmost, and of several there the longest."""

    def __init__(self, normalize, tokens):
        pairs = sorted(((normalize(token["content"]), token) for token in tokens),
                       key=lambda pair: -len(pair[0]))
        self.ids, patterns = [token["id"] for _, token in pairs], []
        for text, token in pairs:
            if not text or token["lstrip"] and text[0] in SPACES:
                raise ValueError(f"the added token {text!r:.40} is empty or begins with a space")
            # lstrip: it takes all spaces before it along.
            spaces = f"(?:(?<![{SPACES}])[{SPACES}]+)?" * token["lstrip"]
            patterns.append(f"{spaces}({re.escape(text)})")
        self.pattern = re.compile("|".join(patterns) or "(?!)")

    def split(self, text):
        """(text, [id of the token after it]), ..., (text, [])"""
        end = 0
        for match in self.pattern.finditer(text):
            yield text[end:match.start()], [self.ids[match.lastindex - 1]]
            end = match.end()
        yield text[end:], []


# Reading a folder --------------------------------------------------------------------------------

FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
         "tokenizer_config.json", "special_tokens_map.json")
BERT = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
ROBERTA = {"unk": "<unk>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>",
           "bos": "<s>", "eos": "</s>"}
SPECIAL = {"BertTokenizer": BERT, "MPNetTokenizer": ROBERTA | {"unk": "[UNK]"},
           "RobertaTokenizer": ROBERTA,
           "PreTrainedTokenizerFast": {}, "TokenizersBackend": {}}  # these follow tokenizer.json
CLASS_OF = {"bert": "BertTokenizer", "mpnet": "MPNetTokenizer", "roberta": "RobertaTokenizer"}
BERT_PAIR = [("cls", 0), ("A", 0), ("sep", 0), ("B", 1), ("sep", 1)]
ROBERTA_PAIR = [("cls", 0), ("A", 0), ("sep", 0), ("sep", 0), ("B", 0), ("sep", 0)]
MPNET_PAIR = [("cls", 0), ("A", 0), ("sep", 0), ("sep", 0), ("B", 1), ("sep", 1)]


def load(path):
    """The tokenizer of a folder, as AutoTokenizer of transformers 5 reads it.

    The vocabulary is tokenizer.json's, else vocab.txt's (WordPiece) or vocab.json's (BPE). Raises
    FileNotFoundError or ValueError, naming what is missing, damaged or not implemented here.
    """
    path = Path(path)
    with reading(path):
        config, model, saved = (read_json(path / f"{name}.json") for name in
                                ("tokenizer_config", "config", "tokenizer"))
        vocab, merges = read_vocabulary(path, saved)
        kind = (config.get("tokenizer_class") or model.get("tokenizer_class")
                or CLASS_OF.get(model.get("model_type"))
                or ("BertTokenizer" if merges is None else "RobertaTokenizer"))
        kind = kind if kind in SPECIAL else kind.removesuffix("Fast")
        expect("tokenizer_class", kind, *SPECIAL)
        ids, special, added = read_tokens(path, config, saved, vocab, kind)
        template = BERT_PAIR if kind == "BertTokenizer" else ROBERTA_PAIR
        if not SPECIAL[kind]:
            template = follow(saved, config, special, ids)
        elif (kind == "RobertaTokenizer") != (merges is not None):
            raise ValueError(f"{kind}, but its vocabulary is another algorithm's")
        types = ["token_type_ids"] * (kind == "BertTokenizer")
        if "token_type_ids" not in config.get("model_input_names", types):
            template = [(part, 0) for part, _ in template]
        get = lambda name, *values: expect(name, config.get(name, values[0]), *values)
        if merges is None:
            algorithm = WordPiece(vocab, vocab[special["unk"]], get("do_lower_case", True, False),
                                  get("strip_accents", None, True, False),
                                  get("tokenize_chinese_chars", True, False))
        else:
            algorithm = ByteLevelBPE(vocab, merges, get("add_prefix_space", False, True))
        get("split_special_tokens", False)
        side = (saved.get("truncation") or {}).get("direction", "right").lower()
        side = get("truncation_side", side, "right", "left")
        return Tokenizer(algorithm, added, ids, special, template, side == "left")


def read_json(file):
    """The object in a JSON file, or {} if the file does not exist."""
    with reading(file):
        return dict(json.loads(file.read_text("utf-8")).items()) if file.is_file() else {}


def expect(what, value, *accepted):
    if value not in accepted:
        raise ValueError(f"{what} is {value!r:.60}, expected {' or '.join(map(repr, accepted))}")
    return value


def read_vocabulary(path, saved):
    """({piece: id}, merges), where merges is None for WordPiece."""
    text, pairs, merges = path / "vocab.txt", path / "merges.txt", None
    if (path / "tokenizer.json").is_file():
        vocab, merges = saved["model"]["vocab"], saved["model"].get("merges")
        algorithm = "WordPiece" if merges is None else "BPE"
        expect("tokenizer.json's model", saved["model"].setdefault("type", algorithm), algorithm)
    elif text.is_file():
        with reading(text):
            lines = text.read_text("utf-8").removesuffix("\n").split("\n")
            vocab = {line.rstrip(SPACES): i for i, line in enumerate(lines)}
    elif pairs.is_file() and (path / "vocab.json").is_file():
        vocab = read_json(path / "vocab.json")
        with reading(pairs):
            merges = [line for line in pairs.read_text("utf-8").split("\n")
                      if line and not line.startswith("#version")]
    else:
        raise FileNotFoundError(f"no tokenizer.json, no vocab.txt, and no vocab.json with "
                                f"merges.txt, in {path}")
    if not all(type(i) is int and 0 <= i < 10 ** 7 for i in vocab.values()):
        raise ValueError("the vocabulary's ids are not whole numbers from 0")
    if merges is not None:
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        if not all(len(x) == 2 and {*x, "".join(x)} <= vocab.keys() for x in merges):
            raise ValueError("a merge is not of two pieces in the vocabulary")
    return vocab, merges


def read_tokens(path, config, saved, vocab, kind):
    """The ids of all tokens, {"cls": "[CLS]", ...}, and the added tokens; completes `config`."""
    extras = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = {token["id"]: token for token in saved.get("added_tokens", [])}
    named = lambda: [key for key, value in config.items()
                     if key.endswith("_token") and isinstance(value, (str, dict))]
    if "added_tokens_decoder" in config:  # it replaces two older files
        decoder = {int(i): token for i, token in config["added_tokens_decoder"].items()}
        listed = decoder if SPECIAL[kind] else listed | decoder
    else:
        config |= read_json(path / "special_tokens_map.json")
        special = [token_of(token)["content"] for token in (*extras, *map(config.get, named()))]
        listed = {i: {"content": content, "special": content in special}
                  for content, i in read_json(path / "added_tokens.json").items()} | listed
    for name, content in SPECIAL[kind].items():
        config.setdefault(f"{name}_token", content)
    for name in BERT:
        if f"{name}_token" not in named():
            raise ValueError(f"tokenizer_config.json names no {name}_token")
    ids, added = dict(vocab), {}
    for i, token in sorted(listed.items()):
        token = token_of(token) | {"id": i}
        # transformers takes the vocabulary's id, or else the next one, whatever the file says.
        expect(f"the id of {token['content']!r:.40}", i, ids.get(token["content"], len(ids)))
        added[token["content"]], ids[token["content"]] = token, i
    extras = extras or config.get("additional_special_tokens") or []
    for token in (token_of(value, True) for value in (*map(config.get, named()), *extras)):
        if token["content"] not in ids:
            raise ValueError(f"the vocabulary has no special token {token['content']!r:.40}")
        added.setdefault(token["content"], token | {"id": ids[token["content"]]})
    special = {name: token_of(config[f"{name}_token"])["content"] for name in BERT}
    return ids, special, added.values()


def token_of(value, special=False):
    """An added token from a file, where a special one may be its text instead of a dict."""
    token = {"content": value, "special": True} if isinstance(value, str) else value
    for name in ("single_word", "rstrip"):
        expect(f"{name} of the added token {token['content']!r:.40}", token.get(name, False), False)
    return {"content": token["content"], "lstrip": token.get("lstrip", False),
            "normalized": token.get("normalized", not token.get("special", special))}


def follow(saved, config, special, ids):
    """Put tokenizer.json's flags into `config`; return its template for a pair."""
    flags = {"lowercase": "do_lower_case", "handle_chinese_chars": "tokenize_chinese_chars",
             "strip_accents": "strip_accents", "add_prefix_space": "add_prefix_space"}
    harmless = ("vocab", "merges", "fuse_unk", "trim_offsets", *flags)
    rules = {"normalizer": {"type": "BertNormalizer", "clean_text": True},
             "pre_tokenizer": {"type": "BertPreTokenizer"},
             "model": {"type": "WordPiece", "unk_token": special["unk"],
                       "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}
    if "merges" in saved["model"]:
        rules = {"normalizer": {}, "model": {"type": "BPE"},
                 "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    for part, rule in rules.items():
        given = saved[part] or {}
        config |= {flags[name]: value for name, value in given.items() if name in flags}
        # What is null, empty or false asks for nothing.
        given = {name: given[name] for name in given if given[name] and name not in harmless}
        expect(f"tokenizer.json's {part}", given, rule)

    processor, cls, sep = saved["post_processor"] or {}, special["cls"], special["sep"]
    templates = {"BertProcessing": BERT_PAIR, "RobertaProcessing": ROBERTA_PAIR}
    kind = expect("tokenizer.json's post_processor", processor.get("type"), "TemplateProcessing",
                  *templates)
    if kind in templates:
        tokens, template = [processor["cls"], processor["sep"]], templates[kind]
    else:
        tokens = [[token, *processor["special_tokens"][token]["ids"]] for token in (cls, sep)]
        names = {cls: "cls", sep: "sep", "A": "A", "B": "B"}
        template = [(names.get(part["id"]), part["type_id"]) for parts in ("single", "pair")
                    for piece in processor[parts] for part in piece.values()]
        expect("the post_processor's template", template,
               *(pair[:3] + pair for pair in (BERT_PAIR, ROBERTA_PAIR, MPNET_PAIR)))
        template = template[3:]
    expect("the post_processor's tokens", tokens, [[cls, ids[cls]], [sep, ids[sep]]])
    return template
