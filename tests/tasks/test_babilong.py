"""BABILong: the prompts and the metric of the benchmark, and facts scattered over noise."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from pathlib import Path
from statistics import mean

import pytest
from transformers import ByT5Tokenizer

from lawcat.errors import ConfigurationError, DataError
from lawcat.tasks import (
    Sample,
    TextSource,
    babilong_training_label,
    babilong_training_pair,
    babilong_training_pairs,
    builtin_source,
    encode_pair,
    encode_pairs,
    get_task,
    held_out,
)
from lawcat.tasks.babi import BABI_TASKS, PLACES, parse_fact
from lawcat.tasks.babi_solver import solve
from lawcat.tasks.babilong import babilong_prompt
from lawcat.tasks.haystack import NOISE_SENTENCE

TASKS = [get_task(f"babilong_{qa}") for qa in BABI_TASKS]
QA1, QA2, QA3, QA4, QA5 = TASKS
EXCERPT = Path(__file__).parent / "babilong_metric.jsonl"
PLACE = "|".join(PLACES)
SHARED = Path(__file__).parents[3] / "shared/data"


def context_of(prompt: str) -> str:
    return prompt.rsplit("<context>\n", 1)[1].rsplit("\n</context>", 1)[0]


def facts_in(context: str) -> list[str]:
    """Return the facts, found by their form among the noise."""
    found = []
    for piece in re.findall(
        r"[A-Z][a-z]+ (?:[a-z]+ )+(?:the )?[a-z]+(?: to [A-Z][a-z]+)?(?: there)?\.", context
    ):
        try:
            parse_fact(piece)
        except DataError:
            continue
        found.append(piece)
    return found


def test_the_prompt_is_the_benchmarks():
    assert babilong_prompt("qa2", "John went to the office.", "Where is the milk? ") == (
        "I give you context with the facts about locations and actions of different persons hidden in some "
        "random text and a question.You need to answer the question based only on the information from the "
        "facts.\nIf a person got an item in the first location and travelled to the second location the item "
        "is also in the second location. If a person dropped an item in the first location and moved to the "
        "second location the item remains in the first location.\n\n<example>\nCharlie went to the kitchen. "
        "Charlie got a bottle. Charlie moved to the balcony. Where is the bottle?\nAnswer: The bottle is in "
        "the balcony.\n</example>\n<example>\nAlan moved to the garage. Alan got a screw driver. Alan moved "
        "to the kitchen. Where is the screw driver?\nAnswer: The screw driver is in the kitchen.\n</example>"
        "\n\nAlways return your answer in the following format: The ’item’ is in ’location’. Do not write "
        "anything else after that.\n\n<context>\nJohn went to the office.\n</context>\n\n"
        "Question: Where is the milk?"
    )
    for qa in BABI_TASKS:
        assert babilong_prompt(qa, "{x}", "Q?").endswith("<context>\n{x}\n</context>\n\nQuestion: Q?")


def test_the_prompts_are_those_of_the_repository():
    path = SHARED / "babilong/prompts_qa1-5.json"
    if not path.is_file():
        pytest.skip("BABILong's prompts are not at hand")
    given = json.loads(path.read_text(encoding="utf-8"))
    for qa in BABI_TASKS:
        parts = given["prompts"][qa]
        expected = given["template"].format(context="C", question="Q", **parts)
        assert babilong_prompt(qa, "C", "Q") == expected


def wrong_verdicts(path):
    wrong, seen = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        task = get_task(f"babilong_{row['task']}")
        sample = Sample(task.name, 0, 0, 0, "", (row["target"],), 20, 1, None, {"question": row["question"]})
        verdict = task.score(sample, row["output"])["accuracy"]
        seen.append(verdict)
        if bool(verdict) != row["correct"]:
            wrong.append(row)
        # Stopping as soon as it is said that one may never changes the verdict.
        output = row["output"]
        end = next((n for n in range(len(output)) if task.is_answered(sample, output[:n])), len(output))
        if task.score(sample, output[:end])["accuracy"] != verdict:
            wrong.append({**row, "end": end})
    return wrong, seen


def test_the_metric_on_real_answers():
    wrong, seen = wrong_verdicts(EXCERPT)
    assert not wrong
    assert 10 < sum(seen) < len(seen) - 10


def test_the_metric_on_all_real_answers_at_hand():
    path = SHARED / "babilong/metric_golden.jsonl"
    if not path.is_file():
        pytest.skip("BABILong's real answers are not at hand")
    wrong, seen = wrong_verdicts(path)
    assert not wrong
    assert len(seen) == 1500


@pytest.mark.parametrize(
    ("text", "right", "over"),
    [
        (" in the Office", True, False),
        (" in the office.", True, True),
        (" in the office. Or the garden", True, True),
        (" in the office or the garden", False, True),
        (" in the office<example>garden", True, True),
        (" from the kitchen to the office", True, False),
        (" in the hall", False, False),
        ("", False, False),
        (".office", False, True),
        ("office\nQuestion: Where? garden", False, True),
    ],
)
def test_the_metric(text, right, over):
    question = {"question": "Where was the milk before the kitchen?"}
    sample = Sample("babilong_qa3", 0, 0, 0, "", ("office",), 20, 1, None, question)
    assert QA3.score(sample, text) == {"accuracy": float(right)}
    assert QA3.is_answered(sample, text) is over


def test_people_and_objects_are_labels_of_qa5():
    sample = Sample("babilong_qa5", 0, 0, 0, "", ("Jeff",), 20, 1, None, {"question": "Who gave the milk?"})
    assert QA5.score(sample, "Answer: JEFF gave the milk")["accuracy"] == 1
    assert QA5.score(sample, "Answer: Jeff gave it to Bill")["accuracy"] == 0
    assert QA5.score(sample, "Answer: Jeff in the office")["accuracy"] == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [0, 1000, 2048])
def test_facts_keep_their_order_and_answer_the_question(tokenizer, task, length):
    for index in range(4):
        made = task.generate(tokenizer, length, index, 0)
        context = context_of(made.prompt)
        facts = facts_in(context)
        assert len(facts) == made.metadata["facts"]
        solution = solve(facts, made.metadata["question"])
        assert (solution.answer,) == made.answers
        assert made.prompt.endswith(f"Question: {made.metadata['question']}")
        assert made.num_tokens == len(tokenizer(made.prompt).input_ids)
        assert made.max_new_tokens == 20
        first = facts[min(solution.supports)]
        assert any(
            context.startswith(first, m.start()) and m.start() / len(context) == made.depth
            for m in re.finditer(re.escape(first), context)
        )
        if length == 0:
            assert context == " ".join(facts)
        else:
            assert len(facts) + 1 <= (length - 300) // 8
            tokens = len(tokenizer(f" {context}", add_special_tokens=False).input_ids)
            assert length - 300 - 6 <= tokens <= length - 300 + 6


def test_noise_is_sentences_of_the_text_in_their_order(tokenizer):
    text = " ".join(
        f"Mr. Number {n} went down to the river and said nothing at all today." for n in range(900)
    )
    made = QA1.generate(tokenizer, 2048, 1, 0, noise=TextSource("rivers", text))
    rest = context_of(made.prompt)
    for fact in facts_in(rest):
        rest = rest.replace(fact, "", 1)
    # Untrained, so that "Mr." ends a sentence; that is shorter than ten tokens and left out.
    assert "Mr." not in rest
    numbers = [int(number) for number in re.findall(r"Number (\d+) went", rest)]
    assert len(numbers) > 30
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert made.metadata["noise_sentences"] in (len(numbers), len(numbers) + 1)
    starts = {context_of(QA1.generate(tokenizer, 2048, n, 0).prompt)[-200:] for n in range(5)}
    assert len(starts) == 5


def test_facts_are_spread_over_all_of_the_noise(tokenizer):
    places = []
    for index in range(60):
        context = context_of(QA2.generate(tokenizer, 1500, index, 0).prompt)
        facts = facts_in(context)
        places += [context.index(fact) / len(context) for fact in facts]
    assert mean(places) == pytest.approx(0.47, abs=0.05)
    assert {int(10 * place) for place in places} == set(range(10))


def test_a_short_text_comes_round_again(tokenizer):
    source = TextSource("short", "Nothing of any importance ever happens in this little town. " * 20)
    made = QA1.generate(tokenizer, 2000, 0, 0, noise=source)
    assert made.metadata["haystack_repeats"] > 2
    assert QA1.generate(tokenizer, 2000, 0, 0).metadata["haystack_repeats"] == 0
    noisy = QA1.generate(tokenizer, 1000, 0, 0, noise="noise")
    assert noisy.prompt.count(NOISE_SENTENCE) >= 8
    for text in ("", "Short. " * 500, "word"):
        with pytest.raises(DataError, match="no sentence of 10 tokens"):
            QA1.generate(tokenizer, 1000, 0, 0, noise=TextSource("bad", text))


def test_texts_are_named_in_the_options():
    options = QA1.resolve_options({})
    assert options["noise"].name == builtin_source().name
    assert (options["babi"], options["length_tokenizer"]) == (None, None)


def test_same_arguments_same_sample(tokenizer):
    one = QA2.generate(tokenizer, 1000, 3, 5)
    assert one == QA2.generate(tokenizer, 1000, 3, 5)
    prompts = {QA2.generate(tokenizer, 0, index, seed).prompt for index in range(4) for seed in range(4)}
    assert len(prompts) == 16


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_a_question_of_evaluation(tokenizer, task):
    # The stories of qa1 and qa4 are so short that other seeds alone would often make the same.
    def belongs(prompt):
        question = prompt.rsplit("\n\nQuestion: ", 1)[1]
        return held_out("\n".join([*facts_in(context_of(prompt)), question]))

    for index in range(25):
        assert belongs(task.generate(tokenizer, 0, index, 0).prompt)
        assert belongs(task.generate(tokenizer, 1500, index, 0).prompt)
        assert not belongs(task.generate(tokenizer, 0, index, 0, split="train").prompt)
        assert not belongs(babilong_training_pair(tokenizer, 1500, index, 0, qa=task.qa)[0])


def test_what_a_length_holds(tokenizer):
    for length in (-1, 1, 300, 323, True, 2.5):
        with pytest.raises((DataError, ConfigurationError), match=r"at least (324|1)"):
            QA1.generate(tokenizer, length, 0, 0)
    assert QA1.generate(tokenizer, 324, 0, 0).metadata["facts"] == 2
    with pytest.raises(DataError, match="stories of qa3 none is as short as the 3 lines"):
        QA3.generate(tokenizer, 324, 0, 0)
    short = [QA3.generate(tokenizer, 600, index, 0).metadata["facts"] for index in range(10)]
    assert max(short) < 37


def test_published_files(tokenizer, tmp_path):
    text = "".join(
        f"1 Mary went to the {place}.\n2 John went to the office.\n3 Where is Mary? \t{place}\t1\n"
        for place in ("garden", "kitchen", "hallway")
    )
    (tmp_path / "qa1_single_train.txt").write_text(text, encoding="utf-8")
    folder = str(tmp_path)
    made = [QA1.generate(tokenizer, 0, index, 0, babi=folder) for index in range(3)]
    assert sorted(one.answers[0] for one in made) == ["garden", "hallway", "kitchen"]
    assert made[0].metadata["stories"] == "qa1_single_train.txt"
    assert "qa1_single_train.txt" in str(QA1.resolve_options({"babi": folder})["babi"].describe())
    resolved = QA1.resolve_options({"babi": folder})
    assert QA1.generate(tokenizer, 0, 1, 0, **resolved) == made[1]
    orders = {
        tuple(QA1.generate(tokenizer, 0, i, seed, babi=folder).answers[0] for i in range(3))
        for seed in range(9)
    }
    assert len(orders) > 1
    with pytest.raises(DataError, match=r"has 3 questions for this length, and sample 4 was asked for"):
        QA1.generate(tokenizer, 0, 3, 0, babi=folder)
    with pytest.raises(ConfigurationError, match="for evaluation"):
        QA1.generate(tokenizer, 0, 0, 0, babi=folder, split="train")
    with pytest.raises(DataError, match=r"holds no qa2_\*_train.txt"):
        QA2.generate(tokenizer, 0, 0, 0, babi=folder)


def test_all_published_questions(tokenizer):
    folder = SHARED / "babi/en-1k"
    if not folder.is_dir():
        pytest.skip("the published bAbI files are not at hand")
    # The benchmark keeps 862 of 1,000 questions of qa3 at 1K, of other stories.
    for count in (845, 900):
        try:
            QA3.generate(tokenizer, 1000, count, 0, babi=str(folder))
        except DataError as error:
            kept = int(re.search(r"has (\d+) questions", str(error)).group(1))
            assert count == 900
            assert kept == pytest.approx(868, abs=8)
        else:
            assert count == 845
    options = QA2.resolve_options({"babi": folder})
    made = [QA2.generate(tokenizer, 0, index, 0, **options) for index in range(1000)]
    rule = mean(QA2.score(one, QA2.rule_answers(one)["last place named"])["accuracy"] for one in made)
    assert rule == pytest.approx(0.396, abs=0.02)


@pytest.mark.parametrize(
    ("task", "samples", "wanted"), [(QA1, 400, 0.546), (QA2, 400, 0.396), (QA3, 200, 0.342)]
)
def test_the_last_place_named(tokenizer, task, samples, wanted):
    """As often right as on the published stories."""
    made = [task.generate(tokenizer, 0, index, 0) for index in range(samples)]
    answers = [task.rule_answers(one) for one in made]
    assert all(set(one) <= {"last place named"} for one in answers)
    right = [
        bool(answer) and task.score(one, answer["last place named"])["accuracy"] == 1
        for one, answer in zip(made, answers, strict=True)
    ]
    assert mean(right) == pytest.approx(wanted, abs=0.05)


def test_rules_look_at_the_facts_only(tokenizer):
    lines = ["1 Mary went to the garden.", "2 John went to the office."]
    story = "\n".join([*lines, "3 Where was the milk before the office? \tgarden\t1"])
    noise = TextSource("n", "They all met in the kitchen of the house again. " * 30)
    made = QA3.generate(tokenizer, 1000, 0, 0, babi=TextSource("x", story), noise=noise)
    assert "kitchen" in context_of(made.prompt)
    assert QA3.rule_answers(made) == {"last place named": "garden"}
    lines = ["1 Bill gave the milk to Jeff.", "2 Who gave the milk? \tBill\t1"]
    story = "\n".join([*lines, "3 What did Bill give to Jeff? \tmilk\t1"])
    given = [QA5.generate(tokenizer, 0, index, 0, babi=TextSource("y", story)) for index in (0, 1)]
    assert {tuple(QA5.rule_answers(one).items()) for one in given} == {
        (("last person or object named", "Jeff"),),
        (("last person or object named", "milk"),),
    }


@pytest.mark.parametrize("sentence", [3000, 40])
def test_sentences_longer_than_the_window_are_cut(tokenizer, sentence):
    noise = TextSource("long", ("and they walked on " * sentence + "home. ") * 3)
    for index in range(4):
        made = QA1.generate(tokenizer, 1500, index, 0, noise=noise)
        tokens = len(tokenizer(f" {context_of(made.prompt)}", add_special_tokens=False).input_ids)
        assert 1194 <= tokens <= 1206


@pytest.mark.parametrize("qa", BABI_TASKS)
def test_training_pairs(tokenizer, qa):
    text = builtin_source().text
    task, plain, full = get_task(f"babilong_{qa}"), 0, 0
    for index in range(24):
        prompt, answer = babilong_training_pair(tokenizer, 900, index, 0, qa=qa, text=text)
        tokens, start = encode_pair(tokenizer, prompt, answer)
        assert len(tokens) <= 900
        assert tokenizer.decode(tokens[start:]) == answer
        question = prompt.rsplit("Question: ", 1)[1]
        facts = facts_in(context_of(prompt))
        solution = solve(facts, question)
        sample = Sample(task.name, 0, 0, 0, "", (solution.answer,), 20, 1, None, {"question": question})
        assert task.score(sample, answer)["accuracy"] == 1
        assert prompt == babilong_prompt(qa, context_of(prompt), question)
        plain += context_of(prompt) == " ".join(facts)
        full += len(tokens) > 890
    assert plain >= 1
    assert 6 <= full <= 20
    again = babilong_training_pair(tokenizer, 900, 3, 0, qa=qa, text=text)
    assert again == babilong_training_pair(tokenizer, 900, 3, 0, qa=qa, text=text)


@pytest.mark.parametrize(
    ("qa", "form"),
    [
        ("qa1", r"\nAnswer: The most recent location of [A-Z]\w+ is \w+\."),
        ("qa2", r"\nAnswer: The (apple|football|milk) is in the \w+\."),
        ("qa3", r"\nAnswer: Before the \w+ the (apple|football|milk) was in the \w+\."),
        ("qa4", r"\nAnswer: [a-z]+"),
        ("qa5", r"\nAnswer: \w+"),
    ],
)
def test_training_answers_have_the_form_that_is_asked_for(tokenizer, qa, form):
    for index in range(5):
        assert re.fullmatch(form, babilong_training_pair(tokenizer, 900, index, 0, qa=qa)[1])


def test_training_pairs_filled_up_or_with_little_room(tokenizer):
    rng = random.Random(0)
    for index in range(20):
        tokens = rng.randint(600, 3000)
        prompt, answer = babilong_training_pair(tokenizer, tokens, index, 0, qa="qa3", fill=True)
        assert tokens - 12 <= len(tokenizer(prompt + answer).input_ids) <= tokens
    with pytest.raises(DataError, match=r"100 tokens cannot hold BABILong's prompt of qa1 and a story"):
        babilong_training_pair(tokenizer, 100, 0, 0, qa="qa1")
    with pytest.raises(ConfigurationError, match=r"qa is 'qa6'"):
        babilong_training_pair(tokenizer, 900, 0, 0, qa="qa6")


@pytest.mark.parametrize("qa", BABI_TASKS)
def test_the_label_of_a_training_answer(tokenizer, qa):
    for index in range(6):
        for prompt, answer in babilong_training_pairs(tokenizer, 1000, index, 4, qa=qa, questions=6):
            first, last = babilong_training_label(answer)
            question = prompt.rsplit("Question: ", 1)[1]
            # All before it follows from the question; nothing but a full stop comes after it.
            assert answer[first:last] in get_task(f"babilong_{qa}").labels or qa == "qa5"
            assert answer[first:last].lower() not in question.lower()
            assert answer[last:] in ("", ".")
            assert re.match(r"\nAnswer: ", answer[:first])
            words = re.findall(r"\w+", answer[9:first].lower())
            said = {"the", "is", "in", "before", "was", "most", "recent", "location", "of"}
            assert {*words} <= {*re.findall(r"\w+", question.lower()), *said}


def test_no_label():
    for text in ("", "\nAnswer: ", "office!"):
        with pytest.raises(ConfigurationError, match="is no answer of babilong_training_pairs"):
            babilong_training_label(text)


def test_shares_of_noise(tokenizer):
    def of(shares, tokens=900, **options):
        made = [
            babilong_training_pairs(tokenizer, tokens, i, 0, qa="qa1", noise_shares=shares, **options)[0]
            for i in range(40)
        ]
        plain = [context_of(prompt) == " ".join(facts_in(context_of(prompt))) for prompt, _ in made]
        full = [len(tokenizer(prompt + answer).input_ids) > tokens - 10 for prompt, answer in made]
        return made, sum(plain), sum(full)

    assert of((0, 0, 1))[1:] == (40, 0)
    assert of((2, 0, 0))[1:] == (0, 40)
    _, plain, full = of((0, 1, 0))
    assert plain < 8
    assert full < 8
    _, plain, full = of((1, 1, 6))
    assert 20 <= plain < 40
    # Whatever the shares: the same stories, and all filled up where that is asked for.
    first, second = of((8, 6, 2))[0], of((0, 0, 1))[0]
    assert (
        first
        == of((4, 3, 1))[0]
        == [babilong_training_pair(tokenizer, 900, i, 0, qa="qa1") for i in range(40)]
    )
    assert [facts_in(context_of(one)) for one, _ in first] == [facts_in(context_of(one)) for one, _ in second]
    assert of((0, 0, 1), fill=True)[1:] == (0, 40)
    for shares in ((), (1, 1), (0, 0, 0), (1, -1, 1)):
        with pytest.raises(ConfigurationError, match=r"noise_shares is .*; give three numbers, none below 0"):
            babilong_training_pairs(tokenizer, 900, 0, 0, qa="qa1", noise_shares=shares)


def test_one_question_a_story_is_as_ever():
    """By a hash of what was given before there were further questions."""
    digest = hashlib.sha256()
    for qa in ("qa1", "qa2", "qa3"):
        for index in range(6):
            made = babilong_training_pair(ByT5Tokenizer(), 4000, index, 0, qa=qa, text=builtin_source().text)
            digest.update("|".join(made).encode())
    assert digest.hexdigest()[:16] == "8b7481898ae7f82b"


def test_further_questions_word_for_word():
    first, *further = babilong_training_pairs(ByT5Tokenizer(), 6000, 5, 0, qa="qa2", questions=4)
    assert first[0].endswith(
        "<context>\nSandra travelled to the hallway. Mary took the apple there. Daniel grabbed the milk "
        "there. Mary moved to the bathroom. Daniel journeyed to the kitchen. Daniel left the milk there. "
        "Sandra went back to the bedroom. Daniel took the milk there. Daniel put down the milk. John went "
        "back to the bathroom.\n</context>\n\nQuestion: Where is the milk?"
    )
    assert first[1] == "\nAnswer: The milk is in the kitchen."
    assert further == [
        ("\n\nQuestion: Where is the apple?", "\nAnswer: The apple is in the bathroom."),
        ("\n\nQuestion: Where is Sandra?", "\nAnswer: The most recent location of Sandra is bedroom."),
        ("\n\nQuestion: Where is John?", "\nAnswer: The most recent location of John is bathroom."),
    ]


FORMS = {
    "Where is [A-Z]": r"\nAnswer: The most recent location of (\w+) is \w+\.",
    "Where is the": r"\nAnswer: The (\w+) is in the \w+\.",
    "Where was the": r"\nAnswer: Before the \w+ the (\w+) was in the \w+\.",
    "Wh[ao]": r"\nAnswer: \w+()",
}


@pytest.mark.parametrize("qa", BABI_TASKS)
def test_every_further_answer_is_right(tokenizer, qa):
    text, counts = builtin_source().text, []
    for index in range(16):
        pairs = babilong_training_pairs(tokenizer, 1000, index, 3, qa=qa, text=text, questions=6)
        assert pairs == babilong_training_pairs(tokenizer, 1000, index, 3, qa=qa, text=text, questions=6)
        tokens, spans = encode_pairs(tokenizer, pairs)
        assert len(tokens) <= 1000
        assert [tokenizer.decode(tokens[start:end]) for start, end in spans] == [said for _, said in pairs]
        facts = facts_in(context_of(pairs[0][0]))
        asked = [prompt.rsplit("\n\nQuestion: ", 1)[1] for prompt, _ in pairs]
        assert len(set(asked)) == len(asked) <= 6
        for question, (prompt, said) in zip(asked, pairs, strict=True):
            assert not held_out("\n".join([*facts, question]))
            form = next(form for words, form in FORMS.items() if re.match(words, question))
            subject = re.fullmatch(form, said).group(1)
            assert not subject or re.search(rf"\b{subject}\b", question)
            assert re.findall(r"\w+", said)[-1] == solve(facts, question).answer
            assert prompt.endswith(f"\n\nQuestion: {question}")
        assert [prompt.startswith("\n\nQuestion: ") for prompt, _ in pairs[1:]] == [True] * (len(pairs) - 1)
        counts.append(len(pairs))
    assert max(counts) > 3
    # The first question and its facts are what a single one would be, unless the story became too long.
    alone = babilong_training_pair(tokenizer, 3000, 1, 3, qa=qa, text=text)
    first = babilong_training_pairs(tokenizer, 3000, 1, 3, qa=qa, text=text, questions=6)[0]
    assert facts_in(context_of(first[0])) == facts_in(context_of(alone[0]))
    assert (first[0].rsplit("\n", 1)[1], first[1]) == (alone[0].rsplit("\n", 1)[1], alone[1])


def test_the_tasks_own_questions_come_first(tokenizer):
    ranks = {"qa3": ["Where was", "Where is the", "Where is"], "qa2": ["Where is the", "Where is"]}
    for qa, starts in ranks.items():
        seen = set()
        for index in range(12):
            pairs = babilong_training_pairs(tokenizer, 2000, index, 0, qa=qa, questions=6)
            asked = [prompt.rsplit("Question: ", 1)[1] for prompt, _ in pairs]
            found = [next(n for n, start in enumerate(starts) if one.startswith(start)) for one in asked]
            assert found == sorted(found)
            seen |= set(found)
        assert seen == set(range(len(starts)))


def test_the_last_place_named_answers_no_more_often_than_in_evaluation(tokenizer, monkeypatch):
    # What is counted is facts and answers; the noise, and how long all of it is, takes the time.
    monkeypatch.setattr("lawcat.tasks.babilong._count_pairs", lambda *arguments: 0)
    for qa, wanted in (("qa2", 0.396), ("qa3", 0.342)):
        right: dict[bool, list[bool]] = {True: [], False: []}
        for index in range(250):
            pairs = babilong_training_pairs(tokenizer, 5000, index, 0, qa=qa, questions=3)
            facts = context_of(pairs[0][0])
            for number, (prompt, said) in enumerate(pairs):
                question = prompt.rsplit("Question: ", 1)[1]
                if number and not question.startswith("Where is the" if qa == "qa2" else "Where was"):
                    continue
                named = [place for place in re.findall(PLACE, facts) if place not in question]
                right[number == 0].append(named[-1:] == [re.findall(r"\w+", said)[-1]])
        assert mean(right[True]) <= wanted + 0.06
        assert mean(right[False]) < wanted


def test_further_questions_give_way_to_the_story(tokenizer):
    counts = []
    for tokens in range(500, 760, 20):
        pairs = babilong_training_pairs(tokenizer, tokens, 0, tokens, qa="qa2", questions=6)
        assert len(encode_pairs(tokenizer, pairs)[0]) <= tokens
        counts.append(len(pairs))
    assert min(counts) < max(counts)
    for questions in (0, -1, True, 1.5):
        with pytest.raises(
            ConfigurationError, match=r"questions is .*; it must be a whole number, at least 1"
        ):
            babilong_training_pairs(tokenizer, 900, 0, 0, qa="qa1", questions=questions)


def test_a_length_counted_by_another_tokenizer(tokenizer, tmp_path):
    with pytest.raises(ConfigurationError, match=r"length_tokenizer is '.*gone', which cannot be loaded"):
        QA1.generate(tokenizer, 1000, 0, 0, length_tokenizer=str(tmp_path / "gone"))
    tokenizer.save_pretrained(tmp_path / "same")
    made = QA1.generate(tokenizer, 1000, 0, 0, length_tokenizer=str(tmp_path / "same"))
    assert made == QA1.generate(tokenizer, 1000, 0, 0)


def test_a_tokenizer_that_puts_the_space_itself(mistral):
    for index in range(4):
        made = QA2.generate(mistral, 2000, index, 0)
        tokens = len(mistral(context_of(made.prompt), add_special_tokens=False).input_ids)
        assert tokens == pytest.approx(1700, abs=10)


def test_making_samples_is_quick(tokenizer):
    QA3.generate(tokenizer, 8192, 0, 0)
    start = time.process_time()
    for index in range(10):
        QA3.generate(tokenizer, 8192, index, 0)
    # 3.5 s for 100, with room for a slow machine.
    assert time.process_time() - start < 2
