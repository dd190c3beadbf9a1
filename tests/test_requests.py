"""Bad input gets a clear error before anything compiles; good input lands in shapes that other calls share."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.engine.arguments import bucket
from specjax.engine.programs import generate_program
from specjax.engine.request import lay_out

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
    return function(**{"target": TARGET, "prompts": PROMPT, "max_new_tokens": 4, **changed})


def assert_says(error, words):
    for word in words:
        assert word in str(error), f"{word!r} is not in {str(error)!r}"


# name -> what changes in the call, and what the message must contain: the value, the limit and the cure.
BAD = {
    # Prompts.
    "no prompts": ({"prompts": []}, ["prompts", "[]", "at least one"]),
    "an empty prompt": ({"prompts": [[]]}, ["prompts", "[0]", "at least one token"]),
    "empty prompts": ({"prompts": np.zeros((2, 0), np.int32)}, ["prompts", "(2, 0)", "ragged lists"]),
    "zero rows": ({"prompts": np.zeros((0, 3), np.int32)}, ["prompts", "(0, 3)", "ragged lists"]),
    "a number as prompt": ({"prompts": 3}, ["prompts", "()", "[rows, width]"]),
    "1-D prompt": ({"prompts": [1, 2, 3]}, ["prompt 0", "()", "flat"]),
    "3-D prompt": ({"prompts": [[[1, 2]]]}, ["prompt 0", "(1, 2)", "flat"]),
    "float prompt": ({"prompts": [[1.0, 2.0]]}, ["prompt 0", "float64", "integers"]),
    "float32 prompt on the device": ({"prompts": jnp.ones((1, 3))}, ["prompts", "float32", "integers"]),
    "NaN in the prompt": ({"prompts": [[1, NAN]]}, ["prompt 0", "float64", "integers"]),
    "bool prompt": ({"prompts": [[True, False]]}, ["prompt 0", "bool", "integers"]),
    "text as prompt": ({"prompts": "def f(x):"}, ["prompts", "integers"]),
    "texts as prompts": ({"prompts": ["def", "f(x)"]}, ["prompt 0", "<U3", "integers"]),
    "None as prompt": ({"prompts": None}, ["prompts", "integers"]),
    "ragged prompts of floats": ({"prompts": [[1, 2], [3.0]]}, ["prompt 1", "float64", "integers"]),
    "ragged prompts, an empty one": ({"prompts": [[1, 2], []]}, ["prompts", "[2, 0]", "at least one token"]),
    "ragged prompts of several dimensions": ({"prompts": [[1, 2], [[3]]]}, ["prompt 1", "(1, 1)", "flat"]),
    "ragged prompts with lengths": (
        {"prompts": [[1, 2], [3]], "lengths": [2, 1]},
        ["prompts", "rectangular", "pad_prompts"],
    ),
    "ragged prompts above the vocabulary": ({"prompts": [[1, 2], [8]]}, ["prompt 1", "token 8", "0 to 7", "tokenizer"]),
    "token above the vocabulary": ({"prompts": [[1, 2], [3, 8]]}, ["prompt 1", "token 8", "0 to 7", "tokenizer"]),
    "token below 0": ({"prompts": [[1, -1]]}, ["prompt 0", "token -1", "0 to 7", "tokenizer"]),
    "token of an array beyond int32": (
        {"prompts": np.array([[1, 2**40]])},
        ["prompt 0", f"token {2**40}", "0 to 7", "tokenizer"],
    ),
    "token beyond int32": ({"prompts": [[1, 2**40]]}, ["prompt 0", f"token {2**40}", "below 2**31"]),
    # Lengths.
    "length 0": ({"lengths": [3, 0]}, ["prompt 1", "length 0", "1 to 3"]),
    "negative length": ({"lengths": [-1, 3]}, ["prompt 0", "length -1", "1 to 3"]),
    "length above the width": ({"lengths": [3, 4]}, ["prompt 1", "length 4", "1 to 3"]),
    "too few lengths": ({"lengths": [3]}, ["lengths", "(1,)", "(2,)"]),
    "one length for all": ({"lengths": 3}, ["lengths", "()", "(2,)"]),
    "2-D lengths": ({"lengths": [[3, 3]]}, ["lengths", "(1, 2)", "(2,)"]),
    "float lengths": ({"lengths": [3.0, 3.0]}, ["lengths", "float64", "integers"]),
    "NaN lengths": ({"lengths": [NAN, 3]}, ["lengths", "float64", "integers"]),
    # Limits.
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
    "negative new tokens": ({"max_new_tokens": -4}, ["max_new_tokens", "-4", "at least 1"]),
    "float new tokens": ({"max_new_tokens": 4.0}, ["max_new_tokens", "4.0", "integer"]),
    "NaN new tokens": ({"max_new_tokens": NAN}, ["max_new_tokens", "nan", "integer"]),
    "True new tokens": ({"max_new_tokens": True}, ["max_new_tokens", "True", "integer"]),
    "None new tokens": ({"max_new_tokens": None}, ["max_new_tokens", "None", "integer"]),
    "no new tokens in a row": ({"max_new_tokens": [4, 0]}, ["max_new_tokens", "[4, 0]", "at least 1"]),
    "no new tokens in a row on the device": ({"max_new_tokens": jnp.asarray([4, 0])}, ["max_new_tokens", "at least 1"]),
    "float new tokens in a row": ({"max_new_tokens": [4.0, 1.0]}, ["max_new_tokens", "[4.0, 1.0]", "integer"]),
    "bool new tokens in a row": ({"max_new_tokens": [True, True]}, ["max_new_tokens", "[True, True]", "integer"]),
    "text as new tokens": ({"max_new_tokens": "4"}, ["max_new_tokens", "'4'", "integer"]),
    "new tokens beyond 64 bits": ({"max_new_tokens": 2**70}, ["max_new_tokens", str(2**70)]),
    "new tokens in a row beyond int32": ({"max_new_tokens": [4, 2**31]}, ["max_new_tokens", str(2**31)]),
    "new tokens of other rows": ({"max_new_tokens": [4, 4, 4]}, ["max_new_tokens", "[4, 4, 4]", "(2,)"]),
    "new tokens of one row": ({"max_new_tokens": [4]}, ["max_new_tokens", "[4]", "(2,)"]),
    "2-D new tokens": ({"max_new_tokens": [[4], [4]]}, ["max_new_tokens", "[[4], [4]]", "(2,)"]),
    "ragged new tokens": ({"max_new_tokens": [[4], [4, 4]]}, ["max_new_tokens", "rectangular"]),
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
    "slots one short for a late look": (
        {"slots": 23, "drafter": specjax.NGramDrafter(num_draft=3)},
        ["slots is 23", "16 places", "need 24", "fixed=True"],
    ),
    "slots one short for drafts": (
        {"slots": 10, "drafter": specjax.NGramDrafter(num_draft=3), "fixed": True},
        ["slots is 10", "3 places", "need 11", "more slots"],
    ),
    "prompt longer than slots": (
        {"prompts": np.ones((1, 20), np.int32), "slots": 16},
        ["slots is 16", "padded to 20", "need 25", "more slots"],
    ),
    "padding wider than slots": (
        {"prompts": np.ones((1, 20), np.int32), "lengths": [3], "slots": 16},
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
    "stop tokens of other rows": ({"stop_tokens": [[1], [2], [3]]}, ["stop_tokens", "(3, 1)", "flat", "[2, k]"]),
    "stop tokens of one row": ({"stop_tokens": [[1, 2]]}, ["stop_tokens", "(1, 2)", "flat", "[2, k]"]),
    "3-D stop tokens": ({"stop_tokens": [[[1]], [[2]]]}, ["stop_tokens", "(2, 1, 1)", "flat", "[2, k]"]),
    "ragged stop tokens": ({"stop_tokens": [[1], [2, 3]]}, ["stop_tokens", "rectangular"]),
    "stop tokens in a row above the vocabulary": ({"stop_tokens": [[1], [8]]}, ["stop_tokens", "8", "0 to 7"]),
    "stop tokens in a row below -1": ({"stop_tokens": [[1], [-2]]}, ["stop_tokens", "-2", "0 to 7"]),
    # Log-probabilities.
    "a number as logprobs": ({"logprobs": 3}, ["logprobs is 3", "True or False", "top_logprobs"]),
    "alternatives without logprobs": ({"top_logprobs": 2}, ["top_logprobs is 2", "logprobs=True"]),
    "more alternatives than tokens": ({"logprobs": True, "top_logprobs": 9}, ["top_logprobs is 9", "0 to 8"]),
    "negative alternatives": ({"logprobs": True, "top_logprobs": -1}, ["top_logprobs is -1", "0 to 8"]),
    "float alternatives": ({"logprobs": True, "top_logprobs": 2.0}, ["top_logprobs is 2.0", "integer", "0 to 8"]),
    "True alternatives": ({"logprobs": True, "top_logprobs": True}, ["top_logprobs is True", "integer", "0 to 8"]),
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
    # Rules.
    "text as rule": ({"verify": "block"}, ["verify", "'block'", "specjax.verify"]),
    "None as rule": ({"verify": None}, ["verify", "None", "specjax.verify"]),
    "a bare function as rule": ({"verify": specjax.verify.token_thresholds}, ["verify", "specjax.verify"]),
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
    "keys of other rows": (
        {"sampling": Sampling(seed=jax.random.split(jax.random.key(0), 3))},
        ["seed", "(3,)", "one key", "(2,)"],
    ),
    "2-D keys": ({"sampling": Sampling(seed=jax.random.split(jax.random.key(0), (2, 1)))}, ["seed", "(2, 1)", "(2,)"]),
    "floats as keys": ({"sampling": Sampling(seed=jnp.ones(2))}, ["seed", "float32", "integers"]),
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
INTEGERS = ("top_k", "seed")
for name in FLOATS:
    BAD[f"NaN {name}"] = ({"sampling": Sampling(**{name: NAN})}, [name, "nan"])
    BAD[f"NaN {name} in a row"] = ({"sampling": Sampling(**{name: [1.0, NAN]})}, [name, "[1.0, nan]"])
    BAD[f"NaN {name} on the device"] = (
        {"sampling": Sampling(**{name: jnp.asarray([NAN, 1.0])})},
        [name, "[nan, 1.0]"],
    )
    BAD[f"inf {name}"] = ({"sampling": Sampling(**{name: INF})}, [name, "inf"])
    if not name.endswith("penalty"):  # there, None is not used
        BAD[f"None {name}"] = ({"sampling": Sampling(**{name: None})}, [name, "None"])
    BAD[f"text as {name}"] = ({"sampling": Sampling(**{name: "1.0"})}, [name, "1.0", "number"])
    BAD[f"complex {name}"] = ({"sampling": Sampling(**{name: 1j})}, [name, "number"])
for name in INTEGERS:
    BAD[f"None {name}"] = ({"sampling": Sampling(**{name: None})}, [name, "integers"])
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
    "1-D prompt": ({"prompts": PROMPT[0]}, ["prompts", "(3,)", "[rows, width]"]),
    "float prompt": ({"prompts": PROMPT.astype(np.float32)}, ["prompts", "float32", "integers"]),
    "too few lengths": ({"lengths": np.array([3])}, ["lengths", "(1,)", "(2,)"]),
    "float lengths": ({"lengths": np.array([3.0, 3.0])}, ["lengths", "float32", "integers"]),
    "temperatures of other rows": ({"sampling": Sampling(temperature=np.ones(3))}, ["temperature", "(3,)", "(2,)"]),
    "float top_k": ({"sampling": Sampling(top_k=np.ones(2))}, ["top_k", "float32", "integers"]),
    "logit_bias of another vocabulary": (
        {"sampling": Sampling(logit_bias=np.zeros(7))},
        ["logit_bias", "(7,)", "(8,)"],
    ),
    "stop tokens of one row": ({"stop_tokens": np.array([[1]])}, ["stop_tokens", "(1, 1)", "flat"]),
    "new tokens of other rows": ({"max_new_tokens": np.array([4, 4, 4]), "slots": 64}, ["max_new_tokens", "(2,)"]),
    "float new tokens": ({"max_new_tokens": np.float32(4), "slots": 64}, ["max_new_tokens", "integer"]),
    "traced new tokens without slots": (
        {"max_new_tokens": np.array([4, 4])},
        ["max_new_tokens is traced", "slots is None", "give slots="],
    ),
    "traced new tokens in fewer slots than the prompt": (
        {"max_new_tokens": np.array([4, 4]), "slots": 2},
        ["slots is 2", "padded to 3", "need 3"],
    ),
    "another vocabulary": ({"drafter": specjax.ModelDrafter(table(1, 9))}, ["9 tokens", "8", "tokenizer"]),
}


@pytest.mark.parametrize(("changed", "words"), TRACED.values(), ids=TRACED.keys())
def test_bad_shapes_and_dtypes_are_found_inside_jit(changed, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        slots = changed.get("slots")
        traced = {name: value for name, value in changed.items() if name != "slots"}
        jax.eval_shape(lambda traced: call(specjax.generate, slots=slots, **traced), traced)
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
        {"prompts": PROMPT.tolist()},
        {"prompts": PROMPT.astype(np.uint8)},
        {"prompts": PROMPT.astype(np.int64)},
        {"prompts": jnp.asarray(PROMPT)},
        {"prompts": list(PROMPT)},
        {"lengths": [3, 3]},
        {"prompts": np.pad(PROMPT, ((0, 0), (0, 5)), constant_values=-7), "lengths": np.array([3, 3])},
        {"max_new_tokens": np.int64(4)},
        {"slots": 128},
        {"stop_tokens": []},
        {"stop_tokens": np.zeros((0,))},
        {"max_new_tokens": [4, 4]},
        {"max_new_tokens": jnp.array([4, 4])},
        {"stop_tokens": [[-1, -1], [-1, -1]]},
        {"stop_tokens": np.zeros((2, 0), np.int32)},
        {"logprobs": True, "top_logprobs": 8},
        {"sampling": Sampling(temperature=np.float64(1), top_k=np.int8(0), top_p=1, seed=np.array([0, 1]))},
        {"sampling": Sampling(logit_bias=None)},
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


def test_stop_tokens_of_a_row_end_that_row():
    free = tokens(max_new_tokens=20)
    first, second = (row[3] for row in free)  # each row's first token
    assert tokens(stop_tokens=[[first], [-1]], max_new_tokens=20) == [free[0][:4], free[1]]
    assert tokens(stop_tokens=[[-1, -1], [-1, second]], max_new_tokens=20) == [free[0], free[1][:4]]


def test_max_new_tokens_of_a_row_end_that_row():
    free = tokens(max_new_tokens=20)
    assert tokens(max_new_tokens=[1, 20]) == [free[0][:4], free[1]]
    assert tokens(max_new_tokens=np.array([20, 7])) == [free[0], free[1][:10]]


def test_ragged_prompts_are_padded():
    ragged, length_b = [[1], [4, 5, 6]], np.array([1, 3])
    assert tokens(prompts=ragged) == tokens(prompts=np.array([[1, 7, 7], [4, 5, 6]]), lengths=length_b)
    assert tokens(prompts=[np.array([1]), range(4, 7)]) == tokens(prompts=ragged)


def test_keys_are_seeds():
    """One key for all rows is folded with each row's number."""
    one = jax.random.key(3)
    several = jnp.stack([jax.random.fold_in(one, 0), jax.random.fold_in(one, 1)])
    text = tokens(sampling=Sampling(seed=one), max_new_tokens=20)
    assert tokens(sampling=Sampling(seed=several), max_new_tokens=20) == text
    assert text != tokens(max_new_tokens=20) and text != tokens(sampling=Sampling(seed=3), max_new_tokens=20)
    swapped = tokens(sampling=Sampling(seed=several[::-1]), prompts=PROMPT[::-1], max_new_tokens=20)
    assert swapped == text[::-1]


def test_a_key_of_the_old_kind_is_no_key():
    with pytest.raises(ValueError) as caught:
        tokens(sampling=Sampling(seed=jax.random.PRNGKey(3)), prompts=PROMPT[:1])
    assert_says(caught.value, ["seed", "(2,)", "(1,)"])


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
    assert small[0] == ((2, 128), jnp.int32)  # the prompts, padded to the slots
    assert small[2]["chunk"] == 16
    assert shapes([[1] * 17, [2]], 110, ())[2]["chunk"] == 32
    assert shapes([[1] * 16, [2]], 112, ())[0] == ((2, 256), jnp.int32)
    assert shapes([[1], [2]], 1, [0] * 9)[1].stop_tokens_bk == ((2, 16), jnp.int32)
    assert shapes([[1], [2]], 1, [[0] * 9] * 2) == shapes([[1], [2]], 1, [0] * 9)
    assert small == shapes([[1], [2]], [1, 100], ())
    # From 256 tokens on, prompts of all widths are read in chunks of 256.
    assert [shapes([[1] * width], 1, ())[2]["chunk"] for width in (129, 256, 257, 1000)] == [256] * 4


def test_another_call_of_the_same_bucket_compiles_nothing():
    """Not even the copy of an argument to the device, of which JAX compiles one for each shape and dtype."""
    another = table(5)
    tokens(sampling=Sampling(temperature=[1.0, 1.0], top_k=2, repetition_penalty=1.3, seed=[0, 1]))
    size = generate_program._cache_size()
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
    assert generate_program._cache_size() == size
    assert [event for event in compiled if "backend_compile" in event] == []


# States.


NGRAM = specjax.NGramDrafter(num_draft=3)


@pytest.fixture(scope="module")
def states():
    """A running state of two rows and one that is done, in 16 slots; others that differ in one thing each."""

    def prefill(**changed):
        return call(specjax.prefill, **{"slots": 16, "drafter": NGRAM, "fixed": True, **changed})

    running = prefill()
    return {
        "running": running,
        "done": specjax.stop(running, [True, True]),
        "one row": prefill(prompts=PROMPT[:1]),
        "other slots": prefill(prompts=PROMPT[:1], slots=17),
        "other drafter": prefill(prompts=PROMPT[:1], drafter=specjax.NGramDrafter(num_draft=2), fixed=True),
        "log-probabilities": prefill(prompts=PROMPT[:1], logprobs=True),
        "keys": prefill(prompts=PROMPT[:1], sampling=Sampling(seed=jax.random.key(0))),
        "more stop tokens": prefill(prompts=PROMPT[:1], stop_tokens=[1] * 9),
        "float cache": prefill(prompts=PROMPT[:1]).replace(cache=jnp.zeros((1, 16))),
    }


def refused(function, words):
    compiled.clear()
    with pytest.raises((ValueError, TypeError)) as caught:
        function()
    assert [event for event in compiled if "backend_compile" in event] == []
    assert_says(caught.value, words)


EXTEND = {
    "past the slots": ({"max_new_tokens": 9}, ["row 0 has 3 tokens", "3 places", "need 17", "has 16", "slots="]),
    "past the slots in one row": (
        {"tokens": [[1], [1, 2]], "max_new_tokens": [4, 8]},
        ["row 1 has 3 tokens", "2 more", "max_new_tokens 8", "need 17", "has 16", "slots="],
    ),
    "too many tokens": ({"tokens": [[1] * 9, []]}, ["row 0 has 3 tokens", "9 more", "need 20", "has 16", "slots="]),
    "too few rows": ({"tokens": [[1]]}, ["tokens has 1 rows", "the state 2", "empty"]),
    "too many rows": ({"tokens": [[1]] * 3}, ["tokens has 3 rows", "the state 2", "empty"]),
    "another number of drafts": (
        {"drafter": specjax.NGramDrafter(num_draft=2)},
        ["proposes 2 tokens", "made for 3", "the same"],
    ),
    "no drafter": ({"drafter": None}, ["proposes 0 tokens", "made for 3", "the same"]),
    "a model as drafter": ({"drafter": DRAFT}, ["drafter", "LanguageModel", "ModelDrafter"]),
    "text as target": ({"target": "checkpoints/py-14m"}, ["target", "str", "specjax.load"]),
    "a token above the vocabulary": ({"tokens": [[1], [8]]}, ["tokens 1", "token 8", "0 to 7", "tokenizer"]),
    "float tokens": ({"tokens": [[1.0], [2.0]]}, ["prompt 0", "float64", "integers"]),
    "a length above the width": ({"tokens": PROMPT, "lengths": [4, 0]}, ["length 4", "0 to 3"]),
    "a negative length": ({"tokens": PROMPT, "lengths": [-1, 0]}, ["length -1", "0 to 3"]),
    "too few lengths": ({"tokens": PROMPT, "lengths": [1]}, ["lengths", "(1,)", "(2,)"]),
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
    "new tokens of other rows": ({"max_new_tokens": [1, 1, 1]}, ["max_new_tokens", "[1, 1, 1]", "(2,)"]),
    "a target too short": (
        {"target": TARGET.replace(max_positions=7)},
        ["4 tokens", "max_new_tokens 4", "8 positions", "target has 7", "shorten"],
    ),
}


@pytest.mark.parametrize(("changed", "words"), EXTEND.values(), ids=EXTEND)
def test_extend_refuses(changed, words, states):
    given = {"target": TARGET, "tokens": [[1], []], "drafter": NGRAM, "max_new_tokens": 4} | changed
    refused(lambda: specjax.extend(state=states["done"], **given), words)


INSERT = {
    "a row that still runs": ("running", [0], "one row", ["row 0 still runs", "specjax.stop"]),
    "a row twice": ("done", [1, 1], "running", ["[1, 1]", "different", "0 to 1"]),
    "a row past the last": ("done", [2], "one row", ["[2]", "0 to 1"]),
    "a row before the first": ("done", [-1], "one row", ["[-1]", "0 to 1"]),
    "more rows than other has": ("done", [0, 1], "one row", ["2 rows", "other has 1", "one for each"]),
    "fewer rows than other has": ("done", [0], "running", ["1 rows", "other has 2", "one for each"]),
    "no rows": ("done", [], "one row", ["rows is []", "flat"]),
    "a number": ("done", 0, "one row", ["rows is 0", "flat"]),
    "floats": ("done", [0.0], "one row", ["rows is [0.0]", "integers"]),
    "a mask": ("done", [True, False], "one row", ["rows is [True, False]", "integers"]),
    "two dimensions": ("done", [[0]], "one row", ["rows is [[0]]", "flat"]),
    "other slots": ("done", [0], "other slots", ["16 and 17 slots", "slots="]),
    "another number of drafts": ("done", [0], "other drafter", ["kinds", "drafter"]),
    "log-probabilities in one": ("done", [0], "log-probabilities", ["kinds", "logprobs"]),
    "keys in one": ("done", [0], "keys", ["seed", "make both with the same"]),
    "more stop tokens": ("done", [0], "more stop tokens", ["stop_tokens_bk", "(2, 8)", "(1, 16)", "stop tokens"]),
    "another cache": ("done", [0], "float cache", ["cache", "int32", "float32", "make both with the same target"]),
}


@pytest.mark.parametrize(("state", "rows", "other", "words"), INSERT.values(), ids=INSERT)
def test_insert_refuses(state, rows, other, words, states):
    refused(lambda: specjax.insert(states[state], rows, states[other]), words)


STOP = {
    "a mask too short": ([True], ["rows", "(1,)", "(2,)"]),
    "a mask too long": ([True] * 3, ["rows", "(3,)", "(2,)"]),
    "one bool": (True, ["rows", "()", "(2,)"]),
    "a mask of two dimensions": ([[True, False]], ["rows", "(1, 2)", "(2,)"]),
    "a row past the last": ([0, 2], ["[0, 2]", "0 to 1"]),
    "a row before the first": ([-1], ["[-1]", "0 to 1"]),
    "floats": ([1.0], ["rows is [1.0]", "bool mask", "(2,)"]),
    "two dimensions": ([[0]], ["rows is [[0]]", "bool mask", "(2,)"]),
    "text": ("all", ["rows is 'all'", "bool mask", "(2,)"]),
    "nothing": (None, ["rows is None", "bool mask", "(2,)"]),
}


@pytest.mark.parametrize(("rows", "words"), STOP.values(), ids=STOP)
def test_stop_refuses(rows, words, states):
    refused(lambda: specjax.stop(states["running"], rows), words)


@pytest.mark.parametrize(
    "rows", [[False, True], np.array([False, True]), jnp.array([False, True]), [1], np.array(1), 1]
)
def test_stop_ends_the_rows_that_are_named(rows, states):
    assert specjax.stop(states["running"], rows).done_b.tolist() == [False, True]


def test_stop_of_no_row_ends_none(states):
    assert specjax.stop(states["running"], []).done_b.tolist() == [False, False]


@pytest.mark.parametrize("rounds", [0, -1, 1.0, True, 2**31, "1"])
def test_run_counts_rounds_in_integers(rounds, states):
    words = ["rounds", repr(rounds), "at least 1"]
    refused(lambda: specjax.run(TARGET, states["running"], drafter=NGRAM, rounds=rounds), words)


@pytest.mark.parametrize("function", [specjax.run, specjax.step], ids=lambda f: f.__name__)
def test_rounds_want_a_rule_and_the_drafter_of_the_state(function, states):
    state = states["running"]
    refused(lambda: function(TARGET, state, drafter=NGRAM, verify="block"), ["verify", "'block'", "specjax.verify"])
    refused(lambda: function(TARGET, state), ["proposes 0 tokens", "made for 3", "the same drafter"])


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
