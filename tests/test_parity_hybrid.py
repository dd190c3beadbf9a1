"""Families with recurrent layers against transformers."""

import pytest
from parity import make_case
from parity import test_greedy_text_is_equal as test_greedy_text_is_equal
from parity import test_logits_whole_token_by_token_and_in_blocks as test_logits_whole_token_by_token_and_in_blocks
from parity_cases import HYBRID


@pytest.fixture(scope="module", params=HYBRID)
def case(request, tmp_path_factory):
    return make_case(*HYBRID[request.param], tmp_path_factory.mktemp("model"))
