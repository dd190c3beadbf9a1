"""A language model of another tokenizer as drafter. In suffixes, u is its vocabulary and p the pieces of a token."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from specjax.text.vocabulary import VocabularyMap
from specjax.types import Cache, Context, Draw, LanguageModel, Proposal, Verdict


@struct.dataclass
class SharedVocabularyState:
    """The rows' text in the draft's tokens.

    Attributes:
      cache: the draft model's.
      tokens_bs: int32, the text's tokens; zeros behind them.
      length_b: int32, how many they are, those included that found no room.
      taken_b: int32, how many of the target's tokens they spell.
    """

    cache: Cache
    tokens_bs: Array
    length_b: Array
    taken_b: Array


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
    """

    model: LanguageModel
    draft_of_v: Array
    pieces_vp: Array
    num_pieces_v: Array
    num_draft: int = struct.field(pytree_node=False, default=4)

    max_positions = None  # a text too long for the draft is no error: the row goes on without drafts

    @property
    def capture(self) -> tuple[int, ...]:
        return ()

    @property
    def vocab_size(self) -> int:
        return self.draft_of_v.shape[0]

    @property
    def _window(self) -> int:
        """Tokens to feed before drafting. A round leaves at most p + 1 unfed: its last draft, which never is fed, and
        the pieces of the token emitted behind it."""
        return self.pieces_vp.shape[1] + 1

    def start(self, context: Context, features: Any, slots: int) -> SharedVocabularyState:
        """Returns the prompt in draft tokens, and the draft's cache filled with it."""
        del features
        rows, width = context.tokens_bs.shape
        # Between vocabularies of one kind a text is seldom twice as long; p times would fit all, and cost as much.
        slots = max(2 * slots, self._window + self.num_draft)
        if self.model.max_positions is not None:
            slots = min(slots, self.model.max_positions)
        zero_b = jnp.zeros((rows,), jnp.int32)
        state = SharedVocabularyState(
            self.model.init_cache(rows, slots), jnp.zeros((rows, slots), jnp.int32), zero_b, zero_b
        )
        state = self._extended(state, context.tokens_bs, context.length_b)
        chunk = min(width, slots)
        last_start = jnp.int32(slots - chunk)  # an overlap feeds some tokens again, which writes what is there

        def feed(i: Array, cache: Cache) -> Cache:
            start = jnp.minimum(i * chunk, last_start)
            tokens_bt = lax.dynamic_slice_in_dim(state.tokens_bs, start, chunk, axis=1)
            return self.model.forward(self.model.params, tokens_bt, cache, zero_b + start).cache

        # The cost follows the longest text: mostly one chunk, since prompts are padded.
        chunks = (jnp.max(self._end(state)) + (chunk - 1)) // chunk
        return dataclasses.replace(state, cache=lax.fori_loop(jnp.int32(0), chunks, feed, state.cache))

    def propose(self, state: SharedVocabularyState, context: Context, draw: Draw) -> tuple[Proposal, Any]:
        """Samples a chain of ``num_draft`` shared tokens."""
        place_t = jnp.arange(self.num_draft + 1, dtype=jnp.int32)[None]  # a round emits no more
        new_bt = jnp.take_along_axis(context.tokens_bs, state.taken_b[:, None] + place_t, axis=1)
        state = self._extended(state, new_bt, context.length_b - state.taken_b)

        end_b = self._end(state)
        start_b = jnp.maximum(end_b - self._window, 0)
        place_w = jnp.arange(self._window, dtype=jnp.int32)[None]
        fed_bw = jnp.take_along_axis(state.tokens_bs, start_b[:, None] + place_w, axis=1)
        output = self.model.forward(self.model.params, fed_bw, state.cache, start_b)
        at_b11 = jnp.maximum(end_b - 1 - start_b, 0)[:, None, None]
        logits_bu = jnp.take_along_axis(output.logits_btv, at_b11, axis=1)[:, 0]

        tokens, probs = [], []
        proposing_b, length_b, draft_b = end_b > 0, jnp.zeros_like(end_b), jnp.zeros_like(end_b)
        for i in range(self.num_draft):
            if i:
                output = self.model.forward(self.model.params, draft_b[:, None], output.cache, end_b + (i - 1))
                logits_bu = output.logits_btv[:, 0]
            prefix_bi = jnp.stack(tokens, axis=1) if tokens else jnp.zeros((end_b.shape[0], 0), jnp.int32)
            token_b, probs_bv = draw(self._restricted(logits_bu), prefix_bi)
            draft_b = self.draft_of_v[token_b]
            # Where a bias bans all shared tokens, what is drawn has no law, or is not shared.
            drawn_b = jnp.take_along_axis(probs_bv, token_b[:, None], axis=1)[:, 0]
            proposing_b &= (drawn_b > 0) & (draft_b >= 0)
            length_b += proposing_b.astype(jnp.int32)
            draft_b = jnp.maximum(draft_b, 0)
            tokens.append(token_b)
            probs.append(probs_bv)
        proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(probs, axis=1), length_b)
        return proposal, dataclasses.replace(state, cache=output.cache)

    def commit(self, state: SharedVocabularyState, context: Context, verdict: Verdict, features: Any) -> Any:
        """Tells the draft model which of the tokens it was fed stay. An accepted draft is one draft token."""
        del context, features
        end_b = self._end(state)
        start_b = jnp.maximum(end_b - self._window, 0)
        fed_drafts_b = jnp.minimum(verdict.num_accepted_b, self.num_draft - 1)
        return dataclasses.replace(state, cache=self.model.commit(state.cache, start_b, end_b - start_b + fed_drafts_b))

    def _extended(self, state: SharedVocabularyState, new_bt: Array, count_b: Array) -> SharedVocabularyState:
        """Spells the first ``count_b`` of the tokens behind each row's end; what finds no room is dropped."""
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
        """Returns the length of each row's text, 0 for one that leaves no room to draft behind it.

        Such a row never drafts again, since its text only grows; so what its passes write at the first slots harms
        nothing, and widens no window of attention.
        """
        room = state.tokens_bs.shape[1] - (self.num_draft - 1)
        return jnp.where(state.length_b <= room, state.length_b, 0)

    def _restricted(self, logits_bu: Array) -> Array:
        """Returns the shared tokens' logits in the target's vocabulary, -inf for all others."""
        logits_bv = logits_bu.astype(jnp.float32)[:, jnp.maximum(self.draft_of_v, 0)]
        return jnp.where((self.draft_of_v >= 0)[None], logits_bv, -jnp.inf)


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
