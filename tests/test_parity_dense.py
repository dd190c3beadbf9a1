"""Dense families against transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from parity import TOLERANCE, assert_generates_the_greedy_text, forward, make_case, make_model, torch, transformers
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import DENSE, VOCAB

import specjax
from specjax.types import whole_feed


@pytest.fixture(scope="module", params=DENSE)
def case(request, tmp_path_factory):
    return make_case(*DENSE[request.param], tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", ["gemma 3", "gemma 4, shared keys, embeddings per layer", "gpt-2"], indirect=True)
def test_generate_writes_the_greedy_text(case):
    assert_generates_the_greedy_text(case)


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2"])
def test_tables_that_differ_are_both_used_though_the_config_ties_them(kind, tmp_path):
    make_model(kind, {"tie_word_embeddings": False}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["tie_word_embeddings"]
    file.write_text(json.dumps(raw | ({"tie_word_embeddings": True} if kind == "Qwen2" else {})))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.random.default_rng(0).integers(3, VOCAB, (1, 20)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model = specjax.load(tmp_path, "float32")
    logits, _ = forward(model, whole_feed(jnp.asarray(tokens)), model.init_cache(1, 32))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
