"""Planning on paper: what fits, and what a round takes at least."""
