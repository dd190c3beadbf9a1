"""P-EAGLE: an EAGLE-3 head that drafts all tokens of a round in one pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from specjax.checks import check_integer
from specjax.drafters.block import Block
from specjax.drafters.eagle import EagleHead
from specjax.drafters.feature import FeatureDrafter, FeatureState
from specjax.types import Context, Event, Feed, LanguageModel


@dataclasses.dataclass(frozen=True)
class PEagleHead:
    """The description of a P-EAGLE head (arXiv 2602.01469, section 3); a ``Head`` of ``specjax.drafters.block``.

    Over the text the draft head is an EAGLE-3 head: slot i takes token i + 1 and the target's states at position i, and
    predicts token i + 2. The last such slot gives the first draft. The slots of the other drafts take the embedding of
    a mask and one learned state in place of the target's, so no slot waits for the draft of another.

    Example, a row of n = 10 tokens and 3 drafts: slot 8 takes token 9 and state 8, and predicts token 10. Slots 9 and
    10 take the mask, and predict tokens 11 and 12. Slots see those before them.

    Parameters are those of the EAGLE head, and ``mask_hidden`` ``[1, 1, m * target's d]``, the learned state.

    Attributes:
      eagle: the EAGLE-3 head.
      mask_token: the token whose embedding the slots after the text hold.

    Raises:
      ValueError: ``eagle`` is no EAGLE-3 head, or its windows stay; or there is no such token.
    """

    eagle: EagleHead
    mask_token: int

    most_drafts = None
    marginal = True
    confidence = False

    def __post_init__(self):
        check_integer("mask_token_id", self.mask_token, 0, self.vocab_size - 1)
        if self.eagle.version != 3 or self.eagle.window_stays:
            raise ValueError("a P-EAGLE head is an EAGLE-3 head whose windows slide; give one")

    @property
    def capture(self) -> tuple[int, ...]:
        return self.eagle.capture

    @property
    def vocab_size(self) -> int:
        return self.eagle.vocab_size

    @property
    def target_hidden_size(self) -> int:
        """Width of the target's states."""
        assert self.eagle.target_hidden_size is not None
        return self.eagle.target_hidden_size

    def describe(self) -> str:
        """Returns one line for people, as for the EAGLE head."""
        return f"P-EAGLE head, of one pass for all drafts: {self.eagle.describe()}"

    def init_params(self, key: Array, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns freshly drawn parameters as a nested dict of arrays; ``key`` is consumed."""
        own, others = jax.random.split(key)
        mask = jax.random.normal(own, (1, 1, self.eagle.states * self.target_hidden_size), dtype)
        return self.eagle.init_params(others, dtype) | {"mask_hidden": mask}

    def abstract_params(self, dtype: jnp.dtype = jnp.dtype("float32")) -> Any:
        """Returns the parameters' shapes and dtypes without computing them."""
        return jax.eval_shape(lambda: self.init_params(jax.random.key(0), dtype))

    def axes(self, params: Any) -> Any:
        """Returns a tree like ``params``, with a tuple of ``Axis`` in place of each array."""
        return self.eagle.axes(_of_eagle(params)) | {"mask_hidden": (None, None, None)}

    def init(self, params: Any, target: LanguageModel, rows: int, slots: int) -> FeatureState:
        """Returns an empty cache."""
        return self._chain(params).init(target, rows, slots)

    def observe(self, params: Any, state: FeatureState, context: Context, event: Event) -> FeatureState:
        """Writes the cache from the target's true states, over what the masks left there."""
        return self._chain(params).observe(state, context, event)

    def block(self, params: Any, state: FeatureState, context: Context, count: int) -> tuple[Block, FeatureState]:
        """Runs the masks. A row of one token drafts nothing: no state of the target is known yet."""
        own, target, rows = _of_eagle(params), context.target, context.length_b.shape[0]
        states_bgd, cache = state.state_bd[:, None], state.cache
        if count > 1:
            running_b = context.running_b.astype(jnp.int32)
            masks_bt = jnp.full((rows, count - 1), self.mask_token, jnp.int32)
            feed = Feed(masks_bt, context.length_b - 1, (count - 1) * running_b)
            learned = self.eagle.fuse(own, tuple(jnp.split(params["mask_hidden"], self.eagle.states, axis=-1)))
            masked_btd = jnp.broadcast_to(learned.astype(states_bgd.dtype), (rows, count - 1, learned.shape[-1]))
            made_btd, cache = self.eagle.run(own, target, feed, masked_btd, cache)
            states_bgd = jnp.concatenate([states_bgd, made_btd], axis=1)
        logits = self.eagle.logits(own, target, states_bgd.reshape(rows * count, -1))
        block = Block(states_bgd, logits.reshape(rows, count, -1), context.length_b >= 2)
        return block, FeatureState(cache, state.state_bd)

    def start(self, params: Any, rows: int) -> None:
        """Returns None: no draft's logits depend on the draft before it."""
        del params, rows

    def step(self, params: Any, carry: None, logits_bu: Array, state_bd: Array, token_b: Array) -> tuple[Array, None]:
        """Returns the logits as they are."""
        del params, state_bd, token_b
        return logits_bu, carry

    def confidence_of(self, params: Any, state_bd: Array, token_b: Array) -> Array:
        """Raises ValueError: there is no confidence head."""
        del params, state_bd, token_b
        raise ValueError("a P-EAGLE head has no confidence head; give a DSpark head that has one")

    def _chain(self, params: Any) -> FeatureDrafter:
        return FeatureDrafter(_of_eagle(params), self.eagle, 1)


def _of_eagle(params: Any) -> Any:
    return {name: part for name, part in params.items() if name != "mask_hidden"}
