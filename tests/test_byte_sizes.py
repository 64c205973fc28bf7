"""Amounts of bytes are read and written as people do."""

import pytest

from foreroute.estimators.byte_sizes import format_binary_bytes, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("2 GiB", 2 * 2**30),
        ("1 kib", 1024),
        ("9.44MB", 9_440_000),
        ("1.5k", 1500),
        ("77", 77),
        (77, 77),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3MB", "12 apples", "3XB", "many", "-4GB", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_sizes_are_written_with_three_digits():
    sizes = [format_bytes(size) for size in (12, 1234, 999_999, 3.4e9)]
    assert sizes == ["12 B", "1.23 kB", "1 MB", "3.4 GB"]


def test_sizes_of_memory_are_written_in_binary_units():
    assert format_binary_bytes(3 * 2**20) == "3.0 MiB"
