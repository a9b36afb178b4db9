from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lawcat.tasks.haystack import builtin_source

MISTRAL = Path(__file__).parents[3] / "shared/data/tokenizers/mistral-7b-v0.1"


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with single digits and a BOS, as Llama's: 1,500 tokens, trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_source().text[:40_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="session")
def mistral():
    if not MISTRAL.is_dir():
        pytest.skip("Mistral's tokenizer is not at hand")
    try:
        return AutoTokenizer.from_pretrained(MISTRAL)
    except (ImportError, ValueError) as error:
        pytest.skip(f"Mistral's tokenizer cannot be read here: {error}")
