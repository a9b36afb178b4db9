"""The transformers model: configuration, attention, cache.

The auto module is loaded first: doing so registers the model (``lawcat._register``), which imports the modules of
this package; were it first loaded from inside one of them, that import would be circular.
"""

import transformers.models.auto.modeling_auto  # noqa: F401
