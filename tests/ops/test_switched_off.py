"""What is off stays off in this process, is said once, and is forgotten by the next."""

import pytest

from alignprop_fast.ops import switched_off


@pytest.fixture(autouse=True)
def all_on():
    switched_off.forget()
    yield
    switched_off.forget()


def test_the_first_reason_stands_and_is_said_once(caplog):
    assert switched_off.reason("triton") is None
    switched_off.switch_off("triton", "no C compiler\nin the path")
    switched_off.switch_off("triton", "another")
    assert switched_off.reason("triton") == "no C compiler in the path"
    assert [record.getMessage() for record in caplog.records] == ["triton is switched off: no C compiler in the path"]
    assert switched_off.everything() == {"triton": "no C compiler in the path"}
