"""How a device computes what `misscompile.variants` defines. `device.py` alone knows a device or a threshold.

What is exported here is what the insert pass puts into a graph, one node each. A node chooses its form when it runs, since
dtype, size and mode (autocast, a later `.half()`, decoding) are known only then.
"""

from misscompile.kernels.bat import add_bat, bat_linear
from misscompile.kernels.dropout import dropout
from misscompile.kernels.fold import Scratch, fold_in_place, is_finite, reserve, stays_finite
from misscompile.kernels.shards import add_update, features_first, features_last, sum_shards

__all__ = [
    "Scratch",
    "add_bat",
    "add_update",
    "bat_linear",
    "dropout",
    "features_first",
    "features_last",
    "fold_in_place",
    "is_finite",
    "reserve",
    "stays_finite",
    "sum_shards",
]
