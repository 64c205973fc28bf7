"""Documents and token ids become sequences of one length."""

import pytest

from foreroute.data.adapters import load_tokenizer
from foreroute.data.document import Document, TokenRow
from foreroute.data.packing import first_tokens, token_sequences


@pytest.fixture(scope="module")
def tokenizer(tiny_moe):
    return load_tokenizer(str(tiny_moe.folder))


def packed_ids(*arguments):
    return [token_ids for token_ids, _ in token_sequences(*arguments)]


def test_documents_are_packed_with_an_end_token_between(tokenizer):
    texts = [Document("a", "abc"), Document("b", "defgh"), Document("c", "ij")]
    end = tokenizer.eos_token_id
    a, b, c = (tokenizer(d.text)["input_ids"] for d in texts)
    everything = [*a, end, *b, end, *c, end]  # 4 + 6 + 3 tokens
    packed = packed_ids(texts, tokenizer, 5, 1000)
    assert packed == [everything[:5], everything[5:10]]


def test_packing_stops_at_the_tokens_asked_for(tokenizer):
    texts = [Document("a", "x" * 100)]
    assert len(list(token_sequences(texts, tokenizer, 10, 25))) == 3


def test_too_little_text_is_refused_with_its_size(tokenizer):
    with pytest.raises(ValueError, match=r"only 4 tokens .* one sequence needs 50"):
        list(token_sequences([Document("a", "abc")], tokenizer, 50, 100))


def test_sequences_begin_as_the_tokenizer_begins_its_texts(tokenizer):
    class Beginning:
        bos_token_id, eos_token_id = 7, 0

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    packed = packed_ids([Document("a", "abcdefgh")], Beginning(), 4, 100)
    assert [len(row) for row in packed] == [4, 4, 4]
    assert all(row[0] == 7 for row in packed)


def test_token_ids_are_packed_as_they_are(tokenizer):
    rows = [TokenRow("a", (5, 6, 7)), TokenRow("b", (8, 9)), TokenRow("c", (10,))]
    assert packed_ids(rows, tokenizer, 3, 100) == [[5, 6, 7], [8, 9, 10]]


def test_a_row_that_a_model_continued_is_one_sequence_from_its_start(tokenizer):
    rows = [
        TokenRow("a", (5, 6, 7, 8), num_prompt_tokens=1),
        TokenRow("too short", (8, 9), num_prompt_tokens=1),
        TokenRow("b", (1, 2, 3), num_prompt_tokens=3),
    ]
    assert list(token_sequences(rows, tokenizer, 3, 100)) == [([5, 6, 7], 1), ([1, 2, 3], 3)]


@pytest.mark.parametrize("token_id", [-100, 260])
def test_ids_that_the_model_does_not_know_are_refused_by_name(tokenizer, token_id):
    rows = [TokenRow("part:7", (1, token_id, 2))]
    with pytest.raises(ValueError, match=rf"Document part:7 has token {token_id}, .* only 260"):
        list(token_sequences(rows, tokenizer, 3, 100, 260))


def test_a_document_begins_as_the_tokenizer_begins_its_texts_and_all_of_it_is_known(tokenizer):
    ids = tokenizer("abcdef")["input_ids"]
    assert first_tokens(Document("a", "abcdef"), tokenizer, 4, 260) == ids[:4]
    assert first_tokens(TokenRow("a", (1, 2, 3)), tokenizer, 2, 260) == [1, 2]
    with pytest.raises(ValueError, match="Document a has token 300"):
        first_tokens(TokenRow("a", (1, 2, 300)), tokenizer, 2, 260)
