# ruff: noqa: RUF001 (letters of other scripts are meant)
"""Tokenizers of GGUF files against those they were made of, transformers' own reading, and a slow SentencePiece."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
from gguf_files import gguf
from many_texts import TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import specjax
from specjax.checkpoint.text_parts import open_text_parts
from specjax.hf.gguf.splits import SPLITS

transformers = pytest.importorskip("transformers")
THEIRS = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS

CORPUS = [text for text in TEXTS for _ in range(3)]


def write(path, model, tokens, types, architecture="llama", **keys):
    """Writes a GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    # transformers' reader needs these, and so does a file that is to open.
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"{architecture}.{key}", 8)
    writer.add_uint32(f"{architecture}.attention.head_count", 2)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    for i in range(8):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(8, np.float32))
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 8), np.float32))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Byte-level BPE.


def byte_level_splits(name):
    """The steps that cut a text in the models' own tokenizers, as transformers has them; None for other names."""
    if name in THEIRS:
        return [pre_tokenizers.Split(Regex(THEIRS[name]), "isolated"), False]
    if name == "gpt-2":
        return [True]
    return [pre_tokenizers.Digits(individual_digits=True), True] if name in ("smollm", "starcoder") else None


NAMES = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜User｜>"]


@pytest.fixture(scope="module", params=NAMES)
def byte_level(request, tmp_path_factory):
    """A trained tokenizer, and the GGUF file of its vocabulary."""
    folder, name = tmp_path_factory.mktemp("bpe"), request.param
    *cuts, regex = byte_level_splits(name)
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    types = [3] * len(SPECIAL) + [1] * (size - len(SPECIAL))
    keys = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    write(folder / "x.gguf", "gpt2", tokens, types, pre=name, merges=merges, **keys)
    return folder / "x.gguf", name, tokenizer


def test_a_byte_level_tokenizer_is_the_one_it_was_made_of(byte_level):
    file, _, tokenizer = byte_level
    ours = open_text_parts(file).tokenizer
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n<｜User｜>x"]:
        encoded = ours.encode(text)
        assert encoded.ids == tokenizer.encode(text).ids, text
        assert ours.decode(encoded.ids, skip_special_tokens=False) == tokenizer.decode(encoded.ids, False)


def test_byte_level_tokens_are_those_of_transformers_reading(byte_level):
    """But for what transformers leaves out: Qwen's composition of characters, SmolLM's way to cut (it takes GPT-2's,
    which keeps digits together), and special tokens with letters past GPT-2's alphabet.
    """
    file, name, _ = byte_level
    ours = open_text_parts(file).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    composed = [text for text in TEXTS if name != "qwen2" or unicodedata.is_normalized("NFC", text)]
    checked = [text for text in composed if name != "smollm" or not any(map(str.isnumeric, text))]
    assert len(checked) > 90
    for text in [*checked, "<|im_start|>user\nhi<|im_end|>\n"]:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_every_way_to_cut_is_one_that_the_tokenizer_reads():
    """Each name's expressions compile, and cut a text into words that are the text."""
    for split in {id(split): split for split in SPLITS.values()}.values():
        cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in split.expressions]
        for text in TEXTS:
            assert "".join(word for word, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)) == text


def test_stop_tokens_and_names(byte_level):
    parts = open_text_parts(byte_level[0])
    assert parts.stop_tokens == (2, 0)  # the one that the metadata name, and "<|endoftext|>"
    assert parts.chat_template is None
    assert {token.content for token in parts.tokenizer.get_added_tokens_decoder().values()} == set(SPECIAL)


def test_a_tokenizer_beside_the_file(byte_level, tmp_path):
    """It is used instead, if it is the model's: whatever the file names, then."""
    file, _, tokenizer = byte_level
    path = tmp_path / "x.gguf"
    path.write_bytes(file.read_bytes())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_text_parts(path).tokenizer.to_str() == tokenizer.to_str()
    described = json.loads(tokenizer.to_str())
    described["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert open_text_parts(path).tokenizer.to_str() == tokenizer.to_str()
    vocabulary = described["model"]["vocab"]
    (one, i), (other, j) = list(vocabulary.items())[-2:]
    vocabulary |= {one: j, other: i}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"tokenizer.json has .* as token .*; it is another model's: move one"):
        open_text_parts(path)


# SentencePiece.


@pytest.fixture(scope="module", params=["llama", "phi3", "gemma2"])
def sentencepiece(request, tmp_path_factory):
    """A GGUF file with the scores of a trained vocabulary, and the vocabulary."""
    folder, name = tmp_path_factory.mktemp("spm"), request.param
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    # As in Llama's vocabulary, merges come first, in their order, then letters.
    merged, letters = [t for t in learned if len(t) > 1], [t for t in learned if len(t) == 1]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    added = {"llama": [], "phi3": ["<|end|>", "<|user|>"], "gemma2": ["<start_of_turn>", "\n\n", "   "]}[name]
    spelled = {token.replace(" ", "▁") for token in added}
    merged = [token for token in merged if token not in spelled]
    tokens = [*first, *merged, *letters, *added]
    # Files of Phi-3 have such types: no token of a chat is a control token.
    types += [1] * (len(merged) + len(letters)) + [3 if token == "<start_of_turn>" else 4 for token in added]
    scores = [0.0] * len(first) + [-float(i) for i in range(len(merged) + len(letters))] + [-1000.0] * len(added)
    keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    keys |= {"add_space_prefix": False} if name == "gemma2" else {}
    write(folder / "x.gguf", "llama", tokens, types, name, scores=scores, **keys)
    return folder / "x.gguf", name, dict(zip(tokens, scores, strict=True)), tokens


def slow_sentencepiece(text, scores, ids, prefix):
    """SentencePiece's BPE: of all neighbours that are a token together, those with the highest score are joined."""
    if not text:
        return []
    pieces = list((" " * prefix + text).replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_sentencepiece_tokens_are_those_of_a_slow_twin(sentencepiece):
    file, name, scores, tokens = sentencepiece
    ours, ids = open_text_parts(file).tokenizer, {token: i for i, token in enumerate(tokens)}
    normal = {token: score for token, score in scores.items() if 259 <= ids[token] and score > -1000}
    for text in TEXTS:
        if name == "gemma2" and ("\n\n" in text or "   " in text):
            continue  # these are tokens that are found before anything is merged
        encoded = ours.encode(text)
        assert encoded.ids == [1, *slow_sentencepiece(text, normal, ids, name != "gemma2")], text
        assert ours.decode(encoded.ids) == text


def test_sentencepiece_tokens_are_those_of_transformers_reading(sentencepiece):
    """But for texts that begin with a space: transformers' LlamaTokenizer puts no other before it."""
    file, name, _, _ = sentencepiece
    ours = open_text_parts(file).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    checked = [text for text in TEXTS if name != "llama" or not text.startswith((" ", "▁"))]
    assert len(checked) > 150
    for text in checked:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_tokens_of_phi3_drop_white_space_after_them(sentencepiece):
    file, name, _, tokens = sentencepiece
    ours = open_text_parts(file).tokenizer
    if name == "phi3":
        end, user = tokens.index("<|end|>"), tokens.index("<|user|>")
        assert ours.encode("<|end|>\n \n<|end|>").ids == [1, end, end]
        assert ours.encode("<|user|>\n<|user|>").ids == [1, user, user]
        assert ours.decode([user, end]) == "<|user|>"  # only the first is no special token
        assert open_text_parts(file).stop_tokens == (2, end)
    if name == "llama":
        assert ours.encode("</s>\n</s>").ids != [1, 2, 2]


@pytest.mark.parametrize("keys", [{}, {"bos_token_id": 99, "eos_token_id": 98, "unknown_token_id": 97}])
def test_sentencepiece_without_ids_of_special_tokens(tmp_path, keys):
    """They are 0, 1 and 2, as in llama.cpp, also if the file has ids past the vocabulary. No merge makes them."""
    tokens = ["<u>", "<b>", "<e>", "<", "b", ">", "b>", "▁", "▁b", "", ""]
    write(tmp_path / "x.gguf", "llama", tokens, [2, 3, 3] + [1] * 8, scores=[0.0] * 3 + [-1.0] * 8, **keys)
    parts = open_text_parts(tmp_path / "x.gguf")
    assert parts.stop_tokens == (2,)
    assert parts.tokenizer.encode("b").ids == [1, 8]
    assert [token.value for token in parts.tokenizer.model.tokenize("<b>")] == ["<", "b>"]
    assert parts.tokenizer.model.tokenize("x")[0].value == "<u>"
    assert parts.tokenizer.id_to_token(10) == "[EMPTY_10]"


def test_tokens_that_end_a_text_by_their_text(tmp_path):
    """Whatever their types are, but for bytes and unknown tokens. Then they are special, too."""
    tokens = ["a", "</s>", "<eos>", "_<EOT>", "<end_of_utterance>", "<|im_end|>", "<|end|>"]
    write(tmp_path / "x.gguf", "gpt2", tokens, [1, 1, 4, 1, 4, 4, 2], pre="gpt-2", merges=[])
    parts = open_text_parts(tmp_path / "x.gguf")
    assert set(parts.stop_tokens) == {1, 2, 3, 4, 5}
    assert parts.tokenizer.decode([0, 5, 0]) == "aa"


# Mistakes.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pre": "martian"}, "tokenizer.ggml.pre, which names how words are cut, is 'martian'; known: a.x-4.0, .*"),
        ({"pre": None}, "is missing: the file was made before 2024-05; .*put the model's tokenizer.json into"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; supported: 'gpt2', 'llama'"),
        ({"merges": ["a c"]}, "the merge .* is not of two tokens into a third"),
        ({"merges": 3}, "tokenizer.ggml.merges is 3; it must be a list of str"),
        ({"token_type": [1]}, "there are 3 tokens and 1 types of tokens"),
        ({"tokens": ["a", "a", "b"]}, "token 'a' has 2 ids"),
        ({"eos_token_id": "b"}, "tokenizer.ggml.eos_token_id is 'b'; it must be an id"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1; it must be true or false"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, change, match):
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
    keys = {key: value for key, value in (keys | change).items() if value is not None}
    model, tokens, types = keys.pop("model"), keys.pop("tokens"), keys.pop("token_type")
    write(tmp_path / "x.gguf", model, tokens, types, **keys)
    with pytest.raises(ValueError, match=match) as caught:
        open_text_parts(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)


def test_chat_templates(tmp_path):
    """A template alone, and several: as they are, and as a conversion writes them."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_chat_template(
        [{"name": "default", "template": "{{ bos_token }}D"}, {"name": "tool_use", "template": "T"}]
    )
    from specjax.hf.gguf.file import Header
    from specjax.hf.gguf.vocabulary import Vocabulary

    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    metadata |= {"tokenizer.ggml.tokens": ["<s>"], "tokenizer.ggml.bos_token_id": 0}
    vocabulary = Vocabulary(Header(tmp_path / "x.gguf", metadata, {}))
    assert vocabulary.chat_templates() == {"default": "{{ bos_token }}D", "tool_use": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(vocabulary.config()))
    template = specjax.text.load_chat_template(tmp_path)
    assert template.render([{"role": "user", "content": ""}]) == "<s>D"
    assert template.render([{"role": "user", "content": ""}], tools=[]) == "T"
