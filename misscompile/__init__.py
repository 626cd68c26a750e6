"""MiSS fine-tuning as a compiler: adapters are rewritten into the graph of a model, not wrapped around its modules."""

from misscompile.adapting import (
    active_adapters,
    adapt,
    adapters,
    delete_adapter,
    disable_adapter,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unload,
)
from misscompile.capture import capture
from misscompile.checkpoint import hotswap_adapter, load_adapter, save_adapter
from misscompile.config import MissConfig
from misscompile.errors import (
    ArgumentError,
    CaptureError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MergeError,
    MissError,
    MissWarning,
    NoMatchError,
    StateError,
    UnknownAdapterError,
    UnsupportedModuleError,
)
from misscompile.lora import LoraError, save_as_lora
from misscompile.merging import merge, unmerge
from misscompile.passes.dump import dump

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "LoraError",
    "MergeError",
    "MissConfig",
    "MissError",
    "MissWarning",
    "NoMatchError",
    "StateError",
    "UnknownAdapterError",
    "UnsupportedModuleError",
    "active_adapters",
    "adapt",
    "adapters",
    "capture",
    "delete_adapter",
    "disable_adapter",
    "dump",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "save_as_lora",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]

__version__ = "0.1.0"
