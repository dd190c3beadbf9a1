"""Small decoders with recurrent layers beside attention: gated DeltaNet as in Qwen3-Next, Mamba-2 as in Granite 4."""

import functools

import jax

from specjax.transformer.config import DecoderConfig, DeltaConfig, LayerConfig, MambaConfig, plain_rope
from specjax.transformer.decoder import decoder_model, init_params

K, R, E, H = 2, 3, 5, 4  # key heads, value heads for each, widths of keys and values
RECURRENCES = {"delta rule": DeltaConfig(K, K * R, E, H, taps=3), "mamba": MambaConfig(K * R, H, K, E, taps=3)}
WIDTH = 16


@functools.cache
def model(rule, vocab=11, seed=2, positions=768, kinds="rar"):
    """A small decoder: "r" is a recurrent layer, "a" one with attention.

    Beside the delta rule, attention has rotary positions and an output gate. Beside Mamba-2 it has no positions.
    """
    delta = rule == "delta rule"
    attention = LayerConfig(plain_rope(4, 100.0) if delta else None)
    config = DecoderConfig(
        *(vocab, WIDTH, 24, len(kinds), 4, 2),
        head_dim=8,
        max_position_embeddings=positions,
        layers=tuple(LayerConfig(None, recurrent=True) if kind == "r" else attention for kind in kinds),
        norm_eps=1e-3,
        output_gate=delta,
        query_key_norm="heads" if delta else None,
        residual_scale=1.0 if delta else 0.7,
        recurrence=RECURRENCES[rule],
    )
    params = init_params(config, jax.random.key(seed))
    params["embed_tokens"]["weight"] *= 30
    return decoder_model(config, jax.tree.map(lambda x: 12 * x if x.ndim > 1 and x.shape[0] > 3 else x, params))
