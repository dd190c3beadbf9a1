"""SmolLM2, the model of ``specjax fetch smollm2``, where it was fetched: against transformers' reading of its file."""

import unicodedata

import numpy as np
import pytest
from gguf_files import gguf, their_reading
from many_texts import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers

import specjax
from specjax.checkpoint.fetched import is_whole

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(not is_whole("smollm2"), reason="smollm2 was not fetched: specjax fetch smollm2")
PROMPTS = ["def mean(numbers):\n", "The capital of France is", "Once upon a time, in a small village,"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def opened():
    return specjax.open("smollm2", "float32")


def test_greedy_text_is_that_of_transformers(opened):
    theirs = their_reading(opened.path).eval()
    prompts = [opened.tokenizer.encode(text).ids for text in PROMPTS]
    drafter = specjax.NGramDrafter(num_draft=3, min_n=1)
    greedy = specjax.Sampling(temperature=0.0)
    made = specjax.generate(
        opened.model, prompts, drafter=drafter, fixed=True, sampling=greedy, max_new_tokens=NEW_TOKENS
    )
    for prompt, ours in zip(prompts, made.rows(), strict=True):
        with torch.no_grad():
            told = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
        np.testing.assert_array_equal(ours, told[0].numpy())


def test_a_chat_ends_with_the_end_of_turn(opened):
    answer = specjax.Session(opened).chat([{"role": "user", "content": "Say hello."}], max_new_tokens=60, temperature=0)
    assert answer.finish_reason == "stop token" and opened.tokenizer.token_to_id("<|im_end|>") == answer.tokens[-1]
    assert "<|im_end|>" not in str(answer)


def test_tokens_are_those_of_transformers(opened):
    """But for texts with numbers: transformers cuts as GPT-2 does; SmolLM and llama.cpp cut at each digit first."""
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
