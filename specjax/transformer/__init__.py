"""One decoder for all families in flax.nnx, and the pure functions that the engine calls."""

from specjax.transformer.config import DecoderConfig as DecoderConfig
from specjax.transformer.config import ExpertsConfig as ExpertsConfig
from specjax.transformer.config import LatentConfig as LatentConfig
from specjax.transformer.config import LayerConfig as LayerConfig
from specjax.transformer.config import Rope as Rope
from specjax.transformer.config import plain_rope as plain_rope
from specjax.transformer.decoder import Decoder as Decoder
from specjax.transformer.decoder import decoder_model as decoder_model
from specjax.transformer.decoder import init_params as init_params
