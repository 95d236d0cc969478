"""pyxclib's readers and writers over ours."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.compat.xclib.data import data_utils


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture
def labels(rng):
    return sp.random(30, 20, 0.2, "csr", dtype=np.float32, rng=rng)


def test_round_trip(tmp_path, labels):
    for X in (labels, labels.tocsc(), labels.tocoo(), sp.csr_array(labels)):
        data_utils.write_sparse_file(X, str(tmp_path / "x.txt"))
        found = data_utils.read_sparse_file(str(tmp_path / "x.txt"))
        assert isinstance(found, sp.csr_matrix)
        assert (found.shape, found.dtype) == (labels.shape, np.float32)
        assert (found != labels).nnz == 0
    data_utils.write_sparse_file(labels, tmp_path / "x.txt", header=False)
    found = data_utils.read_sparse_file(tmp_path / "x.txt", n_features=20, header=False)
    assert (found != labels).nnz == 0


def test_the_writer_leaves_the_matrix_alone(tmp_path):
    X = sp.csr_matrix(([1.0, 2.0], [1, 0], [0, 2]), shape=(1, 2))
    data_utils.write_sparse_file(X, tmp_path / "x.txt")
    assert X.indices.tolist() == [1, 0]
    with pytest.raises(TypeError, match="X is a list"):
        data_utils.write_sparse_file([[1]], tmp_path / "x.txt")


def test_shapes(tmp_path):
    path = write(tmp_path / "x.txt", b"3 5\n4:1 1:2\n\n")
    with pytest.warns(UserWarning, match="has 2 rows of the 3 in its header"):
        X = data_utils.read_sparse_file(path)
    assert X.toarray().tolist() == [[0, 2, 0, 0, 1], [0] * 5, [0] * 5]
    with pytest.warns(UserWarning, match=r"header \(3, 5\), pairs \(2, 7\)"):
        X = data_utils.read_sparse_file(path, n_features=7, force_header=False)
    assert X.shape == (2, 7)
    path = write(tmp_path / "x.txt", b"1:2\n\n")
    assert data_utils.read_sparse_file(path, header=False).shape == (2, 2)
    X = data_utils.read_sparse_file(io.BytesIO(b"1 3\n2:7\n"), dtype="int64")
    assert (X.toarray().tolist(), X.dtype) == ([[0, 0, 7]], np.int64)


def test_ids_that_count_from_one(tmp_path):
    path = write(tmp_path / "x.txt", b"2 3\n1:1 3:2\n2:3\n")
    expected = [[1, 0, 2], [0, 3, 0]]
    for zero_based in (False, "auto"):
        found = data_utils.read_sparse_file(path, zero_based=zero_based)
        assert found.toarray().tolist() == expected
    with pytest.raises(ValueError, match=r"x.txt:2: id 3 is out of range; there are 3 columns"):
        data_utils.read_sparse_file(path)
    path = write(tmp_path / "x.txt", b"2 3\n1:1\n0:3\n")
    assert data_utils.read_sparse_file(path, zero_based="auto")[1, 0] == 3
    with pytest.raises(ValueError, match=r"x.txt:3: id -1 is out of range"):
        data_utils.read_sparse_file(path, zero_based=False)


def test_a_column_given_twice(tmp_path):
    path = write(tmp_path / "x.txt", b"1 3\n1:1 0:4 1:2\n")
    with pytest.raises(ValueError, match=r"x.txt:2: id 1 is given twice"):
        data_utils.read_sparse_file(path)
    found = data_utils.read_sparse_file(path, safe_read=False)
    assert found.toarray().tolist() == [[4, 3, 0]]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"1 3\n0:1\n0:1\n", {}, "x.txt: has 2 rows, expected 1"),
        (b"1 3\n0:1 2\n", {}, r"x.txt:2: '2' is not label:value"),
        (b"0:1\n", {}, r"x.txt:1: header '0:1'; expected rows and columns"),
        (b"3:1\n", {"header": False, "n_features": 3}, r"x.txt:1: id 3 is out of range"),
        (b"1 1\n0:1\n", {"query_id": True}, "not supported"),
        (b"1 1\n0:1\n", {"offset": 3}, "not supported"),
        (b"1 1\n0:1\n", {"length": 3}, "not supported"),
        (b"1 1\n0:1\n", {"zero_based": "yes"}, "zero_based is 'yes'"),
    ],
)
def test_bad_sparse_files(tmp_path, content, arguments, message):
    with pytest.raises(ValueError, match=message):
        data_utils.read_sparse_file(write(tmp_path / "x.txt", content), **arguments)


def test_readers_by_suffix(tmp_path, labels):
    data_utils.write_sparse_file(labels, tmp_path / "x.txt")
    sp.save_npz(tmp_path / "x.npz", labels.tocsc())
    for name in ("x.txt", "x.npz", "X.TXT", "X.NPZ"):
        write(tmp_path / name, (tmp_path / name.lower()).read_bytes())
        found = data_utils.read_gen_sparse(file=str(tmp_path / name))
        assert (found.format, found.dtype) == ("csr", np.float32)
        assert (found != labels).nnz == 0
        assert data_utils.read_gen_sparse(tmp_path / name, dtype="float64").dtype == np.float64
    np.save(tmp_path / "x.npy", labels.toarray().astype(np.float64))
    np.savetxt(tmp_path / "x.txt", labels.toarray())
    for name in ("x.txt", "x.npy", "X.TXT", "X.NPY"):
        write(tmp_path / name, (tmp_path / name.lower()).read_bytes())
        found = data_utils.read_gen_dense(file=tmp_path / name)
        assert found.dtype == np.float32
        assert (found == labels.toarray()).all()
        assert data_utils.read_gen_dense(tmp_path / name, dtype="float64").dtype == np.float64
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"X": labels}))
    for reader in (data_utils.read_gen_sparse, data_utils.read_gen_dense):
        with pytest.raises(ValueError, match=r"x.pkl: suffix '.pkl', expected"):
            reader(tmp_path / "x.pkl")


def test_corpus(tmp_path):
    rows = [{"uid": "a", "title": "Öl", "target_ind": [3, 1]}, {"title": "x"}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write(tmp_path / "x.json.gz", gzip.compress(content))
    corpus = data_utils.read_corpus(str(tmp_path / "x.json.gz"))
    assert next(corpus) == rows[0]
    assert list(corpus) == rows[1:]
    write(tmp_path / "x.json", content + b"{]\n")
    with pytest.raises(ValueError, match=r"x.json:3: malformed JSON"):
        list(data_utils.read_corpus(tmp_path / "x.json"))


def test_features_with_labels(tmp_path):
    content = b"4 5 3\n2,0 1:0.5 4:2\n 0:1\n1\n0:3 2:1\n"
    X, Y, *counts = data_utils.read_data(write(tmp_path / "x.txt", content))
    assert counts == [4, 5, 3]
    assert X.toarray().tolist() == [[0, 0.5, 0, 0, 2], [1, 0, 0, 0, 0], [0] * 5, [3, 0, 1, 0, 0]]
    assert Y.toarray().tolist() == [[1, 0, 1], [0] * 3, [0, 1, 0], [0] * 3]
    assert X.dtype == Y.dtype == np.float32
    X, Y, *counts = data_utils.read_data(
        write(tmp_path / "x.txt", b"1,3 1:2\n\n2 2:2"), header=False, zero_based=False
    )
    assert counts == [None] * 3
    assert X.toarray().tolist() == [[2, 0], [0, 0], [0, 2]]
    assert Y.toarray().tolist() == [[1, 0, 1], [0] * 3, [0, 1, 0]]


def test_byte_order_marks_and_blank_last_lines(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbf2 3 2\r\n0,1 1:2\r\n1 2:1\r\n\r\n\n")
    X, Y, *_ = data_utils.read_data(path)
    assert X.toarray().tolist() == [[0, 2, 0], [0, 0, 1]]
    assert Y.toarray().tolist() == [[1, 1], [0, 1]]
    X, Y, *_ = data_utils.read_data(write(path, b"\xef\xbb\xbf0 1:2\n"), header=False)
    assert (X.toarray().tolist(), Y.toarray().tolist()) == ([[0, 2]], [[1]])
    X = data_utils.read_sparse_file(write(path, b"\xef\xbb\xbf1 3\n2:1\n\n"))
    assert X.toarray().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 3\n0 1:1\n", r"x.txt:1: header '1 3'; expected rows, features and labels"),
        (b"2 3 2\n0 1:1\na,1 1:1\n", r"x.txt:3: 'a,1' is not label,label"),
        (b"1 3 2\n%d 1:1\n" % 10**25, r"x.txt:2: '1000.*' is not label,label"),
        (b"1 3 2\n1e25 1:1\n", r"x.txt:2: '1e25' is not label,label"),
        (b"1 3 2\n1_0 1:1\n", r"x.txt:2: '1_0' is not label,label"),
        (b"1 3 %d\n0 1:1\n" % 10**25, r"x.txt:1: header '1 3 1000.*'; expected rows, features"),
        (b"1 3 2\n0 1:1 x\n", r"x.txt:2: 'x' is not label:value"),
        (b"1 3 2\n0 3:1\n", r"x.txt:2: id 3 is out of range"),
        (b"1 3 2\n2 1:1\n", r"x.txt:2: id 2 is out of range; there are 2 columns"),
        (b"2 3 2\n\n1,0,1 1:1\n", r"x.txt:3: id 1 is given twice"),
        (b"1 3 2\n0 1:1\n1 1:1\n", r"x.txt: has 2 rows, expected 1"),
    ],
)
def test_bad_features_with_labels(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        data_utils.read_data(write(tmp_path / "x.txt", content))


def test_dense_text(tmp_path):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbf2 3\r\n1 2 3\r\n4\t5 6e0\r\n\r\n")
    assert data_utils.read_gen_dense(path).tolist() == [[1, 2, 3], [4, 5, 6]]
    path = write(tmp_path / "x.txt", b"2 3\n1 2\n")
    assert data_utils.read_gen_dense(path).tolist() == [[2, 3], [1, 2]]
    assert data_utils.read_gen_dense(write(tmp_path / "x.txt", b"")).shape == (0, 0)
    for content in (b"1 2\n3\n", b"1 2\n3 x\n", b"1 2\n\n3 4\n"):
        with pytest.raises(ValueError, match=r"x.txt:2: expected 2 numbers"):
            data_utils.read_gen_dense(write(tmp_path / "x.txt", content))


def test_dense_text_by_the_arguments_of_pyxclib(tmp_path):
    path = write(tmp_path / "x.txt", b"a title\n1, 2\n3,4\n5,6\n")
    expected = [[1, 2], [3, 4], [5, 6]]
    assert data_utils.read_gen_dense(path, skip_header=1).tolist() == expected
    assert data_utils.read_gen_dense(path, "float64", ",", 1).tolist() == expected
    with pytest.raises(ValueError, match=r"x.txt:1: expected 2 numbers"):
        data_utils.read_gen_dense(path)
    path = write(tmp_path / "x.txt", b"1;2\n3;x\n")
    with pytest.raises(ValueError, match=r"x.txt:2: expected 2 numbers"):
        data_utils.read_gen_dense(path, delimiter=";")
    # With commas, or after skipped lines, there is no header: the first row is one of numbers.
    path = write(tmp_path / "x.txt", b"1,2\n3,4\n")
    assert data_utils.read_gen_dense(path).tolist() == [[1, 2], [3, 4]]
    path = write(tmp_path / "x.txt", b"2 2\n1 2\n3 4\n")
    assert data_utils.read_gen_dense(path, skip_header=1, delimiter=None).shape == (2, 2)
    with pytest.raises(TypeError, match="delimiter is a int"):
        data_utils.read_gen_dense(path, delimiter=3)


def test_sparse_text_by_the_arguments_of_pyxclib(tmp_path):
    path = write(tmp_path / "x.txt", b"1:1 3:0.5\n2:1\n")
    found = data_utils.read_gen_sparse(str(path), 4, "float64", False, header=False)
    assert found.toarray().tolist() == [[1, 0, 0.5, 0], [0, 1, 0, 0]]
    with pytest.raises(ValueError, match="offset and length are not supported"):
        data_utils.read_gen_sparse(path, offset=3)


def test_a_column_given_twice_in_general_files(tmp_path):
    path = write(tmp_path / "x.txt", b"1 3\n1:1 1:2\n")
    with pytest.raises(ValueError, match=r"x.txt:2: id 1 is given twice"):
        data_utils.read_gen_sparse(path)
    found = data_utils.read_gen_sparse(path, safe_read=False)
    assert found.toarray().tolist() == [[0, 3, 0]]


def test_data_with_tabs_and_float_labels(tmp_path):
    path = write(tmp_path / "x.txt", b"5 3 4\n1.0,3.0\t0:1\t2:2.5\n2 \t1:1\n\t0:7\n2:1\n0\n")
    X, Y, *shape = data_utils.read_data(path)
    assert X.toarray().tolist() == [[1, 0, 2.5], [0, 1, 0], [7, 0, 0], [0, 0, 1], [0] * 3]
    assert Y.toarray().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0], [0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert shape == [5, 3, 4]
    for word in (b"1.5", b"nan", b"inf", b"x"):
        path = write(tmp_path / "x.txt", b"1 3 4\n%b 0:1\n" % word)
        with pytest.raises(ValueError, match=rf"x.txt:2: '{word.decode()}' is not label,label"):
            data_utils.read_data(path)


@pytest.mark.parametrize("read", [data_utils.read_gen_dense, data_utils.read_gen_sparse])
def test_damaged_arrays(tmp_path, read):
    path = tmp_path / ("x.npy" if read is data_utils.read_gen_dense else "x.npz")
    if path.suffix == ".npy":
        np.save(path, np.ones((3, 2)))
    else:
        sp.save_npz(path, sp.identity(9, format="csr"))
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + b"\0\xff\xff" + content[place + 3 :])
        try:
            read(path, dtype=np.float64)
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be read: ")  # noqa: PT017
            refused += 1
        except MemoryError:
            pass
    assert refused > 20


@pytest.mark.parametrize("read", [data_utils.read_gen_dense, data_utils.read_gen_sparse])
def test_a_wrong_dtype_is_no_damage(tmp_path, read):
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    sp.save_npz(tmp_path / "x.npz", sp.identity(9, format="csr"))
    path = tmp_path / ("x.npy" if read is data_utils.read_gen_dense else "x.npz")
    with pytest.raises(TypeError, match="banana"):
        read(path, dtype="banana")
