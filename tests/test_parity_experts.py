"""Families with mixtures of experts against transformers."""

import pytest
from parity import make_case
from parity import test_greedy_text_is_equal as test_greedy_text_is_equal
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import EXPERTS


@pytest.fixture(scope="module", params=EXPERTS)
def case(request, tmp_path_factory):
    return make_case(*EXPERTS[request.param], tmp_path_factory.mktemp("model"))
