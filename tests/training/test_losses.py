"""The terms of training, against values worked out by hand."""

import math

import pytest
import torch

from training.losses import (
    distillation_loss,
    distillation_terms,
    feature_loss,
    feature_terms,
    label_loss,
    label_terms,
    teachers_of,
    total,
)
from training.objective import objective
from training.recipe import Recipe
from training.student import StudentOutputs

LOG2 = math.log(2)
LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4 1/4, 1/2 1/2
IDS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(value, expected):
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_the_label_loss_is_the_mean_negative_log_probability():
    close(label_loss(LOGITS, IDS), (math.log(4 / 3) + LOG2) / 2)


def test_smoothing_spreads_its_share_over_all_classes():
    first = 0.9 * math.log(4 / 3) + 0.1 * (math.log(4 / 3) + math.log(4)) / 2
    close(label_loss(LOGITS, IDS, smoothing=0.1), (first + LOG2) / 2)


def test_probabilities_of_one_class_are_that_class():
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    close(label_loss(LOGITS, mixed), float(label_loss(LOGITS, IDS)))


def test_mixed_labels_cost_in_their_shares():
    mixed = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    first = 0.25 * math.log(4 / 3) + 0.75 * math.log(4)
    close(label_loss(LOGITS, mixed), (first + LOG2) / 2)


@pytest.mark.parametrize("target", [IDS, torch.eye(2)])
def test_class_weights_scale_each_sample_by_its_class(target):
    weights = torch.tensor([2.0, 0.5])
    expected = (2 * math.log(4 / 3) + 0.5 * LOG2) / 2
    close(label_loss(LOGITS, target, class_weights=weights), expected)


def test_distillation_is_the_cross_entropy_of_softened_logits():
    teacher = torch.tensor([[2 * math.log(3), 0.0]])  # 3/4 1/4 at temperature 2
    student = torch.tensor([[0.0, 2 * LOG2]])  # 1/3 2/3 at temperature 2
    expected = 0.75 * math.log(3) + 0.25 * math.log(3 / 2)
    close(distillation_loss(student, teacher, 2.0), expected)
    close(distillation_loss(student, teacher, 2.0, squared=True), 4 * expected)


def test_teachers_get_no_gradient_and_students_do():
    teacher = torch.randn(3, 4, requires_grad=True)
    student = torch.randn(3, 4, requires_grad=True)
    (distillation_loss(student, teacher, 3.0) + feature_loss(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_a_student_like_its_teacher_learns_nothing_from_it():
    logits = torch.randn(3, 4)
    student = logits.clone().requires_grad_()
    distillation_loss(student, logits, 3.0).backward()
    assert student.grad.abs().max() < 1e-6


def test_the_feature_term_is_a_squared_distance_a_sample():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [3.0, 0]])
    close(feature_loss(student, teacher), (4 + 9) / 2)


def test_the_feature_term_does_not_depend_on_the_batch_size():
    student, teacher = torch.randn(4, 8), torch.randn(4, 8)
    doubled = feature_loss(student.repeat(2, 1), teacher.repeat(2, 1))
    torch.testing.assert_close(doubled, feature_loss(student, teacher))


def test_the_deepest_exit_teaches_the_others():
    a, b, c = (torch.randn(2, 3) for _ in range(3))
    first, second, last = teachers_of([a, b, c], "deepest")
    assert first is c and second is c and last is None


def test_the_next_deeper_exit_teaches_each():
    a, b, c = (torch.randn(2, 3) for _ in range(3))
    first, second, last = teachers_of([a, b, c], "next")
    assert first is b and second is c and last is None


def test_the_ensemble_teaches_all_with_the_mean_of_their_logits():
    logits = [torch.randn(2, 3) for _ in range(3)]
    for teacher in teachers_of(logits, "ensemble"):
        torch.testing.assert_close(teacher, sum(logits) / 3)


@pytest.mark.parametrize("source", ["deepest", "next", "ensemble"])
def test_one_exit_alone_has_no_teacher(source):
    assert teachers_of([torch.randn(2, 3)], source) == [None]


def test_terms_are_named_by_kind_and_exit_and_already_weighted():
    logits = [LOGITS, LOGITS]
    terms = label_terms(logits, IDS, [0.7, 1.0])
    assert list(terms) == ["label/1", "label/2"]
    close(terms["label/1"], 0.7 * float(terms["label/2"]))
    soft = distillation_terms("distillation", logits, [LOGITS, None], 0.3, 3.0)
    assert list(soft) == ["distillation/1"]
    close(soft["distillation/1"], 0.3 * float(distillation_loss(LOGITS, LOGITS, 3.0)))
    close(feature_terms([LOGITS], [LOGITS + 1], 0.5)["feature/1"], 0.5 * 2)


def test_a_weight_of_nothing_leaves_the_term_out():
    assert distillation_terms("teacher", [LOGITS], [LOGITS], 0.0, 3.0) == {}
    assert feature_terms([LOGITS], [LOGITS], 0.0) == {}


def test_the_total_is_the_sum_of_the_terms():
    close(total({"a": torch.tensor(1.5), "b": torch.tensor(2.0)}), 3.5)


def outputs(exits=3, n=4, classes=5, width=6):
    torch.manual_seed(0)
    return StudentOutputs(
        [torch.randn(n, classes) for _ in range(exits)],
        [torch.randn(n, width) for _ in range(exits)],
        [torch.randn(n, width) for _ in range(exits - 1)],
    )


def test_the_published_loss_is_what_the_papers_say():
    out, ids = outputs(), torch.tensor([0, 1, 2, 3])
    recipe = Recipe(distillation_weight=0.3, feature_weight=0.03, temperature=3.0)
    expected = label_loss(out.logits[2], ids)
    for k in range(2):
        expected = expected + 0.7 * label_loss(out.logits[k], ids)
        expected = expected + 0.3 * distillation_loss(out.logits[k], out.logits[2], 3.0)
        expected = expected + 0.03 * feature_loss(out.adapted[k], out.pooled[2])
    close(total(objective(recipe, out, ids)), float(expected))


@pytest.mark.parametrize("method", ["deep-supervision", "plain"])
def test_without_self_distillation_every_exit_learns_from_labels_at_full_weight(method):
    out, ids = outputs(), torch.tensor([0, 1, 2, 3])
    terms = objective(Recipe(method=method, feature_weight=1.0), out, ids)
    assert list(terms) == ["label/1", "label/2", "label/3"]
    for term, logits in zip(terms.values(), out.logits, strict=True):
        close(term, float(label_loss(logits, ids)))


def test_the_recipe_smooths_the_labels_that_every_exit_sees():
    out, ids = outputs(), torch.tensor([0, 1, 2, 3])
    terms = objective(Recipe(method="deep-supervision", label_smoothing=0.2), out, ids)
    for term, logits in zip(terms.values(), out.logits, strict=True):
        close(term, float(label_loss(logits, ids, smoothing=0.2)))


def test_classes_weigh_in_every_exit():
    out, ids, weights = outputs(), torch.tensor([0, 1, 2, 3]), torch.tensor([3.0, 1, 1, 1, 0])
    terms = objective(Recipe(method="deep-supervision"), out, ids, weights)
    for term, logits in zip(terms.values(), out.logits, strict=True):
        close(term, float(label_loss(logits, ids, class_weights=weights)))


def test_next_deeper_features_teach_where_logits_do():
    out, ids = outputs(), torch.tensor([0, 1, 2, 3])
    terms = objective(Recipe(distill_from="next", feature_weight=1.0), out, ids)
    close(terms["feature/1"], float(feature_loss(out.adapted[0], out.pooled[1])))
    close(terms["distillation/1"], 0.3 * float(distillation_loss(*out.logits[:2], 3.0)))


def test_the_next_deeper_exit_teaches_without_features_too():
    out, ids = outputs()._replace(adapted=[]), torch.tensor([0, 1, 2, 3])
    terms = objective(Recipe(distill_from="next", feature_weight=0.0), out, ids)
    assert [n for n in terms if not n.startswith("label")] == ["distillation/1", "distillation/2"]


def test_a_separate_teacher_alone_teaches_every_exit():
    out, ids, teacher = outputs(), torch.tensor([0, 1, 2, 3]), torch.randn(4, 5)
    recipe = Recipe(distillation_weight=0.0, teacher_weight=0.4)
    terms = objective(recipe, out, ids, teacher=teacher)
    assert [n for n in terms if n.startswith("teacher")] == ["teacher/1", "teacher/2", "teacher/3"]
    assert not [n for n in terms if n.startswith("distillation")]
    close(terms["label/3"], 0.6 * float(label_loss(out.logits[2], ids)))
    close(terms["teacher/1"], 0.4 * float(distillation_loss(out.logits[0], teacher, 3.0)))


def test_a_separate_teacher_on_top_takes_its_share_from_the_labels():
    out, ids = outputs(), torch.tensor([0, 1, 2, 3])
    recipe = Recipe(distillation_weight=0.3, teacher_weight=0.4)
    terms = objective(recipe, out, ids, teacher=torch.randn(4, 5))
    close(terms["label/1"], 0.3 * float(label_loss(out.logits[0], ids)))
    close(terms["label/3"], 0.6 * float(label_loss(out.logits[2], ids)))
