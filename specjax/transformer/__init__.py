"""A Llama-family decoder in flax.nnx, and the pure functions that the engine takes."""

from specjax.transformer.config import DecoderConfig as DecoderConfig
from specjax.transformer.config import read_config as read_config
from specjax.transformer.decoder import Decoder as Decoder
from specjax.transformer.decoder import decoder_model as decoder_model
from specjax.transformer.decoder import init_params as init_params
