"""Token ids written down from Hugging Face's own tokenizers (transformers 5.23) for the small
vocabularies here."""

import json

import pytest

from data import tokenizer

WORDPIECE = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the a cafe caf\xe9 cat dog ##s ##ing run un ##affable ##aff "
    "##able . , ! ' \" - $ \u4e2d \u6587 "
    "x ##x Cat Run naive i ##i \u0130 9 ##9"
).split()
MERGES = [
    "t h",
    "th e",
    "\u0120 the",
    "\u0120 c",
    "\u0120c a",
    "\u0120ca t",
    "i n",
    "in g",
    "r u",
    "ru n",
    "d o",
    "do g",
    "\u0120 dog",
    "' s",
    "1 2",
    "\xc3 \xa9",
    "\u0120 \u0120",
    "c a",
    "ca f",
    "e l",
    "l l",
    "' ll",
    "\u010a \u010a",
]


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n", encoding="utf-8")

    def load(**settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tokenizer.load(tmp_path)

    return load


@pytest.fixture
def bpe(tmp_path):
    # GPT-2's alphabet: the printable bytes as they are, the others from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *sorted(alphabet),
        *(merge.replace(" ", "") for merge in MERGES),
        "<mask>",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8"
    )
    return tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "text, ids",
    [
        (
            "The cats, running!",
            [2, 5, 9, 11, 19, 1, 20, 3],
        ),  # "running" has no cutting: all of it unknown
        (
            "CAF\xc9 cafe\u0301 x\x00\ufffd\tcat\u200b's",
            [2, 7, 7, 27, 9, 21, 1, 3],
        ),  # accents, control characters, a zero-width space
        (
            'unaffable "dogs" - $9',
            [2, 14, 15, 22, 10, 11, 22, 23, 24, 35, 3],
        ),  # the longest piece first
        ("\u4e2d\u6587cat", [2, 25, 26, 9, 3]),  # each Chinese character is a word
        (
            "x" * 100 + " " + "x" * 101,
            [2, 27] + [28] * 99 + [1, 3],
        ),  # words of more than 100 characters are unknown
        ("the [MASK] runs", [2, 5, 4, 13, 11, 3]),
        ("\u0130i naive", [2, 32, 33, 31, 3]),
        ("", [2, 3]),
    ],
)
def test_wordpiece_is_huggingfaces(wordpiece, text, ids):
    assert wordpiece(do_lower_case=True).encode(text) == (ids, [0] * len(ids))


@pytest.mark.parametrize(
    "text, ids",
    [
        ("The cats, running!", [2, 1, 9, 11, 19, 1, 20, 3]),
        ("CAF\xc9 cafe\u0301 x\x00\ufffd\tcat\u200b's", [2, 1, 1, 27, 9, 21, 1, 3]),
        ("\u0130i naive", [2, 34, 33, 31, 3]),
    ],
)
def test_cased_wordpiece_is_huggingfaces(wordpiece, text, ids):
    assert wordpiece(do_lower_case=False).encode(text)[0] == ids


@pytest.mark.parametrize(
    "text, pair, max_len, ids, second",
    [
        ("the cat the cat", "a dog", 9, [2, 5, 9, 5, 9, 3, 6, 10, 3], 3),
        ("a dog", "the cat the cat", 9, [2, 6, 10, 3, 5, 9, 5, 9, 3], 5),
        ("the cat the cat", "a dog a dog", 8, [2, 5, 9, 3, 6, 10, 6, 3], 4),
        ("the cat the cat", "a dog a dog", 9, [2, 5, 9, 5, 3, 6, 10, 6, 3], 4),
        ("the cat the", "a", 5, [2, 5, 3, 6, 3], 2),
        ("the cat . . .", None, 5, [2, 5, 9, 18, 3], 0),
    ],
)
def test_truncation_is_huggingfaces_longest_first(wordpiece, text, pair, max_len, ids, second):
    assert wordpiece().encode(text, pair, max_len) == (
        ids,
        [0] * (len(ids) - second) + [1] * second,
    )


@pytest.mark.parametrize(
    "text, pair, max_len, ids",
    [
        ("the cat's running", None, 128, [0, 261, 265, 273, 224, 269, 81, 267, 2]),
        (
            "The  caf\xe9\n\n12 dogs we'll",
            None,
            128,
            [0, 55, 75, 72, 224, 264, 73, 275, 202, 202, 274, 272, 86, 224, 90, 72, 281, 2],
        ),
        (
            "cat\u3000the \xbd \u4e2d\U0001f600",
            None,
            128,
            [
                0,
                277,
                87,
                163,
                226,
                226,
                261,
                224,
                130,
                125,
                224,
                164,
                120,
                259,
                176,
                257,
                250,
                226,
                2,
            ],
        ),
        (" the   cat ", None, 128, [0, 262, 276, 265, 224, 2]),
        ("", None, 128, [0, 2]),
        ("the cat the cat", "the dog", 10, [0, 261, 265, 262, 265, 2, 2, 261, 272, 2]),
        ("the dog", "the cat the cat", 9, [0, 261, 272, 2, 2, 261, 265, 262, 2]),
        ("the the the the", "the the the the", 9, [0, 261, 262, 2, 2, 261, 262, 262, 2]),
        ("caf\xe9 12 12 12", None, 7, [0, 278, 275, 224, 274, 224, 2]),
    ],
)
def test_byte_level_bpe_is_huggingfaces(bpe, text, pair, max_len, ids):
    assert bpe.encode(text, pair, max_len) == (ids, [0] * len(ids))


@pytest.mark.parametrize(
    "text, pair, max_len, ids",
    [
        ("The cats.", None, 128, [0, 5, 7, 9, 10, 2]),
        ("the cat", "a dog, a bird", 128, [0, 5, 7, 2, 2, 6, 8, 11, 6, 4, 2]),
        ("the cat the cat", "a dog a dog", 10, [0, 5, 7, 5, 2, 2, 6, 8, 6, 2]),
    ],
)
def test_mpnets_wordpiece_is_huggingfaces(tmp_path, text, pair, max_len, ids):
    vocabulary = "<s> <pad> </s> <unk> [UNK] the a cat dog ##s . , <mask>".split()
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    assert tokenizer.load(tmp_path).encode(text, pair, max_len) == (ids, [0] * len(ids))


def test_the_special_tokens_ids_come_from_the_files(wordpiece, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["<go>", "cat", "[UNK]", "[SEP]", "[MASK]", "[PAD]"])
    )
    tok = wordpiece(cls_token={"content": "<go>"})
    assert tok.encode("cat") == ([0, 1, 3], [0, 0, 0]) and tok.pad_id == 5 and tok.mask_id == 4


def test_errors_name_the_folder_and_what_is_wrong_there(wordpiece, tmp_path):
    with pytest.raises(ValueError, match="max_len is 2: the special tokens alone need 2"):
        wordpiece().encode("the cat", max_len=2)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[MASK]\n")
    with pytest.raises(
        ValueError, match=r"%s: the vocabulary has no special token '\[SEP\]'" % tmp_path
    ):
        wordpiece()
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no vocab.txt, and no vocab.json with merges.txt"):
        wordpiece()
