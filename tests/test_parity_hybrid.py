"""Families with recurrent layers against transformers."""

import jax
import numpy as np
import pytest
from parity import assert_generates_the_greedy_text, make_case
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import HYBRID
from safetensors.numpy import load_file, save_file

import specjax


@pytest.fixture(scope="module", params=HYBRID)
def case(request, tmp_path_factory):
    return make_case(*HYBRID[request.param], tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", ["qwen3-next", "granite 4"], indirect=True)
def test_generate_writes_the_greedy_text(case):
    assert_generates_the_greedy_text(case)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """A model whose folder holds all experts of a layer in one tensor, as transformers computes them, and the same."""
    case = make_case(*HYBRID["qwen3.5 with experts"], tmp_path_factory.mktemp("apart"))
    folder = tmp_path_factory.mktemp("stacked")
    case.theirs.save_pretrained(folder, save_original_format=False)
    return folder, case.ours


def test_experts_may_be_in_one_tensor(stacked):
    folder, ours = stacked
    model = specjax.load(folder, "float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, ours.params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stack: {"gate_up_proj": stack[:-1]},
            "missing, such as 'model.layers.0.mlp.experts.4.gate_proj.weight'",
        ),
        (lambda stack: {"gate_up_proj": np.concatenate([stack, stack])}, "unknown, such as .*experts.5.gate_proj"),
        (lambda stack: {"gate_up_proj": stack[:, 1:]}, "missing, such as .*experts.0.gate_proj"),
        (lambda stack: {"gate_up_proj": stack[:, 2:]}, r"experts.0.gate_proj.weight' is \(19, 24\)"),
        (lambda stack: {"gate_up_proj": stack.swapaxes(1, 2).copy()}, r"experts.0.gate_proj.weight' is \(12, 40\)"),
        (lambda stack: {"gate_up_proj": stack[0]}, "missing, such as .*experts.0.gate_proj"),
        (lambda stack: {"3.up_proj.weight": stack[3, 20:]}, "missing, such as .*experts.0.gate_proj"),
    ],
    ids=["one less", "more", "odd rows", "fewer rows", "transposed", "one expert", "one of them as well"],
)
def test_stacks_of_other_experts_are_refused(change, message, stacked, tmp_path):
    tensors = load_file(stacked[0] / "model.safetensors")
    block = "model.layers.0.mlp.experts."
    changed = change(tensors[block + "gate_up_proj"])
    save_file(
        tensors | {block + name: np.ascontiguousarray(x) for name, x in changed.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((stacked[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        specjax.load(tmp_path)
    assert str(tmp_path) in str(error.value)
