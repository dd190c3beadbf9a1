"""Slow twins of the decoder, its cache and prompt lookup: NumPy and Python loops, one row at a time, in float64."""

import numpy as np


def llama(config, params, tokens):
    """Runs a Llama decoder over one row.

    Args:
      config: a Hugging Face ``config.json`` as a dict.
      params: nested dict of weights ``[out, in]``, with layers under integer keys.
      tokens: token ids of the row.

    Returns:
      The logits ``[t, v]``, and the hidden states ``[t, d]``: the embedding output, the output of each layer, and
      the state after the final norm.
    """
    eps = config["rms_norm_eps"]
    embedding = np.asarray(params["embed_tokens"]["weight"], np.float64)
    x = embedding[np.asarray(tokens)]
    states = [x]
    for i in range(config["num_hidden_layers"]):
        layer = params["layers"][i]
        x = x + attention(config, layer["self_attn"], rms_norm(x, layer["input_layernorm"]["weight"], eps))
        x = x + gated_mlp(layer["mlp"], rms_norm(x, layer["post_attention_layernorm"]["weight"], eps))
        states.append(x)
    states.append(rms_norm(x, params["norm"]["weight"], eps))
    head = embedding if config["tie_word_embeddings"] else np.asarray(params["lm_head"]["kernel"], np.float64).T
    return states[-1] @ head.T, states


def linear(layer, x):
    """``x @ kernel + bias``, the bias being optional."""
    y = x @ np.asarray(layer["kernel"], np.float64)
    return y + np.asarray(layer["bias"], np.float64) if "bias" in layer else y


def rms_norm(x, weight, eps):
    """Divides by the root of the mean square and multiplies by the weight."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def gated_mlp(layers, x):
    """``down(silu(gate(x)) * up(x))``."""
    gate = linear(layers["gate_proj"], x)
    return linear(layers["down_proj"], gate / (1 + np.exp(-gate)) * linear(layers["up_proj"], x))


def rotated(vector, position, theta):
    """Turns each pair (j, j + h/2) of a head by ``position * theta ** (-2j/h)``, as a complex product."""
    half = len(vector) // 2
    turn = np.exp(1j * position * theta ** (-2 * np.arange(half) / len(vector)))
    pairs = (vector[:half] + 1j * vector[half:]) * turn
    return np.concatenate([pairs.real, pairs.imag])


def attention(config, layers, x):
    """Causal self-attention of a row whose first token has position 0; query head n reads key head n // group."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, theta, length = config["head_dim"], config["rope_theta"], len(x)
    query = linear(layers["q_proj"], x).reshape(length, heads, width)
    key = linear(layers["k_proj"], x).reshape(length, kv_heads, width)
    value = linear(layers["v_proj"], x).reshape(length, kv_heads, width)
    query = np.array([[rotated(query[t, n], t, theta) for t in range(length)] for n in range(heads)])
    key = np.array([[rotated(key[t, k], t, theta) for t in range(length)] for k in range(kv_heads)])
    out = attend(query, key, value.transpose(1, 0, 2), np.arange(length), width**-0.5)
    return linear(layers["o_proj"], out.transpose(1, 0, 2).reshape(length, heads * width))


def attend(query_nth, keys_ksh, values_ksh, position_t, scale, window=None, cap=None, chunk=None, sinks_n=None):
    """Attends from each query to the slots up to its position, or the last ``window`` of them; returns ``[n, t, h]``.

    With ``chunk``, a query sees only slots of its own chunk of so many. With ``sinks_n``, each head's softmax has one
    more entry, without a value. The products are scaled, then bent to ``cap * tanh(score / cap)`` where there is a cap.
    """
    heads, length, _ = query_nth.shape
    group = heads // len(keys_ksh)
    out = np.zeros((heads, length, values_ksh.shape[-1]))
    for n in range(heads):
        for t in range(length):
            end = position_t[t] + 1
            first = 0 if window is None else max(0, end - window)
            seen = slice(first if chunk is None else max(first, position_t[t] // chunk * chunk), end)
            scores = keys_ksh[n // group, seen].astype(np.float64) @ query_nth[n, t].astype(np.float64) * scale
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            sink = -np.inf if sinks_n is None else float(sinks_n[n])
            peak = max(scores.max(), sink)
            weights = np.exp(scores - peak)
            out[n, t] = (
                weights / (weights.sum() + np.exp(sink - peak)) @ values_ksh[n // group, seen].astype(np.float64)
            )
    return out


def write(cache_bksh, new_bkth, start_b):
    """Returns a copy of the cache with the new slots of row i from ``start_b[i]`` on."""
    out = np.array(cache_bksh)
    for row, start in enumerate(start_b):
        for t in range(new_bkth.shape[2]):
            out[row, :, start + t] = new_bkth[row, :, t]
    return out


def prompt_lookup(tokens, num_draft, min_n, max_n):
    """Returns the tokens that followed the row's last ones where they occurred before, or none.

    Of all earlier places at which the last n tokens end, the one with the largest n up to ``max_n`` is copied from,
    and the latest of these; a match shorter than ``min_n`` does not count. What was copied is copied on.
    """
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for _ in range(num_draft):
                    text.append(text[end + len(text) - len(tokens)])
                return text[len(tokens) :]
    return []
