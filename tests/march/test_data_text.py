"""The vocabulary's reserved ids and exact round trip; the cleaning of wikitext."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from march.data import DataError, vocabulary
from march.data.corpora import excerpt, wikitext


@pytest.fixture(scope="module")
def articles() -> list[str]:
    return list(excerpt.Excerpt().documents())


@pytest.fixture(scope="module")
def tokenizer(articles):
    return vocabulary.train(articles[:12], 600)


def test_reserved_ids(tokenizer):
    assert tokenizer.token_to_id("</s>") == 0
    assert tokenizer.token_to_id("<extra_id_99>") == 1
    assert tokenizer.token_to_id("<extra_id_0>") == 100
    assert [tokenizer.token_to_id(digit) for digit in "0123456789"] == list(range(101, 111))
    assert tokenizer.get_vocab_size() == 600


def test_numbers_are_split_into_digits_and_decode_keeps_them(tokenizer):
    ids = tokenizer.encode("In 1969, 12km").ids
    assert [i for i in ids if 101 <= i <= 110] == [102, 110, 107, 110, 102, 103]
    assert tokenizer.decode(ids) == "In 1969, 12km"
    merged = [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and len(token) > 1]
    assert all(token.startswith("<extra_id_") for token in merged), merged


def test_control_tokens_decode_to_their_names(tokenizer):
    assert tokenizer.decode([0, 100, 1, 105], skip_special_tokens=False) == "</s><extra_id_0><extra_id_99>4"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_to_the_character(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(i > 100 for i in ids)


def test_every_article_comes_back_to_the_character(tokenizer, articles):
    for text, encoding in zip(articles, tokenizer.encode_batch_fast(articles), strict=True):
        assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_training_is_deterministic(articles):
    assert vocabulary.train(articles[:3], 500).to_str() == vocabulary.train(articles[:3], 500).to_str()


def test_a_vocabulary_needs_room_for_every_byte():
    with pytest.raises(DataError, match="at least 357"):
        vocabulary.train(["text"], 356)
    assert vocabulary.train(["text"], 357).get_vocab_size() == 357


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("'''Bold''' and ''italic'' [[link]] to [[Page|a page]].", "Bold and italic link to a page."),
        ("Text.<ref>Author, 2001</ref> More<ref name=x /> text.<!-- note -->", "Text. More text."),
        ("A\n{| class=wikitable\n|-\n| cell\n|}\nB", "A\nB"),
        ("[[File:X.jpg|thumb|A [[linked]] caption]]Text [[Category:C]]", "Text"),
        ("{{Infobox|name=x}}Text (born {{birth date|1|2}}) and {{convert|12|km|mi}}", "Text (born) and 12 km"),
        ("Water is H<sub>2</sub>O, {{lang|fr|eau}}, {{lang-de|Wasser}}", "Water is H2O, eau, Wasser"),
        ("One\n== Empty ==\n== History ==\n=== Early ===\nTwo", "One\nHistory\nEarly\nTwo"),
        ("One\n== References ==\n* Book\n=== Sub ===\nmore\n== Life ==\nTwo", "One\nLife\nTwo"),
        ("a&nbsp;b &amp; c <math>x^2</math>.", "a b & c."),
        ("[http://x.org the site] and http://bare.org end", "the site and end"),
        ("Unbalanced ''italic and <ref>broken ''ref</ref> end", "Unbalanced italic and end"),
        ("* first\n* second\n# third", "first\nsecond\nthird"),
        ("{{Infobox}}\n[[File:a.png]]", ""),
    ],
)
def test_cleaning(source, text):
    assert wikitext.clean(source) == text


def test_the_excerpt_is_prose_without_markup(articles):
    text = "\n".join(articles)
    assert len(articles) == 106
    assert 2_700_000 < len(text) < 2_900_000
    for pattern in (r"\{\{|\}\}", r"\[\[|\]\]", r"''", r"</?(ref|div|span|br|blockquote|small|table)\b", r"&[a-z]+;"):
        assert not re.findall(pattern, text), pattern
    for pattern in (r"\bFile:", r"\bCategory:", r"https?://", r"==", r"\(\s*\)", r"style=", r"\{\|", r"^\|"):
        assert not re.findall(pattern, text, re.MULTILINE), pattern
    albedo = next(article for article in articles if article.startswith("Albedo"))
    assert albedo.split("\n")[0].endswith("is the diffuse reflectivity or reflecting power of a surface.")
    # prose: the words of English that any English text is full of
    words = re.findall(r"[a-z]+", text.lower())
    assert 0.055 < words.count("the") / len(words) < 0.085


def test_every_article_is_attributed(articles):
    text = excerpt.Excerpt().attribution()
    assert "CC BY-SA" in text
    assert len(re.findall(r"curid=\d+&oldid=\d+", text)) == len(articles)


def test_a_missing_excerpt_says_what_to_do(monkeypatch):
    monkeypatch.setattr(excerpt, "DUMP_BYTES", 5)
    with pytest.raises(DataError, match="pip install"):
        excerpt.dump_path()
    monkeypatch.setattr(excerpt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="package gensim"):
        excerpt.dump_path()
