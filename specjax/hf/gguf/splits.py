# ruff: noqa: RUF001 (letters of other scripts are meant)
"""How byte-level tokenizers cut a text into words before they merge: the names that GGUF files have for it.

A GGUF file names a way to cut (``tokenizer.ggml.pre``) and does not describe the way. llama.cpp has these names and
groups (``src/llama-vocab.cpp``). The models' own ``tokenizer.json`` have these expressions. llama.cpp restates the
expressions for an engine without case-insensitive groups.
"""

import dataclasses

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_REST_OF_CASED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters that have cases. DeepSeek's list of letters lacks some blocks, so these are left out.
_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}\x{ab30}-\x{ab68}\x{10570}-\x{105bc}"
    r"\x{16e40}-\x{16e7f}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df1e}]]"
)


@dataclasses.dataclass(frozen=True)
class Split:
    """How a text is cut.

    Attributes:
      expressions: regular expressions, applied one after the other. Matches and what lies between them are words.
      whole_first: whether a word that is a token is that token, whatever the merges say (``ignore_merges``).
      begins: whether a text begins with the token for it, if the metadata do not say.
      composed: whether characters are composed first (NFC).
    """

    expressions: tuple[str, ...]
    whole_first: bool = False
    begins: bool = False
    composed: bool = False


_GPT2 = Split((_WORDS,))
_DIGITS = Split((r"\p{N}", _WORDS))
_LLAMA3 = Split((rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",), whole_first=True, begins=True)
_DBRX = Split(_LLAMA3.expressions)
_QWEN2 = Split((rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",))
_TEKKEN = Split((rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_OF_CASED}",), whole_first=True, begins=True)
_GPT4O = Split((rf"{_LOWER}{_SUFFIX}?|{_UPPER}{_SUFFIX}?|\p{{N}}{{1,3}}|{_REST_OF_CASED}",))
_DEEPSEEK_LLM = Split(
    (r"[\r\n]", rf"\s?{_CASED}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}+")
)
_DEEPSEEK_CODER = Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))
_DEEPSEEK3 = Split((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATED))
_SEED_CODER = Split(
    (rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
)

SPLITS: dict[str, Split] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _DBRX),
    # Qwen's own tokenizer composes characters. llama.cpp does not, nor does transformers when it reads GGUF.
    "qwen2": dataclasses.replace(_QWEN2, composed=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "kormo", "megrez", "hunyuan"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK3,
    "seed-coder": _SEED_CODER,
}
"""Ways to cut by their names in GGUF files."""
