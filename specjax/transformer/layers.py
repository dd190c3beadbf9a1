"""The small parts of a decoder: linear maps, embeddings, norms, MLPs and rotary positions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from specjax.transformer.config import Activation, DecoderConfig, Rope
from specjax.transformer.products import product, rows
from specjax.types import Axis

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, std: float = 0.02) -> Array:
    """Returns the initial values of a weight: normal, with mean 0 and standard deviation ``std``."""
    return std * jax.random.normal(rngs.params(), shape, dtype)


def declare(value: Array, *axes: Axis) -> nnx.Param:
    """Returns a parameter that declares an ``Axis`` for each of its dimensions."""
    return nnx.Param(value, axes=axes)


def declared_axes(state: nnx.State) -> Any:
    """Returns a nested dict like the parameters', with the axes of each parameter.

    A parameter that declares none gets None for each dimension: it is never split.
    """
    return nnx.to_pure_dict(state, lambda param: param.get_metadata().get("axes", (None,) * len(param.shape)))


class Linear(nnx.Module):
    """``x @ kernel + bias``. ``axes`` are the ``Axis`` of the inputs and of the outputs.

    The kernel is ``[in, out]``. At the widths of speculative decoding XLA's CPU products are 1.2 to 1.5 times faster
    with it than with ``[out, in]`` (docs/performance.md). On a GPU both are equally fast.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        axes: tuple[Axis, Axis] = (None, None),
    ):
        self.kernel = declare(normal(rngs, (inputs, outputs), dtype), *axes)
        self.bias = declare(jnp.zeros((outputs,), dtype), axes[1]) if bias else None

    def __call__(self, x: Array, dtype: jnp.dtype | None = None) -> Array:
        """Returns ``[.., out]`` of states ``[.., in]``, in the dtype of ``x`` or in ``dtype``."""
        y = product(x, self.kernel[...], dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)

    def logits(self, x: Array) -> Array:
        """Returns float32 ``[.., out]`` that no smaller dtype has rounded."""
        return self(x, jnp.dtype("float32"))


class Embedding(nnx.Module):
    """A table ``[v, d]`` of one vector per token. Models that tie embedding and output head use it for both."""

    def __init__(self, vocab: int, width: int, dtype: jnp.dtype, rngs: nnx.Rngs, axis: Axis = "vocab"):
        self.weight = declare(normal(rngs, (vocab, width), dtype), axis, "embed")

    def __call__(self, tokens_bt: Array) -> Array:
        return rows(self.weight[...], tokens_bt)

    def logits(self, x_btd: Array) -> Array:
        """Returns float32 ``[b, t, v]``, the product of each state with each vector of the table."""
        return product(x_btd, self.weight[...], jnp.dtype("float32"), transposed=True)


Width = int | tuple[int, int]
"""Entries that a norm is over; or (heads, entries), for a norm with weights of each head's own."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467). The mean square is float32."""

    def __init__(self, width: Width, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms(x, self.eps).astype(x.dtype) * jnp.broadcast_to(self.weight[...], x.shape)


class RMSNormOnePlus(nnx.Module):
    """Root-mean-square norm that multiplies by 1 + weight (Gemma). The product is float32, too."""

    def __init__(self, width: Width, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros(width, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        scale = 1.0 + self.weight[...].astype(jnp.float32)
        return (rms(x, self.eps) * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def rms(x: Array, eps: float) -> Array:
    """Returns float32 ``x`` over the root of the mean square of its last axis."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016, arXiv 1607.06450), computed in float32."""

    def __init__(self, width: Width, eps: float, dtype: jnp.dtype, bias: bool = True):
        self.weight = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * jnp.broadcast_to(self.weight[...].astype(jnp.float32), y.shape)
        y = y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(jnp.float32), y.shape)
        return y.astype(x.dtype)


Norm = RMSNorm | RMSNormOnePlus | LayerNorm
NORMS: dict[str, Callable[..., Norm]] = {
    "rms": RMSNorm,
    "rms_one_plus": RMSNormOnePlus,
    "layer": LayerNorm,
    "layer_unbiased": functools.partial(LayerNorm, bias=False),
}


def make_norm(config: DecoderConfig, width: Width, dtype: jnp.dtype) -> Norm:
    """Returns a norm of ``width`` entries, of the kind that ``config.norm`` names."""
    return NORMS[config.norm](width, config.norm_eps, dtype)


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202), or ``down(act(up(x)))`` without the gate."""

    def __init__(self, config: DecoderConfig, inner: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.mlp_bias
        self.activation: Activation = config.activation
        self.gate_proj = Linear(width, inner, bias, dtype, rngs, ("embed", "mlp")) if config.gated_mlp else None
        self.up_proj = Linear(width, inner, bias, dtype, rngs, ("embed", "mlp"))
        self.down_proj = Linear(inner, width, bias, dtype, rngs, ("mlp", "embed"))

    def __call__(self, x_btd: Array) -> Array:
        activate, up = ACTIVATIONS[self.activation], self.up_proj(x_btd)
        return self.down_proj(activate(up) if self.gate_proj is None else activate(self.gate_proj(x_btd)) * up)


def scaled(x: Array, scale: float) -> Array:
    """Returns ``scale * x``, computed in float32, in the dtype of ``x``."""
    return x if scale == 1 else (x.astype(jnp.float32) * jnp.float32(scale)).astype(x.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    """Returns ``cap * tanh(x / cap)``, or ``x`` if ``cap`` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def softmax(scores: Array, sinks: Array | None = None) -> Array:
    """Returns the softmax over the last axis.

    Args:
      scores: floats; -inf for entries that get no weight.
      sinks: floats that broadcast to ``[.., 1]``: the logits of one more entry each, which takes its weight away; the
        rest is returned. None: there is no such entry.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    peak = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - peak)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))


def rotary_tables(position_bt: Array, rope: Rope | None) -> tuple[Array, Array] | None:
    """Returns cosines and sines of each pair's angle, float32 ``[b, 1, t, pairs]``; None without a rope."""
    if rope is None:
        return None
    position = position_bt[:, None, :, None].astype(jnp.float32)
    frequency = jnp.asarray(rope.frequencies, jnp.float32)[None, None, None, :]
    if rope.dynamic is not None:
        theta, factor, original = rope.dynamic
        width = 2 * len(rope.frequencies)
        # Each position p takes the base of a text of p + 1 tokens, so a key does not depend on the tokens that were fed
        # together with it.
        length = jnp.maximum(position + 1, float(original))
        base = theta * (factor * length / original - (factor - 1)) ** (width / (width - 2))
        frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32)[None, None, None, :] / width)
    angle = position * frequency
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(x: Array, tables: tuple[Array, Array] | None, interleaved: bool = False) -> Array:
    """Rotates queries or keys ``[b, heads, t, h]`` by their positions.

    Entries past the rotated pairs stay as they are. Interleaved pairs come out as halves: queries and keys are permuted
    in the same way, so their products do not change.

    Args:
      x: floats, queries or keys.
      tables: cosines and sines, as ``rotary_tables`` returns them; None rotates nothing.
      interleaved: see ``Rope``.
    """
    if tables is None:
        return x
    cos, sin = tables
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else turned.astype(x.dtype)
