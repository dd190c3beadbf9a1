"""What the tensors of a folder are: a model's, those of a draft head, or both."""

import re
from collections.abc import Iterable

# Names that only one kind of draft head has, without the prefix "model.". The kinds are those of ``load_drafter``.
_HEADS = {
    "block": re.compile(r"hidden_norm\.weight|mask_hidden"),
    "eagle": re.compile(r"(fc|fusion_fc)\.weight"),
    "mtp": re.compile(r"(layers\.\d+\.eh_proj|mtp\.fc|mtp_layers\.\d+\.input_proj)\.weight"),
    "assistant": re.compile(r"pre_projection\.weight"),
    "medusa": re.compile(r"(medusa_heads?\.)?(\d+\.\d+\.linear|blocks\.\d+\.layers\.\d+)\.weight"),
}
_FIRST_LAYER = re.compile(r"(.+\.)?(layers|h)\.0\..+")


def kinds_of_tensors(names: Iterable[str]) -> list[str]:
    """Returns the kinds of draft heads among tensors, and "model" if a model's first layer is there, too."""
    known = [name.removeprefix("model.") for name in names]
    found = [kind for kind, pattern in _HEADS.items() if any(map(pattern.fullmatch, known))]
    # Heads of blocks have the layer that only EAGLE heads have otherwise.
    found = [kind for kind in found if kind != "eagle" or "block" not in found]
    # The layers of EAGLE heads, heads of blocks and assistants are named like a model's.
    own = [name for name in known if not name.startswith(("mtp.", "mtp_layers.", "medusa_head", "blocks."))]
    has_layers = any(map(_FIRST_LAYER.fullmatch, own))
    return [*found, "model"] if has_layers and not {"eagle", "block", "assistant"} & {*found} else found
