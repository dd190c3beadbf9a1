"""Heads that draft blocks: published layouts against a NumPy twin, drafts round by round, heads that are always right."""

import numpy as np
import pytest
import reference_block
from block_heads import CASES, published
from draft_heads import open_block
from test_drafters import step
from test_eagle import prefilled, random_target, tables_of, true_states, write_folder

TARGET = random_target()


def opened(case, folder, drafts=None, **options):
    """Writes a published head into a folder and opens it."""
    write_folder(folder, case.config, published(case))
    return open_block(f"{folder}{case.options}", TARGET, drafts or case.drafts, "float32", **options)


# The published layouts, on random weights.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_round_drafts_what_the_twin_does(case, tmp_path):
    """The distribution of every draft of four rounds is the twin's, which starts each round anew from the row's tokens
    and the target's states over them: nothing that a block computed may count."""
    tensors, drafter = published(case), opened(case, tmp_path / "head")
    assert drafter.capture == case.states
    table, target_head = tables_of(TARGET, tensors)
    state, accepted = prefilled(TARGET, drafter, seed=4), set()
    for _ in range(4):
        features = [np.asarray(x, np.float64) for x in true_states(TARGET, state.tokens_bs)]
        after, proposal = step(TARGET, state, drafter)
        for row, length in enumerate(np.asarray(state.length_b)):
            assert proposal.length_b[row] == case.drafts
            tokens, drafted = np.asarray(state.tokens_bs)[row, :length], np.asarray(proposal.tokens_bg)[row]
            read = [features[i][row, : length - 1] for i in case.states]
            states = reference_block.block(case.twin, tensors, table, read, tokens[-1])
            logits = reference_block.drafts(case.twin, tensors, states, target_head, tokens[-1], drafted)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            wanted = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(proposal.probs_bgv[row], wanted, atol=1e-4, rtol=0)
        accepted |= set(np.asarray(after.stats.accepted - state.stats.accepted).tolist())
        state = after
    assert {0, 1} <= accepted, "some drafts should be accepted and some not"
