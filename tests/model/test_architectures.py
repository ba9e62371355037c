"""The documentation's table of architectures is what the modules say."""

import pytest

from model.__main__ import CLASSES, main
from model.architectures import ARCHITECTURES
from model.exits import HEADS
from model.network import ARGUMENTS, PLACES
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs/architectures.md").read_text()


def test_every_architecture_is_documented_for_every_stem():
    for architecture in ARCHITECTURES:
        assert DOCUMENT.count(f"\n| `{architecture}` ") == len(CLASSES)


@pytest.mark.parametrize("name", [*ARGUMENTS, *HEADS, *PLACES])
def test_every_argument_is_documented(name):
    assert f"`{name}`" in DOCUMENT


@pytest.mark.slow
def test_the_tables_are_what_the_command_prints(capsys):
    assert main([]) == 0
    assert DOCUMENT.endswith(capsys.readouterr().out.rstrip() + "\n")


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("nope", 2)])
def test_the_command_explains_itself_and_takes_no_words(word, status, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == status
    said = capsys.readouterr()
    assert "usage: python -m model" in (said.err if status else said.out)
    assert "resnet10" not in said.out
