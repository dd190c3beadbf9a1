"""Slow twin of multi-token prediction: NumPy and Python loops over one row, in float64, from tensors as published.

Written from DeepSeek-V3 (DeepSeek-AI 2024; sections 2.1.1, 2.1.2 and 2.2) and the model cards of the other families.
"""

import numpy as np
from reference_model import attend, rms_norm

# Before the layer's tensors and before the others; norms of embedding and state, their projection, the last norm.
NAMES = {
    "deepseek_v3": ("model.layers.{n}.", "model.layers.{n}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "glm4_moe": ("model.layers.{n}.", "model.layers.{n}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "qwen3_next": ("mtp.layers.{k}.", "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    "mimo": (
        *("model.mtp_layers.{k}.", "model.mtp_layers.{k}."),
        *("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    ),
}


def module(config, tensors, k, embedded, states):
    """Runs module k, counted from 0, over a row.

    Args:
      config: ``config.json`` as a dict.
      tensors: the published tensors by name.
      k: the module.
      embedded: embeddings ``[t, d]``, at slot i of token i + k + 1.
      states: ``[t, d]``, those of module k - 1, or the target's.

    Returns:
      The module's states ``[t, d]``, after its norm.
    """
    kind, numbers = config["model_type"], {"n": config["num_hidden_layers"] + k, "k": k}
    layer, parts, *names = NAMES[kind]
    layer, parts = layer.format(**numbers), parts.format(**numbers)

    def weight(name):
        return np.asarray(tensors[name + ".weight"], np.float64)

    def norm(x, name):
        return rms_norm(x, weight(name) + (kind == "qwen3_next"), config["rms_norm_eps"])

    def linear(x, name):
        bias = tensors.get(name + ".bias")
        return x @ weight(name).T + (0 if bias is None else np.asarray(bias, np.float64))

    pair = [norm(embedded, parts + names[0]), norm(states, parts + names[1])]
    x = linear(np.concatenate(pair[::-1] if kind == "mimo" else pair, axis=1), parts + names[2])
    attention = latent_attention if kind == "deepseek_v3" else grouped_attention
    x = x + attention(config, linear, norm, layer + "self_attn.", norm(x, layer + "input_layernorm"))
    y = norm(x, layer + "post_attention_layernorm")
    mlp = (
        gated_mlp(linear, layer + "mlp.", y) if kind == "mimo" else experts(config, tensors, linear, layer + "mlp.", y)
    )
    return norm(x + mlp, parts + names[3])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gated_mlp(linear, prefix, x):
    gate = linear(x, prefix + "gate_proj")
    return linear(gate * sigmoid(gate) * linear(x, prefix + "up_proj"), prefix + "down_proj")


def experts(config, tensors, linear, prefix, x):
    """The sum over each token's experts, and the one that all tokens share."""
    count = config.get("n_routed_experts") or config["num_experts"]
    scores, out = linear(x, prefix + "gate"), np.zeros_like(x)
    if config["model_type"] == "qwen3_next":
        scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        choice, scale = scores, 1.0
        shared = gated_mlp(linear, prefix + "shared_expert.", x) * sigmoid(linear(x, prefix + "shared_expert_gate"))
    else:
        scores, scale = sigmoid(scores), config["routed_scaling_factor"]
        choice = scores + np.asarray(tensors[prefix + "gate.e_score_correction_bias"], np.float64)
        groups = np.sort(choice.reshape(len(x), config["n_group"], -1), axis=-1)[..., -2:].sum(-1)
        best = np.argsort(-groups, axis=-1)[:, : config["topk_group"]]
        for t in range(len(x)):
            for e in range(count):
                if e // (count // config["n_group"]) not in best[t]:
                    choice[t, e] = -np.inf
        shared = gated_mlp(linear, prefix + "shared_experts.", x)
    for t in range(len(x)):
        chosen = np.argsort(-choice[t])[: config["num_experts_per_tok"]]
        weights = scores[t, chosen]
        weights = weights / weights.sum() if config["norm_topk_prob"] else weights
        for e, weight in zip(chosen, weights, strict=True):
            out[t] += scale * weight * gated_mlp(linear, f"{prefix}experts.{e}.", x[t : t + 1])[0]
    return out + shared


def rotated(vector, position, theta, width, neighbours=False):
    """Turns the first ``width`` entries of a head by pairs: halves, or neighbours."""
    turn = np.exp(1j * position * theta ** (-np.arange(0, width, 2) / width))
    first, second = (
        (slice(0, width, 2), slice(1, width, 2)) if neighbours else (slice(width // 2), slice(width // 2, width))
    )
    pairs = (vector[first] + 1j * vector[second]) * turn
    return np.concatenate([pairs.real, pairs.imag, vector[width:]])


def grouped_attention(config, linear, norm, prefix, x):
    """Grouped-query attention, with norms of queries and keys, and with a gate after it, where the family has them."""
    kind, length, heads = config["model_type"], len(x), config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    theta, part = config["rope_theta"], config.get("partial_rotary_factor", 1.0)
    query = linear(x, prefix + "q_proj").reshape(length, heads, -1)
    query, gate = query[..., :width], query[..., width:]
    key, value = (linear(x, f"{prefix}{name}_proj").reshape(length, -1, width) for name in "kv")
    if kind == "qwen3_next" or config.get("use_qk_norm"):
        query, key = norm(query, prefix + "q_norm"), norm(key, prefix + "k_norm")

    def turned(x):
        turns = [[rotated(x[t, n], t, theta, int(part * width)) for t in range(length)] for n in range(x.shape[1])]
        return np.array(turns)

    out = attend(turned(query), turned(key), value.transpose(1, 0, 2), np.arange(length), width**-0.5)
    out = out.transpose(1, 0, 2)
    out = out * sigmoid(gate) if kind == "qwen3_next" else out
    return linear(out.reshape(length, -1), prefix + "o_proj")


def latent_attention(config, linear, norm, prefix, x):
    """Multi-head latent attention with keys and values made from the latents."""
    length, heads, rank = len(x), config["num_attention_heads"], config["kv_lora_rank"]
    plain, width, theta = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["rope_theta"]
    query = linear(norm(linear(x, prefix + "q_a_proj"), prefix + "q_a_layernorm"), prefix + "q_b_proj")
    query = query.reshape(length, heads, plain + width)
    compressed = linear(x, prefix + "kv_a_proj_with_mqa")
    made = linear(norm(compressed[:, :rank], prefix + "kv_a_layernorm"), prefix + "kv_b_proj").reshape(
        length, heads, -1
    )
    queries, keys = np.zeros((2, heads, length, plain + width))
    for n in range(heads):
        for t in range(length):
            turned = rotated(query[t, n, plain:], t, theta, width, neighbours=True)
            queries[n, t] = np.concatenate([query[t, n, :plain], turned])
            turned = rotated(compressed[t, rank:], t, theta, width, neighbours=True)
            keys[n, t] = np.concatenate([made[t, n, :plain], turned])
    values = made[..., plain:].transpose(1, 0, 2)
    out = attend(queries, keys, values, np.arange(length), (plain + width) ** -0.5)
    return linear(out.transpose(1, 0, 2).reshape(length, -1), prefix + "o_proj")
