"""What drafters that remember nothing have in common."""


class Stateless:
    """A drafter but for ``num_draft`` and ``propose``; it reads no states and fits every vocabulary and length."""

    capture = ()
    vocab_size = None
    max_positions = None

    def init(self, target, rows, slots):
        return None

    def observe(self, state, context, event):
        return None
