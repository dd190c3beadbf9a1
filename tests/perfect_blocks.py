"""Targets that a head of blocks predicts without error, whatever the head's kind."""

import jax
import jax.numpy as jnp
import numpy as np

import specjax
from specjax.types import Context, Event, Feed, LanguageModel, Output

LAYERS = 8


def perfect_target(head, params, empty, g, width=16, seed=0):
    """Returns a target whose law at each position is that of the head's draft there.

    Blocks of g + 1 tokens follow each other from the first token on: token i of a block is draft i of a pass that knows
    the text up to the block's first token, its anchor. So drafts of rows whose length is a block's first position are
    all right, and the token after the drafts is the next anchor. A state is a function of its token and position. The
    target is computed place by place, and each time anew from the tokens: nothing of what a drafter does between rounds
    is in it.

    Args:
      head: a ``Head`` of ``specjax.drafters.block``.
      params: its parameters.
      empty: ``empty(rows, slots)``, the head's state without text.
      g: the drafts of a block.
      width: of the target's states.
      seed: of the target's own weights.
    """
    rng, vocab = np.random.default_rng(seed), head.vocab_size
    draws = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tables = {
        "embedding": draws(vocab, width),
        "head": draws(width, vocab) / 2,
        "states": draws(vocab, width),
        "wave": draws(7, width),
        "turns": draws(LAYERS + 1, width, width) / width**0.5,
        "after": draws(vocab, vocab),
    }

    def embed(params, tokens_bt):
        return params[0]["embedding"][tokens_bt]

    def unembed(params, x_btd):
        return x_btd @ params[0]["head"]

    def forward(params, feed, cache, capture=()):
        (tables, own), (rows, slots) = params, cache.shape
        lent = LanguageModel(params, None, None, vocab, embed=embed, unembed=unembed)
        write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start,)))
        tokens_bs = write(cache, feed.tokens_bt, feed.start_b)

        def states(tokens_bt, position_bt):
            plain = jnp.tanh(tables["states"][tokens_bt] + tables["wave"][position_bt % 7])
            return lambda i: plain @ tables["turns"][i]

        everywhere = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (rows, slots))
        features = tuple(map(states(tokens_bs, everywhere), head.capture))

        def token_at(slot_b):
            return jnp.take_along_axis(tokens_bs, jnp.clip(slot_b, 0, slots - 1)[:, None], axis=1)[:, 0]

        def one(_, place):
            position_b = feed.start_b + place
            anchor_b = position_b // (g + 1) * (g + 1)
            context = Context(lent, None, tokens_bs, anchor_b + 1, jnp.ones_like(anchor_b))
            event = Event(Feed(tokens_bs, jnp.zeros_like(anchor_b), anchor_b), features, anchor_b)
            state = head.observe(own, empty(rows, slots + g), context, event)
            block, _ = head.block(own, state, context, g)
            carry, logits_bv = head.start(own, rows), tables["after"][token_at(position_b)]
            for i in range(g):
                given = (block.logits_bgu[:, i], block.states_bgd[:, i], token_at(anchor_b + i))
                draft_bv, carry = head.step(own, carry, *given)
                drafted_b = (position_b - anchor_b == i) & block.ready_b
                logits_bv = jnp.where(drafted_b[:, None], draft_bv, logits_bv)
            return None, logits_bv

        _, logits_tbv = jax.lax.scan(one, None, jnp.arange(feed.tokens_bt.shape[1], dtype=jnp.int32))
        own_states = states(feed.tokens_bt, feed.position_bt)
        return Output(logits_tbv.swapaxes(0, 1), tuple(map(own_states, capture)), tokens_bs)

    return LanguageModel(
        params=(tables, params),
        forward=forward,
        init_cache=lambda rows, slots: jnp.zeros((rows, slots), jnp.int32),
        vocab_size=vocab,
        num_layers=LAYERS,
        embed=embed,
        unembed=unembed,
    )


def acceptance(target, drafter, temperature, blocks=(0, 1, 1, 3, 5), seed=3):
    """Returns how many drafts are accepted at each place, and how many there are, over rows that begin as blocks do.

    Row i has ``blocks[i]`` blocks before the last token.
    """
    rng = np.random.default_rng(5)
    prompts = [rng.integers(target.vocab_size, size=1 + n * (drafter.num_draft + 1)).tolist() for n in blocks]
    sampling = specjax.Sampling(temperature=temperature, seed=seed)
    out = specjax.generate(target, prompts, drafter=drafter, fixed=True, sampling=sampling, max_new_tokens=18)
    return np.asarray(out.stats.accepted_at).sum(0), np.asarray(out.stats.drafted_at).sum(0)
