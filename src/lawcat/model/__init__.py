"""The transformers model: configuration, attention, cache.

The auto module is loaded first: doing so registers the configuration (``lawcat._register``), which imports
its module; were it first loaded from inside that module, the import would be circular.
"""

import transformers.models.auto.configuration_auto  # noqa: F401
