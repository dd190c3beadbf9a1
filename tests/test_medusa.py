"""Medusa: folders against a NumPy twin, heads that must be accepted in full, the loop around them, and bad input."""

import functools
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_medusa
import safetensors.numpy
from draft_heads import open_medusa, write_medusa
from heads_observing import assert_chunks_are_as_one_pass, assert_rounds_alone_are_as_one_pass, context_of
from safetensors.numpy import load_file, save_file
from test_compiled import compilations

import specjax
from specjax.drafters.medusa import MedusaDrafter, head_logits, init_medusa_params
from specjax.hf.weights import tensors_of
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, init_params
from specjax.types import whole_feed

VOCAB, WIDTH, HEADS = 19, 16, 3
FILE = "medusa_lm_head.safetensors"
PROMPTS = [[3], [1, 5], [2, 4, 1, 0, 5, 3, 2]]


@pytest.fixture(scope="module")
def target():
    config = DecoderConfig(VOCAB, WIDTH, 24, 2, 4, 2, max_position_embeddings=1024)
    params = init_params(config, jax.random.key(0))
    return decoder_model(config, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


def published(blocks, heads=HEADS, prefix="", seed=0):
    """Returns random tensors by the published names."""
    random = np.random.default_rng(seed)
    tensors = {}
    for i in range(heads):
        for k in range(blocks):
            tensors[f"{prefix}{i}.{k}.linear.weight"] = random.normal(scale=0.3, size=(WIDTH, WIDTH))
            tensors[f"{prefix}{i}.{k}.linear.bias"] = random.normal(size=(WIDTH,))
        tensors[f"{prefix}{i}.{blocks}.weight"] = random.normal(size=(VOCAB, WIDTH))
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def write(folder, tensors, blocks=1, name=FILE, **config):
    folder.mkdir(exist_ok=True)
    wanted = {"medusa_num_heads": HEADS, "medusa_num_layers": blocks, "base_model_name_or_path": "some/target"}
    (folder / "config.json").write_text(json.dumps(wanted | config))
    save_file(tensors, folder / name)
    return folder


# Against the twin.


@pytest.mark.parametrize(
    ("blocks", "prefix", "name"),
    [(1, "", FILE), (2, "", FILE), (1, "medusa_head.", "model.safetensors")],
    ids=["one block", "two blocks", "prefixed, in model.safetensors"],
)
def test_heads_equal_the_twin(target, tmp_path, blocks, prefix, name):
    """Each head, at every position of a text, on the states of a real pass."""
    folder = write(tmp_path / "heads", published(blocks, prefix=prefix), blocks, name)
    drafter = open_medusa(folder, target, HEADS)
    tokens = jnp.asarray([[4, 1, 18, 7, 2, 9]], jnp.int32)
    (states,) = target.forward(target.params, whole_feed(tokens), target.init_cache(1, 6), (-1,)).features
    tensors = published(blocks)
    for i in range(HEADS):
        wanted = [reference_medusa.logits(tensors, i, state) for state in np.asarray(states[0])]
        np.testing.assert_allclose(head_logits(drafter.params[i], states)[0], wanted, atol=1e-4)


# vLLM's layout (vllm/model_executor/models/medusa.py).

VLLM = {"model_type": "medusa", "num_heads": HEADS, "num_hidden_layers": 2, "architectures": ["MedusaModel"]}
VLLM |= {"max_paths": 64, "topk": 10, "max_seq_len": 2**20, "hidden_size": WIDTH, "vocab_size": VOCAB}
MAP = np.array([4, 18, 0, 7, 9], np.int64)


def as_vllm(tensors, prefix="", shared=False):
    """Returns tensors of two blocks by vLLM's names; a shared output head is that of head 0."""
    renamed = {}
    for name, array in tensors.items():
        head, block, *rest = name.split(".")
        if rest[0] == "linear":
            renamed[f"{prefix}blocks.{head}.layers.{block}.{rest[1]}"] = array
        elif not shared:
            renamed[f"{prefix}lm_heads.{head}.weight"] = array
        elif head == "0":
            renamed[f"{prefix}lm_head.weight"] = array
    return renamed


def write_vllm(folder, tensors, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VLLM | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def vllm_case(name):
    """Returns tensors by FasterDecoding's names, the same by vLLM's, and the config's further keys."""
    tensors = published(2)
    if name == "without biases":
        tensors = {key: array for key, array in tensors.items() if "bias" not in key}
        return tensors, as_vllm(tensors), {"medusa_fc_bias": False}
    if name == "one output head for all":
        tensors |= {f"{i}.2.weight": tensors["0.2.weight"] for i in range(HEADS)}
        return tensors, as_vllm(tensors, shared=True), {"original_lm_head": True}
    if name == "biases, with vLLM's prefix":
        return tensors, as_vllm(tensors, "medusa_heads."), {"medusa_fc_bias": True}
    drafted = {key: array[MAP] if key.endswith(".2.weight") else array for key, array in tensors.items()}
    stored = as_vllm(drafted if name == "a token map" else tensors) | {"token_map": MAP}
    return drafted | {"token_map": MAP}, stored, {"truncated_vocab_size": len(MAP)}


VLLM_CASES = ["without biases", "biases, with vLLM's prefix", "one output head for all", "a token map"]


@pytest.mark.parametrize("name", [*VLLM_CASES, "a token map beside whole output heads"])
def test_heads_in_vllms_layout_equal_the_twin(target, tmp_path, name):
    tensors, stored, config = vllm_case(name)
    drafter = open_medusa(write_vllm(tmp_path / "heads", stored, **config), target, HEADS)
    assert drafter.vocab_size == VOCAB
    states, given = np.random.default_rng(3).normal(size=(2, WIDTH)).astype(np.float32), []
    context = types.SimpleNamespace(
        drafts=lambda g: g, length_b=jnp.asarray([2, 3], jnp.int32), target=types.SimpleNamespace(vocab_size=VOCAB)
    )

    def draw(logits_bv, drafts_bg, index):
        given.append(logits_bv)
        return jnp.zeros((2,), jnp.int32), jax.nn.softmax(logits_bv)

    drafter.propose(jnp.asarray(states), context, draw)
    for i in range(HEADS):
        wanted = [reference_medusa.logits(tensors, i, state, VOCAB) for state in states]
        np.testing.assert_allclose(given[i], wanted, atol=1e-4)


def test_vllms_heads_draft_and_only_biased_ones_are_written_in_the_other_layout(target, tmp_path):
    _, stored, config = vllm_case("a token map")
    drafter = open_medusa(write_vllm(tmp_path / "heads", stored, **config), target, 2)
    leaves, tree = jax.tree.flatten(drafter.params)
    assert [len(axes) for axes in tree.flatten_up_to(drafter.axes())] == [leaf.ndim for leaf in leaves]
    out = generate(target, drafter, PROMPTS, 20)
    assert out.tokens.tolist() == generate(target, None, PROMPTS, 20).tokens.tolist()
    with pytest.raises(ValueError, match="only vLLM's layout has names for"):
        write_medusa(tmp_path / "copy", drafter.params)


VLLM_BAD = {
    "a map of floats": ({"token_map": MAP.astype(np.float32)}, {}, "'token_map' is float32"),
    "a map of two axes": ({"token_map": MAP[None]}, {}, r"'token_map' is int64 \(1, 5\)"),
    "a map to a token past the last": ({"token_map": MAP + 1}, {}, "different tokens of the target's 19"),
    "a map that repeats": ({"token_map": MAP * 0}, {}, "different tokens of the target's 19"),
    "another output head": ({"lm_heads.1.weight": np.zeros((3, WIDTH), np.float32)}, {}, r"is \(3, 16\)"),
    "an unknown tensor": ({"norm.weight": np.zeros(3, np.float32)}, {}, "unknown, such as 'norm.weight'"),
    "two names for one": ({"0.0.linear.weight": np.zeros((WIDTH, WIDTH), np.float32)}, {}, "are both '0.0.linear"),
    "biases that the config denies": ({}, {"medusa_fc_bias": False}, "unknown, such as '0.0.linear.bias'"),
    "a scale": ({}, {"logit_scale": 0.5}, "'logit_scale' is 0.5"),
    "a flag of another type": ({}, {"original_lm_head": 1}, "original_lm_head must be true or false"),
    "no vocabulary": ({}, {"vocab_size": None}, "different tokens of the target's 5"),
}


@pytest.mark.parametrize(("tensors", "config", "message"), VLLM_BAD.values(), ids=VLLM_BAD)
def test_bad_folders_of_vllms_layout_are_refused(target, tmp_path, tensors, config, message):
    _, stored, usual = vllm_case("a token map")
    with pytest.raises(ValueError, match=message) as caught:
        open_medusa(write_vllm(tmp_path / "heads", stored | tensors, **usual | config), target, 2)
    assert str(tmp_path) in str(caught.value)


def test_a_round_reads_the_state_before_the_last_token(target, tmp_path):
    """What ``draw`` is given is head i on the state at position n - 2, in rows of all lengths."""
    drafter = open_medusa(write(tmp_path / "heads", published(1)), target, HEADS)
    prompt, length = specjax.pad_prompts(PROMPTS)
    state = specjax.prefill(target, prompt, length, drafter=drafter, fixed=True, max_new_tokens=8)
    given = []

    def draw(logits_bv, drafts_bg, index):
        assert index == len(given)
        given.append(logits_bv)
        return jnp.full((3,), len(given), jnp.int32), jax.nn.softmax(logits_bv)

    proposal, _ = drafter.propose(state.draft, context_of(target, state), draw)
    assert proposal.length_b.tolist() == [0, HEADS, HEADS]
    assert proposal.tokens_bg.tolist() == [[1, 2, 3]] * 3
    for row in (1, 2):
        tokens = jnp.asarray([PROMPTS[row]], jnp.int32)
        cache = target.init_cache(1, tokens.shape[1])
        (states,) = target.forward(target.params, whole_feed(tokens), cache, (-1,)).features
        for i in range(HEADS):
            wanted = reference_medusa.logits(published(1), i, np.asarray(states[0, -2]))
            np.testing.assert_allclose(given[i][row], wanted, atol=1e-4)


def test_written_heads_are_read_back_and_have_the_published_names(target, tmp_path):
    drafter = open_medusa(write(tmp_path / "heads", published(2), 2), target, HEADS)
    write_medusa(tmp_path / "copy", drafter.params, "some/target")
    tensors = published(2)
    copied = load_file(tmp_path / "copy" / FILE)
    assert copied.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(copied[name], array)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (HEADS, 2)
    again = open_medusa(tmp_path / "copy", target, HEADS)
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)


def test_only_the_heads_that_draft_are_kept_in_the_dtype_asked_for(target, tmp_path):
    folder = write(tmp_path / "heads", published(1))
    drafter = open_medusa(folder, target, 2, "bfloat16")
    assert set(drafter.params) == {0, 1}
    assert {leaf.dtype for leaf in jax.tree.leaves(drafter.params)} == {jnp.dtype("bfloat16")}
    out = generate(target, drafter, PROMPTS, 20)
    assert out.tokens.tolist() == generate(target, None, PROMPTS, 20).tokens.tolist()


def test_a_config_may_count_fewer_heads_than_there_are(target, tmp_path):
    """As published for Vicuna."""
    folder = write(tmp_path / "heads", published(1, heads=5), medusa_num_heads=2)
    assert len(open_medusa(folder, target, 5).params) == 5


# Heads in the folder of the model that they were trained with, as FasterDecoding/medusa-v1.0-vicuna-7b-v1.5 has them.


def write_whole(folder, file="model.safetensors"):
    """Writes a model's config and some of its tensors, with heads in both."""
    folder.mkdir()
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB}
    sizes = {"rms_norm_eps": 1e-5, "num_hidden_layers": 2, "medusa_num_heads": HEADS, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(model | sizes))
    own = {"lm_head.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in own.items()} | published(1, prefix="medusa_head.")
    save_file(tensors, folder / file)
    return folder


def test_heads_in_their_targets_folder_are_the_same_as_alone(target, tmp_path):
    """What is not theirs is left out; the index names the file of each tensor."""
    file = "model-00001-of-00001.safetensors"
    folder = write_whole(tmp_path / "whole", file)
    index = {"weight_map": dict.fromkeys(load_file(folder / file), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = open_medusa(write(tmp_path / "heads", published(1)), target, HEADS)
    jax.tree.map(np.testing.assert_array_equal, open_medusa(folder, target, HEADS).params, alone.params)


def test_the_folder_opens_as_the_target_and_as_its_drafter(tmp_path):
    """Heads and their counts are left out of the model."""
    raw = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "medusa_num_heads": HEADS, "medusa_num_layers": 1}
    config = specjax.hf.decoder_config(raw)
    tensors = tensors_of(specjax.hf.sources("llama", config), init_params(config, jax.random.key(0)))
    arrays = {tensor.name: np.asarray(tensor.read()) for tensor in tensors}
    save_file(arrays | published(1, prefix="medusa_head."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    target = specjax.load(tmp_path, "float32")
    assert "a Medusa head" in " ".join(specjax.hf.open_weights(tmp_path).report)
    np.testing.assert_array_equal(target.params["norm"]["weight"], arrays["model.norm.weight"])
    assert len(open_medusa(tmp_path, target, HEADS).params) == HEADS


def test_heads_alone_may_be_named_after_their_target(target, tmp_path):
    """As one published config is, by its model type; how trees are made of the tokens is another engine's matter."""
    folder = write(tmp_path / "heads", published(1), model_type="llama", decoding_strategy="tree_decoding")
    assert len(open_medusa(folder, target, HEADS).params) == HEADS


def test_a_model_whose_config_does_not_count_its_heads_is_refused(target, tmp_path):
    """As some published ones do not."""
    folder = write_whole(tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    del config["medusa_num_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks the key 'medusa_num_heads'.* does hold heads, add it to the config"):
        open_medusa(folder, target, 2)


def test_heads_in_pickles_are_taken_out_by_the_program_that_the_refusal_names(target, tmp_path, monkeypatch):
    """Run here with a torch that is none, since importing the real one takes longer than all these tests."""
    folder = write_whole(tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for shard, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / f"pytorch_model-0000{shard}-of-00002.bin")
    with pytest.raises(ValueError, match=r"is never opened; convert it as docs/huggingface\.md#pickles says"):
        open_medusa(folder, target, 2)
    page = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    program = page.split("## Pickles")[1].split("<<'END'\n")[1].split("END\n")[0]
    torch = types.SimpleNamespace(load=lambda file, map_location, weights_only: load_file(file))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "safetensors.torch", safetensors.numpy)
    monkeypatch.setattr(safetensors, "torch", safetensors.numpy, raising=False)  # set if another test imported it
    monkeypatch.chdir(folder)
    exec(program, {})
    alone = open_medusa(write(tmp_path / "heads", published(1)), target, HEADS)
    jax.tree.map(np.testing.assert_array_equal, open_medusa(folder, target, HEADS).params, alone.params)


def test_new_heads_are_the_targets_own(target):
    params = init_medusa_params(target.params["lm_head"]["kernel"], 2, 3)
    states = jax.random.normal(jax.random.key(1), (2, 4, WIDTH))
    wanted = target.unembed(target.params, states)
    for i in range(2):
        np.testing.assert_allclose(head_logits(params[i], states), wanted, atol=1e-5)


# What is read of a text.


def test_a_prompt_in_chunks_is_as_in_one_pass(target, tmp_path):
    drafter = open_medusa(write(tmp_path / "heads", published(1)), target, HEADS)
    assert_chunks_are_as_one_pass(target, drafter)


def test_rounds_without_drafts_are_read_as_a_prompt_is(target, tmp_path):
    drafter = open_medusa(write(tmp_path / "heads", published(1)), target, HEADS)
    assert_rounds_alone_are_as_one_pass(target, drafter)


# Heads that must agree.


@functools.cache
def affine(multiplier=3, offset=5, size=VOCAB):
    """A target whose state is its last token, one-hot, and whose next token is an affine function of that."""
    following = (multiplier * np.arange(size) + offset) % size

    def init_cache(rows, slots):
        return jnp.zeros((rows, slots), jnp.int32)

    def forward(params, feed, cache, capture=()):
        states = jax.nn.one_hot(feed.tokens_bt, size)
        return specjax.Output(states @ params, (states,) * len(capture), cache)

    model = specjax.LanguageModel(30 * np.eye(size, dtype=np.float32)[following], forward, init_cache, size)
    return model, following


def perfect(following, heads):
    """Heads with random blocks, whose last layer undoes them: head i gives the token i + 2 steps on."""
    random = np.random.default_rng(0)
    size, params, ahead = len(following), {}, following
    for i in range(heads):
        ahead = following[ahead]
        block = {"kernel": random.normal(scale=0.1, size=(size, size)), "bias": random.normal(size=(size,))}
        y = np.eye(size) @ block["kernel"] + block["bias"]
        states = np.eye(size) + y / (1 + np.exp(-y))
        kernel = np.linalg.solve(states, 30 * np.eye(size)[ahead])
        params[i] = {"blocks": {0: block}, "lm_head": {"kernel": kernel}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def generate(target, drafter, prompts, new, temperature=0.0, **settings):
    prompt, length = specjax.pad_prompts(prompts)
    sampling = specjax.Sampling(temperature=temperature, seed=list(range(len(prompts))))
    return specjax.generate(
        target, prompt, length, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=new, **settings
    )


def walk(following, token, length):
    """Returns the text that begins with a token."""
    text = [token]
    while len(text) < length:
        text.append(int(following[text[-1]]))
    return text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("g", [1, 2, 5])
def test_perfect_heads_are_accepted_in_full(g, temperature):
    """Prompts follow the law, too: a head cannot know what was forced upon the target."""
    target, following = affine()
    prompts = [walk(following, token, length) for token, length in ((3, 1), (8, 2), (2, 7))]
    out = generate(target, MedusaDrafter(perfect(following, g), g), prompts, 31, temperature)
    stats = out.stats
    assert (np.asarray(stats.drafted_at) > 0).all()
    np.testing.assert_array_equal(stats.accepted_at, stats.drafted_at)
    # All rounds emit g + 1 tokens, but for the first of a row of one token, and the last.
    assert stats.rounds.tolist() == [1 + -(-30 // (g + 1)), -(-31 // (g + 1)), -(-31 // (g + 1))]
    for row, prompt in enumerate(prompts):
        assert out.tokens[row, : out.lengths[row]].tolist() == walk(following, prompt[0], len(prompt) + 31)


def test_heads_one_place_off_are_rejected():
    """So the test above sees a shift."""
    target, following = affine()
    heads = perfect(following, 4)
    drafter = MedusaDrafter({i: heads[i + 1] for i in range(3)}, 3)
    stats = generate(target, drafter, [walk(following, 2, length) for length in (1, 2, 7)], 31).stats
    assert 5 * stats.accepted.sum() < stats.drafted.sum()


# Bad input.


def without(name):
    return {key: value for key, value in published(1).items() if key != name}


BAD = {
    "no such family": ({"medusa_num_heads": None}, published(1), "medusa_num_heads must be an integer"),
    "a model type that is none": ({"model_type": 3}, published(1), "model_type.*is 3"),
    "unknown flag": ({"medusa_twist": True}, published(1), "medusa_twist.*unknown"),
    "unknown flag in a model": ({"model_type": "llama", "medusa_twist": True}, published(1), "medusa_twist.*unk"),
    "unknown key": ({"rms_norm_eps": 1e-5}, published(1), "rms_norm_eps.*unknown"),
    "too few tensors": ({"medusa_num_heads": 4}, published(1), r"missing, such as '3.0.linear.bias'"),
    "too many heads": ({"medusa_num_heads": 10**9}, published(1), "at most 100"),
    "another number of blocks": ({"medusa_num_layers": 2}, published(1), "missing"),
    "a missing tensor": ({}, without("1.0.linear.weight"), "1 tensors are missing, such as '1.0.linear.weight'"),
    "a missing head": ({}, without("0.1.weight"), "missing, such as '0.1.weight'"),
    "an unknown tensor": ({}, published(1) | {"lm_head.weight": np.zeros((2, 2), np.float32)}, "unknown.*lm_head"),
    "another shape": ({}, published(1) | {"0.0.linear.bias": np.zeros((3,), np.float32)}, r"\(3,\); config.json asks"),
    "integers": ({}, published(1) | {"0.0.linear.bias": np.zeros((WIDTH,), np.int32)}, "has dtype int32"),
    "the config's width": ({"hidden_size": 8}, published(1), r"config.json asks for \(8"),
    "the config's vocabulary": ({"vocab_size": 8}, published(1), r"config.json asks for \(8, 16\)"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused(target, tmp_path, config, tensors, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_medusa(write(tmp_path / "heads", tensors, **config), target, 2)
    assert str(tmp_path) in str(caught.value)


def test_two_names_for_one_tensor_are_refused(target, tmp_path):
    tensors = published(1) | published(1, prefix="medusa_head.")
    with pytest.raises(ValueError, match="one name"):
        open_medusa(write(tmp_path / "heads", tensors), target, 2)


def test_a_config_of_another_layout_is_refused(target, tmp_path):
    folder = write(tmp_path / "heads", published(1))
    (folder / "config.json").write_text(json.dumps({"model_type": "medusa", "heads": 3}))
    with pytest.raises(ValueError, match="lacks the key 'medusa_num_heads'; give a folder in the layout of"):
        open_medusa(folder, target, 2)


def test_a_pickle_is_never_opened(target, tmp_path):
    folder = write(tmp_path / "heads", published(1))
    (folder / FILE).rename(folder / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"pickle medusa_lm_head\.pt, which is never opened; convert it.*#pickles"):
        open_medusa(folder, target, 2)


def test_no_heads_are_refused(target, tmp_path):
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3}')
    with pytest.raises(ValueError, match="holds neither"):
        open_medusa(tmp_path, target, 2)


@pytest.mark.parametrize("num_draft", [0, True, HEADS + 1])
def test_there_is_a_head_for_each_draft(target, tmp_path, num_draft):
    with pytest.raises(ValueError, match="num_draft"):
        open_medusa(write(tmp_path / "heads", published(1)), target, num_draft)


def test_heads_for_another_target_are_refused_when_opened(tmp_path):
    folder = write(tmp_path / "heads", published(1))
    with pytest.raises(ValueError, match=f"for {VOCAB} tokens and the target has 7"):
        open_medusa(folder, affine(size=7)[0], 2)
    with pytest.raises(ValueError, match=f"states of width {WIDTH} and the target's are {VOCAB} wide"):
        open_medusa(folder, affine()[0], 2)


def test_heads_that_do_not_fit_compile_no_loop(target):
    """Also where they were not opened from a folder."""
    drafter = MedusaDrafter(init_medusa_params(target.params["lm_head"]["kernel"], HEADS), HEADS)
    with compilations() as names:
        with pytest.raises(ValueError, match=f"read states of width {WIDTH} and the target's are {VOCAB} wide"):
            generate(affine()[0], drafter, PROMPTS, 4)
        with pytest.raises(ValueError, match="num_draft is 4 and there are 3 Medusa heads"):
            generate(target, drafter.replace(num_draft=4), PROMPTS, 4)
    assert not [name for name in names if "generate" in str(name)]


def test_heads_of_unequal_shapes_are_not_written(tmp_path):
    params = init_medusa_params(jnp.zeros((4, 5)), 2)
    params[1]["blocks"] = {}
    with pytest.raises(ValueError, match="head 1 has the shapes"):
        write_medusa(tmp_path / "heads", params)
    assert not (tmp_path / "heads").exists()
