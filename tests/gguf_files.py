"""Tiny GGUF files, written as llama.cpp's converter writes them, from the folders that transformers writes.

Names of tensors are those of the package's own map. What the converter changes is restated here, after its sources:
rows of Llama's query and key projections are permuted, Gemma's norms have 1 added, experts are stacked.
"""

import json
import re

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # the package reads them and does not write them
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# Experts' projections in the package's map, which knows the names of all experts together.
_STACKED = {
    "w1": "block_sparse_moe.experts.w1",
    "w2": "block_sparse_moe.experts.w2",
    "w3": "block_sparse_moe.experts.w3",
}
_STACKED |= {f"{name}_proj": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}


def random_blocks(kind, shape, rng):
    """Returns valid blocks of random numbers, whose scales are neither huge nor NaN, as bytes."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    # The places of float16 scales in a block, from ggml's structs.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for at in places:
        scales = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def quantised(kind, array, rng):
    """Returns the stored form of a tensor, and the numbers that it stands for."""
    number = gguf.GGMLQuantizationType[kind]
    rows = array.reshape(-1, array.shape[-1])
    stored = random_blocks(kind, rows.shape, rng) if kind in BLOCKS else gguf.quantize(rows, number)
    return stored.reshape(*array.shape[:-1], -1), gguf.dequantize(stored, number).reshape(array.shape)


def permuted(array, heads):
    """Returns the rows of a projection of heads as llama.cpp's converter orders them."""
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def load_folder(folder):
    """Returns the config of a Hugging Face folder and its tensors as float32."""
    config = json.loads((folder / "config.json").read_text())
    import safetensors.torch  # which needs torch

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return config, {name: tensor.float().numpy() for name, tensor in tensors.items()}


def stored_tensors(config, tensors, stacked):
    """Yields names and arrays of a GGUF file, before they are quantised. ``stacked``: experts, as in newer files."""
    kind, experts = config["model_type"], {}
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind]),
        config["num_hidden_layers"],
    )
    for name, array in tensors.items():
        if found := re.fullmatch(r"(model\.layers\.\d+\.).*experts\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(f"{found[1]}{_STACKED[found[3]]}", {})[int(found[2])] = array
            continue
        base, _, end = name.rpartition(".")
        if kind in ("llama", "mixtral") and base.endswith(("q_proj", "k_proj")):
            array = permuted(array, config["num_attention_heads" if "q_proj" in base else "num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        yield f"{names.get_name(base)}.{end}", array
    for name, stack in experts.items():
        place = names.get_name(name)
        if stacked:
            yield f"{place}.weight", np.stack([stack[e] for e in sorted(stack)])
        else:
            yield from ((f"{place.removesuffix('_exps')}.{e}.weight", array) for e, array in stack.items())


def add_config(writer, config):
    """Writes the keys that the converter writes for a family."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_file_type(0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_pad_token_id(0)  # transformers' Phi-3 has one past this vocabulary
    if "sliding_attention" in ropes:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", ropes["sliding_attention"]["rope_theta"])
    if config["model_type"] not in ("llama", "mixtral", "qwen2", "phi3") or width * heads != config["hidden_size"]:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if config.get("sliding_window") or config["model_type"] == "phi3":  # whose 0 is none
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        )


def rope_tables(config):
    """Yields the tables of rotary positions that the converter stores as tensors."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.asarray(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.asarray(rope["short_factor"], np.float32)
    if rope.get("rope_type") == "llama3":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        original, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        factors = []
        for i in range(0, width, 2):
            wavelength = 2 * np.pi * rope["rope_theta"] ** (i / width)
            smooth = (original / wavelength - low) / (high - low)
            between = 1 / ((1 - smooth) / rope["factor"] + smooth)
            factors.append(
                1.0 if wavelength < original / high else rope["factor"] if wavelength > original / low else between
            )
        yield "rope_freqs.weight", np.asarray(factors, np.float32)


def write(path, config, tensors, kinds=lambda name: "F32", more=lambda writer: None, stacked=True):
    """Writes a GGUF file; the arguments are those of ``fill``, whose result is returned."""
    return fill(gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]]), config, tensors, kinds, more, stacked)


def fill(writer, config, tensors, kinds=lambda name: "F32", more=lambda writer: None, stacked=True):
    """Writes the file or files of a writer.

    Args:
      writer: a ``gguf.GGUFWriter``.
      config, tensors: from ``load_folder``.
      kinds: returns the type of a matrix or stack by its name in the file. Vectors are F32.
      more: writes more metadata.
      stacked: whether the experts of a layer are one tensor.

    Returns:
      What the file's tensors stand for, by their names there.
    """
    rng = np.random.default_rng(0)
    writer.add_name("tiny")
    add_config(writer, config)
    more(writer)
    values = {}
    for name, array in [*stored_tensors(config, tensors, stacked), *rope_tables(config)]:
        kind = kinds(name) if array.ndim > 1 else "F32"
        stored, values[name] = (array, array) if kind == "F32" else quantised(kind, array, rng)
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def add_tokens(writer):
    """Writes a small byte-level vocabulary."""
    tokens = ["<|a|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "<b>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 27 + [4])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")


def their_reading(file):
    """The model as transformers reads it: the steps of ``from_pretrained(gguf_file=)``, which would need accelerate."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
