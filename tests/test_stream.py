"""Text streams against decoding everything at once, and stop strings against searching the finished text."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from specjax.text.stream import TextStream

SPECIAL, ADDED = "<|end|>", "<added>"
# Pieces of characters of 2, 3 and 4 bytes, bytes that are never UTF-8, U+FFFD itself, and characters whole.
BYTE_PIECES = [b"\xc3", b"\xa9", b"\xe6", b"\x97", b"\xa5", b"\xf0", b"\x9f", b"\x99", b"\x82", b"\xff", b"\xed\xa0"]
BYTE_PIECES += [b"\xef\xbf\xbd", b"\xef", b"\xbf", b"\xbd", b"a", b"b", b" ", b"aab", b" b", b"\n", b"\xa5a\xe6\x97"]
WORD_PIECES = ["▁", "▁a", "▁▁", "a", "aab", "b", "▁b", "日", "\ufffd", "\n", ".", "▁."]
FALLBACK = [f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0x61)]


def byte_level_names():
    """Returns the character that stands for each byte: itself if it can be seen, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in seen)
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


def with_vocabulary(pieces, decoder):
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([SPECIAL])
    tokenizer.add_tokens([AddedToken(ADDED, special=False)])
    return tokenizer


NAMES = byte_level_names()
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
BYTE_LEVEL = ["".join(NAMES[byte] for byte in piece) for piece in BYTE_PIECES]
TOKENIZERS = {
    "byte-level": with_vocabulary(BYTE_LEVEL, decoders.ByteLevel()),
    "metaspace": with_vocabulary(WORD_PIECES, decoders.Metaspace()),
    "metaspace never": with_vocabulary(WORD_PIECES, decoders.Metaspace(prepend_scheme="never")),
    "llama": with_vocabulary(WORD_PIECES + FALLBACK, decoders.Sequence(LLAMA)),
    "gemma": with_vocabulary(WORD_PIECES + FALLBACK, decoders.Sequence(LLAMA[:3])),
    "wordpiece": with_vocabulary(["a", "##b", ".", "n't", "[x]"], decoders.WordPiece()),
    "suffix": with_vocabulary(["a</w>", "b", "ab</w>", "."], decoders.BPEDecoder()),
    "replace": with_vocabulary(["a", "b_", "_"], decoders.Replace(Regex("_"), " ")),
    "none": with_vocabulary(["a", "b"], None),
}
parametrized = pytest.mark.parametrize("name", TOKENIZERS)


def tokens_of(tokenizer):
    """Rows of tokens, among them special, added and unknown ones."""
    return st.lists(st.integers(0, tokenizer.get_vocab_size() + 1), max_size=40)


def after_shared(before, whole):
    """Returns what comes after the longest beginning that two texts share."""
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    return whole[shared:]


def expected(tokenizer, prompt, tokens):
    return after_shared(tokenizer.decode(prompt), tokenizer.decode(prompt + tokens))


def cut(text, stop):
    """Returns the text before a stop string, and that: the earliest, then the shortest."""
    for place in range(len(text)):
        for each in sorted(stop, key=len):
            if text.startswith(each, place):
                return text[:place], each
    return text, None


def streamed(stream, tokens, sizes):
    """Pushes tokens in parts of the given sizes, of which the last repeats; returns the pieces, that of the end too."""
    pieces, start = [], 0
    while start < len(tokens):
        size = sizes[min(len(pieces), len(sizes) - 1)]
        pieces.append(stream.push(tokens[start : start + size]))
        start += size
    return [*pieces, stream.finish()]


@parametrized
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_make_up_the_decoded_text(name, data):
    tokenizer = TOKENIZERS[name]
    prompt, tokens = data.draw(tokens_of(tokenizer)), data.draw(tokens_of(tokenizer))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1))
    stream = TextStream(tokenizer, prompt)
    assert "".join(streamed(stream, tokens, sizes)) == expected(tokenizer, prompt, tokens)
    assert stream.stopped is None


@parametrized
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_every_piece_is_certain(name, data):
    """What was shown stays: it begins the text, however that goes on. In the end little is held back."""
    tokenizer = TOKENIZERS[name]
    prompt, tokens = data.draw(tokens_of(tokenizer)), data.draw(tokens_of(tokenizer))
    stream, shown = TextStream(tokenizer, prompt), ""
    for count in range(1, len(tokens) + 1):
        shown += stream.push(tokens[count - 1 : count])
        now = expected(tokenizer, prompt, tokens[:count])
        assert now.startswith(shown) or shown == now == ""
        last = tokenizer.id_to_token(tokens[count - 1])
        if name == "byte-level" and "\ufffd" not in tokenizer.decode(prompt):
            assert now in (shown, shown + "\ufffd")
        elif last not in FALLBACK and last not in (None, SPECIAL) and not now.endswith("\ufffd"):
            assert shown == now


STOP_LETTERS = ["a", "b", "aab", " ", "日", "é", "\ufffd", " b", "\n"]


@pytest.mark.parametrize("name", ["byte-level", "llama", "metaspace"])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_stop_strings_cut_where_a_search_of_the_whole_text_finds_them(name, data):
    tokenizer = TOKENIZERS[name]
    prompt, tokens = data.draw(tokens_of(tokenizer)), data.draw(tokens_of(tokenizer))
    texts = st.lists(st.sampled_from(STOP_LETTERS), min_size=1, max_size=4).map("".join)
    stop = data.draw(st.lists(texts, max_size=4))
    whole = expected(tokenizer, prompt, tokens)
    if whole and data.draw(st.booleans()):  # a stop string that is there
        start = data.draw(st.integers(0, len(whole) - 1))
        stop.append(whole[start : start + data.draw(st.integers(1, 6))])
    stream = TextStream(tokenizer, prompt, stop)
    text = "".join(streamed(stream, tokens, data.draw(st.lists(st.integers(1, 9), min_size=1))))
    assert (text, stream.stopped) == cut(whole, stop)


@settings(deadline=None)
@given(data=st.data())
def test_text_is_held_back_exactly_where_a_stop_string_may_have_begun(data):
    tokenizer = TOKENIZERS["metaspace never"]
    words = [tokenizer.token_to_id(piece) for piece in ("a", "b", "aab")]
    tokens = data.draw(st.lists(st.sampled_from(words), max_size=30))
    stop = data.draw(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
    stream, shown = TextStream(tokenizer, stop=stop), ""
    for count, token in enumerate(tokens, 1):
        shown += stream.push([token])
        if stream.stopped is not None:
            break
        whole = tokenizer.decode(tokens[:count])
        ends = [whole[start:] for start in range(len(whole))]
        assert whole == shown + next((end for end in ends if any(each.startswith(end) for each in stop)), "")


def letters(text):
    tokenizer = TOKENIZERS["metaspace never"]
    return [tokenizer.token_to_id({" ": "▁"}.get(letter, letter)) for letter in text]


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("aaab", ("aab",), ["", "", "a", "", ""], "aab"),
        ("aaaa", ("aab",), ["", "", "a", "a", "aa"], None),
        ("abab", ("abb", "ba"), ["", "", "a", "", ""], "ba"),  # "ab" was not the beginning of "abb"
        ("ab", ("abb", "b"), ["", "", "a"], "b"),  # which only the end decides
        ("abb", ("abb", "b"), ["", "", "", ""], "abb"),  # the earliest beginning
        ("abb", ("abb", "ab"), ["", "", "", ""], "ab"),  # of one beginning, the shortest
        ("b.b", (".",), ["b", "", "", ""], "."),
        ("b a", ("b a b",), ["", "", "", "b a"], None),
    ],
)
def test_stop_strings_letter_by_letter(text, stop, pieces, stopped):
    stream = TextStream(TOKENIZERS["metaspace never"], stop=stop)
    assert streamed(stream, letters(text), [1]) == pieces
    assert stream.stopped == stopped


def test_stop_strings_count_only_where_they_begin_in_new_text():
    tokenizer = TOKENIZERS["metaspace never"]
    stream = TextStream(tokenizer, letters("a a"), stop=("ab",))
    assert stream.push(letters("b")) + stream.push(letters("ab.")) == "b"
    assert stream.stopped == "ab"


def test_characters_are_never_split_and_the_first_space_stays():
    tokenizer = TOKENIZERS["byte-level"]
    pieces = (b"\xe6", b"\x97", b"\xa5", b"\xf0", b"\x9f", b"\x99", b"\x82", b"\xe6")
    ids = [BYTE_PIECES.index(piece) for piece in pieces]
    assert streamed(TextStream(tokenizer), ids, [1]) == ["", "", "日", "", "", "", "🙂", "", "\ufffd"]
    tokenizer = TOKENIZERS["metaspace"]
    word = tokenizer.token_to_id("▁a")
    assert TextStream(tokenizer).push([word, word]) == "a a"
    assert TextStream(tokenizer, [word]).push([word, word]) == " a a"
    assert TextStream(tokenizer, [tokenizer.token_to_id(SPECIAL)]).push([word]) == "a"


def test_byte_tokens_wait_for_the_end_of_their_run():
    tokenizer = TOKENIZERS["llama"]
    names = ("<0xE6>", "<0x97>", "<0xA5>", "a", "<0xE6>", "<0x97>", "<0xFF>", "a")
    ids = [tokenizer.token_to_id(name) for name in names]
    assert streamed(TextStream(tokenizer), ids, [1]) == ["", "", "", "日a", "", "", "", "\ufffd\ufffd\ufffda", ""]


def test_a_run_of_byte_tokens_is_one_even_from_the_prompt_or_across_special_tokens():
    tokenizer = TOKENIZERS["llama"]
    three, broken, letter, special = (
        [tokenizer.token_to_id(name) for name in names]
        for names in (("<0xE6>", "<0x97>", "<0xA5>"), ("<0xFF>",), ("a",), (SPECIAL,))
    )
    assert "".join(streamed(TextStream(tokenizer, three * 5), broken + letter, [1])) == "\ufffd" * 16 + "a"
    assert "".join(streamed(TextStream(tokenizer, three * 5), letter, [1])) == "a"
    assert streamed(TextStream(tokenizer), [three[0], *special, *three[1:], *letter], [1])[-2:] == ["日a", ""]


@pytest.mark.parametrize("gap", [SPECIAL, None])
def test_many_tokens_without_text_leave_the_next_its_space(gap):
    tokenizer = TOKENIZERS["metaspace"]
    nothing = 10**6 if gap is None else tokenizer.token_to_id(gap)
    word = tokenizer.token_to_id("▁a")
    assert "".join(streamed(TextStream(tokenizer, [word]), [nothing] * 30 + [word], [1])) == " a"
    assert "".join(streamed(TextStream(tokenizer, [word] + [nothing] * 30), [word], [1])) == " a"


def test_a_stop_string_that_is_complete_does_not_wait_for_a_longer_one():
    stream = TextStream(TOKENIZERS["metaspace never"], stop=("abb", "ab"))
    assert (stream.push(letters("bab")), stream.stopped) == ("b", "ab")


def test_a_trained_tokenizer_gives_its_text_back():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "def f(naïve):\n    return '日本🙂'  # \ufffd\n"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 3, trainer)
    prompt, rest = tokenizer.encode(text[:9]).ids, tokenizer.encode(text[9:]).ids
    assert "".join(streamed(TextStream(tokenizer, prompt), rest, [1])) == text[9:]


def test_numpy_rows_and_prompts_longer_than_the_window():
    tokenizer = TOKENIZERS["llama"]
    word = tokenizer.token_to_id("▁a")
    stream = TextStream(tokenizer, np.full((500,), word, np.int32))
    assert stream.push(np.full((3,), word, np.int32)) == " a a a"
    assert stream.push(np.zeros((0,), np.int32)) == ""


@pytest.mark.parametrize("piece", [b"\xff", b"\xe6", b"a", b"\xef\xbf\xbd"])
def test_time_is_linear(piece):
    """Ten times the tokens may take no more than twenty times as long, also if the text ends with U+FFFD throughout."""
    tokenizer, token = TOKENIZERS["byte-level"], BYTE_PIECES.index(piece)

    def seconds(count):
        start = time.process_time()
        streamed(TextStream(tokenizer, stop=("\ufffd" * 5 + "a",)), [token] * count, [1])
        return time.process_time() - start

    few = min(seconds(400) for _ in range(3))
    assert seconds(4000) < 20 * few


def test_nothing_comes_after_the_end():
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, stop=("b",))
    assert stream.push([BYTE_PIECES.index(b"aab")]) == "aa"
    assert (stream.push([BYTE_PIECES.index(b"a")]), stream.finish(), stream.stopped) == ("", "", "b")
    stream = TextStream(tokenizer)
    assert (stream.push([BYTE_PIECES.index(b"\xe6")]), stream.finish(), stream.finish()) == ("", "\ufffd", "")
    with pytest.raises(ValueError, match="finished and takes no more tokens"):
        stream.push([0])


@pytest.mark.parametrize("stop", ["abc", ("a", ""), (1,), ("",)])
def test_stop_strings_that_cannot_be_met_are_refused(stop):
    with pytest.raises(ValueError, match="give a sequence of strings, none of them empty"):
        TextStream(TOKENIZERS["none"], stop=stop)


@pytest.mark.parametrize("tokens", [[-1], [0.5], [True], [[1, 2]], 3, [2**31], [2**70], ["a"]])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ValueError, match="give one row of integers"):
        TextStream(TOKENIZERS["none"]).push(tokens)
    with pytest.raises(ValueError, match="give one row of integers"):
        TextStream(TOKENIZERS["none"], tokens)
