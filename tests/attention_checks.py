"""What the tests of the attention op's backends compare, and how."""

import torch
from checks import assert_close

from kernels.ops.attention import visible_keys

# float32 sums over a few hundred weights, with exponentials good to 1e-6 of their value
TOLERANCE = {
    "entropy": (1e-5, 0.0),
    "sink_mass": (2e-6, 0.0),
    "mean_distance": (1e-5, 1e-5),
    "window_mass": (1e-5, 0.0),
    "map": (1e-5, 0.0),
    "received": (1e-5, 1e-5),
    "top_weights": (2e-6, 0.0),
}


def assert_same(actual, expected, slack=1.0):
    """Fail where two results of the op differ; keys of equal weight may change places.

    ``slack`` widens the tolerances, for great scores whose own rounding shows in the weights.
    """
    assert torch.equal(actual.queries, expected.queries)
    missing = expected.map.isnan()
    assert torch.equal(actual.map.isnan(), missing), "map: other rows are nan"
    for name, (atol, rtol) in TOLERANCE.items():
        value, wanted = getattr(actual, name), getattr(expected, name)
        assert value.dtype == wanted.dtype == torch.float32
        if name == "map":
            value, wanted = value[~missing], wanted[~missing]
        assert_close(name, value, wanted, atol=slack * atol, rtol=slack * rtol)
    assert_ids_belong_to_weights(actual, expected, slack)


def assert_ids_belong_to_weights(actual, expected, slack):
    ids, wanted = actual.top_ids, expected.top_ids
    assert ids.dtype == torch.int32 and ids.shape == wanted.shape
    # a key whose weight is about to underflow may be there or not
    clear = expected.top_weights > 1e-30
    assert (ids[clear] >= 0).all()
    assert (ids[actual.top_weights == 0] == -1).all()
    for row in ids.flatten(0, -2):
        listed = row[row >= 0]
        assert listed.unique().numel() == listed.numel(), f"a key twice: {row.tolist()}"
    # ids may differ where weights are alike, up to what rounding does to them
    differ = clear & (ids != wanted)
    for place in differ.nonzero():
        head, weight = tuple(place[:-1]), expected.top_weights[tuple(place)]
        rivals = (expected.top_weights[head] - weight).abs() < slack * 2e-6
        last = expected.top_weights[head][-1]
        assert rivals.sum() > 1 or (weight - last).abs() < slack * 2e-6, f"top_ids{place.tolist()}"


def logsumexp(query, key, *, scaling, causal, window, softcap, valid, **_):
    """Log of each query's sum of exponentials, without sinks, as a fused kernel returns it."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if valid is None:
        valid = torch.ones(len(key), n_keys)
    positions = torch.arange(n_keys - n_queries, n_keys)
    visible = visible_keys(positions, valid.long(), causal=causal, window=window)
    return scores.masked_fill(~visible.unsqueeze(1), -torch.inf).logsumexp(-1)


def call(
    n_queries, *, n_keys=None, heads=1, key_heads=None, batch=1, size=8, spread=1.5, seed=0,
    **options,
):  # fmt: skip
    """Random queries and keys of a shape, and the options of a call, all that have no default."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n_queries, size, generator=generator)
    shape = (batch, key_heads or heads, n_queries if n_keys is None else n_keys, size)
    key = torch.randn(shape, generator=generator) * spread
    defaults = {"causal": True, "window": None, "softcap": None, "sinks": None, "valid": None}
    return query, key, {"scaling": size**-0.5, **defaults, **options}
