"""Exact speculative decoding for JAX, in one compiled loop.

- ``open``, ``Session``: strings in, strings out.
- ``generate``, ``stream``: tokens in, tokens out. ``prefill``, ``step``, ``run``, ``extend``, ``insert`` and ``stop``
  are their parts, pure functions over a ``State``. ``compile`` compiles them before the first request, and
  ``keep_programs`` keeps them for later processes. ``remember`` gives a drafter text to copy from.
- ``rollout``: several completions of each prompt, for reinforcement learning.
- ``load``, ``load_drafter``, ``save``, ``save_drafter``, ``convert_hf``, ``export_hf``: folders.
- ``quantize``, ``dequantize``: weights in 8 or 4 bits.
- ``adapt``: a model of your own of the common signature; ``from_left_padded``: its prompts. ``check_model`` and
  ``check_drafter`` test what is yours.
- ``LanguageModel`` and ``Drafter``: the contracts for models and drafters of your own (``specjax.types``).

Array names inside the library end in a shape suffix, one letter per axis: b rows, t query tokens, s cache slots,
v vocabulary, d model width, n query heads, k key/value heads, h width of an attention head, f MLP width, g draft tokens
per round. Public keywords, and the fields of ``Generation`` and ``Stats``, have no suffix.
"""

from specjax import hf as hf
from specjax import quantized as quantized
from specjax import sharding as sharding
from specjax import testing as testing
from specjax import text as text
from specjax import transformer as transformer
from specjax import verify as verify
from specjax.adapters.adapt import adapt as adapt
from specjax.adapters.padded import from_left_padded as from_left_padded
from specjax.checking.drafter import check_drafter as check_drafter
from specjax.checking.model import check_model as check_model
from specjax.checkpoint.convert import convert_hf as convert_hf
from specjax.checkpoint.convert import export_hf as export_hf
from specjax.checkpoint.drafters import load_drafter as load_drafter
from specjax.checkpoint.drafters import save_drafter as save_drafter
from specjax.checkpoint.models import default_dtype as default_dtype
from specjax.checkpoint.models import load as load
from specjax.checkpoint.models import save as save
from specjax.checkpoint.opened import Opened as Opened
from specjax.checkpoint.opened import open as open
from specjax.drafters.assistant import AssistantDrafter as AssistantDrafter
from specjax.drafters.block import BlockDrafter as BlockDrafter
from specjax.drafters.cascade import Cascade as Cascade
from specjax.drafters.early_exit import EarlyExitDrafter as EarlyExitDrafter
from specjax.drafters.feature import FeatureDrafter as FeatureDrafter
from specjax.drafters.medusa import MedusaDrafter as MedusaDrafter
from specjax.drafters.model import ModelDrafter as ModelDrafter
from specjax.drafters.mtp import MTPDrafter as MTPDrafter
from specjax.drafters.ngram import NGramDrafter as NGramDrafter
from specjax.drafters.shared_vocabulary import SharedVocabularyDrafter as SharedVocabularyDrafter
from specjax.drafters.suffix import SuffixDrafter as SuffixDrafter
from specjax.engine.ahead import compile as compile
from specjax.engine.arguments import pad_prompts as pad_prompts
from specjax.engine.kept import keep_programs as keep_programs
from specjax.engine.loop import extend as extend
from specjax.engine.loop import generate as generate
from specjax.engine.loop import prefill as prefill
from specjax.engine.loop import run as run
from specjax.engine.loop import step as step
from specjax.engine.loop import stream as stream
from specjax.engine.memory import remember as remember
from specjax.engine.rollout import Completions as Completions
from specjax.engine.rollout import Rollout as Rollout
from specjax.engine.rollout import rollout as rollout
from specjax.engine.state import State as State
from specjax.engine.state import insert as insert
from specjax.engine.state import stop as stop
from specjax.quantized import dequantize as dequantize
from specjax.quantized import quantize as quantize
from specjax.sampling import Sampling as Sampling
from specjax.session import Completion as Completion
from specjax.session import Session as Session
from specjax.sharding import make_mesh as make_mesh
from specjax.sharding import shard as shard
from specjax.types import Context as Context
from specjax.types import Drafter as Drafter
from specjax.types import Event as Event
from specjax.types import Feed as Feed
from specjax.types import Generation as Generation
from specjax.types import LanguageModel as LanguageModel
from specjax.types import Output as Output
from specjax.types import Proposal as Proposal
from specjax.types import Stats as Stats
from specjax.types import Verdict as Verdict

__all__ = [
    "AssistantDrafter",
    "BlockDrafter",
    "Cascade",
    "Completion",
    "Completions",
    "Context",
    "Drafter",
    "EarlyExitDrafter",
    "Event",
    "FeatureDrafter",
    "Feed",
    "Generation",
    "LanguageModel",
    "MTPDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "Opened",
    "Output",
    "Proposal",
    "Rollout",
    "Sampling",
    "Session",
    "SharedVocabularyDrafter",
    "State",
    "Stats",
    "SuffixDrafter",
    "Verdict",
    "adapt",
    "check_drafter",
    "check_model",
    "compile",
    "convert_hf",
    "default_dtype",
    "dequantize",
    "export_hf",
    "extend",
    "from_left_padded",
    "generate",
    "hf",
    "insert",
    "keep_programs",
    "load",
    "load_drafter",
    "make_mesh",
    "open",
    "pad_prompts",
    "prefill",
    "quantize",
    "quantized",
    "remember",
    "rollout",
    "run",
    "save",
    "save_drafter",
    "shard",
    "sharding",
    "step",
    "stop",
    "stream",
    "testing",
    "text",
    "transformer",
    "verify",
]
__version__ = "0.1.0"
