"""Mixtures of experts that drop no token.

Experts of limited capacity would drop tokens, and then the text of one row would depend on the other rows.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from specjax.platforms import by_platform
from specjax.sharding import open_parts
from specjax.transformer.config import Activation, DecoderConfig, ExpertsConfig
from specjax.transformer.layers import ACTIVATIONS, MLP, Linear, declare, make_norm, normal, rms
from specjax.transformer.products import Kernel, product, ragged_product


class Router(nnx.Module):
    """Chooses the experts of each token, in float32."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.experts = experts
        self.kernel = declare(normal(rngs, (config.hidden_size, experts.num_experts), dtype), "embed", None)
        self.bias = nnx.Param(jnp.zeros((experts.num_experts,), dtype)) if experts.router_bias else None
        # Float32, since small differences between scores decide and bfloat16 would round them away.
        bias = jnp.zeros((experts.num_experts,), jnp.float32)
        self.e_score_correction_bias = nnx.Param(bias) if experts.corrected else None
        self.eps = config.norm_eps
        self.input_scale = nnx.Param(jnp.ones((config.hidden_size,), dtype)) if experts.normed_router else None
        self.expert_scale = nnx.Param(jnp.ones((experts.num_experts,), dtype)) if experts.expert_scale else None

    def __call__(self, x_md: Array) -> tuple[Array, Array]:
        """Returns the chosen experts of m tokens, int32 ``[m, c]``, and their weights, float32 ``[m, c]``."""
        experts = self.experts
        x_md = x_md.astype(jnp.float32)
        if self.input_scale is not None:
            scale_d = self.input_scale[...].astype(jnp.float32) / math.sqrt(x_md.shape[-1])
            x_md = rms(x_md, self.eps) * scale_d[None]
        logits_me = product(x_md, self.kernel[...].astype(jnp.float32))
        if self.bias is not None:
            logits_me = logits_me + self.bias[...].astype(jnp.float32)[None]
        if experts.score == "sparsemixer":
            assert experts.nearness is not None
            chosen_mc, weights_mc = _sparsemixer(logits_me, experts.per_token, experts.nearness)
            return chosen_mc, weights_mc * experts.scale
        scores_me = jax.nn.softmax(logits_me) if experts.score == "softmax" else jax.nn.sigmoid(logits_me)
        # The choice may use other numbers than the weights. Logits are in the order of the scores, and no two of them
        # were made equal by rounding. A bias balances the experts' load (DeepSeek-V3).
        choice_me = logits_me if experts.groups == 1 else scores_me
        if self.e_score_correction_bias is not None:
            choice_me = scores_me + self.e_score_correction_bias[...][None]
        if experts.groups > 1:
            # A group is as good as its best experts: one (DeepSeek-V2, section 2.1.3) or two (-V3, section 2.1.2).
            grouped_mgx = choice_me.reshape(-1, experts.groups, experts.num_experts // experts.groups)
            best_mg = jnp.sum(lax.top_k(grouped_mgx, min(experts.group_best, grouped_mgx.shape[-1]))[0], axis=-1)
            chosen_mc = lax.top_k(best_mg, experts.best_groups)[1]
            allowed_mg = jnp.any(jax.nn.one_hot(chosen_mc, experts.groups, dtype=bool), axis=1)
            choice_me = jnp.where(allowed_mg[:, :, None], grouped_mgx, -jnp.inf).reshape(choice_me.shape)
        # Weights come from the scores themselves, without the bias.
        chosen_mc = lax.top_k(choice_me, experts.per_token)[1]
        weights_mc = jnp.take_along_axis(scores_me, chosen_mc, axis=1)
        if experts.renormalize:
            weights_mc = weights_mc / (jnp.sum(weights_mc, axis=1, keepdims=True) + 1e-20)
        if self.expert_scale is not None:
            weights_mc = weights_mc * self.expert_scale[...].astype(jnp.float32)[chosen_mc]
        return chosen_mc, weights_mc * experts.scale


def _sparsemixer(logits_me: Array, count: int, nearness: float) -> tuple[Array, Array]:
    """Returns the chosen experts and their weights, ``[m, c]``; see ``ExpertsConfig.score``."""
    left_me, chosen, weights = logits_me, [], []
    for _ in range(count):
        best_m1 = jnp.max(left_me, axis=1, keepdims=True)
        chosen_m = jnp.argmax(left_me, axis=1)
        far_me = (best_m1 - logits_me) / jnp.maximum(jnp.abs(logits_me), best_m1) > nearness
        near_me = jax.nn.softmax(jnp.where(far_me, -jnp.inf, left_me))
        weights.append(jnp.take_along_axis(near_me, chosen_m[:, None], axis=1))
        chosen.append(chosen_m[:, None].astype(jnp.int32))
        taken_me = jax.nn.one_hot(chosen_m, logits_me.shape[1], dtype=bool)
        left_me = jnp.where(taken_me, -jnp.inf, left_me)
    return jnp.concatenate(chosen, axis=1), jnp.concatenate(weights, axis=1)


class Stacks(NamedTuple):
    """The projections of a layer's experts.

    Attributes:
      gate, up: kernels ``[e, d, f]``.
      down: kernels ``[e, f, d]``.
      gate_bias, up_bias: ``[e, f]``, or None.
      down_bias: ``[e, d]``, or None.
    """

    gate: Kernel
    up: Kernel
    down: Kernel
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


class Form(NamedTuple):
    """What an expert computes: ``activation`` is the decoder's, the rest is as in ``ExpertsConfig``."""

    activation: Activation
    clamp: tuple[float, float] | None = None
    weighs_inputs: bool = False

    def join(self, gate: Array, up: Array) -> Array:
        """Returns what goes into the down-projection."""
        if self.clamp is None:
            return ACTIVATIONS[self.activation](gate) * up
        slope, most = self.clamp
        gate, up = jnp.minimum(gate, most), jnp.clip(up, -most, most)
        return gate * jax.nn.sigmoid(slope * gate) * (up + 1)


class Experts(nnx.Module):
    """The experts' gated MLPs, stacked: ``[e, in, out]``."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        e, d, f = experts.num_experts, config.hidden_size, experts.intermediate_size
        self.form = Form(config.activation, experts.clamp, experts.weighs_inputs)
        self.gate_proj = declare(normal(rngs, (e, d, f), dtype), "experts", "embed", "mlp")
        self.up_proj = declare(normal(rngs, (e, d, f), dtype), "experts", "embed", "mlp")
        self.down_proj = declare(normal(rngs, (e, f, d), dtype), "experts", "mlp", "embed")
        if experts.bias:
            self.gate_bias = declare(jnp.zeros((e, f), dtype), "experts", "mlp")
            self.up_bias = declare(jnp.zeros((e, f), dtype), "experts", "mlp")
            self.down_bias = declare(jnp.zeros((e, d), dtype), "experts", "embed")
        self.has_bias = experts.bias

    def __call__(self, x_md: Array, chosen_mc: Array, weights_mc: Array) -> Array:
        """Returns the weighted sum of each token's experts, ``[m, d]``."""
        biases = (self.gate_bias[...], self.up_bias[...], self.down_bias[...]) if self.has_bias else ()
        stacks = Stacks(self.gate_proj[...], self.up_proj[...], self.down_proj[...], *biases)
        run = functools.partial(_run, self.form)
        parts = open_parts("expert")
        if parts > 1 and stacks.gate.shape[0] % parts == 0:
            run = _in_parts(run)
        return run(x_md, chosen_mc, weights_mc.astype(x_md.dtype), stacks)


def _run(form: Form, x_md: Array, chosen_mc: Array, weights_mc: Array, stacks: Stacks, absent: bool = False) -> Array:
    # Two programs for one result. On a CPU XLA's ragged products read every expert, which makes one token 20 times
    # slower (docs/performance.md). On a GPU every branch of the loop over experts would wait for the host.
    return by_platform(
        x_md,
        chosen_mc,
        weights_mc,
        stacks,
        cpu=functools.partial(expert_by_expert, form),
        default=functools.partial(sorted_by_expert, form, absent=absent),
    )


def _in_parts(run: Callable[..., Array]) -> Callable[..., Array]:
    """Returns ``run`` split over the mesh axis "expert": each part runs the experts it holds, and outputs are added.

    The compiler cannot partition grouped (ragged) matrix products, so this uses ``shard_map``.
    """

    def part(id_e: Array, x_md: Array, chosen_mc: Array, weights_mc: Array, stacks: Stacks) -> Array:
        # Expert ids become places in this part's stacks. A choice of another part's expert gets the place after the
        # last one and the weight 0.
        place_mc = chosen_mc - id_e[0]
        held_mc = (place_mc >= 0) & (place_mc < id_e.shape[0])
        place_mc = jnp.where(held_mc, place_mc, id_e.shape[0])
        y_md = run(x_md, place_mc, jnp.where(held_mc, weights_mc, 0), stacks, absent=True)
        # Added in float32: XLA's CPU compiler aborts at a bfloat16 sum over some of a mesh's axes.
        return lax.psum(y_md.astype(jnp.float32), "expert").astype(y_md.dtype)

    def whole(x_md: Array, chosen_mc: Array, weights_mc: Array, stacks: Stacks) -> Array:
        # Inside a part an array has no index of its own, so each part gets the ids of its experts.
        id_e = jnp.arange(stacks.gate.shape[0], dtype=chosen_mc.dtype)
        split, same = PartitionSpec("expert"), PartitionSpec()
        specs = (split, same, same, same, split)
        mapped = jax.shard_map(part, in_specs=specs, out_specs=same, axis_names={"expert"}, check_vma=False)
        return mapped(id_e, x_md, chosen_mc, weights_mc, stacks)

    return whole


def expert_by_expert(form: Form, x_md: Array, chosen_mc: Array, weights_mc: Array, stacks: Stacks) -> Array:
    """Sends all tokens through each expert that any token chose, and keeps the outputs of the tokens that chose it.

    Arguments and result are those of ``Experts.__call__``, as of ``sorted_by_expert``.
    """

    def visit(e: Array, y_md: Array) -> Array:
        chose_mc = chosen_mc == e

        def run(y_md: Array) -> Array:
            # The tree of a quantised stack has two arrays.
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, e, keepdims=False), stacks)
            weight_m1 = jnp.sum(jnp.where(chose_mc, weights_mc, 0), axis=1, keepdims=True)
            inputs_md = x_md * weight_m1 if form.weighs_inputs else x_md
            gate = _biased(product(inputs_md, own.gate), own.gate_bias)
            up = _biased(product(inputs_md, own.up), own.up_bias)
            out_md = _biased(product(form.join(gate, up), own.down), own.down_bias)
            out_md = out_md if form.weighs_inputs else out_md * weight_m1
            return y_md + jnp.where(jnp.any(chose_mc, axis=1, keepdims=True), out_md, 0)

        return lax.cond(jnp.any(chose_mc), run, lambda y_md: y_md, y_md)

    return lax.fori_loop(jnp.int32(0), jnp.int32(stacks.gate.shape[0]), visit, jnp.zeros_like(x_md))


def _biased(x_mf: Array, bias: Array | None) -> Array:
    """Returns rows plus the bias, ``[f]`` or one for each row; or the rows if there is none."""
    return x_mf if bias is None else x_mf + jnp.broadcast_to(bias, x_mf.shape)


def sorted_by_expert(
    form: Form, x_md: Array, chosen_mc: Array, weights_mc: Array, stacks: Stacks, absent: bool = False
) -> Array:
    """Sorts tokens by expert and sends them through ``ragged_dot``, whose groups may have any size.

    ``absent``: choices may be e, one more than the last expert. Such a choice is of no expert here and adds nothing.
    """
    order_n = jnp.argsort(chosen_mc.reshape(-1))
    expert_n, weight_n1 = chosen_mc.reshape(-1)[order_n], weights_mc.reshape(-1)[order_n][:, None]
    sizes_e = jnp.sum(jax.nn.one_hot(expert_n, stacks.gate.shape[0], dtype=jnp.int32), axis=0)

    def ragged(rows: Array, kernels: Kernel, bias_e: Array | None) -> Array:
        y = ragged_product(rows, kernels, sizes_e=sizes_e, expert_n=expert_n)
        return _biased(y, None if bias_e is None else jnp.take(bias_e, expert_n, axis=0, mode="clip"))

    x_nd = x_md[order_n // chosen_mc.shape[1]]
    x_nd = x_nd * weight_n1 if form.weighs_inputs else x_nd
    hidden_nf = form.join(ragged(x_nd, stacks.gate, stacks.gate_bias), ragged(x_nd, stacks.up, stacks.up_bias))
    y_nd = ragged(hidden_nf, stacks.down, stacks.down_bias)
    y_nd = y_nd if form.weighs_inputs else y_nd * weight_n1
    if absent:  # these are sorted after all groups, where ragged products may hold anything
        y_nd = jnp.where((expert_n < stacks.gate.shape[0])[:, None], y_nd, 0)
    # Sorting the order itself gives the inverse permutation: outputs return to their tokens.
    return jnp.sum(y_nd[jnp.argsort(order_n)].reshape(*chosen_mc.shape, -1), axis=1)


class MoE(nnx.Module):
    """The layer's MLP as a mixture: each token's weighted sum over its experts, plus the shared MLP if there is one."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        experts = config.experts
        assert experts is not None
        self.gate = Router(config, experts, dtype, rngs)
        self.experts = Experts(config, experts, dtype, rngs)
        self.shared_experts = MLP(config, experts.shared_size, dtype, rngs) if experts.shared_size else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, False, dtype, rngs) if experts.shared_gate else None

    def mix(self, routed_btd: Array, x_btd: Array) -> Array:
        """Returns the sums of the experts' outputs for ``x_btd``, chosen and weighted by ``routed_btd``."""
        routed_md, x_md = (x.reshape(-1, x.shape[-1]) for x in (routed_btd, x_btd))
        return self.experts(x_md, *self.gate(routed_md)).reshape(x_btd.shape)

    def __call__(self, x_btd: Array) -> Array:
        y_btd = self.mix(x_btd, x_btd)
        if self.shared_experts is None:
            return y_btd
        shared_btd = self.shared_experts(x_btd)
        if self.shared_expert_gate is not None:
            weight_bt1 = jax.nn.sigmoid(self.shared_expert_gate(x_btd))
            shared_btd = shared_btd * jnp.broadcast_to(weight_bt1, shared_btd.shape)
        return y_btd + shared_btd


class MoEBeside(MoE):
    """A mixture beside the layer's MLP: both read the residual stream through norms of their own, and are added."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.input_norm = make_norm(config, config.hidden_size, dtype)
        self.output_norm = make_norm(config, config.hidden_size, dtype)
        self.mlp_norm = make_norm(config, config.hidden_size, dtype)

    def add(self, x_btd: Array, mlp_btd: Array) -> Array:
        """Returns the sum ``[b, t, d]`` of the outputs of MLP and mixture; the router takes the stream as it is.

        Args:
          x_btd: the residual stream.
          mlp_btd: what the layer's MLP made of it.
        """
        return self.mlp_norm(mlp_btd) + self.output_norm(self.mix(x_btd, self.input_norm(x_btd)))
