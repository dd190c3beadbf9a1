"""Writes the table "What is tested for each family" of docs/huggingface.md from the tests' own tables.

Run it after a family or a parity case is added: ``python tests/families_table.py``.
"""

import re
from pathlib import Path

from parity_cases import CASES, SMALL

from specjax.hf import decoder_config
from specjax.hf.families import FAMILIES, RENAMED
from specjax.hf.multimodal import MULTIMODAL

PAGE = Path(__file__).parent.parent / "docs" / "huggingface.md"
HEADER = "| `model_type` | parity cases | layers with | opened from, too | MTP modules | what is refused |\n"
# What transformers computes for a family and specjax does not. The tests of configs hold each refusal.
REFUSED = {
    "deepseek_v2": "other routers (`topk_method`)",
    "deepseek_v3": "other routers (`scoring_func`, `topk_method`)",
    "gemma2": "`use_bidirectional_attention`",
    "gemma3_text": "`use_bidirectional_attention`",
    "gpt2": "`scale_attn_by_inverse_layer_idx`",
    "granitemoehybrid": "`time_step_limit`: several tokens and one would be clamped differently",
    "llama": "`sliding_window`",
    "olmo3": "`rope_theta` other than 500000 at the top level: transformers 4 and 5 read it differently",
    "phi3": "texts past the original length with `longrope`: all keys would change",
    "phimoe": "texts past the original length with `longrope`: all keys would change",
    "qwen2": "`use_mrope`",
}
START, END = "<!-- families: tests/families_table.py -->\n", "<!-- end of families -->\n"


def configs():
    """Returns the decoders of the parity cases of each ``model_type``."""
    import transformers

    found = {kind: [] for kind in FAMILIES}
    for kind, settings in CASES.values():
        config = getattr(transformers, f"{kind}Config")(**{**({} if kind == "GPT2" else SMALL), **settings})
        found[config.model_type].append(decoder_config(config.to_dict()))
    return found


def reach(decoders):
    """Returns how far the layers of some parity case see, other than to the first token."""
    layers = [layer for decoder in decoders for layer in decoder.each_layer]
    kinds = {
        "windows": any(layer.window is not None for layer in layers),
        "chunks": any(layer.chunk is not None for layer in layers),
        "states": any(layer.recurrent for layer in layers),
    }
    return ", ".join(kind for kind, there in kinds.items() if there)


def rows():
    """Yields the rows of the table."""
    from test_mtp import CONFIGS, OF_QWEN_3_5

    modules = {RENAMED[kind].family if kind in RENAMED else kind for kind in CONFIGS} | {*OF_QWEN_3_5.values()}
    for kind, decoders in sorted(configs().items()):
        names = [name for name in RENAMED if RENAMED[name].family == kind]
        names += [name for name, many in MULTIMODAL.items() if any(t.family == kind for t in many.texts.values())]
        also = ", ".join(f"`{name}`" for name in names)
        mtp = "yes" if kind in modules else ""
        yield f"| `{kind}` | {len(decoders)} | {reach(decoders)} | {also} | {mtp} | {REFUSED.get(kind, '')} |\n"


def table():
    """Returns the table with the marks around it."""
    return START + "\n" + HEADER + "|---|---|---|---|---|---|\n" + "".join(rows()) + "\n" + END


def replaced(page):
    """Returns the page with the table in its place."""
    return re.sub(re.escape(START) + ".*" + re.escape(END), lambda _: table(), page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
