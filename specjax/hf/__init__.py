"""Reading and writing Hugging Face model folders: configs, tensor names, safetensors."""

from specjax.hf.config import decoder_config as decoder_config
from specjax.hf.families import sources as sources
from specjax.hf.safetensors import Tensor as Tensor
from specjax.hf.safetensors import TensorSpec as TensorSpec
from specjax.hf.safetensors import open_tensors as open_tensors
from specjax.hf.safetensors import write_tensors as write_tensors
from specjax.hf.weights import Weights as Weights
from specjax.hf.weights import open_weights as open_weights
