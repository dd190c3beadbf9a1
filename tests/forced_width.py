"""Rounds of a given width, where the loop would choose one."""

import dataclasses

import jax.numpy as jnp
import numpy as np


def force(state, number):
    """The state with costs under which every round has width ``number``, and no evidence against it."""
    cost_w = np.where(np.arange(state.request.cost_bw.shape[1]) == number, 1, np.inf).astype(np.float32)
    cost_bw = jnp.broadcast_to(cost_w, state.request.cost_bw.shape)
    width_b = jnp.full_like(state.adapt.width_b, min(number, len(state.adapt.widths) - 1))
    adapt = dataclasses.replace(state.adapt, width_b=width_b, rest_b=jnp.zeros_like(state.adapt.rest_b))
    return dataclasses.replace(state, request=dataclasses.replace(state.request, cost_bw=cost_bw), adapt=adapt)
