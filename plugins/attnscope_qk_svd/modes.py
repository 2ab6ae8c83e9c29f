"""Singular modes of query and key projections: pure functions of the weights."""

import numpy as np

# OpenBLAS computes products of up to this many multiplications on one thread.
_ONE_THREAD = 2**18


def singular_values(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of W_q^T W_k and the cosines of its singular vectors, both (..., mode), dimensionless.

    `query` (..., channel, feature) and `key` (..., channel, key_feature) are the projections; modes are as many as
    channels (or features, if fewer). With W_q = C_q B_q, W_k = C_k B_k, rows of B orthonormal, and C_q^T C_k = X S Y^T
    the vectors are U = B_q^T X and V = B_k^T Y, and the diagonal of U^T V = X^T (B_q B_k^T) Y is had without them.
    Cosines are NaN where the features differ in number.
    """
    query_basis, key_basis, (left, values, right) = _thin(query, key)
    if query.shape[-1] != key.shape[-1]:
        return values, np.full(values.shape, np.nan, values.dtype)
    between = _row_products(query_basis, key_basis)
    return values, (_transposed(left) @ between * right).sum(-1)


def singular_modes(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors (..., mode, feature), singular values (..., mode) and right vectors (..., mode, key_feature).

    Rows are orthonormal, and M = sum_n s_n u_n v_n^T. A pair (u, v) is as good as (-u, -v): the entry of u with the
    largest magnitude (the first of equals) is made positive.
    """
    query_basis, key_basis, (left, values, right) = _thin(query, key)
    u = _joined(_transposed(left)[..., None, :, :] @ query_basis, query.shape[-1])
    v = _joined(right[..., None, :, :] @ key_basis, key.shape[-1])
    largest = np.take_along_axis(u, np.abs(u).argmax(-1)[..., None], -1)
    sign = np.where(largest < 0, -1, 1).astype(u.dtype)
    return u * sign, values, v * sign


def degenerate_groups(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Number of the group that each mode belongs to, (..., mode): neighbours closer than tolerance * s_1 share one.

    Singular vectors are free to rotate within a group, so only what is summed over a group is well defined.
    """
    gaps = values[..., :-1] - values[..., 1:]
    breaks = gaps > tolerance * values[..., :1]
    first = np.zeros((*values.shape[:-1], 1), int)
    return np.concatenate([first, np.cumsum(breaks, -1)], -1)


def share_within_groups(cosines: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cosines (..., mode) averaged within each group of equal singular values, which no rotation there changes."""
    same = groups[..., :, None] == groups[..., None, :]
    return np.einsum("...mn,...n->...m", same, cosines) / same.sum(-1)


def average_cosine(values: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Mean cosine weighted by the singular values, (...) in [-1, 1]; equals tr(W_q^T W_k) over the nuclear norm."""
    total = values.sum(-1)
    weighted = (values * cosines).sum(-1)
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > 0)


def permuted_averages(
    query: np.ndarray, key: np.ndarray, nuclear_norm: np.ndarray, *, draws: int, seed: int, constant: bool = False
) -> np.ndarray:
    """Average cosines after permuting the features of the keys, (draw, head), dimensionless.

    tr(W_q^T W_k P) over the nuclear norm, which P leaves alone as it does every singular value. `query` and `key` are
    (head, channel, feature); the heads of a layer share each permutation, so that their mean can be compared as well.
    With `constant` the last feature is the one that every token has, whose weights are the biases: it stays in place.
    """
    features = query.shape[-1] - constant
    generator = np.random.default_rng(seed)
    by_feature, key_by_feature = (np.ascontiguousarray(np.moveaxis(side, -1, 0)) for side in (query, key))
    averages = np.empty((draws, *nuclear_norm.shape), nuclear_norm.dtype)
    for draw in range(draws):
        order = np.append(generator.permutation(features), np.arange(features, len(key_by_feature)))
        permuted = key_by_feature[order]  # (feature, head, channel)
        averages[draw] = np.vecdot(by_feature, permuted).sum(0) / nuclear_norm
    return averages


def bias_ratio(query_bias: np.ndarray, key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Size of the key-only term b_q^T W_k x_j beside the bilinear one for white inputs: |W_k^T b_q| / |M|_F, (...)."""
    size = np.linalg.norm(np.einsum("...c,...cf->...f", query_bias, key), axis=-1)
    whole = np.linalg.norm(values, axis=-1)
    return np.divide(size, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _thin(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    query_basis, query_core = _orthonormal(query)
    key_basis, key_core = _orthonormal(key)
    return query_basis, key_basis, tuple(np.linalg.svd(_transposed(query_core) @ key_core))


def _orthonormal(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis B of the rows, in pieces, and the core C (..., channel, channel) with W = C B.

    Cholesky of the small Gram matrix, repeated until that is the identity: as exact as Householder's QR unless rows
    are all but dependent; then it is Householder's. (Fukaya et al., "CholeskyQR2", ScalA 2014.)
    """
    basis, core = _pieces(projection), np.eye(projection.shape[-2], dtype=projection.dtype)
    enough = max(1e-12, 10 * np.finfo(projection.dtype).eps)
    for _ in range(3):
        gram = _row_products(basis, basis)
        if np.abs(gram - np.eye(gram.shape[-1])).max() < enough:
            return basis, core
        try:
            lower = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            break
        basis = np.linalg.inv(lower)[..., None, :, :] @ basis
        core = core @ lower
    return _householder(projection)


def _householder(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis, core = np.linalg.qr(_transposed(projection))
    return _pieces(_transposed(basis)), _transposed(core)


def _pieces(rows: np.ndarray) -> np.ndarray:
    """Rows (..., channel, feature) as (..., piece, channel, part), the last piece filled up with zeros.

    Products of pieces are so small that a BLAS computes them on one thread. To wake its other threads costs more than
    the whole product does, and up to a hundred times more where the cores are busy.
    """
    channels, features = rows.shape[-2:]
    part = max(1, _ONE_THREAD // channels**2)
    count = -(-features // part)
    filled = np.zeros((*rows.shape[:-1], count * part), rows.dtype)
    filled[..., :features] = rows
    return np.ascontiguousarray(np.moveaxis(filled.reshape(*rows.shape[:-1], count, part), -2, -3))


def _joined(pieces: np.ndarray, features: int) -> np.ndarray:
    """Pieces as rows (..., channel, feature) again."""
    rows = np.moveaxis(pieces, -3, -2)
    return rows.reshape(*rows.shape[:-2], -1)[..., :features]


def _row_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of the rows of two bases in pieces: (..., channel, channel)."""
    return (one @ _transposed(other)).sum(-3)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)


def with_bias(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A projection (..., channel, feature) and its bias as one of (..., channel, feature + 1), for tokens (x, 1)."""
    return np.concatenate([weight, bias[..., None]], -1)


def mode_readers(query: np.ndarray, key: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """What reads the modes off queries and keys: (..., channel, mode) twice, zeros for modes of no size.

    M v_n = s_n u_n gives u_n = W_q^T (W_k v_n) / s_n, so that x . u_n = (W_q x) . (W_k v_n) / s_n; and likewise
    x . v_n = (W_k x) . (W_q u_n) / s_n. The projections' input x is not needed where W_q x and W_k x are known.
    """
    left, values, right = singular_modes(query, key)
    sized = values > tolerance * values[..., :1]
    inverse = np.divide(1, values, out=np.zeros_like(values), where=sized)[..., None, :]
    return key @ _transposed(right) * inverse, query @ _transposed(left) * inverse
