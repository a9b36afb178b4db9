"""Functions on tensors: no modules, no configuration, no transformers."""

from .backend import backend_names, choose_backend, explain, gated_linear_attention, use_backend
from .chunked import gated_linear_attention_chunked
from .convolution import causal_conv1d
from .feature_map import hedgehog_feature_map
from .fused import linear_attention_mixer
from .reference import gated_linear_attention_reference
from .step import gated_linear_attention_step

__all__ = [
    "backend_names",
    "causal_conv1d",
    "choose_backend",
    "explain",
    "gated_linear_attention",
    "gated_linear_attention_chunked",
    "gated_linear_attention_reference",
    "gated_linear_attention_step",
    "hedgehog_feature_map",
    "linear_attention_mixer",
    "use_backend",
]
