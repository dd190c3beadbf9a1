"""What drafters that remember nothing have in common."""


class Stateless:
    """A drafter but for ``num_draft`` and ``propose``; it reads no states and fits every vocabulary and length."""

    capture = ()
    vocab_size = None
    max_positions = None

    def start(self, context, features, slots):
        return None

    def commit(self, state, context, verdict, features):
        return None
