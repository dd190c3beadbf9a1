"""``transformers`` as a peer of ``bench``: plain, assisted and prompt lookup decoding."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.commands.measure import Way


def ways(
    target: Path,
    draft: Path | None = None,
    *,
    num_draft: int,
    new_tokens: int,
    threads: int,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[Way], str]:
    """Opens the models and returns the ways to decode, and a note on the settings.

    Args:
      target: a Hugging Face folder.
      draft: a Hugging Face folder; None leaves out what needs a draft model.
      num_draft: g.
      new_tokens: the most new tokens.
      threads: of torch.
      stop_tokens: ids that end a text.
    """
    import torch  # here, since transformers and torch are optional
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)

    def opened(folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = list(stop_tokens) or None
        model.generation_config.pad_token_id = 0
        return model

    model = opened(target)

    def way(**options: Any) -> Any:
        def decode(prompt: np.ndarray) -> np.ndarray:
            ids = torch.from_numpy(prompt[None].astype(np.int64))
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **options
                )
            return out[0, len(prompt) :].numpy()

        return decode

    # The number of drafts is a setting of the assistant.
    def assisted(assistant: Any, **settings: Any) -> Any:
        plain = way(assistant_model=assistant)

        def decode(prompt: np.ndarray) -> np.ndarray:
            before = {name: getattr(assistant.generation_config, name) for name in settings}
            try:
                assistant.generation_config.update(**settings)
                return plain(prompt)
            finally:
                assistant.generation_config.update(**before)

        return decode

    steady = {
        "num_assistant_tokens": num_draft,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    name = "transformers"
    found = [Way(name, "plain", "plain", way())]
    if draft is not None:
        assistant = opened(draft)
        found.append(Way(name, "assisted, its defaults", "draft model", assisted(assistant)))
        found.append(Way(name, f"assisted, {num_draft} drafts", "draft model", assisted(assistant, **steady)))
    lookup = way(prompt_lookup_num_tokens=num_draft)
    found.append(Way(name, f"prompt lookup, {num_draft} drafts", "prompt lookup", lookup))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    note = (
        f"{versions}: generate() in torch.inference_mode, float32, {torch.get_num_threads()} threads, "
        f"{model.config._attn_implementation} attention, {model.generation_config.cache_implementation or 'dynamic'} "
        f"cache, no torch.compile, {f'stop tokens {list(stop_tokens)}' if stop_tokens else 'no stop tokens'}."
    )
    return found, note
