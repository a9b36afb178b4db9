import pytest
import torch
from tiny_models import tiny_lawcat, tiny_llama, tiny_mamba, tiny_mistral
from transformers import GenerationConfig, LlamaForCausalLM

from lawcat.evaluation.answering import answer_prompts, reads_in_pieces
from lawcat.evaluation.memory import CacheSize, MemoryPlan, measure_cache, plan_memory
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


@pytest.mark.parametrize("kind", ["llama", "lawcat", "hybrid", "sliding"])
def test_the_tokens_are_those_of_generate(tokenizer, kind):
    model = MODELS[kind]()
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        settings = GenerationConfig(do_sample=False, max_new_tokens=9, pad_token_id=0)
        said = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
    # Rows end at different times, so that the batch loses them one after another.
    ends = {0: 2, 1: 9, 2: 5}
    answers = answer_prompts(
        model,
        tokenizer,
        rows,
        max_new_tokens=9,
        prefill_chunk_tokens=100,
        is_answered=lambda row, text: text == tokenizer.decode(said[row, : ends[row]]),
    )
    assert [answer.num_tokens for answer in answers] == [2, 9, 5]
    assert texts(answers) == [tokenizer.decode(said[row, :end]) for row, end in ends.items()]


def shapes_of_calls(model):
    shapes = []
    reads_in_pieces(model)  # which is tried once, by calls of its own
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_answered_rows_leave_the_batch(tokenizer, model):
    shapes = shapes_of_calls(model)
    answer_prompts(
        model,
        tokenizer,
        ["The grass", "The sky", "The sun", "Here"],
        max_new_tokens=6,
        is_answered=lambda row, text: row < 3,
    )
    assert [rows for rows, _ in shapes] == [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("kind", "widest"), [("llama", 6), ("lawcat", 20), ("hybrid", 6)])
def test_pieces_are_bounded_over_all_rows(tokenizer, kind, widest):
    """Softmax layers make a mask of rows x tokens read x tokens seen; linear ones make none."""
    model = MODELS[kind]()
    rows = [[5] * 90, [6] * 80, [7] * 90]
    shapes = shapes_of_calls(model)
    answer_prompts(model, tokenizer, rows, max_new_tokens=1, prefill_chunk_tokens=60, mask_entries=6 * 3 * 90)
    assert max(columns for _, columns in shapes) == widest
    assert sum(columns for _, columns in shapes) == 90
    shapes.clear()
    # A first piece without padding needs no mask.
    answer_prompts(model, tokenizer, [[5] * 90], max_new_tokens=1, prefill_chunk_tokens=60, mask_entries=540)
    assert shapes[0] == (1, 60)
    assert max(columns for _, columns in shapes[1:]) == min(widest, 6) if kind != "lawcat" else 30


def test_what_is_kept_of_a_prompt(tokenizer):
    ids = [[5] * 40, [6] * 40]
    (answer, _) = answer_prompts(tiny_llama(), tokenizer, ids, max_new_tokens=3)
    assert (
        answer.state_bytes == 40 * 2 * 2 * 2 * 8 * 4
    )  # tokens, layers, keys and values, heads, width, bytes
    model = tiny_lawcat()
    states = [
        answer_prompts(model, tokenizer, [[5] * tokens], max_new_tokens=1)[0].state_bytes
        for tokens in (10, 80)
    ]
    # Of each layer: a state of 4 heads, 8 features and 8 + 1 values; 3 inputs of 64 channels' convolutions.
    assert states == [2 * 4 * (4 * 8 * 9 + 3 * 64)] * 2


def test_a_prompt_of_no_tokens_is_refused(tokenizer, model):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        answer_prompts(model, tokenizer, ["The grass", ""], max_new_tokens=1)


def test_what_a_model_keeps_is_measured():
    assert measure_cache(tiny_llama()) == CacheSize(0, 2 * 2 * 2 * 8 * 4)
    size = measure_cache(tiny_lawcat())
    assert size.token_bytes == 0
    assert size.bytes_at(10) == size.bytes_at(10**6) == 2 * 4 * (4 * 8 * 9 + 3 * 64)
    # Beyond its window of 24 tokens it keeps no more.
    assert measure_cache(tiny_mistral(), (60, 90)).token_bytes == 0
    broken = tiny_llama()
    broken.register_forward_pre_hook(lambda *_: 1 / 0)
    assert measure_cache(broken) is None


def test_rows_of_a_batch_by_memory():
    plan = MemoryPlan(
        batch_tokens=100_000,
        max_rows=64,
        cache=CacheSize(1000, 10),
        cache_bytes=1_000_000,
        prefill_chunk_tokens=1,
        mask_entries=1,
    )
    assert [plan.rows(tokens) for tokens in (0, 100, 3_000, 20_000, 10**6)] == [64, 64, 32, 4, 1]
    constant, growing = plan_memory(tiny_lawcat()), plan_memory(tiny_llama())
    assert constant.rows(16_000) > growing.rows(16_000) == 1
    assert plan_memory(tiny_lawcat(), batch_tokens=500).rows(100) == 5


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
