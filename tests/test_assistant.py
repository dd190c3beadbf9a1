"""Assistants of Gemma 4, which draft from the target's cache, against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, make_case, torch, transformers
from parity_cases import GEMMA4, SHARING, SMALL, VOCAB, WINDOW

import specjax
from specjax.hf.assistant import assistant_fields
from specjax.types import Context, Event, Feed, whole_feed

TEXT = {**SMALL, **GEMMA4, "hidden_size": 20, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2}
TEXT["layer_types"] = ["sliding_attention", "full_attention"]
ORDERED = {"use_ordered_embeddings": True, "num_centroids": 6, "centroid_intermediate_top_k": 2}


def make_assistant(folder, vocab=VOCAB, **settings):
    """Writes an assistant with weights under which every part matters; returns transformers' model."""
    text = transformers.Gemma4TextConfig(**{**TEXT, "vocab_size": vocab})
    config = transformers.Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=SMALL["hidden_size"], attn_implementation="eager", **settings
    )
    model = transformers.Gemma4AssistantForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "token_ordering" in name:
            tensor.data = torch.randperm(vocab, generator=generator)
        elif tensor.ndim == 1 and "inv_freq" not in name and "embed_scale" not in name:
            tensor.data = 1 + 0.3 * noise
        elif tensor.ndim == 2:
            tensor.data = noise / tensor.shape[-1] ** 0.5
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_case("Gemma4Text", {**GEMMA4, **SHARING, "vocab_size": 54}, tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=[{}, ORDERED], ids=["all tokens", "centroids"])
def pair(request, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assistant")
    theirs = make_assistant(folder, 54, **request.param)
    drafter = specjax.load_drafter(f"assistant:{folder}", target.ours, 3, "float32")
    return target, theirs, drafter, request.param


def greedy(logits_bv, drafts_bg, index):
    token_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return token_b, jax.nn.one_hot(token_b, logits_bv.shape[-1], dtype=jnp.float32)


def test_chains_equal_those_of_transformers(pair):
    """Logits of three drafts and the chain that is proposed, within the window of 7 and past it."""
    target, theirs, drafter, ordered = pair
    for length in (6, 21):
        tokens = target.rows[0][:length]
        with torch.no_grad():
            out = target.theirs(
                torch.tensor([tokens[:-1]]), output_hidden_states=True, return_shared_kv_states=True, use_cache=False
            )
        feed = whole_feed(jnp.asarray([tokens[:-1]], jnp.int32))
        ours = target.ours.forward(target.ours.params, feed, target.ours.init_cache(1, 32), (-1,))
        np.testing.assert_allclose(ours.features[0][0], out.hidden_states[-1][0], atol=TOLERANCE)
        sources = drafter.head.sources(target.ours, ours.cache)
        state, their_state = ours.features[0][:, -1], out.hidden_states[-1][:, -1:]
        chain, token = [], tokens[-1]
        for _ in range(3):
            with torch.no_grad():
                embedded = target.theirs.get_input_embeddings()(torch.tensor([[token]]))
                step = theirs(
                    inputs_embeds=torch.cat([embedded, their_state], -1),
                    position_ids=torch.tensor([[length - 1]]),
                    shared_kv_states=dict(out.shared_kv_states),
                )
            at = Feed(jnp.asarray([[token]], jnp.int32), jnp.asarray([length - 2]), jnp.asarray([1]))
            logits, state = drafter.head.step(drafter.params, target.ours, at, state, sources)
            their_state, wanted = step.last_hidden_state, step.logits[0, 0].numpy()
            drafted = np.isfinite(logits[0])
            assert drafted.sum() == (18 if ordered else 54) and np.std(wanted[drafted]) > 0.1
            np.testing.assert_allclose(np.asarray(logits[0])[drafted], wanted[drafted], atol=TOLERANCE)
            np.testing.assert_allclose(state[0], their_state[0, 0], atol=TOLERANCE)
            chain.append(token := int(wanted.argmax()))
        padded = jnp.asarray([tokens + [0] * (32 - length)], jnp.int32)
        context = Context(target.ours, ours.cache, padded, jnp.asarray([length]), jnp.asarray([9]))
        event = Event(feed, ours.features, jnp.asarray([length - 1]))
        noted = drafter.observe(drafter.init(target.ours, 1, 32), context, event)
        proposal, _ = drafter.propose(noted, context, greedy)
        assert proposal.tokens_bg[0].tolist() == chain and proposal.length_b.tolist() == [3]


def test_text_is_exact_and_rows_of_one_token_draft_nothing_at_first(pair):
    target, _, drafter, _ = pair
    prompts = [target.rows[0], target.rows[1][:1]]
    sampling = specjax.Sampling(temperature=0.0)
    got, wanted = (
        specjax.generate(target.ours, prompts, drafter=drafter, sampling=sampling, max_new_tokens=24, fixed=True)
        for drafter in (drafter, None)
    )
    for ours, plain in zip(got.new_tokens(), wanted.new_tokens(), strict=True):
        np.testing.assert_array_equal(ours, plain)
    assert int(got.stats.drafted.sum()) > 0


def test_the_drafter_keeps_its_contract(pair):
    target, _, drafter, _ = pair
    specjax.check_drafter(drafter, target.ours)


def test_folders_are_told_the_right_door(target, tmp_path):
    make_assistant(tmp_path / "a", 54)
    with pytest.raises(ValueError, match="draft head, no model; load_drafter opens it as assistant:"):
        specjax.load_drafter(f"model:{tmp_path / 'a'}", target.ours, 2, "float32")
    with pytest.raises(ValueError, match=r"holds an assistant, not Medusa heads; give the drafter assistant:"):
        specjax.load_drafter(f"medusa:{tmp_path / 'a'}", target.ours, 2, "float32")
    with pytest.raises(ValueError, match="holds a language model, not an assistant"):
        specjax.load_drafter(f"assistant:{target.folder}", target.ours, 2, "float32")
    with pytest.raises(ValueError, match="assistant computes in bfloat16 and the target's cache is float32"):
        specjax.load_drafter(f"assistant:{tmp_path / 'a'}", target.ours, 2, "bfloat16")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    for change, message in (
        ({"backbone_hidden_size": 23}, "states 23 wide"),
        ({"use_ordered_embeddings": True}, "2048"),
    ):
        (tmp_path / "a" / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            specjax.load_drafter(f"assistant:{tmp_path / 'a'}", target.ours, 2, "float32")


RAW = {"model_type": "gemma4_assistant", "text_config": {**TEXT, **WINDOW}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gemma4_text"}, "model_type is 'gemma4_text'; an assistant has"),
        ({"text_config": None}, "text_config is None"),
        ({"text_config": {**TEXT, "num_kv_shared_layers": 1}}, "num_kv_shared_layers is 1"),
        (
            {"text_config": {**TEXT, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99}},
            "set them to 0",
        ),
        ({"backbone_hidden_size": 0}, "backbone_hidden_size"),
    ],
)
def test_configs_that_are_not_computed_are_refused(changed, message):
    assert assistant_fields(RAW)["decoder"].each_layer[0].window == 8
    with pytest.raises(ValueError, match=message):
        assistant_fields(RAW | changed)
