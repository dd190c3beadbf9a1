"""SmolLM2, the model of ``specjax fetch smollm2``, where it was fetched: against transformers' reading of its file."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf, their_reading
from many_texts import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers

import specjax
from specjax.checkpoint.fetched import is_whole

pytestmark = pytest.mark.skipif(not is_whole("smollm2"), reason="smollm2 was not fetched: specjax fetch smollm2")
ROOT = Path(__file__).parent.parent
NEW_TOKENS = 24
GREEDY = specjax.Sampling(temperature=0.0)
PROMPTS = {
    "code": ["def mean(numbers):\n", "SELECT name, age FROM users WHERE", '{"name": "Ada", "born": 1815, "died":'],
    "prose": ["The capital of France is", "Once upon a time, in a small village,"],
    "chat": ["Why is the sky blue?", "Give me a recipe for pancakes.", "Translate to French: Good morning."],
    "numbers": ["1, 2, 3, 5, 8, 13,", "3 apples and 4 pears cost 3 * 2 + 4 * 3 ="],
    "scripts": ["Привет, как дела?", "你好 🙂 Émile said:"],
}


@pytest.fixture(scope="module")
def opened():
    return specjax.open("smollm2", "float32")


@pytest.fixture(scope="module")
def theirs(opened):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return their_reading(opened.path).eval()


def tokens_of(opened, kind, text):
    if kind == "chat":
        return opened.chat_template.encode(opened.tokenizer, [{"role": "user", "content": text}])
    return opened.tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_text_is_that_of_transformers(kind, opened, theirs):
    import torch

    prompts = [tokens_of(opened, kind, text) for text in PROMPTS[kind]]
    drafter = specjax.NGramDrafter(num_draft=3, min_n=1)
    made = specjax.generate(
        opened.model, prompts, drafter=drafter, fixed=True, sampling=GREEDY, max_new_tokens=NEW_TOKENS
    )
    for prompt, ours in zip(prompts, made.rows(), strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1}
        with torch.no_grad():  # without a mask, transformers would mask the ends of turns, which pad as well
            told = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        np.testing.assert_array_equal(ours, told[0].numpy())


def test_a_chat_ends_with_the_end_of_turn(opened):
    answer = specjax.Session(opened).chat([{"role": "user", "content": "Say hello."}], max_new_tokens=60, temperature=0)
    assert answer.finish_reason == "stop token" and opened.tokenizer.token_to_id("<|im_end|>") == answer.tokens[-1]
    assert "<|im_end|>" not in str(answer)


def test_a_stream_never_cuts_a_letter(opened):
    """Emoji are several tokens each; a piece of a stream ends with a whole letter."""
    text = "Smileys: 😀😃😄😁😀😃😄😁😀😃😄😁"
    assert len(opened.tokenizer.encode("😀").ids) > 1
    session = specjax.Session(opened, specjax.NGramDrafter(num_draft=5), fixed=True)
    pieces = list(session.stream(text, 30, temperature=0))
    whole = str(session.complete(text, 30, temperature=0))
    assert "".join(pieces) == whole and any(ord(letter) > 0xFFFF for letter in whole)
    assert len(pieces) > 4 and not any("\ufffd" in piece for piece in pieces)


def test_copies_are_drafted(opened):
    """Where the answer repeats the question, n-gram drafts are accepted; the text is that without drafts."""
    text = "The library opens at nine in the morning and closes at six in the evening."
    messages = [{"role": "user", "content": f"Repeat this text: {text} {text}"}]
    plain = specjax.Session(opened).chat(messages, 48, temperature=0)
    drafted = specjax.Session(opened, specjax.NGramDrafter(num_draft=5), fixed=True).chat(messages, 48, temperature=0)
    assert text in str(plain) and drafted.tokens == plain.tokens
    assert len(drafted.tokens) > 2.5 * drafted.rounds


def test_the_shipped_head_leaves_the_text_as_it_is(opened):
    """And more than a fifth of its first drafts are accepted."""
    prompts = [tokens_of(opened, "chat", text) for text in PROMPTS["chat"]]
    options = {"sampling": GREEDY, "max_new_tokens": 64, "fixed": True}
    drafter = specjax.load_drafter(f"eagle:{ROOT / 'checkpoints' / 'smollm2-eagle'}", opened.model, 4)
    plain, drafted = (specjax.generate(opened.model, prompts, drafter=each, **options) for each in (None, drafter))
    for one, other in zip(plain.rows(), drafted.rows(), strict=True):
        np.testing.assert_array_equal(one, other)
    accepted, tried = (np.asarray(x)[:, 0].sum() for x in (drafted.stats.accepted_at, drafted.stats.drafted_at))
    assert accepted > 0.2 * tried


def test_tokens_are_those_of_transformers(opened):
    """But for texts with numbers: transformers cuts as GPT-2 does; SmolLM and llama.cpp cut at each digit first."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(opened.path.parent, gguf_file=opened.path.name)
    fields = gguf.GGUFReader(opened.path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    original = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    original.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in TEXTS:
        if not any(unicodedata.category(letter)[0] == "N" for letter in text):
            assert opened.tokenizer.encode(text).ids == theirs(text)["input_ids"], text
        assert opened.tokenizer.encode(text).ids == original.encode(text).ids, text
        assert opened.tokenizer.decode(opened.tokenizer.encode(text).ids) == text
