"""What a server answers to."""

from __future__ import annotations

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.serving.names import DEFAULT, NotServed, ServedNames
from tests.serving.conftest import Files


def test_the_names_are_those_of_the_command_line(files: Files) -> None:
    one, two = files.adapters
    names = ServedNames.of(files.model, (f"{one}/", two), files.student)
    assert names.all == [files.model, one, two]  # a slash that the shell added is none of the name
    assert names.resolve(DEFAULT) == names.resolve(files.model) == files.model
    assert names.resolve(one) == names.resolve(files.model, one) == names.resolve(one, one) == one
    assert names.resolve(files.model, None, files.student) == files.model
    for wrong in (
        ("../model", None, None),
        (f"{files.model}/", None, None),
        (files.student, None, None),
        (files.model, files.model, None),
        (two, one, None),
        (files.model, "x/y", None),
        (files.model, None, files.model),
    ):
        with pytest.raises(NotServed):
            names.resolve(*wrong)


def test_an_adapter_is_there_and_has_a_name_of_its_own(files: Files) -> None:
    one, _ = files.adapters
    with pytest.raises(SlimError, match="is given twice"):
        ServedNames.of(files.model, (one, f"{one}/"), None)
    with pytest.raises(SlimError, match=r"adapter_config\.json does not exist"):
        ServedNames.of(files.model, (files.student,), None)
