"""Attention over a cache. The cost follows the tokens in use, not the slots that are allocated."""

import functools
import os
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from specjax.cache import LayerCache, Stored, update
from specjax.platforms import by_platform
from specjax.transformer import flash
from specjax.transformer.layers import softcap, softmax
from specjax.types import Feed, ancestors

SMALLEST_WINDOW = 256


def attend(
    query_bnth: Array,
    keys_bksh: Array,
    values_bksh: Array | None,
    feed: Feed,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    cap: float | None = None,
    value_width: int | None = None,
    sinks_n: Array | None = None,
) -> Array:
    """Attends from each place to its row's slots before the feed, and to the places that it follows.

    The n / k query heads that share a key head are folded into the query axis. So each key and value is read once, and
    there is one matrix product per row and key head. A narrow feed on a CUDA GPU goes through ``flash.attend``,
    everything else through XLA, and all with ``SPECJAX_ATTENTION=xla`` in the environment as it is traced.

    Args:
      query_bnth: floats, queries.
      keys_bksh: floats, keys, those of the feed's places included.
      values_bksh: floats, values. None: the values are the first ``value_width`` entries of the keys.
      feed: the places of the queries. Outputs of places that are not real mean nothing, but are finite.
      scale: multiplies the products of queries and keys.
      window: how many positions a query sees, its own included; None for all. Example: with a window of 3 the query at
        position 10 sees positions 8, 9 and 10.
      chunk: see ``LayerConfig``.
      cap: soft cap of the scaled products, or None.
      sinks_n: floats, the logit of each query head that takes part in the softmax and has no value; None for no sinks.
      value_width: see ``values_bksh``.

    Returns:
      ``[b, n, t, values' h]``. The cost follows the slots in use: in the kernel each row's own, in XLA the smallest of
      ``attention_windows`` that holds the longest row that does not rest.

    Raises:
      ValueError: ``SPECJAX_ATTENTION`` is neither "xla" nor "auto".
    """
    (b, n, t, h), k = query_bnth.shape, keys_bksh.shape[1]
    query = query_bnth.reshape(b, k, n // k * t, h) * jnp.asarray(scale, query_bnth.dtype)
    value_width = value_width or (keys_bksh if values_bksh is None else values_bksh).shape[-1]
    # Latents hold keys and values in one array, which is passed to branches once.
    stored = (keys_bksh,) if values_bksh is None else (keys_bksh, values_bksh)

    sinks_n = None if sinks_n is None else sinks_n.astype(jnp.float32)

    def by_xla(query: Array, stored: LayerCache, feed: Feed, sinks_n: Array | None) -> Array:
        return _over_windows(query, stored, feed, window, chunk, cap, value_width, sinks_n)

    def by_kernel(query: Array, stored: LayerCache, feed: Feed, sinks_n: Array | None) -> Array:
        keys, values = stored if len(stored) == 2 else (stored[0], None)
        seen_btt = places_seen(feed)
        position_bt = positions(feed, seen_btt)
        first_bt = first_seen(position_bt, window, chunk)
        if window is not None:
            seen_btt &= _depths(seen_btt)[:, :, None] - _depths(seen_btt)[:, None] < window
        if chunk is not None and first_bt is not None:
            seen_btt &= position_bt[:, None] >= first_bt[:, :, None]
        length_b = jnp.where(feed.count_b > 0, feed.start_b, 0)
        places = flash.Places(feed.start_b, length_b, first_bt, seen_btt)
        sinks_kq = None if sinks_n is None else jnp.repeat(sinks_n.reshape(k, -1), t, axis=1)
        return flash.attend(query, keys, values, places, sinks_kq, cap=cap, value_width=value_width)

    # Without a cache there is no prefix, and the pass may be one of training, which needs derivatives.
    if attention_form() == "xla" or keys_bksh.shape[2] == t or not flash.serves(query, keys_bksh, value_width):
        out = by_xla(query, stored, feed, sinks_n)
    else:
        out = by_platform(query, stored, feed, sinks_n, cuda=by_kernel, default=by_xla)
    return out.reshape(b, n, t, value_width)


def first_seen(position: Array, window: int | None, chunk: int | None) -> Array | None:
    """Returns the lowest position that a query at each position sees; None if neither window nor chunk limits it."""
    limits = [] if window is None else [position - window + 1]
    limits += [] if chunk is None else [position // chunk * chunk]
    return functools.reduce(jnp.maximum, limits) if limits else None


def _over_windows(
    query_bkqh: Array,
    stored: LayerCache,
    feed: Feed,
    window: int | None,
    chunk: int | None,
    cap: float | None,
    value_width: int,
    sinks_n: Array | None,
) -> Array:
    """Attends over the smallest window of slots that holds every real place, in one softmax."""
    b, k, q, _ = query_bkqh.shape
    t = feed.tokens_bt.shape[1]

    # Made outside of the branches, where all layers share it.
    seen_btt = None if feed.parents_bt is None else places_seen(feed)
    position_bt = feed.position_bt if seen_btt is None else positions(feed, seen_btt)
    if seen_btt is None:
        # A place that is not real sees slot 0. Without any slot its softmax would be NaN, and the next layer would
        # write NaN into the cache.
        position_bt = jnp.where(feed.real_bt, position_bt, 0)
    first_bt = first_seen(position_bt, window, chunk)
    sinks_1n11 = None if sinks_n is None else sinks_n[None, :, None, None]

    def over(
        used: int,
        query: Array,
        stored: LayerCache,
        seen: tuple[Array, Array | None],
        tree: tuple[Array, ...],
        sinks: Array | None,
    ) -> Array:
        keys, values = stored[0][:, :, :used], stored[-1][:, :, :used, :value_width]
        scores = jnp.einsum("bkqh,bksh->bkqs", query, keys, preferred_element_type=jnp.float32)
        scores = softcap(scores, cap).reshape(b, k * q // t, t, used)
        seen_bts = _slots_of_tree(used, *seen, *tree) if tree else _slots(used, *seen)
        scores = jnp.where(seen_bts[:, None], scores, -jnp.inf)
        weights = softmax(scores, sinks).astype(values.dtype)
        out = jnp.einsum("bkqs,bksh->bkqh", weights.reshape(b, k, q, used), values, preferred_element_type=jnp.float32)
        return out.astype(values.dtype)

    # One branch for each window, chosen on the device: the length of the text is not known when this compiles.
    windows = attention_windows(stored[0].shape[2])
    needed = jnp.max(jnp.where(feed.count_b > 0, feed.start_b + feed.count_b, 1))
    index = jnp.sum(needed > jnp.asarray(windows[:-1], needed.dtype))
    tree = () if seen_btt is None else (feed.start_b, feed.real_bt, seen_btt)
    branches = [functools.partial(over, used) for used in windows]
    return lax.switch(index, branches, query_bkqh, stored, (position_bt, first_bt), tree, sinks_1n11)


def places_seen(feed: Feed) -> Array:
    """Returns the mask of a block: bool, ``[b, t, t]``, or ``[1, t, t]`` for chains: whether place i sees place j.

    A place sees itself, the place that it follows, the place that this one follows, and so on. A parent below 0 stands
    for none: such a place follows the prefix.
    """
    t = feed.tokens_bt.shape[1]
    if feed.parents_bt is None:
        return jnp.tril(jnp.ones((1, t, t), bool))
    return ancestors(feed.parents_bt)


def _depths(seen_btt: Array) -> Array:
    """Returns how many places stand between each place and the prefix, int32 ``[b or 1, t]``."""
    return jnp.sum(seen_btt, axis=-1, dtype=jnp.int32) - 1


def positions(feed: Feed, seen_btt: Array) -> Array:
    """Returns the position of each place, int32 ``[b, t]``: in a tree, it follows the depth and not the slot."""
    return feed.start_b[:, None] + _depths(seen_btt)


def _slots(used: int, position_bt: Array, first_bt: Array | None) -> Array:
    """Returns which of the first ``used`` slots each place of a chain sees, bool ``[b, t, used]``."""
    slot_11s = jnp.arange(used, dtype=jnp.int32)[None, None]
    seen_bts = slot_11s <= position_bt[:, :, None]
    return seen_bts if first_bt is None else seen_bts & (slot_11s >= first_bt[:, :, None])


def _slots_of_tree(
    used: int, position_bt: Array, first_bt: Array | None, start_b: Array, real_bt: Array, seen_btt: Array
) -> Array:
    """Returns as ``_slots`` does what the places of a tree see; one that is not real sees slot 0."""
    slot_11s, t = jnp.arange(used, dtype=jnp.int32)[None, None], seen_btt.shape[1]
    place_b1s = slot_11s - start_b[:, None, None]
    index_bts = jnp.broadcast_to(jnp.clip(place_b1s, 0, t - 1), (*seen_btt.shape[:2], used))
    own_bts = jnp.take_along_axis(seen_btt, index_bts, axis=2) & (place_b1s < t)
    seen_bts = (place_b1s < 0) | own_bts
    if first_bt is not None:
        # A slot of the tree is not its position.
        own_b1s = jnp.take_along_axis(position_bt[:, None], index_bts[:, :1], axis=2)
        seen_bts &= jnp.where(place_b1s < 0, slot_11s, own_b1s) >= first_bt[:, :, None]
    return jnp.where(real_bt[:, :, None], seen_bts, slot_11s == 0)


def attention_form() -> str:
    """Returns the form of attention that the environment asks for."""
    form = os.environ.get("SPECJAX_ATTENTION", "auto")
    if form not in ("auto", "xla"):
        raise ValueError(f'the environment variable SPECJAX_ATTENTION is {form!r}; set it to "xla" or "auto"')
    return form


def store_and_attend(
    query_bnth: Array, new: LayerCache, feed: Feed, stored: Stored | None, **options: Any
) -> tuple[Array, Stored]:
    """Stores a layer's new keys and values, and attends to all that are stored.

    Args:
      query_bnth: floats, queries.
      new: keys and values ``[b, k, t, h]`` of the feed's places, or keys alone that hold the values.
      feed: the places.
      stored: the layer's part of the cache. None: the places attend to each other.
      **options: keyword arguments of ``attend``.

    Returns:
      ``[b, n, t, values' h]``, and the layer's part of the cache with ``new``.
    """
    if stored is not None and not isinstance(stored, tuple):
        return stored.attend(query_bnth, new, **options)
    stored = update(stored, new, feed.start_b)
    keys, values = stored if len(stored) == 2 else (stored[0], None)
    return attend(query_bnth, keys, values, feed, **options), stored


def attend_to_shared(query_bnth: Array, feed: Feed, stored: Stored | None, **options: Any) -> Array:
    """Attends to the keys and values that another layer stored in this pass.

    Args:
      query_bnth: floats, queries.
      feed: the places.
      stored: what the other layer returned as its part of the cache.
      **options: keyword arguments of ``attend``.

    Returns:
      ``[b, n, t, h]``.

    Raises:
      ValueError: that layer's part is a cache of another kind, which attends only as it stores.
    """
    if not isinstance(stored, tuple) or len(stored) != 2:
        raise ValueError(
            f"a layer shares the keys and values of another, whose part of the cache is a {type(stored).__name__}; "
            "only a cache of plain keys and values can be shared"
        )
    return attend(query_bnth, *stored, feed, **options)


def attention_windows(slots: int) -> tuple[int, ...]:
    """Returns the windows that are compiled: doubling from 256, the last one ``slots``.

    Examples: 1000 slots have 256, 512 and 1000; 100 slots have 50 and 100. A short cache has two windows as well,
    because XLA may copy a cache that a product reads outside of a branch of ``lax.switch``.
    """
    windows = []
    window = min(SMALLEST_WINDOW, max(slots // 2, 1))
    while window < slots:
        windows.append(window)
        window *= 2
    return (*windows, slots)
