"""GPT-2."""

from specjax.hf.families.shared import FULL_ATTENTION, Family, take_activation
from specjax.hf.keys import Keys
from specjax.hf.names import CONV1D, LINEAR, SAME, Table, layer_path
from specjax.transformer.config import MAX_HEAD, MAX_LAYERS, DecoderConfig, LayerConfig


def _conv1d(ours: str, theirs: str) -> Table:
    """Rows of a projection of GPT-2."""
    kernel, bias = f"transformer.h.{{i}}.{theirs}.weight", f"transformer.h.{{i}}.{theirs}.bias"
    return {layer_path(f"{ours}.kernel"): (kernel, CONV1D), layer_path(f"{ours}.bias"): (bias, SAME)}


def _layer_norm(ours: str, theirs: str) -> Table:
    """Rows of a norm of GPT-2."""
    return {f"{ours}.{part}": (f"transformer.{theirs}.{part}", SAME) for part in ("weight", "bias")}


GPT2: Table = {
    "embed_tokens.weight": ("transformer.wte.weight", SAME),
    "embed_positions.weight": ("transformer.wpe.weight", SAME),
    "lm_head.kernel": ("lm_head.weight", LINEAR),
    **_layer_norm("norm", "ln_f"),
    **_layer_norm("layers.{i}.input_layernorm", "h.{i}.ln_1"),
    **_layer_norm("layers.{i}.post_attention_layernorm", "h.{i}.ln_2"),
    **_conv1d("self_attn.q_proj", "attn.c_attn"),
    **_conv1d("self_attn.k_proj", "attn.c_attn"),
    **_conv1d("self_attn.v_proj", "attn.c_attn"),
    **_conv1d("self_attn.o_proj", "attn.c_proj"),
    **_conv1d("mlp.up_proj", "mlp.c_fc"),
    **_conv1d("mlp.down_proj", "mlp.c_proj"),
}


def _gpt2(keys: Keys) -> DecoderConfig:
    # 1. GPT-2 has its own names for all sizes.
    width, heads, layers = keys.integer("n_embd"), keys.integer("n_head"), keys.integer("n_layer", most=MAX_LAYERS)
    if width % heads or width // heads > MAX_HEAD:
        raise ValueError(f"n_embd {width} and n_head {heads} give no width of an attention head of at most {MAX_HEAD}")
    inner = keys.integer("n_inner", None, optional=True)
    keys.only("scale_attn_weights", True)
    keys.only("scale_attn_by_inverse_layer_idx", False)
    positions = keys.integer("n_positions", 1024)
    # 2. transformers takes the usual names of these sizes, too, so they must not say something else.
    usual = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
    }
    for key, value in usual.items():
        keys.only(key, value)
    keys.only("layer_types", [FULL_ATTENTION] * layers, None)
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=4 * width if inner is None else inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        layers=(LayerConfig(rope=None),) * layers,
        learned_positions=True,
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=take_activation(keys, "activation_function", "gelu_new"),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=keys.flag("tie_word_embeddings", True),
    )


FAMILIES = {
    "gpt2": Family(_gpt2, "GPT2LMHeadModel", GPT2),
}
