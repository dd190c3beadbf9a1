"""P-EAGLE heads and PARD models, which draft over masks: against NumPy twins, and drafts that are always right."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_block
import reference_model
import test_eagle
from draft_heads import open_block, open_eagle
from heads_observing import (
    assert_chunks_are_as_one_pass,
    assert_rounds_alone_are_as_one_pass,
    assert_rows_that_change_are_as_read_anew,
)
from perfect_blocks import acceptance, perfect_target
from test_drafters import step
from test_eagle import CASES, TARGET, VOCAB, WIDTH, in_speculators, prefilled, tables_of, true_states, write_folder

import specjax
from specjax.drafters.block import Block
from specjax.drafters.eagle import EagleHead
from specjax.drafters.feature import FeatureState
from specjax.drafters.pard import PardDrafter
from specjax.drafters.peagle import PEagleHead
from specjax.hf.safetensors import open_tensors
from specjax.transformer.config import DecoderConfig
from specjax.transformer.decoder import decoder_model, empty_cache, init_params
from specjax.types import whole_feed

MASK = 39
SPECFORGE = {key: value for key, value in test_eagle.SPECFORGE.items() if key != "architectures"}
# The config, and the EAGLE-3 case of its tensors and of what the twin is told.
HEADS = {
    "speculators": (in_speculators("eagle3") | {"speculators_model_type": "peagle", "mask_token_id": MASK}, "fc_norm"),
    "speculators, several layers": (
        in_speculators("eagle3", layer={"num_hidden_layers": 3})
        | {"speculators_model_type": "peagle", "mask_token_id": MASK},
        "several layers",
    ),
    "SpecForge": (
        SPECFORGE | {"architectures": ["PEagleDraftModel"], "mask_token_id": MASK, "draft_vocab_size": VOCAB},
        "the whole vocabulary",
    ),
    "vLLM": (test_eagle.SPECFORGE | {"ptd_token_id": MASK}, "EAGLE-3, SpecForge"),
}
HEADS["speculators"][0]["fc_norm"] = True


def published(name):
    """Returns the tensors and what the twin is told."""
    _, of_eagle = HEADS[name]
    case = dataclasses.replace(CASES[of_eagle], first="layers.0.")
    tensors = test_eagle.published(case)
    rng = np.random.default_rng(8)
    tensors["mask_hidden"] = rng.normal(size=(1, 1, 3 * WIDTH)).astype(np.float32)
    tensors["embed_tokens.weight"] = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    return tensors, case.twin | {"mask_token_id": MASK}


def opened(name, folder, drafts=4, options="", target=TARGET):
    write_folder(folder, HEADS[name][0], published(name)[0])
    return open_block(f"{folder}{options}", target, drafts, "float32")


@pytest.mark.parametrize("name", HEADS)
def test_each_round_of_p_eagle_drafts_what_the_twin_does(name, tmp_path):
    (tensors, twin), drafter = published(name), opened(name, tmp_path / "head")
    if name in ("SpecForge", "vLLM"):
        assert drafter.capture == (2, 4, 5)
    table, target_head = tables_of(TARGET, tensors)
    state, accepted = prefilled(TARGET, drafter, seed=4), set()
    for _ in range(4):
        features = [np.asarray(x, np.float64) for x in true_states(TARGET, state.tokens_bs)]
        after, proposal = step(TARGET, state, drafter)
        for row, length in enumerate(np.asarray(state.length_b)):
            assert proposal.length_b[row] == (4 if length > 1 else 0)
            if length > 1:
                tokens, read = np.asarray(state.tokens_bs)[row, :length], [features[i][row] for i in drafter.capture]
                logits = reference_block.peagle(twin, tensors, table, target_head, read, tokens, 4)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                wanted = weights / weights.sum(-1, keepdims=True)
                np.testing.assert_allclose(proposal.probs_bgv[row], wanted, atol=1e-4, rtol=0)
        accepted |= set(np.asarray(after.stats.accepted - state.stats.accepted).tolist())
        state = after
    assert {0, 1} <= accepted, "some drafts should be accepted and some not"


def test_the_first_draft_is_eagle_3s(tmp_path):
    """A P-EAGLE head of one draft is an EAGLE-3 head."""
    tensors, _ = published("speculators")
    config = HEADS["speculators"][0] | {"speculators_model_type": "eagle3"}
    del config["mask_token_id"]
    eagle = {key: tensors[key] for key in tensors if key != "mask_hidden"}
    chain = open_eagle(write_folder(tmp_path / "eagle", config, eagle), TARGET, 1, "float32")
    one = opened("speculators", tmp_path / "head", 1)
    state, other = prefilled(TARGET, one, seed=4), prefilled(TARGET, chain, seed=4)
    (after, found), (same, wanted) = step(TARGET, state, one), step(TARGET, other, chain)
    np.testing.assert_allclose(found.probs_bgv[1:], wanted.probs_bgv[1:], atol=1e-6)
    np.testing.assert_array_equal(after.tokens_bs, same.tokens_bs)


def test_a_p_eagle_head_comes_back_as_it_was_written(tmp_path):
    drafter = opened("speculators", tmp_path / "head")
    specjax.save_drafter(tmp_path / "again", drafter, TARGET, HEADS["speculators"][0], target_name="some/target")
    again = open_block(tmp_path / "again", TARGET, 4, "float32")
    assert again.head == drafter.head
    assert again.head.describe().startswith(
        "P-EAGLE head, of one pass for all drafts: EAGLE-3 head, 1 layer of width 16"
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, drafter.params)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["speculators_model_type"] == "peagle" and written["mask_token_id"] == MASK
    assert written["speculators_config"]["algorithm"] == "peagle"
    assert open_tensors(tmp_path / "again").keys() == published("speculators")[0].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "the token of the mask is None; give mask_token_id"),
        ({"mask_token_id": VOCAB}, f"mask_token_id must be an integer of at most {VOCAB - 1}"),
        ({"pard_token": 3}, r"the token of the mask is \{'mask_token_id': 39, 'pard_token': 3\}"),
        ({"mask_token_id": "x"}, "mask_token_id must be an integer of at least 0, got 'x'"),
        ({"norm_before_fc": True}, "norm_before_fc and fc_norm are both true"),
    ],
)
def test_bad_configs_of_p_eagle_are_refused(change, message, tmp_path):
    folder = write_folder(tmp_path, HEADS["speculators"][0] | change, published("speculators")[0])
    with pytest.raises(ValueError, match=message) as caught:
        open_block(folder, TARGET, 3)
    assert str(tmp_path) in str(caught.value)


def test_bad_folders_of_p_eagle_are_refused(tmp_path):
    config, tensors = HEADS["speculators"][0], published("speculators")[0]
    short = tensors | {"mask_hidden": tensors["mask_hidden"][..., :-1]}
    with pytest.raises(ValueError, match="mask_hidden"):
        open_block(write_folder(tmp_path / "short", config, short), TARGET, 3)
    missing = {key: tensors[key] for key in tensors if key != "mask_hidden"}
    with pytest.raises(ValueError, match="mask_hidden"):
        open_block(write_folder(tmp_path / "missing", config, missing), TARGET, 3)
    folder = write_folder(tmp_path / "head", config, tensors)
    with pytest.raises(ValueError, match="holds a P-EAGLE head, whose windows always slide; leave out @window=stays"):
        open_block(f"{folder}@window=stays", TARGET, 3)
    with pytest.raises(
        ValueError, match=f"holds a draft head of blocks, not an EAGLE head; give the drafter block:{folder}"
    ):
        open_eagle(folder, TARGET, 3)
    with pytest.raises(ValueError, match="a P-EAGLE head is an EAGLE-3 head whose windows slide"):
        PEagleHead(EagleHead(DecoderConfig(VOCAB, WIDTH, 20, 1, 4), (-1,), version=1), 3)


# PARD.

CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
DECODER = DecoderConfig(VOCAB, WIDTH, 20, 2, 4, 2, max_position_embeddings=1024)


def draft_model():
    params = init_params(DECODER, jax.random.key(3))
    return decoder_model(DECODER, jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params))


def test_each_round_of_pard_drafts_what_the_twin_does():
    """The model has seen the row and nothing of earlier masks."""
    drafter = PardDrafter(draft_model(), 4, mask_token=MASK)
    state, accepted = prefilled(TARGET, drafter, seed=4), set()
    for _ in range(5):
        after, proposal = step(TARGET, state, drafter)
        for row, length in enumerate(np.asarray(state.length_b)):
            tokens = [*np.asarray(state.tokens_bs)[row, :length].tolist(), *[MASK] * 3]
            logits = reference_model.llama(CONFIG, drafter.model.params, tokens)[0][-4:]
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            wanted = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(proposal.probs_bgv[row], wanted, atol=1e-4, rtol=0)
        accepted |= set(np.asarray(after.stats.accepted - state.stats.accepted).tolist())
        state = after
    assert {0, 1} <= accepted


def test_a_pard_folder_opens_by_what_it_says(tmp_path, caplog):
    model = draft_model()
    specjax.save(tmp_path / "draft", CONFIG, model.params)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    write = lambda **keys: (tmp_path / "draft" / "config.json").write_text(json.dumps(config | keys))
    write(pard_token=MASK, spd_type="pard")
    drafter = open_block(f"{tmp_path / 'draft'}@argmax", TARGET, 3, "float32")
    assert isinstance(drafter, PardDrafter) and drafter.mask_token == MASK and drafter.argmax and drafter.num_draft == 3
    assert not caplog.records
    with pytest.raises(ValueError, match="holds a language model, whose windows always slide"):
        open_block(f"{tmp_path / 'draft'}@window=stays", TARGET, 3)
    write(pard_token=VOCAB)
    with pytest.raises(ValueError, match=rf"config.json: pard_token must be an integer of at most {VOCAB - 1}"):
        open_block(tmp_path / "draft", TARGET, 3)
    write(pard_token=MASK)
    other = test_eagle.random_target(vocab=50)
    with pytest.raises(ValueError, match="has a vocabulary of 40 tokens and the target one of 50"):
        open_block(tmp_path / "draft", other, 3)
    write()
    with pytest.raises(ValueError, match="holds a language model, not a draft head of blocks"):
        open_block(tmp_path / "draft", TARGET, 3)


# Both.


def p_eagle(drafts=4):
    head = PEagleHead(
        EagleHead(DecoderConfig(VOCAB, WIDTH, 20, 2, 4, 2), (2, 4, 5), 3, norm_before_residual=True), MASK
    )
    rng = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 1.6 / x.shape[0] ** 0.5, jnp.float32) if x.ndim > 1 else x
    return specjax.BlockDrafter(jax.tree.map(draw, head.init_params(jax.random.key(0))), head, drafts)


def pard(drafts=4):
    return PardDrafter(draft_model(), drafts, mask_token=MASK)


BOTH = {"P-EAGLE": p_eagle, "PARD": pard}


def pard_as_head(model):
    """One pass over the whole row and the masks after it, with nothing kept."""

    def block(params, state, context, count):
        del state
        slot_1s = jnp.arange(context.tokens_bs.shape[1], dtype=jnp.int32)[None]
        tokens_bs = jnp.where(slot_1s < context.length_b[:, None], context.tokens_bs, MASK)
        masks = jnp.full((tokens_bs.shape[0], count), MASK, jnp.int32)
        tokens_bs = jnp.concatenate([tokens_bs, masks], axis=1)
        logits = model.forward(params, whole_feed(tokens_bs), model.init_cache(*tokens_bs.shape)).logits_btv
        at_bg = context.length_b[:, None] - 1 + jnp.arange(count, dtype=jnp.int32)[None]
        logits = jnp.take_along_axis(logits, at_bg[:, :, None], axis=1)
        return Block(logits, logits, jnp.ones_like(context.running_b)), None

    return SimpleNamespace(
        capture=(),
        vocab_size=VOCAB,
        observe=lambda params, state, context, event: None,
        block=block,
        start=lambda params, rows: None,
        step=lambda params, carry, logits, state, token: (logits, None),
    )


@pytest.mark.parametrize("name", BOTH)
def test_perfect_drafts_are_always_accepted(name):
    drafter = BOTH[name](3)
    if name == "PARD":
        target = perfect_target(pard_as_head(drafter.model), drafter.model.params, lambda rows, slots: None, 3)
    else:
        head = drafter.head

        def empty(rows, slots):
            cache = empty_cache(head.eagle.decoder, rows, slots, jnp.float32)
            return FeatureState(cache, jnp.zeros((rows, WIDTH), jnp.float32))

        target = perfect_target(head, drafter.params, empty, 3)
    blocks = (1, 1, 2, 3, 5) if name == "P-EAGLE" else (0, 1, 1, 3, 5)  # P-EAGLE drafts nothing after one token
    for temperature in (0.0, 1.0):
        accepted, drafted = acceptance(target, drafter, temperature, blocks)
        assert accepted.tolist() == drafted.tolist() and (drafted >= 10).all()
    masked = {"mask_token": 3} if name == "PARD" else {"head": dataclasses.replace(drafter.head, mask_token=3)}
    accepted, drafted = acceptance(target, dataclasses.replace(drafter, **masked), 1.0, blocks)
    assert (accepted / drafted).min() < 0.95


@pytest.mark.parametrize("name", BOTH)
def test_a_prompt_in_chunks_is_as_in_one_pass(name):
    assert_chunks_are_as_one_pass(TARGET, BOTH[name]())


@pytest.mark.parametrize("name", BOTH)
def test_rounds_without_drafts_are_read_as_a_prompt_is(name):
    assert_rounds_alone_are_as_one_pass(TARGET, BOTH[name]())


@pytest.mark.parametrize("name", BOTH)
def test_rows_that_are_extended_or_put_in_are_as_read_anew(name):
    assert_rows_that_change_are_as_read_anew(TARGET, BOTH[name]())


@pytest.mark.parametrize("name", BOTH)
def test_likeliest_drafts_are_certain(name):
    drafter = BOTH[name]()
    state = prefilled(TARGET, drafter, seed=4, temperature=0.7)
    (_, sampled), (_, proposal) = (step(TARGET, state, dataclasses.replace(drafter, argmax=x)) for x in (False, True))
    assert proposal.probs_bgv is None
    likeliest = np.asarray(sampled.probs_bgv)[1:].argmax(-1)
    np.testing.assert_array_equal(np.asarray(proposal.tokens_bg)[1:], likeliest)


@pytest.mark.parametrize("name", BOTH)
def test_all_slots_are_used_to_the_last(name):
    """Masks reach past the rows' ends: a row that ends at its last slot has the text of plain decoding."""
    drafter = BOTH[name](6)
    prompts, settings = [[1, 2, 3], [4]], {"max_new_tokens": 13, "sampling": specjax.Sampling(temperature=0.0)}
    out = specjax.generate(TARGET, prompts, drafter=drafter, fixed=True, slots=3 + 13 + 6 + 1, **settings)
    plain = specjax.generate(TARGET, prompts, **settings)
    for row, other in zip(out.rows(), plain.rows(), strict=True):
        np.testing.assert_array_equal(row, other)
