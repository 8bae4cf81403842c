"""SQuAD's exact match and F1: cases by hand, by the official rules, and torchmetrics beside them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqs_pyro.errors import DataError
from sqs_pyro.tasks.squad import Answer, Question, exact_match, f1, figures, normalised, questions

COLUMNS = ("question", "context", "answers")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an   apple, a day. ", "apple day"),
        ("U.S.A.", "usa"),
        ("well-known", "wellknown"),
        ("theatre and Athens", "theatre and athens"),
        ("The", ""),
        ("Beyoncé’s", "beyoncé’s"),  # only ASCII punctuation goes
        ("1,000\n km", "1000 km"),
    ],
)
def test_normalised(given, expected):
    assert normalised(given) == expected


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "overlap"),
    [
        ("the Denver Broncos", ["Denver Broncos", "Carolina"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 * (1 * 0.5) / (1 + 0.5)),
        ("Denver Broncos of Colorado", ["Broncos of Denver"], 0, 2 * (3 / 4 * 1) / (3 / 4 + 1)),
        (
            "a b b",
            ["b b b"],
            0,
            2 * (1 * 2 / 3) / (1 + 2 / 3),
        ),  # counted as often as they stand there, "a" is no word
        ("Carolina", ["Denver Broncos", "Carolina Panthers"], 0, 2 / 3),  # the best of several
        ("", ["Denver"], 0, 0),
        ("Oslo", ["Denver"], 0, 0),
    ],
)
def test_by_hand(predicted, answers, exact, overlap):
    assert exact_match(predicted, answers) == exact
    assert f1(predicted, answers) == pytest.approx(overlap)


words = st.lists(
    st.sampled_from(["the", "a", "Red", "red.", "river", "of", "Oslo", "oslo"]), min_size=1, max_size=5
)


@settings(max_examples=25)  # torchmetrics takes long over each
@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_beside_torchmetrics(pairs):
    from torchmetrics.functional.text import squad

    predicted = [" ".join(words) for words, _ in pairs]
    answers = [[" ".join(words) for words in each] for _, each in pairs]
    given = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predicted)]
    right = [
        {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(i)}
        for i, texts in enumerate(answers)
    ]
    asked = [Question("?", "", tuple(Answer(text, 0) for text in texts)) for texts in answers]
    found, reference = figures(predicted, asked), squad(given, right)
    assert 100 * found["exact_match"] == pytest.approx(float(reference["exact_match"]), abs=1e-4)
    if all(normalised(text) for text in predicted) and all(normalised(t) for texts in answers for t in texts):
        assert 100 * found["f1"] == pytest.approx(float(reference["f1"]), abs=1e-4)


CONTEXT = "Oslo is in Norway. Bergen is in Norway, too."


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Norway", "in Norway"], "answer_start": [11, 8]},
        [{"text": "Norway", "answer_start": 11}, {"text": "in Norway", "answer_start": 8}],
        json.dumps({"text": ["Norway", "in Norway"], "answer_start": [11, 8]}),
        {"text": ["Norway", "in Norway"]},
    ],
    ids=["hub", "official", "csv", "no starts"],
)
def test_rows(answers):
    row = {"question": "Where is Oslo?", "context": CONTEXT, "answers": answers, "id": "x"}
    right = (Answer("Norway", 11), Answer("in Norway", 8))
    assert questions([row], "here", COLUMNS) == [Question("Where is Oslo?", CONTEXT, right)]
    assert CONTEXT[right[1].start : right[1].end] == "in Norway"


def test_the_official_files_articles():
    qas = [
        {"id": "1", "question": "Where?", "answers": [{"text": "Norway", "answer_start": 11}]},
        {"id": "2", "question": "What?", "answers": [{"text": "Oslo", "answer_start": 0}]},
    ]
    article = {"title": "Oslo", "paragraphs": [{"context": CONTEXT, "qas": qas}]}
    found = questions([article, article], "here", COLUMNS)
    assert [question.text for question in found] == ["Where?", "What?", "Where?", "What?"]
    assert found[1] == Question("What?", CONTEXT, (Answer("Oslo", 0),))


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (
            {"text": ["Norway"], "answer_start": [12]},
            "answer 'Norway' in row 2, which stands not at character 12 in",
        ),
        ({"text": ["Sweden"]}, "answer 'Sweden' in row 2, which stands nowhere in its context"),
        ({"text": ["Norway"], "answer_start": [-33]}, "not at character -33"),
        ({"text": [], "answer_start": []}, r"as answers of row 2: give .* with at least one answer"),
        ({"text": [" "], "answer_start": [4]}, "as answers of row 2"),
        ({"text": ["Norway"], "answer_start": [1, 2]}, "as answers of row 2"),
        ("Norway", "here has 'Norway' as answers of row 2"),
        (None, "here has None as answers of row 2"),
    ],
)
def test_an_answer_that_is_none(answers, sentence):
    fine = {"question": "Where?", "context": CONTEXT, "answers": {"text": ["Oslo"]}}
    with pytest.raises(DataError, match=sentence):
        questions([fine, {**fine, "answers": answers}], "here", COLUMNS)


def test_a_missing_column():
    with pytest.raises(
        DataError, match="here has no column 'context' in row 1: its columns are question, passage"
    ):
        questions([{"question": "Where?", "passage": CONTEXT}], "here", COLUMNS)
