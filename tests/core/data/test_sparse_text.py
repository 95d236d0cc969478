"""Sparse matrices as text: what comes back, and what every fault is answered with."""

import io
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame.data.sparse_text
from ngame.data.sparse_text import read_sparse_text, write_sparse_text


def rows_of(text):
    """Ids and values of every row, as lists of pairs."""
    pairs = list(zip(text.ids.tolist(), text.values.tolist(), strict=True))
    ends = text.offsets.tolist()
    return [pairs[a:b] for a, b in pairwise(ends)]


def slow(content):
    """The same by splitting strings."""
    return [
        [(int(i), float(v)) for i, v in (pair.split(":") for pair in line.split())]
        for line in content.split("\n")
    ]


def test_a_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"4 9\r\n2:0.5 0:1\r\n\r\n8:-3e2 # a remark: 1:1\n7:4\t1:1")
    text = read_sparse_text(path, dtype=np.float64)
    assert text.header == (4, 9)
    assert text.offsets.tolist() == [0, 2, 2, 3, 5]
    assert text.ids.tolist() == [2, 0, 8, 7, 1]
    np.testing.assert_array_equal(text.values, [0.5, 1, -300, 4, 1])
    assert text.values.dtype == np.float64


def test_no_header_and_no_rows():
    assert rows_of(read_sparse_text(io.BytesIO(b"1:2\n\n"), header=False)) == [[(1, 2.0)], []]
    empty = read_sparse_text(io.BytesIO(b"0 3\n"))
    assert empty.matrix((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 23])
@given(
    rows=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 2**40),
                st.floats(allow_nan=False, allow_infinity=False, width=32),
            ),
            max_size=4,
        ),
        max_size=9,
    ),
    newline=st.booleans(),
)
def test_blocks_hide_nothing(block, rows, newline):
    content = "\n".join(" ".join(f"{i}:{v!r}" for i, v in row) for row in rows)
    before, ngame.data.sparse_text._BLOCK_BYTES = ngame.data.sparse_text._BLOCK_BYTES, block
    try:
        end = "\n" if newline else ""
        found = rows_of(read_sparse_text(io.BytesIO((content + end).encode()), header=False))
    finally:
        ngame.data.sparse_text._BLOCK_BYTES = before
    expected = slow(content) if newline or content.rpartition("\n")[2] else slow(content)[:-1]
    assert found == expected


@pytest.mark.parametrize(
    "pair",
    [
        "3",
        "3:",
        ":3",
        "x:1",
        "3:x",
        "1.5:1",
        "-1:1",
        "3:1:1",
        "3 :1",
        "1_0:2",
        "1:2_0",
        "é:1",
        "inf:1",
        "nan:1",
        "9" * 20 + ":1",
        "1:+1",
        "1:0x1",
    ],
)
@pytest.mark.parametrize("around", ["0:1 {} 5:2", "{}", "4:4 {}", "{} 2:2"])
def test_a_fault_has_its_line(pair, around):
    file = io.BytesIO(f"3 9\n0:1\n\n{around.format(pair)}\n1:1\n".encode())
    with pytest.raises(ValueError, match=r"^file:4: '.*' is not label:value$"):
        read_sparse_text(file)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "infinity", "1e400", "-9e9999"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_is_finite(value, dtype):
    with pytest.raises(ValueError, match=r"^file:3: '1:.*' is not label:value with a finite value"):
        read_sparse_text(io.BytesIO(f"2 9\n0:1\n0:1 1:{value} 2:2\n".encode()), dtype=dtype)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("1e39", np.float32),
        ("-3.5e38", np.float32),
        ("70000", np.float16),
        ("9223372036854775808", np.int64),
        ("-129", np.int8),
    ],
)
def test_a_value_fits_its_type(value, dtype):
    message = r"^file:4: '7:.*' has a value too large for "
    with pytest.raises(ValueError, match=message):
        read_sparse_text(io.BytesIO(f"3 9\n\n0:1\n1:2 7:{value}\n".encode()), dtype=dtype)


@pytest.mark.parametrize(
    "value",
    ["1e-400", "-1e-400", "1.5E-99999999999999999999", "0." + 400 * "0" + "1", "0.01e-330"],
)
def test_a_value_too_close_to_zero_is_zero(value):
    text = read_sparse_text(io.BytesIO(f"1 9\n0:1 1:{value}\n".encode()), dtype=np.float64)
    assert text.values.tolist() == [1, 0]


def test_zeros_in_front_or_an_exponent_do_not_hide_a_large_value():
    for value in ("000" + 400 * "9", "0.001e312", "9" * 320 + "e-10", "1e99999999999999999999"):
        with pytest.raises(ValueError, match="with a finite value"):
            read_sparse_text(io.BytesIO(f"1 9\n1:{value}\n".encode()), dtype=np.float64)
    text = read_sparse_text(
        io.BytesIO(f"1 9\n1:0.0001e311 2:{'9' * 320}e-20\n".encode()), dtype="d"
    )
    assert text.values == pytest.approx([1e307, 1e300])


def test_blank_lines_at_the_end_are_no_rows_of_a_header():
    text = read_sparse_text(io.BytesIO(b"2 9\n3:1\n\n\n\n"))
    assert rows_of(text) == [[(3, 1.0)], []]
    text = read_sparse_text(io.BytesIO(b"1 9\n\n\n3:1\n"))
    assert len(text.offsets) == 4  # a pair too far down is not skipped


def test_a_byte_order_mark_is_skipped():
    for content, header in ((b"\xef\xbb\xbf1 9\n3:1\n", True), (b"\xef\xbb\xbf3:1\n", False)):
        text = read_sparse_text(io.BytesIO(content), header=header)
        assert rows_of(text) == [[(3, 1.0)]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_what_can_be_read_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="matrix has NaN or infinity"):
        write_sparse_text(tmp_path / "x.txt", sp.csr_matrix([[1, value]]))
    assert not list(tmp_path.iterdir())


def test_faults_do_not_make_up_for_each_other():
    with pytest.raises(ValueError, match=r"^file:2: '1' is not label:value$"):
        read_sparse_text(io.BytesIO(b"1 9\n1 2:3:4\n"))


@pytest.mark.parametrize(
    "header", ["", "3", "3 4 5", "a b", "-1 3", "1.5 2", "1_0 3", "9" * 19 + " 3", "3 " + "9" * 25]
)
def test_a_bad_header(header):
    with pytest.raises(ValueError, match=r":1: header .* expected rows and columns"):
        read_sparse_text(io.BytesIO(header.encode() + b"\n0:1\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 3\n0:1\n1:1\n", "has 2 rows, expected 1"),
        (b"2 3\n0:1\n1:1 3:1\n", "^file:3: id 3 is out of range; there are 3 columns"),
        (b"3 3\n0:1\n\n2:1 1:1 2:1\n", "^file:4: id 2 is given twice"),
        (b"3 3\n0:1\n0:1\n1:1 1:1\n", "^file:4: id 1 is given twice"),
    ],
)
def test_what_is_no_matrix(content, message):
    text = read_sparse_text(io.BytesIO(content))
    with pytest.raises(ValueError, match=message):
        text.matrix(text.header)


def test_duplicates_are_summed_where_asked_and_the_arrays_stay():
    text = read_sparse_text(io.BytesIO(b"3 4\n2:1 1:5 2:2\n\n"))
    matrix = text.matrix((3, 4), sum_duplicates=True)
    assert matrix.toarray().tolist() == [[0, 5, 3, 0], [0] * 4, [0] * 4]
    assert text.ids.tolist() == [2, 1, 2]
    assert text.values.tolist() == [1, 5, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_what_is_written_comes_back(tmp_path, rng, dtype):
    matrix = sp.random(70, 50, 0.1, "csr", rng=rng)
    matrix.data = rng.standard_normal(matrix.nnz) * 10.0 ** rng.integers(-9, 9, matrix.nnz)
    matrix = sp.csr_matrix(matrix.astype(dtype))
    write_sparse_text(tmp_path / "x.txt", matrix)
    text = read_sparse_text(tmp_path / "x.txt", dtype=dtype)
    again = text.matrix(text.header)
    assert (again.indices == matrix.indices).all()
    np.testing.assert_array_equal(again.data, matrix.data)
    assert (again.indptr == matrix.indptr).all()


def test_how_it_is_written(tmp_path, monkeypatch):
    matrix = sp.csr_matrix((np.float32([0.1, 2, 0, 1]), [3, 0, 1, 1], [0, 2, 2, 4]), shape=(3, 4))
    for block in (1, 2, 9):
        monkeypatch.setattr(ngame.data.sparse_text, "_BLOCK_ROWS", block)
        write_sparse_text(tmp_path / "x.txt", matrix)
        assert (tmp_path / "x.txt").read_bytes() == b"3 4\n0:2.0 3:0.1\n\n1:1.0\n"
    write_sparse_text(tmp_path / "x.txt", matrix, header=False)
    assert (tmp_path / "x.txt").read_bytes() == b"0:2.0 3:0.1\n\n1:1.0\n"
    assert matrix.indices.tolist() == [3, 0, 1, 1]


@pytest.mark.parametrize("id", [2**48, 2**63 - 1])
def test_an_id_that_no_matrix_has(id):
    text = read_sparse_text(io.BytesIO(f"0:1\n1:1 {id}:1\n".encode()), header=False)
    with pytest.raises(ValueError, match=rf"^file:2: id {id} is too large"):
        text.matrix((2, id + 1))
