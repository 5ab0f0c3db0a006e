import pytest
import torch

from tpt_nb.lessons import check


def test_agreement_prints_one_line(capsys):
    check.close("entropy", torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0 + 1e-8])
    check.equal("chosen", torch.tensor([3, 1]), [3, 1])
    assert capsys.readouterr().out == "entropy: correct\nchosen: correct\n"


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (None, "got None"),
        ([1.0], r"expected shape \[2\], got \[1\]"),
        ([1.0, 2.5], r"expected \[1., 2.\], got \[1. , 2.5\]; the largest difference is 0.5"),
        ([1.0, float("nan")], "largest difference is nan"),
    ],
)
def test_disagreement_says_what_was_expected_and_what_came(got, message):
    with pytest.raises(AssertionError, match=message):
        check.close("entropy", got, [1.0, 2.0])


def test_equal_says_what_was_expected_and_what_came():
    with pytest.raises(AssertionError, match=r"chosen: expected \[3, 1\], got \[1, 3\]"):
        check.equal("chosen", torch.tensor([1, 3]), [3, 1])
