"""A hundred damaged files for each reader; `python tests/fuzz.py 10000` tries more."""

import fuzz
import pytest


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.Readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_damaged_file_is_read_or_named_in_one_short_line(readers, name):
    problems = {seed: fuzz.outcome(readers, name, seed) for seed in range(100)}
    assert not {seed: problem for seed, problem in problems.items() if problem}
