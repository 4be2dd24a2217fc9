"""``examples/benchmarks/vocabulary.py --smoke``."""

import torch
from ahead import ahead
from training import smoke_run

from examples.benchmarks.vocabulary import words


@ahead
def vocabulary_smoke(folder):
    return smoke_run("vocabulary.py", folder)


def test_the_smoke_run_prints_both_vocabularies(vocabulary_smoke):
    for line in ("\n| 256 | 0 |", "\n| 1,024 | 0 |", "\n| 1,024 | 0.03 |"):
        assert line in vocabulary_smoke


def test_the_most_common_words_have_numbers_and_all_others_have_zero(tmp_path):
    text = tmp_path / "text"
    text.write_text("def f(x): x += x")
    numbers, most_common = words(str(text), 3)
    assert most_common == [b" ", b"x"]
    assert torch.equal(numbers, torch.tensor([0, 1, 0, 0, 2, 0, 0, 1, 2, 1, 0, 0, 1, 2]))
    assert torch.equal(words(str(text), 3, [b"def"])[0].nonzero().view(-1), torch.tensor([0]))
