"""Token ids written down from AutoTokenizer of transformers 5.24, for the folders written here."""

import json
import time

import pytest

from data import tokenizer

WORDPIECE = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a cafe caf\xe9 cat dog ##s ##ing run un ##affable ##aff "
    "##able . , ! ' \" - $ \u4e2d \u6587 x ##x Cat Run naive i ##i \u0130 9 ##9").split()
MPNET = "<s> <pad> </s> <unk> [UNK] the a cat dog ##s . , <mask>".split()
MERGES = (
    "t h|th e|\u0120 the|\u0120 c|\u0120c a|\u0120ca t|i n|in g|r u|ru n|d o|do g|\u0120 dog|' s|"
    "1 2|\xc3 \xa9|\u0120 \u0120|c a|ca f|e l|l l|' ll|\u010a \u010a").split("|")
# GPT-2's alphabet: the printable bytes as they are, the others from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = sorted(map(chr, [*PRINTABLE, *range(256, 512 - len(PRINTABLE))]))
BPE = ["<s>", "<pad>", "</s>", "<unk>", *ALPHABET, *(m.replace(" ", "") for m in MERGES), "<mask>"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "<pad>", "</s>", "<unk>", "<mask>")


def write(folder, kind, **files):
    """A folder with vocabulary files, config.json and the JSON files `files`."""
    folder.mkdir(exist_ok=True)
    if kind == "roberta":
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(BPE)}))
        lines = "\n".join(["#version: 0.2", *MERGES]) + "\n"
        (folder / "merges.txt").write_text(lines, encoding="utf-8")
    else:
        lines = "\n".join(WORDPIECE if kind == "bert" else MPNET) + "\n"
        (folder / "vocab.txt").write_text(lines, encoding="utf-8")
    for name, content in ({"config": {"model_type": kind}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(content, i, **flags):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True} | flags


def piece(name, token_type):
    return {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": token_type}}


SINGLE = [piece("[CLS]", 0), piece("A", 0), piece("[SEP]", 0)]
TEMPLATE = {"type": "TemplateProcessing", "single": SINGLE,
            "pair": [*SINGLE, piece("B", 1), piece("[SEP]", 1)],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}
                               for i, token in ((2, "[CLS]"), (3, "[SEP]"))}}
MODEL = {"bert": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100},
         "roberta": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                     "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                     "ignore_merges": False, "merges": [merge.split(" ") for merge in MERGES]}}


def saved(folder, kind, config=None, added_tokens=(), **parts):
    """A folder as transformers 5 saves it: tokenizer.json and tokenizer_config.json only."""
    tokens = {"bert": WORDPIECE, "mpnet": MPNET, "roberta": BPE}[kind]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = [added(token, i) for token, i in vocab.items() if token in SPECIAL]
    contents = {
        "truncation": None, "added_tokens": [*special, *added_tokens],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": MODEL["roberta" if kind == "roberta" else "bert"] | {"vocab": vocab},
        "post_processor": TEMPLATE if kind == "bert" else {
            "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
            "trim_offsets": True, "add_prefix_space": False}}
    if kind == "roberta":
        contents |= {"normalizer": None, "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": True}}
    for name, changes in parts.items():
        contents[name] = changes and (contents[name] or {}) | changes
    class_name = {"bert": "Bert", "mpnet": "MPNet", "roberta": "Roberta"}[kind] + "Tokenizer"
    names = ("[PAD] [UNK] [CLS] [SEP] [MASK]" if kind == "bert" else
             "<pad> [UNK] <s> </s> <mask>" if kind == "mpnet" else "<pad> <unk> <s> </s> <mask>")
    keys = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = dict(zip(keys, names.split())) | {"tokenizer_class": class_name} | (config or {})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids_of(folder, text, pair=None, max_len=128):
    return tokenizer.load(folder).encode(text, pair, max_len)[0]


# The algorithms ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, ids", [
    ("The cats, running!", [2, 5, 9, 11, 19, 1, 20, 3]),  # no pieces make "running": unknown
    # accents, control characters, a zero-width space
    ("CAF\xc9 cafe\u0301 x\x00\ufffd\tcat\u200b's", [2, 7, 7, 27, 9, 21, 1, 3]),
    ('unaffable "dogs" - $9', [2, 14, 15, 22, 10, 11, 22, 23, 24, 35, 3]),  # longest piece first
    ("\u4e2d\u6587cat", [2, 25, 26, 9, 3]),  # each Chinese character is a word
    ("x" * 100 + " " + "x" * 101, [2, 27] + [28] * 99 + [1, 3]),  # more than 100 are unknown
    ("the [MASK] runs", [2, 5, 4, 13, 11, 3]),
    ("\u0130i naive", [2, 32, 33, 31, 3]),
    ("", [2, 3]),
])
def test_wordpiece_is_huggingfaces(tmp_path, text, ids):
    folder = write(tmp_path, "bert", tokenizer_config={"do_lower_case": True})
    assert tokenizer.load(folder).encode(text) == (ids, [0] * len(ids))


@pytest.mark.parametrize("text, ids", [
    ("The cats, running!", [2, 1, 9, 11, 19, 1, 20, 3]),
    ("CAF\xc9 cafe\u0301 x\x00\ufffd\tcat\u200b's", [2, 1, 1, 27, 9, 21, 1, 3]),
    ("\u0130i naive", [2, 34, 33, 31, 3]),
])
def test_cased_wordpiece_is_huggingfaces(tmp_path, text, ids):
    assert ids_of(write(tmp_path, "bert", tokenizer_config={"do_lower_case": False}), text) == ids


@pytest.mark.parametrize("text, pair, max_len, ids", [
    ("the cat's running", None, 128, [0, 261, 265, 273, 224, 269, 81, 267, 2]),
    ("The  caf\xe9\n\n12 dogs we'll", None, 128, [0, 55, 75, 72, 224, 264, 73, 275, 202, 202, 274,
                                                  272, 86, 224, 90, 72, 281, 2]),
    ("cat\u3000the \xbd \u4e2d\U0001f600", None, 128, [
        0, 277, 87, 163, 226, 226, 261, 224, 130, 125, 224, 164, 120, 259, 176, 257, 250, 226, 2]),
    (" the   cat ", None, 128, [0, 262, 276, 265, 224, 2]),
    ("", None, 128, [0, 2]),
    ("the cat the cat", "the dog", 10, [0, 261, 265, 262, 265, 2, 2, 261, 272, 2]),
    ("the dog", "the cat the cat", 9, [0, 261, 272, 2, 2, 261, 265, 262, 2]),
    ("the the the the", "the the the the", 9, [0, 261, 262, 2, 2, 261, 262, 262, 2]),
    ("caf\xe9 12 12 12", None, 7, [0, 278, 275, 224, 274, 224, 2]),
])
def test_byte_level_bpe_is_huggingfaces(tmp_path, text, pair, max_len, ids):
    tok = tokenizer.load(write(tmp_path, "roberta"))
    assert tok.encode(text, pair, max_len) == (ids, [0] * len(ids))


@pytest.mark.parametrize("text, pair, max_len, ids", [
    ("The cats.", None, 128, [0, 5, 7, 9, 10, 2]),
    ("the cat", "a dog, a bird", 128, [0, 5, 7, 2, 2, 6, 8, 11, 6, 4, 2]),
    ("the cat the cat", "a dog a dog", 10, [0, 5, 7, 5, 2, 2, 6, 8, 6, 2]),
])
def test_mpnets_wordpiece_is_huggingfaces(tmp_path, text, pair, max_len, ids):
    tok = tokenizer.load(write(tmp_path, "mpnet"))
    assert tok.encode(text, pair, max_len) == (ids, [0] * len(ids))


@pytest.mark.parametrize("text, pair, max_len, ids, second", [
    ("the cat the cat", "a dog", 9, [2, 5, 9, 5, 9, 3, 6, 10, 3], 3),
    ("a dog", "the cat the cat", 9, [2, 6, 10, 3, 5, 9, 5, 9, 3], 5),
    ("the cat the cat", "a dog a dog", 8, [2, 5, 9, 3, 6, 10, 6, 3], 4),
    ("the cat the cat", "a dog a dog", 9, [2, 5, 9, 5, 3, 6, 10, 6, 3], 4),
    ("the cat the", "a", 5, [2, 5, 3, 6, 3], 2),
    ("the cat . . .", None, 5, [2, 5, 9, 18, 3], 0),
])
def test_truncation_is_huggingfaces_longest_first(tmp_path, text, pair, max_len, ids, second):
    types = [0] * (len(ids) - second) + [1] * second
    assert tokenizer.load(write(tmp_path, "bert")).encode(text, pair, max_len) == (ids, types)


@pytest.mark.parametrize("where", [
    {"config": {"truncation_side": "left"}}, {"truncation": {"direction": "Left"}}])
def test_truncation_on_the_left_keeps_the_last_tokens(tmp_path, where):
    folder = saved(tmp_path, "bert", **where)
    assert ids_of(folder, "the cat the dog a", max_len=5) == [2, 5, 10, 6, 3]
    assert ids_of(folder, "the cat the dog a cat", "a dog a", 9) == [2, 10, 6, 9, 3, 6, 10, 6, 3]


@pytest.mark.parametrize("word", ["ab" * 50_000, "the" * 33_333, "\U0001f600" * 25_000,
                                  " " * 100_000, "x <mask>" * 12_000])
def test_a_text_of_100000_letters_takes_less_than_two_seconds(tmp_path, word):
    for kind in ("bert", "roberta"):
        tok = tokenizer.load(write(tmp_path / kind, kind))
        began = time.perf_counter()
        tok.encode(word)
        assert time.perf_counter() - began < 2


# What the folder's files say ---------------------------------------------------------------------

PAIR = {"bert": ([2, 5, 9, 11, 19, 6, 10, 3, 5, 9, 3], 3),
        "mpnet": ([0, 5, 7, 9, 11, 6, 8, 2, 2, 5, 7, 2], 0),
        "roberta": ([0, 55, 75, 72, 265, 86, 15, 224, 68, 272, 2, 2, 261, 265, 2], 0)}


@pytest.mark.parametrize("kind", PAIR)
@pytest.mark.parametrize("config", [
    {}, {"tokenizer_class": "TokenizersBackend", "model_input_names": ["token_type_ids"]},
    {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_folders_saved_by_transformers_5_are_read(tmp_path, kind, config):
    ids, second = PAIR[kind]
    # Without model_input_names, PreTrainedTokenizerFast gives a model no token types.
    second = 0 if config.get("tokenizer_class") == "PreTrainedTokenizerFast" else second
    tok = tokenizer.load(saved(tmp_path, kind, config))
    types = [0] * (len(ids) - second) + [1] * second
    assert tok.encode("The cats, a dog", "the cat") == (ids, types)


def test_token_types_are_all_0_where_model_input_names_has_none(tmp_path):
    names = {"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids"]}
    folder = write(tmp_path, "bert", config={"model_type": "roberta"}, tokenizer_config=names)
    assert tokenizer.load(folder).encode("the cat", "a dog") == ([2, 5, 9, 3, 6, 10, 3], [0] * 7)


def test_berts_flags_are_tokenizer_configs_and_a_generic_classs_tokenizer_jsons(tmp_path):
    cased = {"lowercase": False}
    folder = saved(tmp_path, "bert", {"do_lower_case": True}, normalizer=cased)
    assert ids_of(folder, "The Cat cat") == [2, 5, 9, 9, 3]
    generic = {"do_lower_case": True, "tokenizer_class": "TokenizersBackend"}
    folder = saved(tmp_path, "bert", generic, normalizer=cased)
    assert ids_of(folder, "The Cat cat") == [2, 1, 29, 9, 3]


@pytest.mark.parametrize("kind, config, text, ids", [
    ("bert", {"strip_accents": False}, "Caf\xe9 cafe", [2, 8, 7, 3]),
    ("bert", {"tokenize_chinese_chars": False}, "\u4e2d\u6587 \u4e2d", [2, 1, 25, 3]),
    ("roberta", {"add_prefix_space": True}, "the cat<mask>the", [0, 262, 265, 283, 262, 2]),
    ("roberta", {"add_prefix_space": True}, "\u3000the", [0, 224, 163, 226, 226, 261, 2]),
])
def test_flags_are_followed(tmp_path, kind, config, text, ids):
    assert ids_of(write(tmp_path, kind, tokenizer_config=config), text) == ids


def test_special_tokens_map_wins_over_tokenizer_config_unless_that_lists_added_tokens(tmp_path):
    config, names = {"do_lower_case": True, "cls_token": "!"}, {"cls_token": {"content": "-"}}
    folder = write(tmp_path, "bert", tokenizer_config=config, special_tokens_map=names)
    assert ids_of(folder, "The cat") == [23, 5, 9, 3]
    config["added_tokens_decoder"] = {}
    folder = write(tmp_path, "bert", tokenizer_config=config)
    assert ids_of(folder, "The cat") == [20, 5, 9, 3]


LISTED = {"added_tokens_decoder": {"37": {"content": "Foo", "normalized": False, "special": True}}}
NORMAL = {"normalized": True, "special": False}


@pytest.mark.parametrize("make, kind, arguments, text, ids", [
    (write, "bert", {"added_tokens": {"Foo": 37}}, "a foo FOOs xFoo", [2, 6, 37, 37, 1, 27, 37, 3]),
    (write, "bert", {"tokenizer_config": LISTED, "added_tokens": {"bar": 37}}, "a foo Foos bar",
     [2, 6, 1, 37, 1, 1, 3]),
    (saved, "bert", {"added_tokens": [added("Foo", 37, **NORMAL), added("Caf\xe9s", 38)]},
     "a foo FOOs Caf\xe9s cafes", [2, 6, 37, 37, 1, 38, 7, 11, 3]),
    (saved, "bert", {"added_tokens": [added("foo", 37), added("foo bar", 38)]}, "foo bar foo",
     [2, 38, 37, 3]),
    (saved, "bert", {"added_tokens": [added("\u4e2d\u6587", 37, **NORMAL), added(" a", 38)]},
     "x\u4e2d\u6587x a", [2, 27, 37, 27, 38, 3]),
    # all-mpnet-base-v2 has such a <unk>
    (saved, "mpnet", {"added_tokens": [added("<unk>", 3, normalized=True)]},
     "<UNK> <unk> [UNK] [unk]", [0, 3, 3, 4, 4, 4, 4, 2]),
    # roberta-base has such a <mask>
    (saved, "roberta", {"added_tokens": [added("<mask>", 283, lstrip=True)]},
     "the  <mask> cat \u3000<mask>", [0, 261, 283, 265, 283, 2]),
    (write, "roberta", {}, "the  <mask> cat", [0, 261, 276, 283, 265, 2]),
])
def test_added_tokens_are_found_as_huggingface_finds_them(tmp_path, make, kind, arguments, text,
                                                          ids):
    assert ids_of(make(tmp_path, kind, **arguments), text) == ids


def test_added_tokens_count_in_the_vocabularys_size(tmp_path):
    tok = tokenizer.load(write(tmp_path, "bert", added_tokens={"foo": 37, "bar": 38}))
    assert tok.vocab_size == 39
    assert (tok.pad_id, tok.cls_id, tok.sep_id, tok.mask_id) == (0, 2, 3, 4)


GENERIC = {"tokenizer_class": "TokenizersBackend"}


@pytest.mark.parametrize("make, kind, arguments, words", [
    (write, "bert", {"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}},
     "tokenizer_class is 'BertJapaneseTokenizer', expected 'BertTokenizer' or"),
    (write, "bert", {"config": {"tokenizer_class": "CamembertTokenizer"}}, "'CamembertTokenizer'"),
    (write, "bert", {"config": {"model_type": "roberta"}}, "the vocabulary has no special token"),
    (saved, "roberta", {"config": {"tokenizer_class": "BertTokenizer"}}, "another algorithm's"),
    (write, "bert", {"tokenizer_config": {"do_lower_case": "no"}}, "do_lower_case is 'no'"),
    (write, "bert", {"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens"),
    (write, "bert", {"tokenizer_config": {"truncation_side": "up"}}, "truncation_side is 'up'"),
    (write, "bert", {"added_tokens": {"foo": 50}}, "the id of 'foo' is 50, expected 37"),
    (write, "bert", {"tokenizer_config": {"additional_special_tokens": ["<e>"]}},
     "the vocabulary has no special token '<e>'"),
    (write, "bert", {"tokenizer_config": {"mask_token": None}}, "names no mask_token"),
    (saved, "bert", {"added_tokens": [added("foo", 37, single_word=True)]},
     "single_word of the added token 'foo'"),
    (saved, "bert", {"added_tokens": [added("foo", 37, rstrip=True)]}, "rstrip of the added"),
    (saved, "bert", {"added_tokens": [added("\u0301", 37, **NORMAL)]}, "is empty"),
    (saved, "bert", {"model": {"type": "Unigram"}}, "tokenizer.json's model is 'Unigram'"),
    (saved, "bert", {"config": GENERIC, "normalizer": {"type": "NFC"}}, "normalizer is"),
    (saved, "bert", {"config": GENERIC, "pre_tokenizer": {"type": "Whitespace"}}, "'Whitespace'"),
    (saved, "bert", {"config": GENERIC, "post_processor": None}, "post_processor is None"),
    (saved, "bert", {"config": GENERIC, "post_processor": {"single": []}}, "template is"),
    (saved, "bert", {"config": GENERIC, "model": {"max_input_chars_per_word": 9}}, "model is"),
    (saved, "roberta", {"config": GENERIC, "model": {"ignore_merges": True}}, "ignore_merges"),
    (saved, "roberta", {"config": GENERIC, "normalizer": {"type": "NFC"}}, "normalizer is"),
    (saved, "bert", {"model": {"vocab": {"[PAD]": -1}}}, "ids are not whole numbers"),
    (saved, "bert", {"model": {"vocab": {"[PAD]": 0.5}}}, "ids are not whole numbers"),
    (saved, "bert", {"model": {"vocab": {"[PAD]": 10 ** 12}}}, "ids are not whole numbers"),
    (saved, "roberta", {"model": {"merges": ["y x z"]}}, "is not of two pieces"),
    (saved, "roberta", {"model": {"merges": [["y", "xyz"]]}}, "is not of two pieces"),
])
def test_what_is_not_implemented_or_damaged_is_refused_by_name(tmp_path, make, kind, arguments,
                                                               words):
    with pytest.raises(ValueError, match=words) as refused:
        tokenizer.load(make(tmp_path, kind, **arguments))
    assert str(tmp_path) in str(refused.value)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300


def test_missing_tokens_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="max_len is 2: the special tokens alone need 2"):
        ids_of(write(tmp_path, "bert"), "the cat", max_len=2)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[MASK]\n")
    with pytest.raises(ValueError, match=rf"{tmp_path}: .* has no special token '\[SEP\]'"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="vocab.txt: UnicodeDecodeError"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"no tokenizer.json, no vocab.txt.* in {tmp_path}"):
        tokenizer.load(tmp_path)
