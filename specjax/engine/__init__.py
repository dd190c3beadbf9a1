"""The loop: requests, state, one round, and rounds until every row is done."""
