"""The configuration of a lawcat model: the teacher's fields and one for each variant of the operator."""

# No "from __future__ import annotations" here: it makes strings of the fields' types, which `strict` does
# not check then.

# mypy is told to leave transformers out.
# mypy: disallow-subclassing-any=False

import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ..errors import ConfigurationError

LINEAR = "linear_attention"
SLIDING = "sliding_attention"
FULL = "full_attention"

# The fields of the operator that a user may choose; all others are the teacher's.
OPERATOR_FIELDS = (
    "feature_map",
    "feature_dim",
    "use_conv",
    "conv_kernel_size",
    "conv_init_std",
    "use_normalizer",
    "normalizer_eps",
    "gate",
    "gate_rank",
    "gate_divisor",
    "gate_bias_init",
    "min_log_decay",
    "linear_rope",
    "state_heads",
    "sliding_window",
    "num_sinks",
)
# Fields of ours, whose names are checked against typing errors.
_OPERATOR_FIELDS = ("teacher_model_type", "layer_types", *OPERATOR_FIELDS)
_CHOICES: dict[str, tuple[str, ...]] = {
    "feature_map": ("tied", "untied"),
    "gate": ("channel", "head", "none"),
    "gate_bias_init": ("zeros", "spread"),
    "state_heads": ("query", "kv"),
}


@strict
class LawcatConfig(PreTrainedConfig):
    r"""Configuration of [`LawcatForCausalLM`].

    The first group of fields is the teacher's and keeps its meaning (see `LlamaConfig`). The second group is
    the operator of LAWCAT (arXiv 2509.18467); each variant the paper discusses is one field.

    Args:
        teacher_model_type: Family of the teacher, such as `"llama"`: a row of `lawcat.convert.families`.
        attention_bias: Biases of the projections to q, k and v, and of the one from their output but for
            what `attention_output_bias` says.
        attention_output_bias: Bias of the projection from attention's output. `None` means as
            `attention_bias`; Qwen2 has the others and not this one.
        use_qk_norm: A norm over each head's q and k, right after the projection: Qwen3.
        layer_types: Per layer `"linear_attention"`, `"full_attention"` (the teacher's softmax attention
            kept) or `"sliding_attention"` (that over the last `sliding_window` tokens and `num_sinks` sinks
            only, in constant memory). `None` makes every layer linear.
        feature_map: `"tied"`: one matrix a head for q and k alike. `"untied"`: one for each.
        feature_dim: Width F of the feature map's output, even. `None` means `head_dim`.
        use_conv: Causal convolution across tokens on q and k.
        conv_kernel_size: Number of taps K of that convolution, at least 2.
        conv_init_std: Standard deviation of its taps for preceding tokens where training starts. 0: the
            identity, but for 0.001. What has to be learned across tokens is learned sooner from 0.1 to 0.3.
        use_normalizer: Divide by the decayed sum of weights, so that the weights of past tokens sum to one.
        normalizer_eps: Added to that sum before dividing.
        gate: `"channel"` (one decay a feature channel), `"head"` (one a head) or `"none"` (no decay).
        gate_rank: Inner width of the gate's two-matrix projection.
        gate_divisor: `log a = logsigmoid(logit) / gate_divisor`.
        gate_bias_init: `"zeros"`, or `"spread"`: from 0 to 8 over the channels, half-lives from 16 tokens to
            beyond 30,000.
        min_log_decay: Lower bound of `log a` a token, negative: what lets the chunked form factor decays over
            32 tokens at a time in float32. Down to -5 it takes 16 tokens; below, a much slower form.
        linear_rope: Apply the teacher's rotary embedding to q and k of linear layers too. The paper finds
            that this prevents length generalisation.
        state_heads: `"query"`: a state a query head, as in the paper. `"kv"`: convolution, map and gate of k
            are per kv head, so that the state is smaller by the group size.
        sliding_window: Tokens w, the present one among them, that linear layers weigh by the teacher's
            softmax instead; older ones are weighed by the state, and both share one denominator. `None`: no
            window. Padding between tokens takes up places in it. Layers of sliding attention need it too.
        num_sinks: First tokens of each row that never leave the window.

    Raises:
        ConfigurationError: a `ValueError`, for a value outside what is stated above, naming the field, the
            value and what is allowed, or for a name that is nearly one of the second group.

    Example:
        >>> from lawcat import LawcatConfig
        >>> config = LawcatConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
        >>> config.layer_types
        ['linear_attention', 'linear_attention']
    """

    model_type = "lawcat"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # The teacher's.
    teacher_model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False

    # The operator's.
    layer_types: list[str] | None = None
    feature_map: str = "tied"
    feature_dim: int | None = None
    use_conv: bool = True
    conv_kernel_size: int = 4
    conv_init_std: float = 0.0
    use_normalizer: bool = True
    normalizer_eps: int | float = 1e-6
    gate: str = "channel"
    gate_rank: int = 16
    gate_divisor: int | float = 16.0
    gate_bias_init: str = "spread"
    min_log_decay: int | float = -2.5
    linear_rope: bool = False
    state_heads: str = "query"
    sliding_window: int | None = None
    num_sinks: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if close := difflib.get_close_matches(name, _OPERATOR_FIELDS, n=1, cutoff=0.8):
                raise ConfigurationError(f"{name} is not a field of LawcatConfig. Did you mean {close[0]!r}?")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigurationError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}; set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.feature_dim is None:
            self.feature_dim = self.head_dim
        if self.layer_types is None:
            self.layer_types = [LINEAR] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # Here too, since transformers wraps what its own call of it raises into an error that is no
        # ValueError.
        self.validate_architecture()

    @property
    def num_state_heads(self) -> int:
        """Heads N that keep a state of their own: the query heads, or the kv heads."""
        heads = self.num_attention_heads if self.state_heads == "query" else self.num_key_value_heads
        assert heads is not None
        return heads

    def validate_architecture(self) -> None:
        """Refuse values that contradict each other. Also called by transformers, when a config is saved."""
        if problem := self._problem():
            raise ConfigurationError(problem)

    def _problem(self) -> str | None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                return f"{name}={getattr(self, name)!r} is not a choice; use one of {choices}."
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            return f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}."
        head_dim, feature_dim = self.head_dim, self.feature_dim
        if feature_dim is not None and (feature_dim < 2 or feature_dim % 2):
            return f"feature_dim={feature_dim} must be an even number of at least 2."
        if head_dim is not None and feature_dim is not None and feature_dim > 2 * head_dim:
            return (
                f"feature_dim={feature_dim} is more than twice head_dim={head_dim}: the map starts as the "
                "first feature_dim/2 columns of the identity, which has head_dim columns."
            )
        layers, layer_types = self.num_hidden_layers, self.layer_types
        if layer_types is not None and len(layer_types) != layers:
            entries = len(layer_types)
            return f"layer_types has {entries} entries for num_hidden_layers={layers}; give one a layer."
        if unknown := sorted(set(layer_types or ()) - {LINEAR, SLIDING, FULL}):
            return f"layer_types holds {unknown[0]!r}; use {LINEAR!r}, {SLIDING!r} or {FULL!r}."
        if self.sliding_window is not None and self.sliding_window < 1:
            window = self.sliding_window
            return f"sliding_window={window} must be at least 1; for no window leave it out (None)."
        if self.sliding_window is None and SLIDING in (layer_types or ()):
            return f"layer_types holds {SLIDING!r}, which needs sliding_window, a number of tokens."
        if self.num_sinks < 0:
            return f"num_sinks={self.num_sinks} must be at least 0."
        if self.num_sinks and self.sliding_window is None:
            return (
                f"num_sinks={self.num_sinks} has no effect without a window: set sliding_window to a number "
                "of tokens, or num_sinks=0."
            )
        if self.conv_kernel_size < 2:
            taps = self.conv_kernel_size
            return f"conv_kernel_size={taps} must be at least 2; for no convolution set use_conv=False."
        if self.conv_init_std < 0:
            return f"conv_init_std={self.conv_init_std} must be at least 0, which is the identity."
        if self.gate_rank < 1:
            return f"gate_rank={self.gate_rank} must be at least 1; for no gate set gate='none'."
        for name in ("normalizer_eps", "gate_divisor"):
            if getattr(self, name) <= 0:
                return f"{name}={getattr(self, name)} must be above 0."
        if self.min_log_decay >= 0:
            return f"min_log_decay={self.min_log_decay} must be below 0 (natural logarithm of a decay)."
        return None


__all__ = ["FULL", "LINEAR", "SLIDING", "LawcatConfig"]
