"""Heads that draft blocks, as they are published: configs, random tensors, and what the twin is told of them."""

import dataclasses

import numpy as np

VOCAB, DRAFTED, WIDTH, LAYERS, INNER, HEADS, KV_HEADS, HEAD_DIM, RANK = 40, 11, 16, 8, 20, 4, 2, 6, 5
LAYER = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8,  # shorter than the texts here: it means nothing
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3, "use_sliding_window": True}
ZLAB = {
    **{"architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, **LAYER},
    **{"block_size": 4, "num_target_layers": LAYERS, "tie_word_embeddings": False, "dtype": "bfloat16"},
    **{"layer_types": ["full_attention"] * 2, "sliding_window": None, "use_sliding_window": False},
    "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 4, 6]},
}
DEEPSPEC = {
    **{"architectures": ["Qwen3DSparkModel"], **LAYER, "block_size": 3, "num_target_layers": LAYERS},
    **{"mask_token_id": 39, "target_layer_ids": [-1, 2, 5], "num_anchors": 512, "tie_word_embeddings": False},
    **{"enable_confidence_head": True, "confidence_head_with_markov": True},
    **{"markov_rank": RANK, "markov_head_type": "vanilla"},
}
SPECFORGE = {
    **{key: value for key, value in ZLAB.items() if key not in ("architectures", "dflash_config")},
    "architectures": ["DSparkDraftModel"],
    "dflash_config": {
        **{"mask_token_id": 39, "target_layer_ids": [0, 3], "projector_type": "dspark", "attention_mode": "gqa"},
        **{"markov_rank": RANK, "markov_head_type": "gated", "confidence_head_alpha": 1.0},
        **{"enable_confidence_head": True, "confidence_head_with_markov": False},
    },
}

DFLASH2 = {
    **ZLAB,
    **{"architectures": ["DFlash2DraftModel"], "block_size": None, "is_causal": False, **SLIDING},
    "dflash_config": {
        **{"mask_token_id": 39, "target_layer_ids": [1, 4, 6], "block_size": 4, "conv_kernel_size": 2},
        **{"conv_group_size": 4, "selector_rank": RANK, "selector_top_k": 6},
    },
}


def in_speculators(kind="dflash", layer=None, **head):
    """Returns a config of speculators' layout."""
    usual = {"draft_vocab_size": VOCAB, "block_size": 4, "mask_token_id": 39, "aux_hidden_state_layer_ids": [2, 4, 5]}
    if kind == "dspark":
        usual |= {"markov_rank": RANK, "markov_head_type": "rnn", "sample_from_anchor": True}
        usual |= {"enable_confidence_head": True, "confidence_head_with_markov": True}
    return {
        "architectures": ["DFlashSpeculator"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "some/target", "architectures": []}},
        "target_hidden_size": None,
        "sliding_window_non_causal": False,
        "transformer_layer_config": LAYER | (layer or {}),
        **usual | head,
    }


@dataclasses.dataclass
class Case:
    """A published head: its config, what the twin is told of it, the states it reads, what it has beside the layers."""

    config: dict
    twin: dict = dataclasses.field(default_factory=dict)
    states: tuple = (2, 4, 5)
    own: tuple = ()  # of embed_tokens, lm_head
    drafted: int = VOCAB
    options: str = ""  # after the folder, as for ``load_drafter``

    def __post_init__(self):
        plain = {"block_size": 4, "mask_token_id": 39, "from_anchor": False, "causal": (False,) * 2}
        self.twin = {**LAYER, **plain, "windows": (None,) * 2, **self.twin}

    @property
    def drafts(self):
        return self.twin["block_size"] - (not self.twin["from_anchor"])


OF_DFLASH2 = {"conv_group_size": 4, "selector_top_k": 6, "windows": (None, 3)}
DSPARK = {"from_anchor": True, "block_size": 3, "markov_head_type": "vanilla", "confidence_head_with_markov": True}
CASES = {
    "DFlash, z-lab": Case(ZLAB, states=(2, 5, 7)),
    "DFlash, z-lab, its defaults": Case(
        ZLAB | {"block_size": None, "dflash_config": {"mask_token_id": 7, "block_size": 3}},
        {"block_size": 3, "mask_token_id": 7},
        states=(2, 6),
    ),
    "DFlash, z-lab, windows": Case(ZLAB | SLIDING, {"windows": (None, 3), "causal": (False, True)}, states=(2, 5, 7)),
    "DFlash, z-lab, windows in both directions": Case(
        ZLAB | SLIDING | {"is_causal": False}, {"windows": (None, 3)}, states=(2, 5, 7)
    ),
    "DFlash, z-lab, causal": Case(ZLAB | {"is_causal": True}, {"causal": (True, True)}, states=(2, 5, 7)),
    "DFlash, speculators": Case(in_speculators()),
    "DFlash, speculators, windows that stay": Case(
        in_speculators(layer=SLIDING),
        {"windows": (None, 3), "causal": (False, True), "window_stays": True},
        options="@window=stays",
    ),
    "DFlash, speculators, windows in both directions": Case(
        in_speculators(layer=SLIDING, sliding_window_non_causal=True),
        {"windows": (None, 3), "window_stays": True},
        options="@window=stays",
    ),
    "DFlash, speculators, a smaller vocabulary": Case(
        in_speculators(draft_vocab_size=DRAFTED), own=("lm_head",), drafted=DRAFTED
    ),
    "DFlash, speculators, from the anchor": Case(in_speculators(sample_from_anchor=True), {"from_anchor": True}),
    "DFlash2, z-lab": Case(DFLASH2, OF_DFLASH2, states=(2, 5, 7)),
    "DFlash2, speculators": Case(
        in_speculators(
            *("dflash2", SLIDING),
            sliding_window_non_causal=True,
            conv_kernel_size=3,
            conv_group_size=8,
            selector_rank=RANK,
            selector_top_k=9,
        ),
        OF_DFLASH2 | {"conv_group_size": 8, "selector_top_k": 9, "taps": 3, "window_stays": True},
        options="@window=stays",
    ),
    "DSpark, DeepSpec": Case(DEEPSPEC, DSPARK, states=(0, 3, 6), own=("embed_tokens", "lm_head")),
    "DSpark, SpecForge": Case(
        SPECFORGE,
        DSPARK | {"block_size": 4, "markov_head_type": "gated", "confidence_head_with_markov": False},
        states=(1, 4),
    ),
    "DSpark, speculators": Case(
        in_speculators("dspark", draft_vocab_size=DRAFTED),
        DSPARK | {"block_size": 4, "markov_head_type": "rnn"},
        own=("lm_head",),
        drafted=DRAFTED,
    ),
}


def published(case, seed=0):
    """Returns random tensors with the names and shapes of the layout, as NumPy arrays."""
    rng, twin = np.random.default_rng(seed), case.twin
    shapes = {"fc.weight": (WIDTH, len(case.states) * WIDTH), "norm.weight": (WIDTH,), "hidden_norm.weight": (WIDTH,)}
    for i in range(twin["num_hidden_layers"]):
        layer = f"layers.{i}."
        for name, size in {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (size * HEAD_DIM, WIDTH)
        shapes[f"{layer}self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD_DIM)
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{layer}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    if "embed_tokens" in case.own:
        shapes["embed_tokens.weight"] = (VOCAB, WIDTH)
    if "lm_head" in case.own:
        shapes["lm_head.weight"] = (case.drafted, WIDTH)
    if group := twin.get("conv_group_size"):
        taps = twin.get("taps", 2)
        for name in [f"layers.{i}.{part}_conv" for i in range(2) for part in ("attention", "mlp")]:
            shapes[f"{name}.base_kernel"] = (2, taps, WIDTH)
            shapes[f"{name}.kernel_projection.weight"] = (2 * taps * WIDTH // group, WIDTH)
        shapes |= {f"candidate_selector.{part}_codebook": (VOCAB, RANK) for part in ("predecessor", "successor")}
        shapes["candidate_selector.hidden_projection.weight"] = (RANK, WIDTH)
    if kind := twin.get("markov_head_type"):
        shapes |= {"markov_head.markov_w1.weight": (VOCAB, RANK), "markov_head.markov_w2.weight": (case.drafted, RANK)}
        name, size = (
            ("gate_proj", (RANK, WIDTH + RANK)) if kind == "gated" else ("joint_proj", (3 * RANK, 2 * RANK + WIDTH))
        )
        if kind != "vanilla":
            shapes |= {f"markov_head.{name}.weight": size, f"markov_head.{name}.bias": size[:1]}
        inputs = WIDTH + RANK * twin["confidence_head_with_markov"]
        shapes |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
    tensors = {}
    for name, shape in shapes.items():
        scale, middle = (0.2, 1.0) if "norm" in name else (0.8 if "markov" in name or "codebook" in name else 0.3, 0.0)
        tensors[name] = (middle + scale * rng.normal(size=shape)).astype(np.float32)
    if case.drafted != VOCAB:
        target_of_u = np.sort(rng.permutation(VOCAB)[: case.drafted])
        tensors["d2t"] = target_of_u - np.arange(case.drafted)
        tensors["t2d"] = np.isin(np.arange(VOCAB), target_of_u)
    return tensors
