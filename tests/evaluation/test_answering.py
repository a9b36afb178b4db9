import pytest
import torch
from tiny_models import tiny_lawcat, tiny_llama, tiny_mamba, tiny_mistral
from transformers import GenerationConfig, LlamaForCausalLM

from lawcat.evaluation.answering import answer_prompts, reads_in_pieces
from lawcat.tasks import passkey_text

PROMPTS = [passkey_text("31415", 40, 90), passkey_text("9", 10, 70), passkey_text("27182", 150, 60)]


MODELS = {
    "llama": tiny_llama,
    "lawcat": tiny_lawcat,
    "hybrid": lambda: tiny_lawcat(layer_types=["linear_attention", "full_attention"]),
    "sliding": tiny_mistral,
    "mamba": tiny_mamba,
}


def texts(answers):
    return [answer.text for answer in answers]


@pytest.mark.filterwarnings("ignore:MambaForCausalLM does not go on")
@pytest.mark.parametrize("kind", MODELS)
def test_batches_and_pieces_change_nothing(tokenizer, kind):
    model = MODELS[kind]()
    alone = [answer_prompts(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert len({answer.text for answer in alone}) > 1
    assert {answer.num_tokens for answer in alone} == {6}
    for chunk in (4096, 64, 50, 7):
        assert (
            answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=6, prefill_chunk_tokens=chunk) == alone
        )


def test_a_model_that_forgets_is_read_at_once(tokenizer):
    """Some recurrent models start anew when several tokens come with a cache, and say nothing."""

    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            if input_ids.shape[1] > 1:
                kwargs |= {"attention_mask": None, "position_ids": None}
                past_key_values = None
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    honest = tiny_llama()
    forgetful = Forgetful(honest.config).eval()
    forgetful.load_state_dict(honest.state_dict())
    whole = answer_prompts(honest, tokenizer, PROMPTS[:1], max_new_tokens=6)
    with pytest.warns(UserWarning, match="Forgetful does not go on from its cache"):
        assert (
            answer_prompts(forgetful, tokenizer, PROMPTS[:1], max_new_tokens=6, prefill_chunk_tokens=50)
            == whole
        )
    assert reads_in_pieces(honest)


def test_answers_are_those_of_a_plain_greedy_loop(tokenizer, model):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    (answer,) = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=6, prefill_chunk_tokens=16)
    assert answer.text == tokenizer.decode(ids[0, start:])


def test_an_answer_ends_when_it_is_out_and_the_others_go_on(tokenizer, model):
    whole = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=8)
    asked = []

    def is_answered(row, text):
        asked.append(row)
        return row == 1 and asked.count(1) == 3

    answers = answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=8, is_answered=is_answered)
    assert [answer.num_tokens for answer in answers] == [8, 3, 8]
    assert whole[1].text.startswith(answers[1].text)
    assert (answers[0], answers[2]) == (whole[0], whole[2])
    assert asked.count(1) == 3

    (stopped,) = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=8, is_answered=lambda *_: True)
    assert stopped.num_tokens == 1


def test_the_models_own_end_token_ends_an_answer(tokenizer, model):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    first = int(model(ids).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [499, first]
    (answer,) = answer_prompts(model, tokenizer, PROMPTS[:1], max_new_tokens=6)
    assert (answer.text, answer.num_tokens) == ("", 0)


def test_generation_settings_of_the_model_are_put_aside_and_back(tokenizer, model):
    plain = texts(answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=6))
    settings = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=20
    )
    model.generation_config = settings
    model.train()
    assert texts(answer_prompts(model, tokenizer, PROMPTS, max_new_tokens=6)) == plain
    assert model.generation_config is settings
    assert model.training
