"""The configuration of a lawcat model: the teacher's fields and one field for each variant of the operator."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

LINEAR = "linear_attention"
FULL = "full_attention"

_CHOICES: dict[str, tuple[str, ...]] = {
    "gate": ("channel", "head", "none"),
    "gate_bias_init": ("zeros", "spread"),
    "state_heads": ("query", "kv"),
}


@strict
class LawcatConfig(PreTrainedConfig):
    r"""Configuration of [`LawcatForCausalLM`].

    The first group of fields is the teacher's and keeps its meaning (see `LlamaConfig`). The second group is the
    operator of LAWCAT (arXiv 2509.18467); each variant the paper discusses is one field.

    Args:
        teacher_model_type: Family of the teacher, `"llama"` or `"mistral"`: a row of `lawcat.convert.families`.
        layer_types: Per layer `"linear_attention"` or `"full_attention"` (the teacher's softmax attention kept).
            `None` makes every layer linear.
        feature_dim: Width F of the feature map's output, even. `None` means `head_dim`.
        use_conv: Causal convolution across tokens on q and k.
        conv_kernel_size: Number of taps K of that convolution, at least 2.
        use_normalizer: Divide by the decayed sum of weights, so that the weights of past tokens sum to one.
        normalizer_eps: Added to that sum before dividing.
        gate: `"channel"` (one decay a feature channel), `"head"` (one a head) or `"none"` (no decay).
        gate_rank: Inner width of the gate's two-matrix projection.
        gate_divisor: `log a = logsigmoid(logit) / gate_divisor`.
        gate_bias_init: `"zeros"`, or `"spread"`: from 0 to 8 over the channels, half-lives from 16 tokens to
            beyond 30,000.
        min_log_decay: Lower bound of `log a` a token, negative: keeps the chunked form in float32's range.
        linear_rope: Apply the teacher's rotary embedding to q and k of linear layers too. The paper finds that this
            prevents length generalisation.
        state_heads: `"query"`: a state a query head, as in the paper. `"kv"`: convolution, map and gate of k are per
            kv head, so that the state is smaller by the group size.

    Raises:
        ValueError: for a value outside what is stated above, naming the field, the value and what is allowed.

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
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False

    # The operator's.
    layer_types: list[str] | None = None
    feature_dim: int | None = None
    use_conv: bool = True
    conv_kernel_size: int = 4
    use_normalizer: bool = True
    normalizer_eps: float = 1e-6
    gate: str = "channel"
    gate_rank: int = 16
    gate_divisor: float = 16.0
    gate_bias_init: str = "spread"
    min_log_decay: float = -5.0
    linear_rope: bool = False
    state_heads: str = "query"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.feature_dim is None:
            self.feature_dim = self.head_dim
        if self.layer_types is None:
            self.layer_types = [LINEAR] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def num_state_heads(self) -> int:
        """Heads N that keep a state of their own: the query heads, or the kv heads."""
        heads = self.num_attention_heads if self.state_heads == "query" else self.num_key_value_heads
        assert heads is not None
        return heads

    def validate_architecture(self) -> None:
        """Refuse values that contradict each other. Called by transformers after every construction."""
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not a choice; use one of {', '.join(map(repr, allowed))}.")
        kv_heads = self.num_key_value_heads
        if kv_heads is not None and self.num_attention_heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads={kv_heads}."
            )
        layer_types = self.layer_types
        if layer_types is not None:
            if len(layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"layer_types has {len(layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                    "give one a layer."
                )
            unknown = sorted(set(layer_types) - {LINEAR, FULL})
            if unknown:
                raise ValueError(f"layer_types holds {unknown[0]!r}; use {LINEAR!r} or {FULL!r}.")
        if self.feature_dim is not None and (self.feature_dim < 2 or self.feature_dim % 2):
            raise ValueError(f"feature_dim={self.feature_dim} must be an even number of at least 2.")
        if self.head_dim is not None and self.feature_dim is not None and self.feature_dim > 2 * self.head_dim:
            raise ValueError(
                f"feature_dim={self.feature_dim} is more than twice head_dim={self.head_dim}: the map starts as the "
                "first feature_dim/2 columns of the identity, which has head_dim columns."
            )
        if self.conv_kernel_size < 2:
            raise ValueError(
                f"conv_kernel_size={self.conv_kernel_size} must be at least 2; for no convolution set use_conv=False."
            )
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank={self.gate_rank} must be at least 1; for no gate set gate='none'.")
        for name in ("normalizer_eps", "gate_divisor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.min_log_decay >= 0:
            raise ValueError(f"min_log_decay={self.min_log_decay} must be below 0 (natural logarithm of a decay).")



__all__ = ["FULL", "LINEAR", "LawcatConfig"]
