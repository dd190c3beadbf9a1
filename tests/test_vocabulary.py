"""Vocabularies: what bytes tokens stand for, which tokens two tokenizers share, and how the others are spelled."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from specjax.text import vocabulary
from specjax.text.vocabulary import VocabularyMap, match_vocabularies, token_bytes

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "py-14m"
CODE = """def mean(values):\n    return sum(values) / len(values)\n\n\nclass Stack:\n    def push(self, item):\n""" * 5
PROSE = """The quick brown fox jumps over the lazy dog; the dog, naïve as ever, went on sleeping in the sun. """ * 5
TEXTS = [CODE, PROSE, "", " two  spaces ", "tabs\tand\r\nlines", "naïve, 漢字 🙂 \u0301", "<s> and </s>, <0x41>, ▁"]


def byte_level(text, size=340, special=("<s>", "</s>")):
    """A byte-level BPE trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentencepiece(text, size=120, metaspace=False):
    """A BPE with byte fallback over text whose spaces are marks, laid out as Llama 2 does: ids 0 to 2 are special, 3
    to 258 are bytes. The mark in front of a text comes from a normalizer, or from Metaspace."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def permuted(tokenizer, seed):
    """The same tokens under other ids, and the new id of each."""
    spec = json.loads(tokenizer.to_str())
    new = np.random.default_rng(seed).permutation(len(spec["model"]["vocab"])).tolist()
    spec["model"]["vocab"] = {token: new[i] for token, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = new[token["id"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(spec)), new


TOKENIZERS = {
    "byte-level, code": byte_level(CODE),
    "byte-level, prose": byte_level(PROSE),
    "byte fallback": sentencepiece(PROSE),
    "byte fallback, Metaspace": sentencepiece(CODE, metaspace=True),
    "the shipped one": Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")),
}


# What tokens stand for.


@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_the_tokens_are_the_text(name, text):
    """Over every text, letters cut in their bytes included. Marks before the text are the tokenizer's own."""
    tokenizer = TOKENIZERS[name]
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    # A mark that the text itself holds reads as a space, there and in the tokenizer's own decoder.
    wanted = text if "byte-level" in name or "shipped" in name else re.sub("^(?=.)", " ", text).replace("▁", " ")
    if "Metaspace" in name and wanted.startswith("  "):
        wanted = wanted[1:]  # it puts a mark only where the text has none
    data = token_bytes(tokenizer)
    assert b"".join(data[i] for i in ids) == wanted.encode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokens_bytes_are_what_the_tokenizer_decodes(name):
    tokenizer = TOKENIZERS[name]
    data = token_bytes(tokenizer)
    assert len(data) == tokenizer.get_vocab_size()
    whole = tokenizer.token_to_id("a")
    for i, known in enumerate(data):
        if known is None:
            assert tokenizer.decode([i]) == "" and tokenizer.decode([i], skip_special_tokens=False) != ""
        elif b"\xef\xbf\xbd" not in known:
            # Behind an "a", so that no decoder strips the space of a token that begins a text.
            assert tokenizer.decode([whole, i]) == (b"a" + known).decode("utf-8", errors="replace")


def test_ids_without_a_token_stand_for_nothing():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert token_bytes(tokenizer) == [b"a", None, None, b"b"]


def test_added_tokens_are_read_as_text_unless_special():
    tokenizer = byte_level(PROSE, 260)
    tokenizer.add_tokens([AddedToken("    ", special=False), AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    assert token_bytes(tokenizer)[-3:] == [b"    ", b"<think>", None]


@pytest.mark.parametrize(
    "tokenizer",
    [Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))],
    ids=["words", "WordPiece"],
)
def test_unknown_kinds_are_refused(tokenizer):
    if isinstance(tokenizer.model, models.WordPiece):
        tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"unknown kind.*ByteLevel.*Metaspace"):
        token_bytes(tokenizer)


# Matching.


def matched(target, draft, target_size=None, draft_size=None):
    return match_vocabularies(
        target, draft, target_size or target.get_vocab_size(), draft_size or draft.get_vocab_size()
    )


def pieces_of(found, i):
    return found.pieces_vp[i, : found.num_pieces_v[i]].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_permuted_vocabulary_is_shared_whole(name):
    """All but the bytes that a letter spells too: text is written with the letter."""
    tokenizer = TOKENIZERS[name]
    draft, new = permuted(tokenizer, 3)
    found = matched(tokenizer, draft)
    unshared = np.flatnonzero(found.draft_of_v < 0)
    assert all(re.fullmatch("<0x[0-7].>", tokenizer.id_to_token(i)) for i in unshared)
    shared = np.flatnonzero(found.draft_of_v >= 0)
    np.testing.assert_array_equal(found.draft_of_v[shared], np.asarray(new)[shared])
    assert found.num_shared == len(shared) > 200
    assert found.pieces_vp.shape[1] == 1
    assert found.num_pieces_v.tolist() == [1] * tokenizer.get_vocab_size()


PAIRS = [(one, other) for one in TOKENIZERS for other in TOKENIZERS if one != other]


@pytest.mark.parametrize(("target", "draft"), PAIRS, ids=str)
def test_tokens_are_shared_by_what_they_decode_to(target, draft):
    """Tokens of whole letters, against a search by decoded text. What is not shared, a byte-level draft spells as it
    would a text of its own."""
    bytewise = "byte fallback" not in draft
    target, draft = TOKENIZERS[target], TOKENIZERS[draft]

    def decoded(tokenizer, i):
        return tokenizer.decode([tokenizer.token_to_id("a"), i])[1:]

    def is_byte(tokenizer, i):
        return tokenizer.id_to_token(i).startswith("<0x")

    written = {}
    for i in sorted(range(draft.get_vocab_size()), key=lambda i: (is_byte(draft, i), i)):
        written.setdefault(decoded(draft, i), i)
    found = matched(target, draft)
    for i in range(target.get_vocab_size()):
        text = decoded(target, i)
        if text and "\ufffd" not in text and not is_byte(target, i):
            assert found.draft_of_v[i] == written.get(text, -1), target.id_to_token(i)
            if bytewise and text not in written:
                assert pieces_of(found, i) == draft.encode(text).ids[-vocabulary.MAX_PIECES :]
    assert found.num_shared > 60


@pytest.mark.parametrize(("target", "draft"), PAIRS, ids=str)
def test_pieces_spell_the_token(target, draft):
    target, draft = TOKENIZERS[target], TOKENIZERS[draft]
    found, data, pieces = matched(target, draft), token_bytes(target), token_bytes(draft)
    assert found.pieces_vp.shape[1] <= vocabulary.MAX_PIECES
    cut = 0
    for i, known in enumerate(data):
        ids = pieces_of(found, i)
        if known is None:
            assert ids == ([found.draft_of_v[i]] if found.draft_of_v[i] >= 0 else [])
            continue
        spelled = b"".join(pieces[piece] for piece in ids)
        if len(ids) < vocabulary.MAX_PIECES:
            assert spelled == known, target.id_to_token(i)
        else:
            cut += spelled != known
            assert known.endswith(spelled)
    print(f"{found.num_shared} of {len(data)} shared, {cut} longer than {vocabulary.MAX_PIECES} pieces")
    assert (found.num_pieces_v > 0).sum() >= len(data) - 3


def by_hand(tokens, special=()):
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *tokens])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_matching_by_hand():
    """Ids that a tokenizer does not have are unshared, and special tokens are spelled only if shared."""
    target = by_hand(["a", "b", "ab", "Ġb", "abab", "ababa", "Ã©", "Ã", "x"], special=["<eos>", "<pad>"])
    draft = by_hand(["Ġ", "©", "Ã", "b", "a"], special=["<bos>", "<eos>"])
    found = match_vocabularies(target, draft, 13, 7)
    #                                 eos pad a  b  ab  Ġb abab ababa é  Ã  x
    assert found.draft_of_v.tolist() == [1, -1, 6, 5, -1, -1, -1, -1, -1, 4, -1, -1, -1]
    spelled = [[1], [], [6], [5], [6, 5], [2, 5], [6, 5, 6, 5], [5, 6, 5, 6], [4, 3], [4], [], [], []]
    assert [pieces_of(found, i) for i in range(13)] == spelled
    assert found.num_shared == 4
    assert (found.draft_of_v.dtype, found.pieces_vp.dtype, found.num_pieces_v.dtype) == (np.int32,) * 3


def test_sizes_below_the_tokenizers_hide_tokens():
    target, draft = by_hand(["a", "b", "ab"]), by_hand(["c", "b", "a"])
    assert match_vocabularies(target, draft, 2, 3).draft_of_v.tolist() == [2, 1]
    found = match_vocabularies(target, draft, 3, 2)
    assert found.draft_of_v.tolist() == [-1, 1, -1]
    assert [pieces_of(found, i) for i in range(3)] == [[], [1], [1]], "token 2 of the draft is not to be fed"


def test_a_special_token_is_not_matched_with_text():
    target = by_hand(["<", "s", ">", "<s>"], special=["<e>"])
    draft = by_hand(["<", "s", ">", "e", "<e>"], special=["<s>"])
    found = matched(target, draft)
    assert pieces_of(found, target.token_to_id("<e>")) == []
    assert found.draft_of_v.tolist() == [-1, 1, 2, 3, -1]
    assert pieces_of(found, 4) == [1, 2, 3], "as text, not as the draft's special token"


def test_letters_are_matched_with_letters_and_not_with_byte_fallback():
    """Where a vocabulary has an ASCII letter twice, as itself and as a byte, text is written with the letter."""
    bytewise, fallback = TOKENIZERS["byte-level, prose"], TOKENIZERS["byte fallback"]
    letter, byte = fallback.token_to_id("o"), fallback.token_to_id("<0x6F>")
    there, back = matched(bytewise, fallback), matched(fallback, bytewise)
    assert there.draft_of_v[bytewise.token_to_id("o")] == letter
    assert back.draft_of_v[letter] == bytewise.token_to_id("o")
    assert back.draft_of_v[byte] == -1
    assert pieces_of(back, byte) == [bytewise.token_to_id("o")]
    assert there.draft_of_v[bytewise.token_to_id("â")] == fallback.token_to_id("<0xE2>"), "part of a letter"


def test_the_lowest_of_equal_ids_counts():
    doubled, single = sentencepiece(PROSE), TOKENIZERS["byte-level, prose"]
    doubled.add_tokens([AddedToken(" ", normalized=False)])  # a second id for what "▁" stands for
    first, second, wanted = doubled.token_to_id("▁"), doubled.token_to_id(" "), single.token_to_id("Ġ")
    assert first < second
    found = matched(doubled, single)
    assert (found.draft_of_v[first], found.draft_of_v[second]) == (wanted, -1)
    assert pieces_of(found, second) == [wanted]
    assert matched(single, doubled).draft_of_v[wanted] == first


def test_padding_and_truncation_of_the_draft_tokenizer_do_not_matter():
    target, draft = TOKENIZERS["byte-level, code"], TOKENIZERS["byte-level, prose"]
    plain = matched(target, draft)
    padded = Tokenizer.from_str(draft.to_str())
    padded.enable_padding(length=9)
    padded.enable_truncation(1)
    np.testing.assert_array_equal(matched(target, padded).pieces_vp, plain.pieces_vp)
    assert padded.padding["length"] == 9, "the caller's tokenizer stays as it is"


def test_vocabularies_with_nothing_in_common_are_refused():
    one, other = by_hand(["a", "b"], special=["<s>"]), by_hand(["c"], special=["<s>"])
    with pytest.raises(ValueError, match=r"target's vocabulary \(3 ids\).*draft's \(2 ids\).*tokenizer has some"):
        matched(one, other)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ValueError, match=r"target_size is .* at least 1"):
        match_vocabularies(by_hand(["a"]), by_hand(["a"]), *sizes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0], [[0], [1]], [1]), r"shape \(1,\), pieces_vp \(2, 1\)"),
        (([0], [0], [1]), r"pieces_vp \(1,\)"),
        (([-2], [[0]], [1]), "negative id"),
        (([-1], [[-1]], [1]), "negative id"),
        (([-1], [[0, 1]], [3]), "outside of 0 to 2"),
        (([-1, 0], [[0, 1], [0, 1]], [1, 2]), "token 1 is shared"),
        (([2], [[1]], [1]), "token 0 is shared"),
    ],
)
def test_a_map_checks_itself(arrays, message):
    with pytest.raises(ValueError, match=message):
        VocabularyMap(*(np.asarray(array, np.int32) for array in arrays))
