from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.text.lines import join_lines, split_lines


@given(st.text(alphabet=st.sampled_from("ab \t\r\n\u00a0\u3000é"), max_size=40))
def test_splitting_and_joining_gives_the_text_back(text: str) -> None:
    lines = split_lines(text)
    sentences = [line.sentence for line in lines if line.sentence]
    assert join_lines(lines, sentences) == text
    assert all(sentence == sentence.strip() and "\n" not in sentence for sentence in sentences)


def test_structure_survives_translation() -> None:
    lines = split_lines("Title\r\n\r\n  - one \n  - two\n")
    assert [line.sentence for line in lines if line.sentence] == ["Title", "- one", "- two"]
    assert join_lines(lines, ["Titel", "- eins", "- zwei"]) == "Titel\r\n\r\n  - eins \n  - zwei\n"
