"""pyxclib's features and labels: small cases by hand."""

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.compat.xclib.data.features import DenseFeatures, FeaturesBase, SparseFeatures
from ngame.compat.xclib.data.labels import DenseLabels, LabelsBase, SparseLabels

# Column 1 has no value, and the values of column 2 cancel; row 2 is empty.
VALUES = np.array([[3, 0, 1, 4], [0, 0, -1, 0], [0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize("kind", [DenseFeatures, SparseFeatures, FeaturesBase])
def test_features(kind):
    given = sp.csr_matrix(VALUES) if kind is SparseFeatures else VALUES.copy()
    features = kind("", None, X=given)

    def dense(found):
        return found.toarray().tolist() if sp.issparse(found) else found.tolist()

    assert features.data is features.X
    assert features.shape == (3, 4) == (features.num_instances, features.num_features)
    assert features.frequency().tolist() == [1, 0, 2, 1]
    assert features.frequency(axis=1).tolist() == [3, 1, 0]
    assert features.get_invalid_indices().tolist() == [1]
    assert features.get_valid_indices(axis=1).tolist() == [0, 1]
    assert dense(features.index_select([2, 0], axis=0)) == VALUES[[2, 0]].tolist()
    assert dense(features.index_select([2, 0])) == VALUES[:, [2, 0]].tolist()
    assert features.remove_invalid().tolist() == [0, 2, 3]
    assert features.remove_invalid(axis=1).tolist() == [0, 1]
    assert dense(features.X) == [[3, 1, 4], [0, -1, 0]]
    with pytest.raises(ValueError, match="axis is 2, expected 0 or 1"):
        features.index_select([0], axis=2)


def test_features_are_normalized_and_indexed():
    features = DenseFeatures("", None, X=VALUES.copy(), normalize=True)
    np.testing.assert_allclose(features[0], VALUES[0] / np.sqrt(26), rtol=1e-6)
    assert features[2].tolist() == [0] * 4
    features = SparseFeatures("", None, X=sp.csr_matrix(VALUES), normalize=True)
    ids, values = features[0]
    assert ids.tolist() == [0, 2, 3]
    np.testing.assert_allclose(values, [3 / np.sqrt(26), 1 / np.sqrt(26), 4 / np.sqrt(26)])
    assert [part.tolist() for part in features[2]] == [[], []]


def test_features_from_files(tmp_path):
    np.save(tmp_path / "x.npy", VALUES.astype(np.float64))
    sp.save_npz(tmp_path / "x.npz", sp.csr_matrix(VALUES))
    found = DenseFeatures(str(tmp_path), "x.npy").data
    assert found.dtype == np.float32
    assert (found == VALUES).all()
    assert (SparseFeatures(str(tmp_path), "x.npz").data.toarray() == VALUES).all()
    with pytest.raises(ValueError, match="fname and X are None, expected one of them"):
        DenseFeatures(str(tmp_path), None)
    with pytest.raises(ValueError, match="X is None, and FeaturesBase reads no files"):
        FeaturesBase(str(tmp_path), "x.npy")


@pytest.mark.parametrize("kind", [LabelsBase, DenseLabels, SparseLabels])
def test_labels(kind):
    labels = kind("", None, Y=sp.coo_matrix(VALUES))
    assert labels.data.format == "csr"
    assert labels.shape == (3, 4)
    assert labels.frequency().tolist() == [1, 0, 2, 1]
    assert labels.get_invalid_indices(axis=1).tolist() == [2]
    assert labels.transpose().shape == (4, 3)
    assert labels.index_select([1], axis=0).toarray().tolist() == [[0, 0, -1, 0]]
    assert labels.remove_invalid().tolist() == [0, 2, 3]
    labels.binarize()
    assert labels.Y.toarray().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    labels.data = VALUES[:, :2]
    assert (labels.data.format, labels.num_labels) == ("csr", 2)
    with pytest.raises(ValueError, match="axis is 5"):
        labels.frequency(axis=5)


def test_labels_are_normalized_and_indexed():
    labels = DenseLabels("", None, Y=sp.csr_matrix(VALUES), normalize=True)
    assert labels[0].tolist() == [0.75, 0, 0.25, 1]
    assert labels[0].dtype == np.float32
    ids, values = SparseLabels("", None, Y=sp.csr_matrix(VALUES), normalize=True)[0]
    assert (ids.tolist(), values.tolist()) == ([0, 2, 3], [0.75, 0.25, 1])
    assert LabelsBase("", None, Y=VALUES, _format="csc").data.format == "csc"
    Y = sp.csr_array(VALUES)  # whose rows have one dimension
    assert [part.tolist() for part in SparseLabels("", None, Y)[0]] == [
        part.tolist() for part in SparseLabels("", None, sp.csr_matrix(VALUES))[0]
    ]
    assert DenseLabels("", None, Y)[0].tolist() == VALUES[0].tolist()


@pytest.mark.parametrize("kind", [LabelsBase, DenseLabels, SparseLabels])
def test_no_labels(kind):
    labels = kind("", None)
    assert labels.shape == (-1, -1)
    labels.normalize()
    labels.binarize()
    for found in (
        labels.data, labels[0], labels.frequency(), labels.remove_invalid(), labels.transpose(),
        labels.get_valid_indices(), labels.instance_select([0]), labels.label_select([0]),
    ):  # fmt: skip
        assert found is None


def test_labels_from_a_file(tmp_path):
    sp.save_npz(tmp_path / "y.npz", sp.csr_matrix(VALUES))
    assert (LabelsBase(str(tmp_path), "y.npz").data.toarray() == VALUES).all()
