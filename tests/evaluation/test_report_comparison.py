import pytest

from lawcat.evaluation.comparison import compare_models, comparison_notes
from lawcat.evaluation.report import markdown_report


def results(name, shares, kind=None, **changes):
    """`shares`: (accuracy, low, high) by length, in percent."""
    cells = [
        {
            "task": "passkey",
            "length": length,
            "samples": 100,
            "errors": 0,
            "metric": "accuracy",
            "accuracy": None if values is None else values[0] / 100,
            "ci95": None if values is None else [values[1] / 100, values[2] / 100],
            "options": {},
        }
        for length, values in shares.items()
    ]
    payload = {"schema": 1, "model": name, "seed": 0, "results": cells, **changes}
    return payload | ({"kind": kind} if kind else {})


# Behind at 1K and apart from it at 2K; level at 4K; ahead at 8K and apart at 16K.
STUDENT = {
    1024: (90, 82, 95),
    2048: (70, 60, 78),
    4096: (70, 60, 78),
    8192: (60, 50, 69),
    16384: (50, 40, 60),
}
TEACHER = {1024: (96, 90, 98), 2048: (95, 89, 98), 4096: (70, 60, 78), 8192: (55, 45, 64), 16384: (0, 0, 4)}


def test_first_beats_and_first_loses():
    (found,) = compare_models(
        [results("student", STUDENT, "student"), results("teacher", TEACHER, "teacher")]
    )
    assert (found.task, found.model, found.baseline) == ("passkey", "student", "teacher")
    assert (found.first_loses, found.first_behind) == (2048, 1024)
    assert (found.first_beats, found.first_ahead) == (16384, 8192)
    assert [round(one.points) for one in found.differences] == [-6, -25, 0, 5, 50]
    assert [one.apart for one in found.differences] == [False, True, False, False, True]


def test_intervals_that_touch_are_not_apart():
    upper = results("upper", {1024: (80, 70, 90)})
    (touching,) = compare_models([results("lower", {1024: (60, 50, 70)}), upper])
    assert (touching.first_beats, touching.first_ahead) == (None, 1024)
    (apart,) = compare_models([results("lower", {1024: (60, 50, 69.9)}), upper])
    assert apart.first_beats == 1024


def test_lengths_of_one_model_alone_and_crashed_cells_are_left_out():
    ours = results("student", {512: (90, 80, 95), 1024: None, 2048: (90, 80, 95)}, "student")
    (found,) = compare_models([results("teacher", TEACHER), ours])
    assert [one.length for one in found.differences] == [2048]
    assert (
        compare_models([results("teacher", {1024: (5, 1, 9)}), results("student", {2048: (5, 1, 9)})]) == []
    )


@pytest.mark.parametrize(
    ("kinds", "pairs"),
    [
        ((None, None, None), [("b", "a"), ("c", "a")]),
        (("teacher", "baseline", "student"), [("c", "a"), ("c", "b")]),
        (("student", "teacher", "student"), [("a", "b"), ("a", "c"), ("c", "b")]),
        (("student", "student", "student"), [("b", "a"), ("c", "a")]),
    ],
)
def test_students_against_baselines_or_else_all_against_the_first(kinds, pairs):
    payloads = [results(name, TEACHER, kind) for name, kind in zip("abc", kinds, strict=True)]
    assert [(one.model, one.baseline) for one in compare_models(payloads)] == pairs


def test_it_is_said_when_models_were_asked_other_questions():
    teacher, student = results("teacher", {1024: (5, 1, 9)}), results("student", {1024: (5, 1, 9)})
    assert comparison_notes([teacher, student]) == []
    assert comparison_notes([teacher, student | {"seed": 1}]) == [
        "student and teacher were asked different questions: their seeds are 1 and 0."
    ]
    student["results"][0]["errors"] = 3
    assert comparison_notes([teacher, student]) == [
        "student and teacher were asked 103 and 100 questions of passkey at 1K."
    ]
    student["results"][0]["options"] = {"depth": "random"}
    assert comparison_notes([teacher, student]) == [
        "student and teacher were asked different questions: options of passkey at 1K differ."
    ]


def test_markdown_has_the_table():
    page = markdown_report([results("teacher", TEACHER), results("student", STUDENT)])
    assert "| student | teacher | 16K | 2K | 8K | 1K |" in page
    assert "- | passkey" not in page
    assert "## Where each first beats and first loses" not in markdown_report([results("one", TEACHER)])
