"""A folder's tokenizer: the ids of AutoTokenizer, with the tokens of all files and without settings of training."""

import json
import random
from pathlib import Path

import pytest
from tiny import save_tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import specjax
from specjax.hf.families import FAMILIES
from specjax.hf.multimodal import MULTIMODAL
from specjax.text import tokenizer as tokenizer_module
from specjax.text.tokenizer import load_tokenizer, read_special_tokens

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "py-14m" / "tokenizer.json"
HELLO = [{"role": "user", "content": "Hello"}]
TEXTS = (
    "x<|im_end|> y",
    "a <e> b <img>foo xfoo foo! bar return</s><s> </think>\n \u00e9! return foo",
    "<img><img> <e>foo  bar <|im_end|>",
)


def byte_level():
    return Tokenizer.from_file(str(SHIPPED))


def marked():
    """Letters with a mark for a space, and bytes for all else, in the style of SentencePiece."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate([*names, *"abcdefghijklmnopqrstuvwxyz<>/|_\u2581"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


BASES = {"byte-level": byte_level(), "marked": marked()}


def write(folder, tokenizer, **files):
    """Writes a folder whose tokenizer is of the class that takes ``tokenizer.json`` as it is."""
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.get("tokenizer_config", {})
    files.setdefault("config", {"model_type": "llama"})
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def same_as_auto(folder):
    """Asserts that ids, added tokens and their flags are those of AutoTokenizer."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    assert repr(ours.get_added_tokens_decoder()) == repr(theirs.added_tokens_decoder)
    named = read_special_tokens(folder).named
    assert {name: token.content for name, token in named.items()} == theirs.special_tokens_map
    return ours


def test_a_marker_that_only_the_config_lists_is_one_token(tmp_path):
    token = {"content": "<|im_end|>", "special": True, "normalized": False}
    write(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": {"4096": token}})
    assert load_tokenizer(tmp_path).encode("x<|im_end|>").ids == [88, 4096]
    same_as_auto(tmp_path)


FLAGS = {"lstrip": True, "rstrip": False, "single_word": True, "normalized": False}
FILES = {
    "listed, with flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                "300": {"content": "<e>", "special": True, **FLAGS},
                "301": {"content": "foo", "special": False, **FLAGS | {"rstrip": True}},
                "299": {"content": "\u00e9!", "special": False, **FLAGS | {"single_word": False, "normalized": True}},
                "2": {"content": "</s>", "special": True, **FLAGS | {"single_word": False}},
            },
            "eos_token": "foo",
        }
    },
    "named": {
        "tokenizer_config": {
            "eos_token": "<|im_end|>",
            "pad_token": {"__type": "AddedToken", "content": "<e>", "special": False, **FLAGS},
            "bos_token": None,
            "image_token": "<img>",
            "audio_token": {"__type": "AddedToken", "content": "return", "special": True, **FLAGS},
            "add_bos_token": True,
            "add_eos_token": True,
            "add_prefix_space": True,
        }
    },
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<e>", "<|im_end|>"], "unk_token": "<e>"}},
    "extra, as a list": {
        "tokenizer_config": {
            "extra_special_tokens": ["foo", {"__type": "AddedToken", "content": "<e>", "special": True, **FLAGS}],
            "additional_special_tokens": ["<img>"],
        }
    },
    "extra, with names": {
        "tokenizer_config": {"extra_special_tokens": {"image_token": "<img>", "z_token": "foo"}, "b_token": "<e>"}
    },
    "of this model": {"tokenizer_config": {"model_specific_special_tokens": {"image_token": "<img>"}}},
    "the older map": {
        "tokenizer_config": {"eos_token": "</s>", "pad_token": "<e>", "image_token": "<img>"},
        "special_tokens_map": {
            "eos_token": {"content": "<|im_end|>", **FLAGS},
            "pad_token": None,
            "video_token": "foo",
            "additional_special_tokens": ["</think>"],
        },
    },
    "the older map, with the newer key": {
        "tokenizer_config": {"extra_special_tokens": ["<e>"]},
        "special_tokens_map": {"extra_special_tokens": ["<e>", {"content": "foo", **FLAGS}]},
    },
    "the older list": {
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<img>"]},
        "added_tokens": {"<img>": 303, "<|im_end|>": 302, "foo": 301, "<e>": 300, "wrong": 2},
    },
    "the older files do not count": {
        "tokenizer_config": {"added_tokens_decoder": {}, "eos_token": "<e>"},
        "special_tokens_map": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<img>"]},
        "added_tokens": {"foo": 300},
    },
    "special tokens are split": {"tokenizer_config": {"split_special_tokens": True, "eos_token": "<e>"}},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", FILES)
def test_tokens_that_other_files_name(tmp_path, case, base):
    same_as_auto(write(tmp_path, BASES[base], **FILES[case]))


@pytest.mark.parametrize("seed", range(40))
def test_tokens_named_at_random(tmp_path, seed):
    """Several files at once, with names that contradict each other."""
    rng = random.Random(seed)
    names = ["<|im_end|>", "<e>", "<img>", "foo", " bar", "return", "<s>", "</s>", "</think>", "\u00e9!"]

    def maybe(value, chance=0.4):
        return {} if rng.random() > chance else value

    def token(**more):
        flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized")}
        return {"content": rng.choice(names), **flags, **more}

    listed = {str(300 + i): token(special=rng.random() < 0.7) for i in range(rng.randrange(4))}
    config = maybe({"added_tokens_decoder": listed})
    for name in ("bos_token", "eos_token", "pad_token", "image_token"):
        config |= maybe({name: rng.choice([rng.choice(names), token(__type="AddedToken", special=True)])})
    config |= maybe({"additional_special_tokens": rng.sample(names, 2)})
    older = maybe({"eos_token": token()}) | maybe({"pad_token": rng.choice(names)})
    older |= maybe({"additional_special_tokens": rng.sample(names, 1)})
    same_as_auto(write(tmp_path, rng.choice(list(BASES.values())), tokenizer_config=config, special_tokens_map=older))


def test_the_classes_of_types_of_models_are_those_of_transformers():
    names = pytest.importorskip("transformers.models.auto.tokenization_auto").TOKENIZER_MAPPING_NAMES
    known = {*FAMILIES, *MULTIMODAL}
    prefixed = {kind: name for kind, name in names.items() if kind in known and name in tokenizer_module._PREFIXED}
    assert tokenizer_module._CLASSES == prefixed


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2TokenizerFast", "GPT2Tokenizer", None])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_a_space_before_a_text(tmp_path, name, stored, flag):
    """It is up to the class of the tokenizer, which the type of the model names if nothing else does."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stored)
    config = {"tokenizer_class": name} | ({} if flag is None else {"add_prefix_space": flag})
    write(tmp_path, tokenizer, tokenizer_config=config, config={"model_type": "gpt2"})
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f", " def", "a<|endoftext|>b"):
        assert load_tokenizer(tmp_path).encode(text).ids == theirs(text)["input_ids"]


def test_a_space_before_a_text_within_several_steps(tmp_path):
    tokenizer = byte_level()
    steps = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True}
    write(tmp_path, tokenizer, tokenizer_config=config)
    assert load_tokenizer(tmp_path).encode("def").ids == tokenizer.encode(" def").ids != tokenizer.encode("def").ids


# Settings of training.


def trained():
    """Returns a tokenizer with all settings of training, and the ids of a text without them."""
    tokenizer = byte_level()
    text = "def name_of(self, value):\n    return self.name" * 4
    ids = tokenizer.encode(text).ids
    tokenizer.enable_truncation(8, stride=2)
    tokenizer.enable_padding(length=400, direction="left", pad_token="<|endoftext|>", pad_to_multiple_of=16)
    tokenizer.model.dropout = 0.3
    return tokenizer, text, ids


def test_truncation_padding_and_dropout_do_not_act(tmp_path):
    tokenizer, text, ids = trained()
    write(tmp_path, tokenizer)
    ours = load_tokenizer(tmp_path)
    assert len(ids) > 16 and all(ours.encode(text).ids == ids for _ in range(3))
    assert ours.encode_batch(["a", text])[0].ids == ours.encode("a").ids
    assert (ours.truncation, ours.padding, ours.model.dropout) == (None, None, None)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for truncation in ({"max_length": 0}, {"max_length": 1, "direction": "Left", "strategy": "OnlyFirst", "stride": 0}):
        spec["truncation"] = {"strategy": "LongestFirst", "stride": 0} | truncation
        spec["padding"] = spec["padding"] | {"strategy": "BatchLongest"}
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert load_tokenizer(tmp_path).encode(text).ids == ids


def test_a_conversion_keeps_tokens_and_templates_and_drops_the_settings(tmp_path):
    tokenizer, text, ids = trained()
    specjax.export_hf(save_tiny(tmp_path / "tiny"), tmp_path / "hf")
    config = {
        "added_tokens_decoder": {"4096": {"content": "<|im_end|>", "special": True}},
        "extra_special_tokens": {"image_token": "<img>"},
        "eos_token": "<|im_end|>",
        "split_special_tokens": False,
    }
    config_of_model = json.loads((tmp_path / "hf" / "config.json").read_text())
    write(tmp_path / "hf", tokenizer, tokenizer_config=config, config=config_of_model)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ image_token }}")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ eos_token }}")
    specjax.convert_hf(tmp_path / "hf", tmp_path / "ours")
    specjax.export_hf(tmp_path / "ours", tmp_path / "back")
    for name in ("hf", "ours", "back"):
        opened = specjax.open(tmp_path / name)
        assert opened.need_tokenizer().encode(text + "<|im_end|>a<img>").ids == [*ids, 4096, 65, 4097], name
        assert opened.need_chat_template().render(HELLO) == "<img>"
        assert opened.need_chat_template().render(HELLO, tools=[]) == "<|im_end|>"
    for name in ("ours", "back"):
        spec = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert (spec["truncation"], spec["padding"], spec["model"]["dropout"]) == (None, None, None)
        assert [token["id"] for token in spec["added_tokens"]] == [0, 4096, 4097]


# Damage.


def test_a_byte_order_mark_is_left_out(tmp_path):
    write(tmp_path, byte_level(), tokenizer_config={"eos_token": "<e>"}, special_tokens_map={"pad_token": "<img>"})
    wanted = load_tokenizer(tmp_path).encode(TEXTS[1]).ids
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(tmp_path).encode(TEXTS[1]).ids == wanted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token is 3; a token is a text"),
        ({"tokenizer_config": {"eos_token": {"lstrip": True}}}, "eos_token is .*; a token is a text"),
        ({"tokenizer_config": {"eos_token": {"content": "a", "lstrip": 1}}}, "eos_token has lstrip 1; it must be true"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]; it must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder is .*; it must be an object"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"1": "a"}}},
            "added_tokens_decoder holds 'a' under 1; it must",
        ),
        ({"tokenizer_config": {"extra_special_tokens": "a"}}, "'a' is no list of tokens"),
        ({"tokenizer_config": {"extra_special_tokens": [1]}}, "extra_special_tokens is 1; a token is"),
        ({"tokenizer_config": {"model_specific_special_tokens": ["a"]}}, "is no list of tokens and no object"),
        ({"special_tokens_map": {"eos_token": []}}, r"special_tokens_map.json: eos_token is \[\]; a token is"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, r"eos_token holds '\\ud800' at place 0, which is half of"),
        ({"added_tokens": {"a": "1"}}, "added_tokens.json: the id of 'a' is '1'; it must be an integer"),
        ({"added_tokens": [1]}, "added_tokens.json holds a list"),
    ],
)
def test_files_that_name_no_tokens(tmp_path, files, message):
    write(tmp_path, byte_level(), **files)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_token_that_is_there_may_get_other_flags(tmp_path):
    token = {"content": "<|endoftext|>", "special": False, "lstrip": True, "normalized": False}
    write(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": {"0": token}})
    ours = same_as_auto(tmp_path)
    assert ours.get_added_tokens_decoder()[0] == AddedToken("<|endoftext|>", lstrip=True, normalized=False)
