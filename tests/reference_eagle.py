"""Slow twin of EAGLE heads: NumPy and Python loops over one row, in float64, from tensors as they are published.

Written from EAGLE (arXiv 2401.15077, section 4.1), EAGLE-3 (arXiv 2503.01840, section 3) and what the layouts say of
themselves. A ``config`` holds a layer's Hugging Face keys, with the head's flags beside them. Slot i stands for token
i + 1 and the target's state at position i.
"""

import numpy as np
from reference_model import attend, rms_norm, rotated


def weight(tensors, name, layer=None):
    """Returns a tensor of the head, or of one of its layers, by whichever of its published names there is."""
    names = [name, name.replace("fc.", "fusion_fc.")]
    if layer is not None:
        names = [f"layers.{layer}.{name}"] + [f"{first}.{name}" for first in ("midlayer", "transformer") if layer == 0]
    found = [prefix + name for prefix in ("", "model.") for name in dict.fromkeys(names) if prefix + name in tensors]
    assert len(found) == 1, names
    return np.asarray(tensors[found[0]], np.float64)


def linear(tensors, name, layer, x, bias):
    y = x @ weight(tensors, f"{name}.weight", layer).T
    return y + weight(tensors, f"{name}.bias", layer) if bias else y


def fuse(config, tensors, features):
    """Returns ``[t, d]`` from the target's states ``[t, target's d]``: EAGLE-1's as it is, EAGLE-3's through ``fc``."""
    if config["version"] == 1:
        return features[0]
    eps = config["rms_norm_eps"]
    if config.get("fc_norm"):
        features = [rms_norm(x, weight(tensors, f"fc_norm.{i}.weight"), eps) for i, x in enumerate(features)]
    x = np.concatenate(features, axis=-1)
    if config.get("norm_before_fc"):
        x = rms_norm(x, weight(tensors, "input_norm.weight"), eps)
    return linear(tensors, "fc", None, x, False)


def run(config, tensors, embedded, states):
    """Returns the states ``[t, d]`` after the head's layers, of embeddings and states ``[t, d]``."""
    eps = config["rms_norm_eps"]
    if config["version"] == 1:
        x = attended = linear(tensors, "fc", None, np.concatenate([embedded, states], axis=-1), config["bias"])
    else:
        normed = rms_norm(states, weight(tensors, "hidden_norm.weight", 0), eps)
        embedded = rms_norm(embedded, weight(tensors, "input_layernorm.weight", 0), eps)
        attended = np.concatenate([embedded, normed], axis=-1)
        x = normed if config.get("norm_before_residual") else states
    for layer in range(config["num_hidden_layers"]):
        if layer:
            attended = rms_norm(x, weight(tensors, "input_layernorm.weight", layer), eps)
        x = x + attention(config, tensors, layer, attended)
        y = rms_norm(x, weight(tensors, "post_attention_layernorm.weight", layer), eps)
        gate, up = (linear(tensors, f"mlp.{name}_proj", layer, y, False) for name in ("gate", "up"))
        x = x + linear(tensors, "mlp.down_proj", layer, gate / (1 + np.exp(-gate)) * up, False)
    return rms_norm(x, weight(tensors, "norm.weight"), eps) if config.get("norm_output") else x


def attention(config, tensors, layer, x):
    """Causal self-attention; query head n reads key head n // group."""
    heads, kv_heads, length = config["num_attention_heads"], config["num_key_value_heads"], len(x)
    width = config.get("head_dim") or config["hidden_size"] // heads
    bias, theta = config.get("attention_bias", False), config.get("rope_theta", 10000.0)

    def projected(name, count):
        return linear(tensors, f"self_attn.{name}_proj", layer, x, bias).reshape(length, count, width)

    query, key, value = projected("q", heads), projected("k", kv_heads), projected("v", kv_heads)
    if config.get("model_type") == "qwen3":
        query = rms_norm(query, weight(tensors, "self_attn.q_norm.weight", layer), config["rms_norm_eps"])
        key = rms_norm(key, weight(tensors, "self_attn.k_norm.weight", layer), config["rms_norm_eps"])
    query = np.array([[rotated(query[t, n], t, theta) for t in range(length)] for n in range(heads)])
    key = np.array([[rotated(key[t, k], t, theta) for t in range(length)] for k in range(kv_heads)])
    out = attend(query, key, value.transpose(1, 0, 2), np.arange(length), width**-0.5)
    return linear(tensors, "self_attn.o_proj", layer, out.transpose(1, 0, 2).reshape(length, heads * width), bias)


def logits(config, tensors, states, target_head):
    """Returns ``[t, v]``, -inf for tokens outside the draft vocabulary.

    ``target_head`` ``[v, d]`` is for heads without an output head: all of EAGLE-1, and some of EAGLE-3.
    """
    if config["version"] == 1:
        return states @ np.asarray(target_head, np.float64).T
    if not config.get("norm_output") and config.get("norm_logits", True):
        states = rms_norm(states, weight(tensors, "norm.weight"), config["rms_norm_eps"])
    out = np.full((len(states), config["vocab_size"]), -np.inf)
    own = any(name.endswith("lm_head.weight") for name in tensors)
    for u in range(config["draft_vocab_size"]):
        token = u + int(tensors["d2t"][u]) if "d2t" in tensors else u
        row = weight(tensors, "lm_head.weight")[u] if own else np.float64(target_head[token])
        out[:, token] = states @ row
    return out


def chain(config, tensors, table, target_head, features, tokens, drafts):
    """Returns the logits ``[len(drafts) + 1, v]`` of a chain after a row of n tokens.

    Args:
      config: see above.
      tensors: the published tensors.
      table: the embeddings ``[v, d]``.
      target_head: as for ``logits``.
      features: the target's states at the row's positions, n - 1 of them or more.
      tokens: the row.
      drafts: tokens that are fed, each with the head's state of the step before.
    """
    states = fuse(config, tensors, features)[: len(tokens) - 1]
    tokens, out = list(tokens[1:]), []
    for draft in [*drafts, None]:
        last = run(config, tensors, np.asarray(table, np.float64)[tokens], states)[-1:]
        out.append(logits(config, tensors, last, target_head)[0])
        tokens, states = [*tokens, draft], np.concatenate([states, last], axis=0)
    return np.array(out)
