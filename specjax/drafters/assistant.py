"""Drafting with an assistant: a small decoder that reads the target's cache and has none of its own (Gemma 4)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array, lax

from specjax.cache import LayerCache
from specjax.checks import check_integer
from specjax.drafters.chain import Chain, place, repeat
from specjax.drafters.fields import check_unset
from specjax.rows import text_at
from specjax.transformer.config import EXTERNAL, DecoderConfig
from specjax.transformer.decoder import DecoderLayer
from specjax.transformer.functional import Functional
from specjax.transformer.layers import Embedding, Linear, make_norm, rotary_tables
from specjax.types import Cache, Context, Draw, Event, Feed, LanguageModel, Proposal


@dataclasses.dataclass(frozen=True)
class AssistantHead:
    """What an assistant computes.

    Attributes:
      decoder: its layers, of which each shares the keys and values of a layer of the target: a layer without a window
        those of the target's last layer without one, a layer with a window those of the last layer with one. The
        target embeds, and the logits are neither scaled nor capped, whatever the decoder says.
      target_width: width of the target's hidden states and embeddings.
      centroids: parts that the vocabulary is cut into, of equal size, each with a score of its own. None: all tokens
        have logits.
      chosen: how many parts have logits: those with the best scores.

    Raises:
      ValueError: a layer has keys and values of its own, the decoder has learned positions, embeddings for each layer
        or a bias on its output head, or the numbers of parts are out of range.
    """

    decoder: DecoderConfig
    target_width: int
    centroids: int | None = None
    chosen: int = 1

    def __post_init__(self):
        check_integer("target_width", self.target_width, 1)
        check_unset("an assistant", self.decoder, "learned_positions", "per_layer", "head_bias")
        if any(layer.shares != EXTERNAL for layer in self.decoder.each_layer):
            raise ValueError("a layer of the assistant has keys and values of its own; all must share the target's")
        if self.centroids is not None:
            check_integer("centroids", self.centroids, 1, self.decoder.vocab_size)
            check_integer("chosen centroids", self.chosen, 1, self.centroids)
            if self.decoder.vocab_size % self.centroids:
                raise ValueError(f"{self.centroids} centroids do not cut {self.decoder.vocab_size} tokens evenly")

    def init_params(self, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns freshly drawn parameters as a nested dict of arrays; ``key`` is consumed."""
        return _ASSISTANT.init(self, key, dtype)

    def abstract_params(self, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns the parameters' shapes and dtypes without computing them."""
        return _ASSISTANT.abstract(self, dtype)

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params``, with a tuple of ``Axis`` in place of each array."""
        return _ASSISTANT.axes(self, _dtype_of(params))

    def sources(self, target: LanguageModel, cache: Cache) -> list[LayerCache]:
        """Returns for each layer the target's keys and values that it reads.

        Raises:
          ValueError: the target has no such layer, or keys and values of another shape or dtype.
        """
        target.require("windows")
        last = {}
        for window, stored in zip(target.windows or (), cache.layers, strict=True):
            if isinstance(stored, tuple) and len(stored) == 2:
                last[window is None] = stored
        for i, layer in enumerate(self.decoder.each_layer):
            what = "no window" if layer.window is None else "a window"
            if (layer.window is None) not in last:
                raise ValueError(
                    f"layer {i} of the assistant reads a layer with {what}, which the target lacks; {_CURE}"
                )
            wanted = self.decoder.kv_heads_of(layer), self.decoder.head_width_of(layer)
            keys = last[layer.window is None][0]
            if (keys.shape[1], keys.shape[3]) != wanted:
                raise ValueError(
                    f"layer {i} of the assistant reads {wanted[0]} heads of {wanted[1]} entries, and the target's last "
                    f"layer with {what} has {keys.shape[1]} of {keys.shape[3]}; {_CURE}"
                )
        return [last[layer.window is None] for layer in self.decoder.each_layer]

    def step(
        self, params: Any, target: LanguageModel, feed: Feed, state_bd: Array, sources: list[LayerCache]
    ) -> tuple[Array, Array]:
        """Returns float32 logits ``[b, v]`` of the next token, -inf where there are none, and the next state.

        Args:
          params: the assistant's parameters.
          target: has the embedding.
          feed: one place a row: the token before the one that is drafted, at the last slot that the layers see.
            Example, a row of n = 10 tokens: slot 8 for all drafts. They have the position 9.
          state_bd: the target's state at that slot; after the first draft, the state that ``step`` returned.
          sources: what the method of this name returned.
        """
        assert target.embed is not None
        module = _ASSISTANT.bind(self, params, _dtype_of(params))
        return module(target.embed(target.params, feed.tokens_bt), state_bd[:, None], feed, sources)


_CURE = "give the assistant's own target, or an assistant made for this one"


class _Assistant(nnx.Module):
    def __init__(self, head: AssistantHead, dtype: jnp.dtype, rngs: nnx.Rngs):
        config, width = head.decoder, head.decoder.hidden_size
        self.head = head
        self.pre_projection = Linear(2 * head.target_width, width, False, dtype, rngs, (None, "embed"))
        self.layers = nnx.List([DecoderLayer(config, layer, dtype, rngs) for layer in config.each_layer])
        self.norm = make_norm(config, width, dtype)
        self.post_projection = Linear(width, head.target_width, False, dtype, rngs, ("embed", None))
        self.embed_tokens = Embedding(config.vocab_size, width, dtype, rngs)  # the output head; the target's embeds
        if head.centroids is not None:
            self.centroids = Linear(width, head.centroids, False, dtype, rngs, ("embed", None))
            self.tokens_cx = nnx.Param(jnp.arange(config.vocab_size, dtype=jnp.int32).reshape(head.centroids, -1))

    def __call__(
        self, embedded_btd: Array, state_btd: Array, feed: Feed, sources: list[LayerCache]
    ) -> tuple[Array, Array]:
        dtype = self.embed_tokens.weight[...].dtype
        x_btd = self.pre_projection(jnp.concatenate([embedded_btd.astype(dtype), state_btd.astype(dtype)], axis=-1))
        ropes = dict.fromkeys(layer.rope for layer in self.head.decoder.each_layer)
        tables = {rope: rotary_tables(feed.position_bt + 1, rope) for rope in ropes}
        for layer, described, stored in zip(self.layers, self.head.decoder.each_layer, sources, strict=True):
            x_btd, _ = layer(x_btd, feed, tables[described.rope], stored)
        x_btd = self.norm(x_btd)
        return self.logits(x_btd[:, 0]), self.post_projection(x_btd)[:, 0].astype(state_btd.dtype)

    def logits(self, x_bd: Array) -> Array:
        if self.head.centroids is None:
            return self.embed_tokens.logits(x_bd)
        # Only the tokens of the best parts have logits: their rows of the table are gathered.
        chosen_bk = lax.top_k(self.centroids.logits(x_bd), self.head.chosen)[1]
        tokens_bm = self.tokens_cx[...][chosen_bk].reshape(x_bd.shape[0], -1)
        logits_bm = jnp.einsum("bd,bmd->bm", x_bd, self.embed_tokens(tokens_bm), preferred_element_type=jnp.float32)
        row_b1 = jnp.arange(x_bd.shape[0], dtype=jnp.int32)[:, None]
        return jnp.full((x_bd.shape[0], self.head.decoder.vocab_size), -jnp.inf).at[row_b1, tokens_bm].set(logits_bm)


_ASSISTANT = Functional(_Assistant)


def _dtype_of(params: Any) -> jnp.dtype:
    return params["norm"]["weight"].dtype


@struct.dataclass
class AssistantDrafter:
    """Drafts a chain with an assistant, whose layers attend to the target's keys and values.

    The first draft comes from the target's state at the last slot of its cache and the embedding of the row's last
    token; each further draft from the assistant's own state and the embedding of the draft before it. All drafts of a
    round have the position of the row's last token. A row of one token drafts nothing: the cache holds no slot yet.

    Attributes:
      params: the assistant's parameters.
      head: what they compute.
      num_draft: g, tokens proposed per round.
      unrolled: as for ``ModelDrafter``.
    """

    params: Any
    head: AssistantHead = struct.field(pytree_node=False)
    num_draft: int = struct.field(pytree_node=False, default=4)
    unrolled: bool = struct.field(pytree_node=False, default=True)

    capture = (-1,)
    max_positions = None

    @property
    def vocab_size(self) -> int:
        return self.head.decoder.vocab_size

    def axes(self) -> Any:
        """Returns what each parameter's dimensions stand for, in a tree like ``params``."""
        return self.head.axes(self.params)

    def init(self, target: LanguageModel, rows: int, slots: int) -> Array:
        """Returns states ``[rows, target's d]``: the target's at the last slot of each row's cache.

        Raises:
          ValueError: the assistant was made for another target, or computes in another dtype than the target's cache.
        """
        del slots
        target.require("embed", "windows")
        sources = self.head.sources(target, jax.eval_shape(lambda: target.init_cache(1, 1)))
        if any(keys.dtype != _dtype_of(self.params) for keys, _ in sources):
            raise ValueError(
                f"the assistant computes in {_dtype_of(self.params)} and the target's cache is {sources[0][0].dtype}; "
                "open both with one dtype"
            )
        (spec,) = target.state_specs(self.capture)
        if spec.shape[-1] != self.head.target_width:
            raise ValueError(
                f"the assistant reads states {self.head.target_width} wide and the target's are {spec.shape[-1]}; "
                + _CURE
            )
        return jnp.zeros((rows, spec.shape[-1]), spec.dtype)

    def observe(self, state: Array, context: Context, event: Event) -> Array:
        """Notes the target's state at the last true place."""
        del context
        last_bd = place(event.features[0], jnp.maximum(event.kept_b - 1, 0))
        return jnp.where(event.kept_b[:, None] > 0, last_bd, state)

    def propose(self, state: Array, context: Context, draw: Draw) -> tuple[Proposal, Array]:
        """Samples a chain of ``num_draft`` tokens."""
        target, length_b, g = context.target, context.length_b, context.drafts(self.num_draft)
        sources = self.head.sources(target, context.cache)
        running_b = context.running_b.astype(jnp.int32)
        slot_b = jnp.maximum(length_b - 2, 0)

        # A row proposes no more where a bias bans all tokens that the assistant can draft.
        def advance(i: int | Array, carry: Any) -> Any:
            chain, drafting_b, drafted_b, token_b, state_bd = carry
            feed = Feed(token_b[:, None], slot_b, running_b)
            logits_bv, state_bd = self.head.step(self.params, target, feed, state_bd, sources)
            chain, token_b = chain.add(draw, logits_bv, i)
            drafting_b = drafting_b & chain.lawful(i)
            return chain, drafting_b, drafted_b + drafting_b.astype(jnp.int32), token_b, state_bd

        chain = Chain.empty(length_b.shape[0], g, target.vocab_size)
        last_b = text_at(context.tokens_bs, length_b - 1, 1)[:, 0]
        carry = (chain, length_b >= 2, jnp.zeros_like(length_b), last_b, state)
        chain, _, drafted_b, _, _ = repeat(0, g, advance, carry, self.unrolled)
        return chain.propose(drafted_b), state

    def follow(self, state: Array, context: Context, tokens_bg: Array) -> Array:
        """Nothing to do: ``observe`` notes the true state, whoever drafted."""
        del context, tokens_bg
        return state
