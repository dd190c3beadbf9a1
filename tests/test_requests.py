"""Bad input gets a clear error before anything compiles; good input lands in shapes that other calls share."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.engine.loop import _generate_jit
from specjax.engine.request import bucket, lay_out

VOCAB = 8


def table(seed, vocab=VOCAB):
    return specjax.testing.table_model(np.random.default_rng(seed).normal(size=(vocab, vocab)))


TARGET, DRAFT = table(0), table(1)
PROMPT = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
NAN, INF = float("nan"), float("inf")
Sampling = specjax.Sampling

# Everything that JAX traces, lowers or compiles in this process.
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **kwargs: compiled.append(event) if event.startswith("/jax/core/compile/") else None
)


def call(function, **changed):
    if inspect.isfunction(changed.get("drafter")):  # one that might be refused as it is made
        changed["drafter"] = changed["drafter"]()
    return function(**{"target": TARGET, "prompt_bt": PROMPT, "max_new_tokens": 4, **changed})


def assert_says(error, words):
    for word in words:
        assert word in str(error), f"{word!r} is not in {str(error)!r}"


# name -> what changes in the call, and what the message must contain: the value, the limit and the cure.
BAD = {
    # Prompts.
    "no prompts": ({"prompt_bt": []}, ["prompt_bt", "(0,)", "pad_prompts"]),
    "an empty prompt": ({"prompt_bt": [[]]}, ["prompt_bt", "(1, 0)", "pad_prompts"]),
    "empty prompts": ({"prompt_bt": np.zeros((2, 0), np.int32)}, ["prompt_bt", "(2, 0)", "pad_prompts"]),
    "zero rows": ({"prompt_bt": np.zeros((0, 3), np.int32)}, ["prompt_bt", "(0, 3)", "pad_prompts"]),
    "a number as prompt": ({"prompt_bt": 3}, ["prompt_bt", "()", "[rows, tokens]"]),
    "1-D prompt": ({"prompt_bt": [1, 2, 3]}, ["prompt_bt", "(3,)", "[rows, tokens]"]),
    "3-D prompt": ({"prompt_bt": [[[1, 2]]]}, ["prompt_bt", "(1, 1, 2)", "[rows, tokens]"]),
    "float prompt": ({"prompt_bt": [[1.0, 2.0]]}, ["prompt_bt", "float64", "integers"]),
    "float32 prompt on the device": ({"prompt_bt": jnp.ones((1, 3))}, ["prompt_bt", "float32", "integers"]),
    "NaN in the prompt": ({"prompt_bt": [[1, NAN]]}, ["prompt_bt", "float64", "integers"]),
    "bool prompt": ({"prompt_bt": [[True, False]]}, ["prompt_bt", "bool", "integers"]),
    "text as prompt": ({"prompt_bt": "def f(x):"}, ["prompt_bt", "integers"]),
    "texts as prompts": ({"prompt_bt": ["def", "f(x)"]}, ["prompt_bt", "integers"]),
    "None as prompt": ({"prompt_bt": None}, ["prompt_bt", "integers"]),
    "ragged prompts": ({"prompt_bt": [[1, 2], [3]]}, ["prompt_bt", "rectangular", "pad_prompts"]),
    "token above the vocabulary": ({"prompt_bt": [[1, 2], [3, 8]]}, ["prompt 1", "token 8", "0 to 7", "tokenizer"]),
    "token below 0": ({"prompt_bt": [[1, -1]]}, ["prompt 0", "token -1", "0 to 7", "tokenizer"]),
    "token beyond int32": ({"prompt_bt": [[1, 2**40]]}, ["prompt 0", f"token {2**40}", "0 to 7", "tokenizer"]),
    # Lengths.
    "length 0": ({"prompt_length_b": [3, 0]}, ["prompt 1", "length 0", "1 to 3"]),
    "negative length": ({"prompt_length_b": [-1, 3]}, ["prompt 0", "length -1", "1 to 3"]),
    "length above the width": ({"prompt_length_b": [3, 4]}, ["prompt 1", "length 4", "1 to 3"]),
    "too few lengths": ({"prompt_length_b": [3]}, ["prompt_length_b", "(1,)", "(2,)"]),
    "one length for all": ({"prompt_length_b": 3}, ["prompt_length_b", "()", "(2,)"]),
    "2-D lengths": ({"prompt_length_b": [[3, 3]]}, ["prompt_length_b", "(1, 2)", "(2,)"]),
    "float lengths": ({"prompt_length_b": [3.0, 3.0]}, ["prompt_length_b", "float64", "integers"]),
    "NaN lengths": ({"prompt_length_b": [NAN, 3]}, ["prompt_length_b", "float64", "integers"]),
    # Limits.
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
    "negative new tokens": ({"max_new_tokens": -4}, ["max_new_tokens", "-4", "at least 1"]),
    "float new tokens": ({"max_new_tokens": 4.0}, ["max_new_tokens", "4.0", "integer"]),
    "NaN new tokens": ({"max_new_tokens": NAN}, ["max_new_tokens", "nan", "integer"]),
    "True new tokens": ({"max_new_tokens": True}, ["max_new_tokens", "True", "integer"]),
    "None new tokens": ({"max_new_tokens": None}, ["max_new_tokens", "None", "integer"]),
    "new tokens per row": ({"max_new_tokens": [4, 4]}, ["max_new_tokens", "[4, 4]", "Sampling.max_new_tokens"]),
    "new tokens beyond int32": ({"max_new_tokens": 2**31}, ["max_new_tokens", str(2**31)]),
    "target too short": (
        {"target": TARGET.replace(max_positions=6)},
        ["3 tokens", "max_new_tokens 4", "7 positions", "target has 6", "shorten"],
    ),
    "drafter too short": (
        {"drafter": specjax.ModelDrafter(DRAFT.replace(max_positions=6))},
        ["3 tokens", "max_new_tokens 4", "7 positions", "drafter has 6", "shorten"],
    ),
    "slots one short": ({"slots": 7}, ["slots is 7", "need 8", "more slots"]),
    "slots one short for drafts": (
        {"slots": 10, "drafter": specjax.NGramDrafter(num_draft=3)},
        ["slots is 10", "3 drafts", "need 11", "more slots"],
    ),
    "prompt longer than slots": (
        {"prompt_bt": np.ones((1, 20), np.int32), "slots": 16},
        ["slots is 16", "20 tokens", "need 25", "more slots"],
    ),
    "padding wider than slots": (
        {"prompt_bt": np.ones((1, 20), np.int32), "prompt_length_b": [3], "slots": 16},
        ["slots is 16", "padded to 20", "need 20", "more slots"],
    ),
    "negative slots": ({"slots": -1}, ["slots", "-1", "8"]),
    "float slots": ({"slots": 64.0}, ["slots", "64.0", "integer"]),
    "text as slots": ({"slots": "64"}, ["slots", "'64'", "integer"]),
    "True slots": ({"slots": True}, ["slots", "True"]),
    # Stop tokens.
    "stop token above the vocabulary": ({"stop_tokens": [2, 8]}, ["stop_tokens", "8", "0 to 7"]),
    "stop token below 0": ({"stop_tokens": (-1,)}, ["stop_tokens", "-1", "0 to 7"]),
    "stop token beyond int32": ({"stop_tokens": [2**40]}, ["stop_tokens", str(2**40), "0 to 7"]),
    "float stop tokens": ({"stop_tokens": [2.0]}, ["stop_tokens", "float64", "integers"]),
    "bool stop tokens": ({"stop_tokens": [True]}, ["stop_tokens", "bool", "integers"]),
    "NaN stop tokens": ({"stop_tokens": NAN}, ["stop_tokens", "float64", "integers"]),
    "text as stop tokens": ({"stop_tokens": "\n"}, ["stop_tokens", "integers"]),
    "None stop tokens": ({"stop_tokens": None}, ["stop_tokens", "integers"]),
    "stop tokens per row": ({"stop_tokens": [[1], [2]]}, ["stop_tokens", "(2, 1)", "flat"]),
    # Models.
    "text as target": ({"target": "checkpoints/py-14m"}, ["target", "str", "specjax.load"]),
    "None as target": ({"target": None}, ["target", "NoneType", "specjax.load"]),
    "parameters as target": ({"target": {"weight": np.ones(3)}}, ["target", "dict", "specjax.load"]),
    "a drafter as target": ({"target": specjax.NGramDrafter()}, ["target", "NGramDrafter", "specjax.load"]),
    "text as drafter": ({"drafter": "ngram"}, ["drafter", "str"]),
    "a model as drafter": ({"drafter": DRAFT}, ["drafter", "LanguageModel", "ModelDrafter"]),
    "a class as drafter": ({"drafter": specjax.NGramDrafter}, ["drafter", "NGramDrafter"]),
    "a drafter around text": ({"drafter": specjax.ModelDrafter("checkpoints/py-14m")}, ["drafter", "vocab_size"]),
    "another vocabulary": ({"drafter": specjax.ModelDrafter(table(1, 9))}, ["9 tokens", "8", "tokenizer"]),
    "no drafts": (
        {"drafter": lambda: specjax.ModelDrafter(DRAFT, num_draft=0)},
        ["num_draft is 0", "at least 1", "None"],
    ),
    "no looked-up drafts": (
        {"drafter": lambda: specjax.NGramDrafter(num_draft=0)},
        ["num_draft is 0", "at least 1", "None"],
    ),
    "negative drafts": (
        {"drafter": lambda: specjax.NGramDrafter(num_draft=-2)},
        ["num_draft is -2", "at least 1", "None"],
    ),
    "float drafts": ({"drafter": lambda: specjax.ModelDrafter(DRAFT, num_draft=2.0)}, ["num_draft", "2.0", "integer"]),
    "True drafts": ({"drafter": lambda: specjax.ModelDrafter(DRAFT, num_draft=True)}, ["num_draft", "True", "integer"]),
    # Rules and keys.
    "text as rule": ({"verify": "block"}, ["verify", "'block'", "specjax.verify"]),
    "None as rule": ({"verify": None}, ["verify", "None", "specjax.verify"]),
    "a bare function as rule": ({"verify": specjax.verify.token_thresholds}, ["verify", "specjax.verify"]),
    "a number as key": ({"key": 5}, ["key", "5", "jax.random.key"]),
    "a NumPy number as key": ({"key": np.uint32(5)}, ["key", "5", "jax.random.key"]),
    "text as key": ({"key": "5"}, ["key", "'5'", "jax.random.key"]),
    "several keys": ({"key": jax.random.split(jax.random.key(0), 2)}, ["key", "(2,)", "jax.random.key"]),
    "floats as key": ({"key": jnp.ones(2)}, ["key", "float32", "jax.random.key"]),
    # Sampling.
    "a dict as sampling": ({"sampling": {"temperature": 1.0}}, ["sampling", "dict", "specjax.Sampling"]),
    "a number as sampling": ({"sampling": 0.5}, ["sampling", "float", "specjax.Sampling"]),
    "None as sampling": ({"sampling": None}, ["sampling", "NoneType", "specjax.Sampling"]),
    "a class as sampling": ({"sampling": Sampling}, ["sampling", "specjax.Sampling"]),
    "negative temperature": ({"sampling": Sampling(temperature=-0.5)}, ["temperature", "-0.5", "at least 0", "greedy"]),
    "top_p 0": ({"sampling": Sampling(top_p=0.0)}, ["top_p", "0.0", "above 0", "at most 1"]),
    "top_p above 1": ({"sampling": Sampling(top_p=1.5)}, ["top_p", "1.5", "above 0", "at most 1"]),
    "negative top_p": ({"sampling": Sampling(top_p=-0.1)}, ["top_p", "-0.1", "above 0", "at most 1"]),
    "min_p above 1": ({"sampling": Sampling(min_p=1.5)}, ["min_p", "1.5", "from 0", "to 1"]),
    "negative min_p": ({"sampling": Sampling(min_p=-0.1)}, ["min_p", "-0.1", "from 0", "to 1"]),
    "negative top_k": ({"sampling": Sampling(top_k=-1)}, ["top_k", "-1", "at least 0"]),
    "float top_k": ({"sampling": Sampling(top_k=3.0)}, ["top_k", "float64", "integers"]),
    "NaN top_k": ({"sampling": Sampling(top_k=NAN)}, ["top_k", "float64", "integers"]),
    "top_k beyond int32": ({"sampling": Sampling(top_k=2**31)}, ["top_k", str(2**31)]),
    "repetition_penalty 0": ({"sampling": Sampling(repetition_penalty=0)}, ["repetition_penalty", "0", "above 0"]),
    "negative repetition_penalty": (
        {"sampling": Sampling(repetition_penalty=-1.2)},
        ["repetition_penalty", "-1.2", "above 0"],
    ),
    "negative seed": ({"sampling": Sampling(seed=-1)}, ["seed", "-1", "0 to 2**32 - 1"]),
    "seed of 33 bits": ({"sampling": Sampling(seed=2**32)}, ["seed", str(2**32), "0 to 2**32 - 1"]),
    "float seed": ({"sampling": Sampling(seed=1.0)}, ["seed", "float64", "integers"]),
    "NaN seed": ({"sampling": Sampling(seed=NAN)}, ["seed", "float64", "integers"]),
    "a key as seed": ({"sampling": Sampling(seed=jax.random.key(0))}, ["seed", "integers"]),
    "no new tokens in a row": (
        {"sampling": Sampling(max_new_tokens=[4, 0])},
        ["max_new_tokens", "[4, 0]", "at least 1"],
    ),
    "float new tokens in a row": ({"sampling": Sampling(max_new_tokens=[4.0, 1.0])}, ["max_new_tokens", "float64"]),
    "new tokens in a row beyond int32": ({"sampling": Sampling(max_new_tokens=2**31)}, ["max_new_tokens", str(2**31)]),
    "logit_bias of another vocabulary": (
        {"sampling": Sampling(logit_bias=np.zeros(7))},
        ["logit_bias", "(7,)", "(8,)"],
    ),
    "logit_bias of other rows": (
        {"sampling": Sampling(logit_bias=np.zeros((3, 8)))},
        ["logit_bias", "(3, 8)", "(2, 8)"],
    ),
    "logit_bias by token": ({"sampling": Sampling(logit_bias={3: 1.0})}, ["logit_bias"]),
    "logit_bias ragged": ({"sampling": Sampling(logit_bias=[[0.0] * 8, [0.0]])}, ["logit_bias", "rectangular"]),
    "logit_bias of text": ({"sampling": Sampling(logit_bias=["a"] * 8)}, ["logit_bias", "number"]),
    "NaN in logit_bias": ({"sampling": Sampling(logit_bias=[0.0] * 7 + [NAN])}, ["logit_bias", "nan"]),
    "inf in logit_bias": ({"sampling": Sampling(logit_bias=[0.0] * 7 + [INF])}, ["logit_bias", "inf"]),
    "logit_bias of 1e39, inf in float32": (
        {"sampling": Sampling(logit_bias=[0.0] * 7 + [1e39])},
        ["logit_bias", "inf"],
    ),
    "logit_bias bans all tokens of a row": (
        {"sampling": Sampling(logit_bias=np.where([[False], [True]], -INF, np.zeros((2, 8))))},
        ["logit_bias", "-inf", "not all"],
    ),
    # What float32 rounds out of its range.
    "top_p 1e-50, 0 in float32": ({"sampling": Sampling(top_p=1e-50)}, ["top_p", "above 0"]),
    "repetition_penalty 1e-50, 0 in float32": (
        {"sampling": Sampling(repetition_penalty=1e-50)},
        ["repetition_penalty", "above 0"],
    ),
    "repetition_penalty 1e39, inf in float32": (
        {"sampling": Sampling(repetition_penalty=1e39)},
        ["repetition_penalty", "finite"],
    ),
    "presence_penalty 1e39, inf in float32": (
        {"sampling": Sampling(presence_penalty=1e39)},
        ["presence_penalty", "finite"],
    ),
    "temperature 1e39, inf in float32": ({"sampling": Sampling(temperature=1e39)}, ["temperature", "finite"]),
}

# What is wrong for every parameter of its kind.
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed", "max_new_tokens")
for name in FLOATS:
    BAD[f"NaN {name}"] = ({"sampling": Sampling(**{name: NAN})}, [name, "nan"])
    BAD[f"NaN {name} in a row"] = ({"sampling": Sampling(**{name: [1.0, NAN]})}, [name, "[1.0, nan]"])
    BAD[f"NaN {name} on the device"] = (
        {"sampling": Sampling(**{name: jnp.asarray([NAN, 1.0])})},
        [name, "[nan, 1.0]"],
    )
    BAD[f"inf {name}"] = ({"sampling": Sampling(**{name: INF})}, [name, "inf"])
    BAD[f"None {name}"] = ({"sampling": Sampling(**{name: None})}, [name, "None"])
    BAD[f"text as {name}"] = ({"sampling": Sampling(**{name: "1.0"})}, [name, "1.0", "number"])
    BAD[f"complex {name}"] = ({"sampling": Sampling(**{name: 1j})}, [name, "number"])
for name in ("top_k", "seed"):
    BAD[f"None {name}"] = ({"sampling": Sampling(**{name: None})}, [name, "integers"])
for name in INTEGERS:
    BAD[f"text as {name}"] = ({"sampling": Sampling(**{name: "1"})}, [name, "integers"])
    BAD[f"bool {name}"] = ({"sampling": Sampling(**{name: True})}, [name, "bool", "integers"])
    BAD[f"{name} beyond 64 bits"] = ({"sampling": Sampling(**{name: 2**70})}, [name])
for name in (*FLOATS, *INTEGERS):
    for shape in ((3,), (1,), (2, 1)):
        value = np.ones(shape, np.int32 if name in INTEGERS else np.float32)
        BAD[f"{name} of shape {shape}"] = ({"sampling": Sampling(**{name: value})}, [name, str(shape), "(2,)"])
    BAD[f"ragged {name}"] = ({"sampling": Sampling(**{name: [[1], [1, 1]]})}, [name])


@pytest.mark.parametrize("function", [specjax.generate, specjax.stream, specjax.prefill], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("changed", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_a_clear_error_before_anything_compiles(changed, words, function):
    if "verify" in changed and function is specjax.prefill:
        pytest.skip("prefill verifies nothing")
    compiled.clear()
    with pytest.raises((ValueError, TypeError)) as caught:
        call(function, **changed)
    assert compiled == []
    assert_says(caught.value, words)


@pytest.mark.parametrize("rounds", [0, -1, 1.0, True, None, "1"])
def test_stream_counts_rounds_in_integers(rounds):
    compiled.clear()
    with pytest.raises(ValueError) as caught:
        call(specjax.stream, rounds=rounds)
    assert compiled == []
    assert_says(caught.value, ["rounds", repr(rounds), "at least 1"])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"min_n": 0}, ["min_n", "0", "1 <="]),
        ({"min_n": 5}, ["min_n", "5", "max_n", "4"]),
        ({"min_n": 1.5}, ["min_n", "1.5", "integer"]),
        ({"max_n": 4.0}, ["max_n", "4.0", "integer"]),
        ({"max_n": "4"}, ["max_n", "'4'", "integer"]),
    ],
    ids=str,
)
def test_lookup_sizes_are_checked_when_given(sizes, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        specjax.NGramDrafter(**sizes)
    assert_says(caught.value, words)


# Inside the caller's own jit, shapes and dtypes are known and values are not.
TRACED = {
    "1-D prompt": ({"prompt_bt": PROMPT[0]}, ["prompt_bt", "(3,)", "[rows, tokens]"]),
    "float prompt": ({"prompt_bt": PROMPT.astype(np.float32)}, ["prompt_bt", "float32", "integers"]),
    "too few lengths": ({"prompt_length_b": np.array([3])}, ["prompt_length_b", "(1,)", "(2,)"]),
    "float lengths": ({"prompt_length_b": np.array([3.0, 3.0])}, ["prompt_length_b", "float32", "integers"]),
    "temperatures of other rows": ({"sampling": Sampling(temperature=np.ones(3))}, ["temperature", "(3,)", "(2,)"]),
    "float top_k": ({"sampling": Sampling(top_k=np.ones(2))}, ["top_k", "float32", "integers"]),
    "logit_bias of another vocabulary": (
        {"sampling": Sampling(logit_bias=np.zeros(7))},
        ["logit_bias", "(7,)", "(8,)"],
    ),
    "2-D stop tokens": ({"stop_tokens": np.array([[1]])}, ["stop_tokens", "(1, 1)", "flat"]),
    "another vocabulary": ({"drafter": specjax.ModelDrafter(table(1, 9))}, ["9 tokens", "8", "tokenizer"]),
}


@pytest.mark.parametrize(("changed", "words"), TRACED.values(), ids=TRACED.keys())
def test_bad_shapes_and_dtypes_are_found_inside_jit(changed, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        jax.eval_shape(lambda changed: call(specjax.generate, **changed), changed)
    assert_says(caught.value, words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"slots": 7}, ["slots is 7", "need 8"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0", "at least 1"]),
        ({"sampling": Sampling(temperature=-1.0)}, ["temperature", "-1.0", "at least 0"]),
        ({"stop_tokens": (8,)}, ["stop_tokens", "8", "0 to 7"]),
    ],
    ids=["slots", "max_new_tokens", "temperature", "stop_tokens"],
)
def test_values_known_inside_jit_are_checked(changed, words):
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(lambda prompt_bt: call(specjax.generate, prompts=prompt_bt, **changed), PROMPT)
    assert_says(caught.value, words)


# Good input.


def tokens(**changed):
    generation = call(specjax.generate, **changed)
    return [
        np.asarray(row)[:length].tolist() for row, length in zip(generation.tokens, generation.lengths, strict=True)
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_bt": PROMPT.tolist()},
        {"prompt_bt": PROMPT.astype(np.uint8)},
        {"prompt_bt": PROMPT.astype(np.int64)},
        {"prompt_bt": jnp.asarray(PROMPT)},
        {"prompt_bt": list(PROMPT)},
        {"prompt_length_b": [3, 3]},
        {"prompt_bt": np.pad(PROMPT, ((0, 0), (0, 5)), constant_values=-7), "prompt_length_b": np.array([3, 3])},
        {"max_new_tokens": np.int64(4)},
        {"slots": 128},
        {"stop_tokens": []},
        {"stop_tokens": np.zeros((0,))},
        {"key": jax.random.key(0)},
        {"sampling": Sampling(temperature=np.float64(1), top_k=np.int8(0), top_p=1, seed=np.array([0, 1]))},
        {"sampling": Sampling(max_new_tokens=4, logit_bias=None)},
    ],
    ids=str,
)
def test_the_same_call_in_other_words(changed):
    assert tokens(**changed) == tokens()


def test_stop_tokens_may_be_one_number_or_a_range():
    assert tokens(stop_tokens=5) == tokens(stop_tokens=[5])
    stopped = tokens(stop_tokens=range(VOCAB))
    assert [len(row) for row in stopped] == [4, 4]


def test_the_fewest_slots_that_are_accepted_suffice():
    assert tokens(slots=8) == tokens()


def test_a_key_of_the_old_kind_is_as_good():
    assert tokens(key=jax.random.PRNGKey(3)) == tokens(key=jax.random.key(3))
    assert tokens(key=jax.random.key(3), max_new_tokens=20) != tokens(max_new_tokens=20)


@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1, 2**31, 2**32 - 2])
def test_one_seed_gives_row_i_the_seed_plus_i(seed):
    several = tokens(sampling=Sampling(seed=np.array([seed, seed + 1])), max_new_tokens=20)
    assert tokens(sampling=Sampling(seed=seed), max_new_tokens=20) == several
    assert tokens(sampling=Sampling(seed=[seed, seed + 1]), max_new_tokens=20) == several


def test_the_largest_seed_is_followed_by_zero():
    assert tokens(sampling=Sampling(seed=2**32 - 1)) == tokens(sampling=Sampling(seed=[2**32 - 1, 0]))


# Buckets.


def test_buckets_are_powers_of_two():
    assert [bucket(size, 16) for size in (1, 15, 16, 17, 32, 33, 100)] == [16, 16, 16, 32, 32, 64, 128]
    assert [bucket(size, 1) for size in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


def test_prompts_of_one_bucket_get_one_layout():
    def shapes(prompts, max_new_tokens, stop_tokens):
        prompt_bt, length_b = specjax.pad_prompts(prompts)
        laid_out = lay_out(TARGET, None, prompt_bt, length_b, Sampling(), max_new_tokens, stop_tokens, None)
        return jax.tree.map(lambda x: (x.shape, x.dtype) if isinstance(x, jax.Array) else x, laid_out)

    small = shapes([[1], [2]], 1, ())
    assert small == shapes([[1] * 16, [2, 3]], 111, range(8))
    assert small[0] == ((2, 16), jnp.int32)
    assert small[2] == 128
    assert shapes([[1] * 17, [2]], 110, ())[0] == ((2, 32), jnp.int32)
    assert shapes([[1] * 16, [2]], 112, ())[2] == 256
    assert shapes([[1], [2]], 1, [0] * 9)[1].stop_tokens_k == ((16,), jnp.int32)


def test_another_call_of_the_same_bucket_compiles_nothing():
    """Not even the copy of an argument to the device, of which JAX compiles one for each shape and dtype."""
    another = table(5)
    tokens(sampling=Sampling(temperature=[1.0, 1.0], top_k=2, seed=[0, 1]))
    size = _generate_jit._cache_size()
    compiled.clear()
    sampling = Sampling(temperature=[0.0, 0.7], top_k=3, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=[8, 9])
    prompt_bt, length_b = specjax.pad_prompts([[7, 6, 5, 4, 3, 2, 1, 0, 1, 2], [1]])
    tokens(
        target=another,
        prompts=prompt_bt,
        lengths=length_b,
        max_new_tokens=50,
        stop_tokens=(1, 2, 3),
        sampling=sampling,
    )
    assert _generate_jit._cache_size() == size
    assert [event for event in compiled if "backend_compile" in event] == []


# pad_prompts.


def test_pad_prompts_pads_with_zeros_on_the_right():
    prompt_bt, length_b = specjax.pad_prompts([[5], [1, 2, 3], range(2)])
    assert prompt_bt.tolist() == [[5, 0, 0], [1, 2, 3], [0, 1, 0]]
    assert length_b.tolist() == [1, 3, 2]
    assert (prompt_bt.dtype, length_b.dtype) == (np.int32, np.int32)
    prompt_bt, length_b = specjax.pad_prompts([np.array([1, 2]), jnp.array([3])])
    assert prompt_bt.tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["at least one"]),
        ([[]], ["[0]", "at least one token"]),
        ([[1], []], ["[1, 0]", "at least one token"]),
        ([1, 2], ["prompt 0", "token"]),
        ([[1], [1.5]], ["prompt 1", "float64", "integers"]),
        ([[1], [True]], ["prompt 1", "bool", "integers"]),
        (["12"], ["prompt 0", "integers"]),
        ([[1], [None]], ["prompt 1", "integers"]),
        ([[[1]]], ["prompt 0", "(1, 1)"]),
        ([[2**40]], ["prompt 0", str(2**40)]),
        (5, ["prompts", "5"]),
    ],
    ids=str,
)
def test_pad_prompts_refuses_what_are_no_tokens(prompts, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        specjax.pad_prompts(prompts)
    assert_says(caught.value, words)
