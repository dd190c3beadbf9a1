"""Which fields of a ``DecoderConfig`` a draft head computes."""

import dataclasses

from specjax.transformer.config import DecoderConfig


def check_unset(what: str, decoder: DecoderConfig, *names: str) -> None:
    """Checks that fields which a draft head would ignore have their defaults.

    Args:
      what: the draft head, for the message.
      decoder: describes the draft head's layers.
      *names: fields of ``DecoderConfig`` that the draft head does not compute.

    Raises:
      ValueError: one of the fields has another value than its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(decoder)}
    given = {name: getattr(decoder, name) for name in names if getattr(decoder, name) != defaults[name]}
    if given:
        fields = ", ".join(given)
        raise ValueError(f"the decoder of {what} has {given}, which is not computed there; leave out {fields}")
