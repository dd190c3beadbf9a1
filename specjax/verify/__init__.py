"""Verification rules: which draft tokens are accepted, and which token is emitted after them.

Each rule keeps the target's distribution exactly, for any drafter. Rules are array functions and know no model.
``token`` and ``block`` verify chains; ``walk``, ``coupled``, ``recursive``, ``traversal`` and ``multipath`` verify
chains and trees. ``default_rule`` chooses one for a drafter.

At temperature 0 the engine's distributions are one-hot. Then every rule here is greedy verification: drafts are
accepted while they are the target's argmax, and the target's argmax is emitted after them.
"""

from specjax.verify.chains import ChainRule as ChainRule
from specjax.verify.chains import Thresholds as Thresholds
from specjax.verify.chains import at_tokens as at_tokens
from specjax.verify.chains import block as block
from specjax.verify.chains import block_thresholds as block_thresholds
from specjax.verify.chains import last_success as last_success
from specjax.verify.chains import leading_successes as leading_successes
from specjax.verify.chains import residual as residual
from specjax.verify.chains import token as token
from specjax.verify.chains import token_thresholds as token_thresholds
from specjax.verify.defaults import default_rule as default_rule
from specjax.verify.trees import TreeRule as TreeRule
from specjax.verify.trees import TreeThresholds as TreeThresholds
from specjax.verify.trees import multipath as multipath
from specjax.verify.trees import multipath_thresholds as multipath_thresholds
from specjax.verify.trees import own_success as own_success
from specjax.verify.trees import recursive as recursive
from specjax.verify.trees import recursive_thresholds as recursive_thresholds
from specjax.verify.trees import success_below as success_below
from specjax.verify.trees import traversal as traversal
from specjax.verify.trees import traversal_thresholds as traversal_thresholds
from specjax.verify.walks import WalkRule as WalkRule
from specjax.verify.walks import coupled as coupled
from specjax.verify.walks import walk as walk
