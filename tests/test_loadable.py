"""The page of docs that is written from the tests' lists of formats."""

from .loadable import PAGE, page


def test_the_page_is_what_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again: python tests/loadable.py"
