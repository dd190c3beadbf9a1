"""A language model of another tokenizer as drafter. In suffixes, u is its vocabulary and p the pieces of a token."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.drafters.chain import Chain, place, repeat
from specjax.drafters.draft_ids import by_targets_ids
from specjax.rows import text_at
from specjax.text.vocabulary import VocabularyMap
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal

_CHUNK = 256  # draft tokens of a prompt that are fed at a time


@struct.dataclass
class SharedVocabularyState:
    """The rows' text in the draft's tokens.

    Attributes:
      cache: the draft model's.
      tokens_bs: int32, the text's tokens; zeros past them.
      length_b: int32, how many they are, those included that found no room.
      taken_b: int32, how many of the target's tokens they spell.
      fed_b: int32, how many of the text's tokens the cache holds, as in ``ModelState``. Never the last one: it is fed
        again, for its logits, where the target's next token is spelled by none.
    """

    cache: Cache
    tokens_bs: Array
    length_b: Array
    taken_b: Array
    fed_b: Array


@struct.dataclass
class SharedVocabularyDrafter:
    """Drafts with a model of another vocabulary, on the tokens that both have.

    The draft's distribution is restricted to the shared tokens and renormalised (Timor et al. 2025, token-level
    intersection, arXiv 2502.05202), so drafts are ordinary tokens of the target, and every verification rule stays
    exact. The draft reads the row's text in its own tokens: a target token is spelled by up to p of them.

    A row proposes nothing while its text has no draft token, once that text outgrows the draft's cache, and where a
    bias bans all shared tokens.

    Attributes:
      model: the draft model.
      draft_of_v: int32 ``[v]``, the draft's id of each of the target's tokens, -1 where it has none.
      pieces_vp: int32 ``[v, p]``, each token in draft tokens; for a shared one, its id alone.
      num_pieces_v: int32 ``[v]``, how many of the p count.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``.
    """

    model: LanguageModel
    draft_of_v: Array
    pieces_vp: Array
    num_pieces_v: Array
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)

    max_positions = None  # a text too long for the draft is no error: the row goes on without drafts

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def vocab_size(self) -> int:
        return self.draft_of_v.shape[0]

    @property
    def _rolls_back(self) -> bool:
        return self.model.commit is not None

    @property
    def _window(self) -> int:
        """The most draft tokens of a row that are fed before the first draft, as in ``ModelDrafter``.

        Of a round, the token after the accepted drafts has up to p pieces. A cache that keeps the drafts lacks one
        more, the last draft, which is never fed. A cache that must be rolled back lacks all of them, and the draft
        token before them.
        """
        return self.pieces_vp.shape[1] + (self.num_draft + 1 if self._rolls_back else 1)

    def init(self, target: LanguageModel, rows: int, slots: int) -> SharedVocabularyState:
        """Returns empty texts and an empty cache."""
        del target
        # Between vocabularies of one kind a text is seldom twice as long; p times would fit all, and cost as much.
        slots = max(2 * slots, self._window + self.num_draft)
        if self.model.max_positions is not None:
            slots = min(slots, self.model.max_positions)
        # A prompt's chunk may start at any slot, so the cache has room for one past the text.
        cache = self.model.init_cache(rows, slots + max(_CHUNK, self._window))
        zero_b = jnp.zeros((rows,), jnp.int32)
        return SharedVocabularyState(cache, jnp.zeros((rows, slots), jnp.int32), zero_b, zero_b, zero_b)

    def observe(self, state: SharedVocabularyState, context: Context, event: Event) -> SharedVocabularyState:
        """Spells the tokens that are new, and feeds a prompt. A round's are fed by ``propose``."""
        # 1. Spell all tokens up to the one after those that were kept.
        new_b = jnp.where(event.kept_b > 0, event.end_b + 1 - state.taken_b, 0)
        new_bt = text_at(context.tokens_bs, state.taken_b, event.feed.tokens_bt.shape[1] + 1)
        if event.drafted:
            # 2. An accepted draft is one draft token, and what was fed of the rejected ones is forgotten.
            accepted_b = jnp.maximum(event.kept_b - 1, 0)
            fed_b = jnp.minimum(state.fed_b, state.length_b + accepted_b)
            state = self._extended(state, new_bt, new_b)
            fed_b = jnp.minimum(fed_b, jnp.maximum(state.length_b - 1, 0))
            return dataclasses.replace(state, fed_b=jnp.where(event.kept_b > 0, fed_b, state.fed_b))
        state = self._extended(state, new_bt, new_b)

        # 3. Feed a prompt: of its last token nothing is needed before the first draft.
        def feed(_: Array, state: SharedVocabularyState) -> SharedVocabularyState:
            count_b = jnp.clip(self._end(state) - 1 - state.fed_b, 0, _CHUNK)
            chunk = Feed(text_at(state.tokens_bs, state.fed_b, _CHUNK), state.fed_b, count_b)
            _, cache = self.model.run(chunk, state.cache)
            return dataclasses.replace(state, cache=cache, fed_b=state.fed_b + count_b)

        most = jnp.max(self._end(state) - 1 - state.fed_b)
        return lax.fori_loop(jnp.int32(0), (most + (_CHUNK - 1)) // _CHUNK, feed, state)

    def propose(self, state: SharedVocabularyState, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Samples a chain of ``num_draft`` shared tokens."""
        # 1. Spell the token of a row that has no other: no event came with it, since none of its tokens was fed.
        first_b = (context.running_b & (state.taken_b == 0)).astype(jnp.int32)
        state = self._extended(state, text_at(context.tokens_bs, jnp.zeros_like(first_b), 1), first_b)
        end_b, g = self._end(state), context.drafts(self.num_draft)
        running_b = context.running_b & (end_b > 0)

        # 2. Feed what the cache lacks of the text. In a cascade that may be too much for one pass, since accepted
        # drafts of another drafter have several pieces. Such a row catches up first, and proposes nothing.
        missing_b = jnp.where(running_b, end_b - state.fed_b, 0)
        count_b = jnp.minimum(missing_b, self._window)
        drafting_b = running_b & (missing_b <= self._window)
        feed = Feed(text_at(state.tokens_bs, state.fed_b, self._window), state.fed_b, count_b)
        output = self.model.forward(self.model.params, feed, state.cache)
        logits_btu, cache = output.logits_btv, self.model.keep(output.cache, feed, count_b)
        # A cache that must be rolled back is kept as it was before the last token.
        held_b = jnp.where(drafting_b, count_b - 1, count_b)
        read = dataclasses.replace(state, cache=self.model.keep(output.cache, feed, held_b), fed_b=state.fed_b + held_b)
        real_b = drafting_b.astype(jnp.int32)

        # 3. Draw, and feed each draft for the next. A row ends where it draws a token that is not shared. Inside a
        # cascade, ``draw`` may return such a token of another drafter's: from there on the cache is wrong.
        def add(chain: Chain, logits_bu: Array, proposing_b: Array, i: int | Array) -> tuple[Chain, Array, Array]:
            chain, token_b = chain.add(draw, self._restricted(logits_bu), i)
            draft_b = self.draft_of_v[token_b]
            return chain, proposing_b & chain.lawful(i) & (draft_b >= 0), draft_b

        def advance(i: int | Array, carry: Any) -> Any:
            chain, proposing_b, length_b, draft_b, right_b, fed_b, cache = carry
            right_b &= draft_b >= 0
            feed = Feed(jnp.maximum(draft_b, 0)[:, None], end_b + (i - 1), real_b)
            logits_btu, cache = self.model.run(feed, cache)
            chain, proposing_b, draft_b = add(chain, logits_btu[:, 0], proposing_b, i)
            length_b += proposing_b.astype(jnp.int32)
            return chain, proposing_b, length_b, draft_b, right_b, fed_b + right_b.astype(jnp.int32), cache

        chain = Chain.empty(end_b.shape[0], g, self.vocab_size)
        logits_bu = place(logits_btu, jnp.maximum(count_b - 1, 0))
        chain, proposing_b, draft_b = add(chain, logits_bu, drafting_b, 0)
        length_b, fed_b = proposing_b.astype(jnp.int32), read.fed_b + real_b
        carry = (chain, proposing_b, length_b, draft_b, drafting_b, fed_b, cache)
        chain, _, length_b, _, _, fed_b, cache = repeat(1, g, advance, carry, self.unrolled)
        ahead = dataclasses.replace(read, cache=cache, fed_b=fed_b)
        return chain.propose(length_b), read if self._rolls_back else ahead

    def _extended(self, state: SharedVocabularyState, new_bt: Array, count_b: Array) -> SharedVocabularyState:
        """Spells the first ``count_b`` of the tokens past each row's end; what finds no room is dropped."""
        place_t = jnp.arange(new_bt.shape[1], dtype=jnp.int32)[None]
        place_p = jnp.arange(self.pieces_vp.shape[1], dtype=jnp.int32)[None, None]
        number_bt = jnp.where(place_t < count_b[:, None], self.num_pieces_v[new_bt], 0)
        end_bt = state.length_b[:, None] + jnp.cumsum(number_bt, axis=1, dtype=jnp.int32)
        slot_btp = (end_bt - number_bt)[..., None] + place_p
        slot_btp = jnp.where(place_p < number_bt[..., None], slot_btp, state.tokens_bs.shape[1])
        row_b11 = jnp.arange(new_bt.shape[0], dtype=jnp.int32)[:, None, None]
        tokens_bs = state.tokens_bs.at[row_b11, slot_btp].set(self.pieces_vp[new_bt], mode="drop")
        return dataclasses.replace(state, tokens_bs=tokens_bs, length_b=end_bt[:, -1], taken_b=state.taken_b + count_b)

    def _end(self, state: SharedVocabularyState) -> Array:
        """Returns the length of each row's text, 0 for one that leaves no room to draft after it.

        Such a row never drafts again, since its text only grows.
        """
        room = state.tokens_bs.shape[1] - (self.num_draft - 1)
        return jnp.where(state.length_b <= room, state.length_b, 0)

    def _restricted(self, logits_bu: Array) -> Array:
        """Returns the shared tokens' logits in the target's vocabulary, -inf for all others."""
        return by_targets_ids(logits_bu.astype(jnp.float32), self.draft_of_v)


def shared_vocabulary_drafter(
    model: LanguageModel, vocabulary_map: VocabularyMap, num_draft: int = 4
) -> SharedVocabularyDrafter:
    """Returns a drafter for the target of ``vocabulary_map``.

    Args:
      model: the draft model.
      vocabulary_map: from the target's vocabulary to the draft model's, as ``match_vocabularies`` returns it.
      num_draft: g, tokens proposed per round, at least 1.

    Raises:
      ValueError: the map names tokens that the model does not have, shares none, or the model is too short.
    """
    highest = int(max(vocabulary_map.draft_of_v.max(), vocabulary_map.pieces_vp.max()))
    if highest >= model.vocab_size:
        raise ValueError(
            f"the map names draft token {highest} and the draft model's ids are 0 to {model.vocab_size - 1}; match the "
            "vocabularies with this model's tokenizer and vocab_size"
        )
    if not vocabulary_map.num_shared:
        raise ValueError("the map shares no token, so nothing could be drafted; give another draft model")
    needed = vocabulary_map.pieces_vp.shape[1] + 1 + num_draft
    if model.max_positions is not None and model.max_positions < needed:
        raise ValueError(
            f"the draft model has {model.max_positions} positions and drafting {num_draft} tokens needs {needed}: "
            "draft fewer, or give a model of more positions"
        )
    return SharedVocabularyDrafter(
        model=model,
        draft_of_v=jnp.asarray(vocabulary_map.draft_of_v, jnp.int32),
        pieces_vp=jnp.asarray(vocabulary_map.pieces_vp, jnp.int32),
        num_pieces_v=jnp.asarray(vocabulary_map.num_pieces_v, jnp.int32),
        num_draft=num_draft,
    )
