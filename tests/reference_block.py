"""Slow twins of drafters of blocks: NumPy and Python loops over one row, in float64, from tensors as published.

Written from DFlash (arXiv 2602.06036), DSpark (arXiv 2607.05147, section 3) and what the layouts say of themselves. A
``config`` holds a layer's Hugging Face keys, and beside them:

- ``block_size``, ``mask_token_id``; ``from_anchor``: the anchor's place predicts, too.
- ``causal``: for each layer, whether places of the block see only earlier ones; ``windows``: its window, or None;
  ``window_stays``: the window is the anchor's for all places, and not of the block.
- ``markov_head_type``: "vanilla", "gated", "rnn" or None.
- ``conv_group_size`` and ``selector_top_k`` of DFlash2, or None.
"""

import numpy as np
import reference_eagle
from reference_model import rms_norm, rotated


def weight(tensors, name):
    return np.asarray(tensors[name], np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def contexts(config, tensors, features):
    """Returns ``[t, d]``: what the target's states ``[t, target's d]`` become, side by side."""
    x = np.concatenate([np.asarray(x, np.float64) for x in features], axis=-1) @ weight(tensors, "fc.weight").T
    return rms_norm(x, weight(tensors, "hidden_norm.weight"), config["rms_norm_eps"])


def block(config, tensors, table, features, anchor):
    """Returns the normed states ``[block_size, d]`` of a block.

    Args:
      config: see above.
      tensors: the published tensors.
      table: the embeddings ``[v, d]``.
      features: the target's states before the anchor, ``[n - 1, d]`` each.
      anchor: the row's last token, at position n - 1.
    """
    context = contexts(config, tensors, features)
    table = np.asarray(table, np.float64)
    x = np.array([table[anchor]] + [table[config["mask_token_id"]]] * (config["block_size"] - 1))
    for layer in range(config["num_hidden_layers"]):
        x = x + attention(config, tensors, layer, x, context)
        y = u = rms_norm(x, weight(tensors, f"layers.{layer}.post_attention_layernorm.weight"), config["rms_norm_eps"])
        y = convolved(config, tensors, f"layers.{layer}.mlp_conv", 0, u, y)
        gate, up = (y @ weight(tensors, f"layers.{layer}.mlp.{name}_proj.weight").T for name in ("gate", "up"))
        y = (silu(gate) * up) @ weight(tensors, f"layers.{layer}.mlp.down_proj.weight").T
        x = x + convolved(config, tensors, f"layers.{layer}.mlp_conv", 1, u, y)
    return rms_norm(x, weight(tensors, "norm.weight"), config["rms_norm_eps"])


def attention(config, tensors, layer, x, context):
    """Query by query and head by head: the text before the anchor, whose c get no norm, and the block."""
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    name, eps, theta = f"layers.{layer}.self_attn", config["rms_norm_eps"], config.get("rope_theta", 10000.0)
    conv, u = (
        f"layers.{layer}.attention_conv",
        rms_norm(x, weight(tensors, f"layers.{layer}.input_layernorm.weight"), eps),
    )
    normed = convolved(config, tensors, conv, 0, u, u)
    both = np.concatenate([context, normed], axis=0)
    query = (normed @ weight(tensors, f"{name}.q_proj.weight").T).reshape(len(x), heads, width)
    key = (both @ weight(tensors, f"{name}.k_proj.weight").T).reshape(len(both), kv_heads, width)
    value = (both @ weight(tensors, f"{name}.v_proj.weight").T).reshape(len(both), kv_heads, width)
    query = rms_norm(query, weight(tensors, f"{name}.q_norm.weight"), eps)
    key = rms_norm(key, weight(tensors, f"{name}.k_norm.weight"), eps)
    start = len(context)
    out = np.zeros((len(x), heads, width))
    for i in range(len(x)):
        seen = [p for p in range(len(both)) if sees(config, layer, start, start + i, p)]
        for n in range(heads):
            k = n // (heads // kv_heads)
            turned = rotated(query[i, n], start + i, theta)
            scores = np.array([turned @ rotated(key[p, k], p, theta) for p in seen]) * width**-0.5
            weights = np.exp(scores - scores.max())
            out[i, n] = weights / weights.sum() @ value[seen, k]
    return convolved(config, tensors, conv, 1, u, out.reshape(len(x), -1) @ weight(tensors, f"{name}.o_proj.weight").T)


def convolved(config, tensors, name, side, u, z):
    """Returns a part's input (side 0) or output (side 1) z after DFlash2's convolution, whose kernels come from u."""
    group = config.get("conv_group_size")
    if group is None:
        return z
    base, made = weight(tensors, f"{name}.base_kernel")[side], u @ weight(tensors, f"{name}.kernel_projection.weight").T
    made, out = made.reshape(len(u), 2, len(base), -1)[:, side], np.zeros_like(z)
    for t in range(len(z)):
        for tap in range(min(t + 1, len(base))):
            for c in range(z.shape[1]):
                out[t, c] += (base[tap, c] + made[t, tap, c // group]) * z[t - tap, c]
    return out


def sees(config, layer, anchor, own, other):
    """Whether the place at position ``own`` of a block that starts at ``anchor`` sees the position ``other``."""
    window = config["windows"][layer]
    if other >= anchor and config["causal"][layer] and other > own:
        return False
    if window is None:
        return True
    if config.get("window_stays"):
        return other >= anchor - window
    return abs(own - other) < window


def unary(config, tensors, states, target_head):
    """Returns the logits of each draft over the draft vocabulary, before the Markov head."""
    states = states if config["from_anchor"] else states[1:]
    head = tensors.get("lm_head.weight", target_head)
    return states, states @ np.asarray(head, np.float64).T


def drafts(config, tensors, states, target_head, anchor, drafted):
    """Returns the logits ``[g, v]`` of drafts after tokens that were drafted, -inf outside the draft vocabulary."""
    states, logits = unary(config, tensors, states, target_head)
    out, recurrent = np.full((len(drafted), config["vocab_size"]), -np.inf), None
    for i, before in enumerate([anchor, *drafted[:-1]]):
        if config.get("selector_top_k"):
            out[i] = selected(config, tensors, states[i], before, logits[i])
            continue
        bias, recurrent = markov(config, tensors, states[i], before, recurrent)
        for u, logit in enumerate(logits[i] + bias):
            out[i, u + int(tensors["d2t"][u]) if "d2t" in tensors else u] = logit
    return out


def selected(config, tensors, state, before, logits):
    """Returns the logits of the likeliest tokens, corrected by DFlash2's selector; -inf for all others."""
    read = weight(tensors, "candidate_selector.predecessor_codebook")[before]
    read = read * (weight(tensors, "candidate_selector.hidden_projection.weight") @ state)
    out = np.full(len(logits), -np.inf)
    for token in np.argsort(-logits)[: config["selector_top_k"]]:
        out[token] = logits[token] + read @ weight(tensors, "candidate_selector.successor_codebook")[token]
    return out


def markov(config, tensors, state, before, recurrent):
    """Returns the bias of a draft after a token, and the recurrent state."""
    kind = config.get("markov_head_type")
    if kind is None:
        return 0.0, None
    row, out = weight(tensors, "markov_head.markov_w1.weight")[before], weight(tensors, "markov_head.markov_w2.weight")
    if kind == "vanilla":
        return out @ row, None
    name = "gate_proj" if kind == "gated" else "joint_proj"
    recurrent = np.zeros(len(row)) if recurrent is None else recurrent
    read = np.concatenate([state, row] if kind == "gated" else [recurrent, row, state])
    made = weight(tensors, f"markov_head.{name}.weight") @ read + weight(tensors, f"markov_head.{name}.bias")
    if kind == "gated":
        return out @ (sigmoid(made) * row), None
    gate, candidate, last = np.split(made, 3)
    return out @ np.tanh(last), sigmoid(gate) * recurrent + (1 - sigmoid(gate)) * np.tanh(candidate)


def confidence(config, tensors, state, before):
    """Returns the probability that a draft is accepted, as the confidence head estimates it."""
    row = weight(tensors, "markov_head.markov_w1.weight")[before] if config["confidence_head_with_markov"] else []
    return sigmoid(
        weight(tensors, "confidence_head.proj.weight")[0] @ np.concatenate([state, row])
        + weight(tensors, "confidence_head.proj.bias")[0]
    )


def peagle(config, tensors, table, target_head, features, tokens, count):
    """Returns the logits ``[count, v]`` of a P-EAGLE head after a row of n tokens.

    ``config`` is that of ``reference_eagle`` with ``mask_token_id``. Slot i of the text takes token i + 1 and the
    states at position i; the slots after it, the mask and the learned state.
    """
    learned = np.split(weight(tensors, "mask_hidden")[0], len(features), axis=-1)
    states = reference_eagle.fuse(config, tensors, [x[: len(tokens) - 1] for x in features])
    masked = np.repeat(reference_eagle.fuse(config, tensors, learned), count - 1, axis=0)
    fed = [*tokens[1:], *[config["mask_token_id"]] * (count - 1)]
    embedded = np.asarray(table, np.float64)[fed]
    made = reference_eagle.run(config, tensors, embedded, np.concatenate([states, masked], axis=0))
    return reference_eagle.logits(config, tensors, made[-count:], target_head)
