"""Recurrent layers: one state per row in place of a slot per token, and how a round takes places back.

Letters beside those of :mod:`specjax`: e width of a key, h width of a value, k key heads, r value heads that share a
key head, c channels of a convolution.

A layer has a matrix S for each value head, which maps keys to values. Place i scales the matrix by a decay a_i, 0 to 1,
and adds what it writes, w_i, under its key k_i:

    S_i = a_i S_{i-1} + k_i w_i^T,    y_i = q_i S_i

Mamba-2 writes its input (Dao and Gu 2024, arXiv 2405.21060). Gated DeltaNet writes the part of its value that the
matrix does not hold yet (Yang et al. 2025, arXiv 2412.06464). Either way, what a place writes does not depend on later
places. So the state after any first m places of a pass is

    S_m = A_m S_0 + sum over i <= m of (A_m / A_i) k_i w_i^T,    A_i = a_1 a_2 ... a_i

A pass keeps the state before it, and key, decay and write of each place (``RecurrentPass``). ``RecurrentPass.keep``
computes the sum for the places that stay. So no pass makes a state per place. Example: Qwen3-Next has 2 MB of state in
a layer; a place has 41 kB of keys, writes and inputs of convolutions. Everything but those inputs is float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array, lax

from specjax.platforms import by_platform
from specjax.transformer.config import Activation, DecoderConfig, RecurrenceConfig
from specjax.transformer.layers import ACTIVATIONS, Linear, declare, normal
from specjax.types import Axis, Feed

CHUNK = 64  # places of a long pass that attend to each other; earlier places are in the state
_EXACT = lax.Precision.HIGHEST  # a state adds up what all tokens wrote, and with it their rounding


@struct.dataclass
class RecurrentState:
    """What a recurrent layer keeps of each row between passes.

    Attributes:
      state_bkerh: float32, the matrix of each value head.
      windows: for each convolution of w taps, its last inputs ``[b, w - 1, c]``.
    """

    state_bkerh: Array
    windows: tuple[Array, ...]


@struct.dataclass
class RecurrentPass:
    """What a recurrent layer keeps of a pass until it is known which places stay.

    Attributes:
      state_bkerh: float32, the state before the pass.
      keys_bkte: float32.
      writes_bktrh: float32, what each place writes under its key.
      decay_bktr: float32, at most 0: log of a place's decay.
      inputs: for each convolution of w taps, its inputs ``[b, w - 1 + t, c]``: those before the pass, then the pass's.
    """

    state_bkerh: Array
    keys_bkte: Array
    writes_bktrh: Array
    decay_bktr: Array
    inputs: tuple[Array, ...]

    def keep(self, kept_b: Array) -> RecurrentState:
        """Returns the state after the first ``kept_b[i]`` places of row i. A row that keeps none has its old bits."""
        t = self.keys_bkte.shape[2]
        # A place that does not stay has decay 1 and writes nothing.
        stays_b1t1 = (jnp.arange(t, dtype=kept_b.dtype)[None] < kept_b[:, None])[:, None, :, None]
        decay_bktr = jnp.where(stays_b1t1, self.decay_bktr, 0)
        writes_bktrh = jnp.where(stays_b1t1[..., None], self.writes_bktrh, 0)
        state_bkerh = _advance(self.state_bkerh, self.keys_bkte, writes_bktrh, decay_bktr)

        def last(inputs_bsc: Array) -> Array:
            taps = inputs_bsc.shape[1] - t
            slot_bw = kept_b[:, None] + jnp.arange(taps, dtype=kept_b.dtype)[None]
            return jnp.take_along_axis(inputs_bsc, slot_bw[:, :, None], axis=1)

        return RecurrentState(state_bkerh, tuple(map(last, self.inputs)))


def empty_state(config: DecoderConfig, rows: int, dtype: jnp.dtype) -> RecurrentState:
    """Returns what a recurrent layer keeps of rows without tokens; ``dtype`` is that of the convolutions' inputs."""
    sizes = config.recurrence
    assert sizes is not None
    windows = tuple(jnp.zeros((rows, sizes.taps - 1, channels), dtype) for channels in _channels(sizes))
    return RecurrentState(jnp.zeros((rows, *sizes.state_shape), jnp.float32), windows)


def _channels(sizes: RecurrenceConfig) -> tuple[int, int, int]:
    """Returns the channels of queries, keys and values."""
    k, e, r, h = sizes.state_shape
    return k * e, k * e, k * r * h


class Places(NamedTuple):
    """What the places of a pass give to a recurrence; all float32.

    Attributes:
      query_bkte, keys_bkte: they read and write the matrices.
      values_bktrh: what each place writes; with ``rate_bktr``, what the matrix shall hold under the place's key.
      decay_bktr: log of the decay, at most 0.
      rate_bktr: the share of the difference between value and held value that is written, 0 to 1 (the delta rule).
        None: the value is written as it is.
    """

    query_bkte: Array
    keys_bkte: Array
    values_bktrh: Array
    decay_bktr: Array
    rate_bktr: Array | None


def recur(state_bkerh: Array, places: Places) -> tuple[Array, Array]:
    """Returns what t places read, and what they write: both float32 ``[b, k, t, r, h]``.

    Up to ``CHUNK`` places attend to each other and to the state, by matrix products. More go chunk by chunk.
    """
    t = places.keys_bkte.shape[2]
    if t <= CHUNK:
        return _chunk(state_bkerh, places)
    chunks = -(-t // CHUNK)

    def split(x: Array) -> Array:
        # Padding has decay 1 and writes nothing.
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * CHUNK - t)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, CHUNK, *x.shape[3:]), 2, 0)

    def step(state: Array, chunk: Places) -> tuple[Array, tuple[Array, Array]]:
        out, writes = _chunk(state, chunk)
        return _advance(state, chunk.keys_bkte, writes, chunk.decay_bktr), (out, writes)

    _, found = lax.scan(step, state_bkerh, jax.tree.map(split, places))
    out, writes = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[:, :, :t] for x in found)
    return out, writes


def _chunk(state_bkerh: Array, places: Places) -> tuple[Array, Array]:
    """Does what ``recur`` does for places that all attend to each other."""
    query, keys, values, decay, rate = places
    t = keys.shape[2]
    # 1. Decays from the start through each place, and after place j through place i; 0 for later places j. Each has a
    # sum of its own: a difference of two sums would lose a mild decay after a strong one to rounding.
    earlier_tt = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
    after_tt = jnp.tril(jnp.ones((t, t), bool), -1)[None, None, None]
    decay_bkrt1 = decay.swapaxes(2, 3)[..., None]
    between_bkrtt = jnp.cumsum(jnp.where(after_tt, decay_bkrt1, 0), axis=3)
    between_bkrtt = jnp.where(earlier_tt, jnp.exp(between_bkrtt), 0)
    since_bktr1 = jnp.exp(jnp.cumsum(decay, axis=2))[..., None]
    # 2. What queries and keys read from the state before the pass, in one product, since it reads the whole state.
    readers = query if rate is None else jnp.concatenate([query, keys], axis=2)
    held = jnp.einsum("bkte,bkerh->bktrh", readers, state_bkerh, precision=_EXACT)
    # 3. With the delta rule, each place writes the part that neither the state nor the earlier places hold:
    # w_i + b_i sum over j < i of (A_i / A_j) (k_i k_j) w_j = b_i (v_i - A_i k_i S_0), a triangular system.
    writes = values
    if rate is not None:
        missing = (values - since_bktr1 * held[:, :, t:]) * rate[..., None]
        overlap_bktt = jnp.einsum("bkie,bkje->bkij", keys, keys, precision=_EXACT)
        mixing_bkrtt = between_bkrtt * overlap_bktt[:, :, None] * rate.swapaxes(2, 3)[..., None]
        writes = _solve(jnp.where(after_tt, mixing_bkrtt, 0), missing.swapaxes(2, 3)).swapaxes(2, 3)
    # 4. Each place reads the state, and what places up to itself wrote.
    scores_bktt = jnp.einsum("bkie,bkje->bkij", query, keys, precision=_EXACT)
    weights_bkrtt = between_bkrtt * scores_bktt[:, :, None]
    out = jnp.einsum("bkrij,bkjrh->bkirh", weights_bkrtt, writes, precision=_EXACT)
    return out + since_bktr1 * held[:, :, :t], writes


def _solve(lower: Array, right: Array) -> Array:
    """Returns x with ``(1 + L) x = right``, where L is ``lower`` ``[.., t, t]``: 0 on and above its diagonal."""
    if right.shape[-2] == 1:
        return right
    solve = functools.partial(lax.linalg.triangular_solve, left_side=True, lower=True, unit_diagonal=True)
    return by_platform(lower, right, cpu=_substitute, default=solve)


def _substitute(lower: Array, right: Array) -> Array:
    """Does what ``_solve`` does, place by place.

    On a CPU ``triangular_solve`` is a call into LAPACK, which shares its work out to XLA's threads and waits for them.
    If all these threads are in such calls, all wait for ever. Example: two layers at a time on two cores.
    """

    def step(i: Array, x: Array) -> Array:
        row = lax.dynamic_slice_in_dim(lower, i, 1, axis=-2)
        rest = lax.dynamic_slice_in_dim(x, i, 1, axis=-2) - jnp.einsum("...ij,...jh->...ih", row, x, precision=_EXACT)
        return lax.dynamic_update_slice_in_dim(x, rest, i, axis=-2)

    return lax.fori_loop(1, right.shape[-2], step, right)


def _advance(state_bkerh: Array, keys_bkte: Array, writes_bktrh: Array, decay_bktr: Array) -> Array:
    """Returns the state after all places."""
    # Summed from the end, so that the decays of the last places, which matter most, are sums of few numbers.
    from_bktr = lax.cumsum(decay_bktr, axis=2, reverse=True)
    after_bktr = jnp.pad(from_bktr[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    left_bktrh = jnp.exp(after_bktr)[..., None] * writes_bktrh
    added = jnp.einsum("bkte,bktrh->bkerh", keys_bkte, left_bktrh, precision=_EXACT)
    return jnp.exp(from_bktr[:, :, 0])[:, :, None, :, None] * state_bkerh + added


class ShortConvolution(nnx.Module):
    """A causal convolution of each channel with its own taps, then an activation."""

    def __init__(
        self,
        channels: int,
        taps: int,
        bias: bool,
        activation: Activation,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        axis: Axis = None,
    ):
        self.activation: Activation = activation
        # Drawn from a wide distribution: a few small taps would make all that follows small.
        self.taps = declare(normal(rngs, (taps, channels), dtype, taps**-0.5), None, axis)
        self.bias = declare(jnp.zeros((channels,), dtype), axis) if bias else None

    def __call__(self, x_btc: Array, window_bwc: Array) -> tuple[Array, Array]:
        """Returns the output, float32 ``[b, t, c]``, and the inputs, those before the pass and the pass's."""
        taps_wc = self.taps[...].astype(jnp.float32)
        t, w = x_btc.shape[1], taps_wc.shape[0]
        inputs_bsc = jnp.concatenate([window_bwc, x_btc.astype(window_bwc.dtype)], axis=1)
        wide_bsc = inputs_bsc.astype(jnp.float32)
        y_btc = jnp.zeros((), jnp.float32) if self.bias is None else self.bias[...].astype(jnp.float32)[None, None]
        for i in range(w):
            y_btc = y_btc + wide_bsc[:, i : i + t] * taps_wc[i][None, None]
        return ACTIVATIONS[self.activation](y_btc), inputs_bsc


class Recurrence(nnx.Module):
    """What recurrent layers share: projections and convolutions of queries, keys and values, a gate, and the output."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        key_axis: str,
        bias: bool = False,
        conv_bias: bool = False,
    ):
        sizes = config.recurrence
        assert sizes is not None
        self.shape, width = sizes.state_shape, config.hidden_size
        k, _, r, _ = self.shape
        keys, values = (key_axis, k), ("heads", k * r)

        def linear(outputs: int, axis: Axis) -> Linear:
            return Linear(width, outputs, bias, dtype, rngs, ("embed", axis))

        def convolution(channels: int, axis: Axis) -> ShortConvolution:
            return ShortConvolution(channels, sizes.taps, conv_bias, config.activation, dtype, rngs, axis)

        of_queries, of_keys, of_values = _channels(sizes)
        self.q_proj, self.q_conv = linear(of_queries, keys), convolution(of_queries, keys)
        self.k_proj, self.k_conv = linear(of_keys, keys), convolution(of_keys, keys)
        self.v_proj, self.v_conv = linear(of_values, values), convolution(of_values, values)
        self.gate_proj, self.step_proj = linear(of_values, values), linear(k * r, values)
        # Float32 in every model: the decay of a token multiplies all that was written before.
        self.decay_log = declare(jnp.zeros((k * r,), jnp.float32), values)
        self.step_bias = declare(jnp.ones((k * r,), jnp.float32), values)
        self.o_proj = Linear(of_values, width, bias, dtype, rngs, (values, "embed"))

    def project(self, x_btd: Array, stored: RecurrentState) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        """Returns queries and keys ``[b, k, t, e]``, values ``[b, k, t, r, h]``, and inputs as of ``RecurrentPass``."""
        query, of_queries = self.q_conv(self.q_proj(x_btd), stored.windows[0])
        keys, of_keys = self.k_conv(self.k_proj(x_btd), stored.windows[1])
        values, of_values = self.v_conv(self.v_proj(x_btd), stored.windows[2])
        (b, t, _), (k, e, _, h) = x_btd.shape, self.shape
        query, keys = (x.reshape(b, t, k, e).swapaxes(1, 2) for x in (query, keys))
        return query, keys, self.by_head(values, h), (of_queries, of_keys, of_values)

    def by_head(self, x_btc: Array, *width: int) -> Array:
        """Returns float32 ``[b, k, t, r, *width]`` of what each value head has ``width`` entries of."""
        (b, t, _), (k, _, r, _) = x_btc.shape, self.shape
        return jnp.moveaxis(x_btc.astype(jnp.float32).reshape(b, t, k, r, *width), 2, 1)

    def steps(self, x_btd: Array) -> tuple[Array, Array]:
        """Returns the step of each token and value head, above 0, and log of the decay in it, both ``[b, k, t, r]``."""
        k, _, r, _ = self.shape
        step_bktr = jax.nn.softplus(self.by_head(self.step_proj(x_btd)) + self.step_bias[...].reshape(1, k, 1, r))
        return step_bktr, -jnp.exp(self.decay_log[...]).reshape(1, k, 1, r) * step_bktr

    def run(self, stored: RecurrentState, places: Places, inputs: tuple[Array, ...]) -> tuple[Array, RecurrentPass]:
        """Returns what the places read, ``[b, k, t, r, h]``, and what the pass may keep."""
        out, writes = recur(stored.state_bkerh, places)
        return out, RecurrentPass(stored.state_bkerh, places.keys_bkte, writes, places.decay_bktr, inputs)


def check_chain(feed: Feed) -> None:
    """Raises ValueError if a feed is a tree."""
    if feed.parents_bt is not None:
        raise ValueError("the feed is a tree (parents_bt), but the model has recurrent layers; feed chains to it")
