"""Plans on paper: the memory that a model needs on a mesh of devices, and the least time of a round."""

from pathlib import Path

from specjax.planning.hardware import HARDWARE as HARDWARE
from specjax.planning.hardware import Hardware as Hardware
from specjax.planning.roofline import BYTES as BYTES
from specjax.planning.roofline import WARP as WARP
from specjax.planning.roofline import Mesh as Mesh
from specjax.planning.roofline import Messages as Messages
from specjax.planning.roofline import Model as Model
from specjax.planning.roofline import Pass as Pass
from specjax.planning.roofline import Seconds as Seconds
from specjax.planning.roofline import Weights as Weights
from specjax.planning.roofline import all_reduce_seconds as all_reduce_seconds
from specjax.planning.roofline import cache_bytes as cache_bytes
from specjax.planning.roofline import check_mesh as check_mesh
from specjax.planning.roofline import choosing as choosing
from specjax.planning.roofline import forward as forward
from specjax.planning.roofline import num_params as num_params
from specjax.planning.roofline import seconds as seconds
from specjax.planning.roofline import token_bytes as token_bytes
from specjax.planning.roofline import touched_experts as touched_experts
from specjax.planning.roofline import weights as weights
from specjax.planning.rounds import RESERVE as RESERVE
from specjax.planning.rounds import Memory as Memory
from specjax.planning.rounds import Round as Round
from specjax.planning.rounds import Setting as Setting
from specjax.planning.rounds import best as best
from specjax.planning.rounds import kept as kept
from specjax.planning.rounds import memory as memory
from specjax.planning.rounds import plan_round as plan_round

CONFIGS = Path(__file__).parent / "configs"  # config.json of each model that can be planned by name
