"""``specjax.open`` and ``load_drafter``: what they return, and what they say of a wrong text or folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from draft_heads import write_medusa, write_mtp
from tiny import CONFIG, save_tiny, spelling_tokenizer

import specjax
from specjax.checkpoint.spec import OPTIONS, folders_of, parse, short_name
from specjax.drafters.medusa import init_medusa_params
from specjax.drafters.mtp import MTPConfig, init_mtp_params
from specjax.hf.config import decoder_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def opened(folder):
    return specjax.open(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A folder.


def test_a_folder_opens_with_all_that_belongs_to_it(folder, opened):
    assert opened.path == folder and opened.stop_tokens == (0,)
    equal(opened.model.params, specjax.load(folder).params)
    assert opened.tokenizer.encode("a b").ids == spelling_tokenizer().encode("a b").ids
    assert opened.chat_template.render([{"role": "user", "content": "a"}]) == "<|user|>a<|end|><|assistant|>"
    assert len(repr(opened)) < 300, "parameters are not printed"


def test_what_is_missing_is_none_and_what_is_damaged_is_refused(copy):
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    opened = specjax.open(copy)
    assert opened.tokenizer is None and opened.chat_template is None
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        specjax.open(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="does not compile"):
        specjax.open(copy)
    with pytest.raises(ValueError, match="is not a folder"):
        specjax.open(copy / "nowhere")


def test_arguments_are_those_of_load(folder):
    assert jax.tree.leaves(specjax.open(folder, "bfloat16").model.params)[0].dtype == "bfloat16"
    mesh = specjax.make_mesh()
    assert jax.tree.leaves(specjax.open(folder, mesh=mesh).model.params)[0].sharding.mesh == mesh


def test_what_was_opened_can_be_saved(copy, tmp_path):
    """With the stop tokens of ``generation_config.json``, which ``save`` does not write."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    opened = specjax.open(copy)
    specjax.save(tmp_path / "again", opened.config, opened.model.params, opened.tokenizer)
    again = specjax.open(tmp_path / "again")
    equal(again.model.params, opened.model.params)
    assert again.stop_tokens == opened.stop_tokens == (0, 5)
    assert again.tokenizer.get_vocab() == opened.tokenizer.get_vocab()
    specjax.save(tmp_path / "bare", opened.config, opened.model.params)
    names = sorted(path.name for path in (tmp_path / "bare").iterdir())
    assert names == ["config.json", "params"] and specjax.open(tmp_path / "bare").tokenizer is None


# Drafters.


@pytest.fixture(scope="module")
def heads(opened, tmp_path_factory):
    """Freshly drawn heads."""
    path = tmp_path_factory.mktemp("heads")
    module = init_mtp_params(MTPConfig(decoder_config(CONFIG)), jax.random.key(2))
    write_mtp(path / "mtp", CONFIG, module)
    write_medusa(path / "medusa", init_medusa_params(opened.model.params["lm_head"]["kernel"], 2))
    return path


def test_each_kind_is_opened_by_its_name(opened, folder, heads):
    kinds = {
        f"model:{folder}": specjax.ModelDrafter,
        f"mtp:{heads}/mtp": specjax.MTPDrafter,
        f"medusa:{heads}/medusa": specjax.MedusaDrafter,
        "ngram": specjax.NGramDrafter,
        "early-exit:1": specjax.EarlyExitDrafter,
    }
    for spec, kind in kinds.items():
        for target in (opened, opened.model):
            drafter = specjax.load_drafter(spec, target, 2)
            assert isinstance(drafter, kind) and drafter.num_draft == 2
    assert specjax.load_drafter("early-exit:1", opened).depth == 1
    chained = specjax.load_drafter(f"cascade:ngram,mtp:{heads}/mtp", opened, 3, chained=True).second
    assert isinstance(chained, specjax.FeatureDrafter) and chained.num_draft == 3


def test_a_cascade_is_nested_to_the_left(opened, folder):
    drafter = specjax.load_drafter(f"cascade:ngram,model:{folder},early-exit:2", opened, 3)
    assert isinstance(drafter.second, specjax.EarlyExitDrafter) and drafter.num_draft == 3
    assert isinstance(drafter.first.first, specjax.NGramDrafter)
    assert isinstance(drafter.first.second, specjax.ModelDrafter)


def test_an_opened_target_gives_its_tokenizer(opened, copy):
    """A draft whose tokenizer names its tokens otherwise drafts the tokens that both have."""
    spelling_tokenizer("zyxwvutsrqponmlkjihgfedcba ").save(str(copy / "tokenizer.json"))
    assert isinstance(specjax.load_drafter(f"model:{copy}", opened), specjax.SharedVocabularyDrafter)
    assert isinstance(specjax.load_drafter(f"model:{copy}", opened.model), specjax.ModelDrafter)
    with_tokenizer = specjax.load_drafter(f"model:{copy}", opened.model, tokenizer=opened.tokenizer)
    assert isinstance(with_tokenizer, specjax.SharedVocabularyDrafter)


def test_a_draft_of_the_same_tokens_may_name_more_or_fewer_added_ones(opened, copy):
    config = {"pad_token": "<|pad|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert specjax.open(copy).need_tokenizer().get_vocab_size() == opened.tokenizer.get_vocab_size() + 1
    assert isinstance(specjax.load_drafter(f"model:{copy}", opened), specjax.ModelDrafter)
    # The same token under another id, or another token under the same id, is another vocabulary.
    for letters in ("abcdefghijklmnopqrstuvwxzy ", "ABcdefghijklmnopqrstuvwxyz "):
        spelling_tokenizer(letters).save(str(copy / "tokenizer.json"))
        assert isinstance(specjax.load_drafter(f"model:{copy}", opened), specjax.SharedVocabularyDrafter)


def test_a_draft_over_a_mesh_is_whole_unless_rules_split_it(opened, folder):
    mesh = specjax.make_mesh()
    drafter = specjax.load_drafter(f"model:{folder}", opened, mesh=mesh)
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(drafter)}
    assert specs <= {jax.sharding.PartitionSpec(*[None] * n) for n in range(4)}


@pytest.mark.parametrize(
    "spec",
    [
        *("none", "", "eagle", "model:", "ngram:", "ngram:3", "medusa", "early-exit", "early-exit:", "early-exit:x"),
        *("early-exit:-1", "cascade:ngram", "cascade:", "cascade:ngram,", "cascade:ngram,none", "Eagle:x", "x:y"),
        "cascade:ngram,cascade:ngram",
    ],
)
def test_a_text_that_names_no_drafter(spec, opened):
    allowed = (
        "give model:DIR, eagle:DIR, block:DIR, mtp:DIR, medusa:DIR, assistant:DIR, ngram, suffix, "
        "suffix:FILE.txt, early-exit:LAYERS, or cascade:A,B"
    )
    with pytest.raises(ValueError, match=allowed):
        specjax.load_drafter(spec, opened)


def test_a_folder_without_its_kind(folder, opened):
    with pytest.raises(ValueError, match=rf"a folder without its kind; give model:{folder} .* or assistant: and"):
        specjax.load_drafter(str(folder), opened)
    with pytest.raises(TypeError, match="give a string: model:DIR"):
        specjax.load_drafter(folder, opened)
    with pytest.raises(ValueError, match=r"nowhere.*is not a folder|nowhere.*does not exist"):
        specjax.load_drafter("model:nowhere", opened)


def test_a_file_that_is_remembered(tmp_path, opened):
    file = tmp_path / "corpus.txt"
    for content, wrong in (
        (None, "cannot be read as UTF-8"),
        (b"", "has no text"),
        (b"\xff", "cannot be read as UTF-8"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=wrong):
            specjax.load_drafter(f"suffix:{file}", opened)
    file.write_text("a quick fox")
    drafter = specjax.load_drafter(f"cascade:suffix:{file},early-exit:1", opened, 3)
    tokens = opened.tokenizer.encode("a quick fox").ids
    assert drafter.first.text_m[-len(tokens) :].tolist() == tokens and drafter.num_draft == 3
    assert drafter.first.vocab_size == opened.model.vocab_size
    with pytest.raises(ValueError, match="needs the target's tokenizer"):
        specjax.load_drafter(f"suffix:{file}", opened.model)
    assert (np.asarray(specjax.load_drafter("suffix", opened.model).text_m) == -1).all()


@pytest.mark.parametrize("spec", ["ngram", "early-exit:1", "cascade:ngram,early-exit:1"])
def test_a_number_of_drafts_that_is_none(spec, opened):
    for num_draft in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match=rf"num_draft.*{num_draft}"):
            specjax.load_drafter(spec, opened, num_draft)


def test_folders_and_names():
    spec = "cascade:ngram,eagle:a/b,early-exit:3,model:c"
    assert [str(path) for path in folders_of(spec)] == ["a/b", "c"]
    assert short_name(spec) == "ngram, else b, else first 3 layers, else c"


# Heads out again.


@pytest.mark.parametrize(
    ("spec", "value", "options"),
    [
        ("eagle:a/b@rope=target", "a/b", {"rope": "target"}),
        ("mtp:a@chained@zero_first=false", "a", {"chained": "true", "zero_first": "false"}),
        ("mtp:a@chain_states=unnormed", "a", {"chain_states": "unnormed"}),
        ("eagle:a@window=stays@norm_output=logits", "a", {"window": "stays", "norm_output": "logits"}),
        ("eagle:a", "a", {}),
    ],
)
def test_options_follow_the_folder(spec, value, options):
    found = parse(spec)
    assert (found.value, found.options) == (value, options)
    assert [str(path) for path in folders_of(f"cascade:ngram,{spec}")] == [value]
    assert all(found.choice(name) in OPTIONS[found.kind][name] for name in OPTIONS[found.kind])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("eagle:a@rope=theirs", "option 'rope' of eagle:a is 'theirs'; give it once, as own or target"),
        ("eagle:a@rope", "option 'rope' of eagle:a is 'true'"),
        ("mtp:a@chained@chained", "option 'chained' of mtp:a is 'true'; give it once"),
        ("mtp:a@rope=target", r"a@rope=target does not exist; .*mtp drafters have \['chain_states', 'chained', 'zero"),
        ("medusa:a@chained", "medusa drafters have none"),
        ("model:a@b=c", "model drafters have none"),
    ],
)
def test_unknown_options_are_refused(spec, message):
    for text in (spec, f"cascade:ngram,{spec}"):
        with pytest.raises(ValueError, match=message):
            specjax.load_drafter(text, None)


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    (tmp_path / "a@b").mkdir()
    found = parse(f"mtp:{tmp_path}/a@b@chained")
    assert found.value == f"{tmp_path}/a@b" and found.flag("chained")


def test_a_head_is_written_with_its_figures_and_read_back(opened, heads, tmp_path):
    for kind, config in (("mtp", CONFIG), ("medusa", None)):
        drafter = specjax.load_drafter(f"{kind}:{heads / kind}", opened, 1)
        specjax.save_drafter(tmp_path / kind, drafter, opened, config, metrics={"loss": 1.5})
        equal(specjax.load_drafter(f"{kind}:{tmp_path / kind}", opened, 1).params, drafter.params)
        assert json.loads((tmp_path / kind / "metrics.json").read_text()) == {"loss": 1.5}


def test_what_is_no_head_is_not_written(opened, heads, tmp_path):
    path = tmp_path / "out"
    with pytest.raises(TypeError, match=r"drafter is a NGramDrafter; give an EAGLE head"):
        specjax.save_drafter(path, specjax.NGramDrafter(), opened, CONFIG)
    with pytest.raises(ValueError, match="config is None; give the keys"):
        specjax.save_drafter(path, specjax.load_drafter(f"mtp:{heads}/mtp", opened, 1), opened)
    with pytest.raises(ValueError, match="give None, for Medusa heads"):
        specjax.save_drafter(path, specjax.load_drafter(f"medusa:{heads}/medusa", opened, 2), opened, CONFIG)
    with pytest.raises(ValueError, match=r"config\.json asks for"):
        drafter = specjax.load_drafter(f"mtp:{heads}/mtp", opened, 1)
        specjax.save_drafter(path, drafter, opened, CONFIG | {"intermediate_size": 8})
    assert not path.exists()
