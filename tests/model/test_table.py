"""Tables look the same as text and as a page."""

import pytest

from model.table import markdown_table


def test_columns_line_up_where_they_are_asked_to():
    assert markdown_table(
        ("run", "exit", "why"), [("one", 12.5, "because"), ("another", 3, "")], [1]
    ) == (
        "| run     | exit | why |\n"
        "| ------- | ---: | --- |\n"
        "| one     | 12.5 | because |\n"
        "| another |    3 |     |"
    )


def test_a_column_of_numbers_lines_up_at_the_end_too():
    assert markdown_table(["n"], [[1], [1000]], right=[0]).split("\n") == [
        "|    n |",
        "| ---: |",
        "|    1 |",
        "| 1000 |",
    ]


def test_a_cell_stays_one_cell_whatever_is_in_it():
    assert markdown_table(["a"], [["x | y\n  z"]]).endswith(r"| x \| y z |")


def test_a_row_has_a_cell_for_each_column():
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["a", "b"], [["1"]])
