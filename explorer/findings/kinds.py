"""Kinds of findings: each suggests candidates in one half of the prompts and tests in the other."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtr, stdtrit

from explorer.findings.halves import MIN_PROMPTS, Floats, Half, Ids, RouterChoices
from explorer.metrics.coactivation import MIN_EXPECTED, pair_uplift, transition_uplift
from explorer.metrics.specialization import MIN_COUNT
from explorer.text import visible

_DRAWS, _BOOTSTRAPS, _SHUFFLES = 4_000, 200, 1_999
_WORDS = 50  # the most frequent ones; more would only be slower
_SEED = 0


class Candidate(NamedTuple):
    """What one half suggests, and the function that tests it in the other.

    Attributes
    ----------
    strength : float
        Comparable within a kind; the strongest candidate is tested.
    test : callable
        Returns None where the other half cannot tell.
    """

    strength: float
    test: Callable[[Half], "Tested | None"]


class Tested(NamedTuple):
    """A candidate in the half that did not suggest it; see ``explorer.findings.Finding``."""

    sentence: str
    effect: float
    low: float
    high: float
    p: float
    page: str
    address: dict[str, str]
    prompts: int | None = None  # that the test is of, where they are not all of the half


def _ratio(part: Floats, whole: Floats, null: float = 1.0) -> tuple[float, float, float, float]:
    """Test whether a ratio of sums over prompts exceeds its null; the prompt is the unit.

    Returns the ratio, its 95% interval, and the one-sided p of Student's t (Cochran 1977,
    "Sampling Techniques", ch. 6).
    """
    used = whole > 0
    part, whole = part[used], whole[used]
    n = len(part)
    if n < MIN_PROMPTS:
        return float("nan"), float("nan"), float("nan"), 1.0
    ratio = part.sum() / whole.sum()
    spread = np.sqrt(n / (n - 1) * ((part - ratio * whole) ** 2).sum()) / whole.sum()
    if spread == 0:  # every prompt says the same
        return float(ratio), float(ratio), float(ratio), 0.5**n if ratio > null else 1.0
    half = stdtrit(n - 1, 0.975) * spread
    p = float(stdtr(n - 1, (null - ratio) / spread))
    return float(ratio), float(ratio - half), float(ratio + half), p


def _shares(part: Floats, whole: Floats, inside: npt.NDArray[np.bool_]) -> Floats:
    """Return the share inside less that outside; ``inside`` is [..., P]."""
    total_in, total_out = inside @ whole, (~inside) @ whole
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((inside @ part) / total_in - ((~inside) @ part) / total_out)


def _permuted(part: Floats, whole: Floats, inside: npt.NDArray[np.bool_]) -> float:
    """Return the p of a share inside that exceeds the one outside, labels of prompts shuffled."""
    random = np.random.default_rng(_SEED)
    labels = random.permuted(np.broadcast_to(inside, (_DRAWS, len(inside))), axis=1)
    drawn = _shares(part, whole, labels)
    seen = _shares(part, whole, inside)
    return float((1 + (drawn >= seen).sum()) / (1 + _DRAWS))


def _sums(half: Half, values: npt.NDArray[Any]) -> Floats:
    """Add up a value of each token over its prompt, [P]."""
    sums = np.bincount(half.prompt, values, minlength=len(half.tokens))
    return np.asarray(sums, dtype=np.float64)


def _expert(site: str, expert: int) -> tuple[str, dict[str, str]]:
    return "experts", {"layer": site, "id": str(expert), "about": "expert"}


def _named(domain: str) -> str:
    return f"“{visible(domain)}”" if domain else "no domain"


# --- kinds of findings ----------------------------------------------------------------------------


def _dead(half: Half) -> Iterator[Candidate]:
    """Suggest experts that nothing chose, where uniform routing would have missed none."""
    idle = [
        np.setdiff1d(site.routed[site.load[:, site.routed].sum(0) == 0], site.used)
        for site in half.sites
    ]
    if not any(map(len, idle)):
        return

    def test(other: Half) -> Tested | None:
        n_prompts = len(other.tokens)
        dead, chance = [], 0.0
        for site, experts in zip(other.sites, idle, strict=True):
            still = [e for e in experts.tolist() if not site.load[:, e].any()]
            dead += [(site.name, e) for e in still]
            # of each prompt one token counts: that is all that is surely independent
            chance = (
                max(chance, (1 - site.top_k / site.n_experts) ** n_prompts) if still else chance
            )
        if not dead:
            return None
        shown = ", ".join(f"L{name}.E{e}" for name, e in dead[:6])
        more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
        many = f"{len(dead)} experts are" if len(dead) > 1 else "1 expert is"
        total = sum(len(site.routed) for site in other.sites)
        sentence = f"{many} never chosen, of {total}: {shown}{more}."
        n = float(len(dead))
        page, address = _expert(*dead[0])
        return Tested(sentence, n, n, n, chance, page, address)

    yield Candidate(1.0, test)


def _overloaded(half: Half) -> Iterator[Candidate]:
    """Suggest the busiest expert of every layer."""
    for at, site in enumerate(half.sites):
        loads = site.load[:, site.routed].sum(0)
        if len(loads) < 2 or not loads.sum():
            continue
        expert = int(site.routed[loads.argmax()])
        ratio = float(loads[expert] / loads.mean())
        if ratio < 1.5:
            continue

        def test(other: Half, at: int = at, expert: int = expert) -> Tested:
            there = other.sites[at]
            fair = there.load[:, there.routed].mean(1)
            ratio, low, high, p = _ratio(there.load[:, expert], fair)
            sentence = (
                f"Expert {expert} of layer {there.name} gets {ratio:.1f} times its fair share of "
                f"the work ({low:.1f} to {high:.1f}), the most of all experts."
            )
            return Tested(sentence, ratio, low, high, p, *_expert(there.name, expert))

        yield Candidate(ratio, test)


def _of_a_domain(half: Half) -> Iterator[Candidate]:
    """Suggest experts that take a domain's tokens far more often than others."""
    for domain in sorted(set(half.domain)):
        inside = half.domain == domain
        if inside.sum() < 2 or inside.all():
            continue
        for at, site in enumerate(half.sites):
            here = site.load[inside].sum(0) / half.tokens[inside].sum()
            others = site.load[~inside].sum(0) / half.tokens[~inside].sum()
            chance = np.maximum(here, others) * (1 - np.maximum(here, others))
            spread = np.sqrt(chance / half.tokens[inside].sum() + 1e-9)
            strength = (here - others) / spread
            expert = int(strength.argmax())

            def test(
                other: Half, at: int = at, expert: int = expert, domain: str = domain
            ) -> Tested | None:
                there, inside = other.sites[at], other.domain == domain
                if inside.sum() < 2:
                    return None
                part = there.load[:, expert]
                mine, low, high, _ = _ratio_or_sum(part[inside], other.tokens[inside])
                rest = float(part[~inside].sum() / other.tokens[~inside].sum())
                interval = f" ({low:.0%} to {high:.0%})" if np.isfinite(low) else ""
                sentence = (
                    f"Expert {expert} of layer {there.name} belongs to {_named(domain)}: it takes "
                    f"{mine:.0%} of that domain's tokens{interval} and {rest:.0%} of the others."
                )
                p = _permuted(part, other.tokens, inside)
                return Tested(sentence, mine, low, high, p, *_expert(there.name, expert))

            yield Candidate(float(strength[expert]), test)


def _ratio_or_sum(part: Floats, whole: Floats) -> tuple[float, float, float, float]:
    """As ``_ratio``, with a value but no interval for a few prompts."""
    if len(part) >= MIN_PROMPTS:
        ratio, low, high, p = _ratio(part, whole)
        return ratio, max(low, 0.0), min(high, 1.0), p
    return float(part.sum() / whole.sum()), float("nan"), float("nan"), 1.0


def _of_a_word(half: Half) -> Iterator[Candidate]:
    """Suggest experts that take nearly every occurrence of one vocabulary entry."""
    entries, counts = np.unique(half.token[half.token >= 0], return_counts=True)
    often = np.argsort(-counts, kind="stable")[:_WORDS]
    for entry in entries[often][counts[often] >= 3 * MIN_COUNT].tolist():
        rows = half.token == entry
        if len(np.unique(half.prompt[rows])) < MIN_PROMPTS:
            continue
        for at, site in enumerate(half.sites):
            chosen = site.ids[rows]
            hits = np.bincount(chosen[chosen >= 0], minlength=site.n_experts)
            usual = site.load.sum(0) / len(half.token)
            gain = hits / rows.sum() - usual
            expert = int(gain.argmax())

            def test(
                other: Half, at: int = at, expert: int = expert, entry: int = entry
            ) -> Tested | None:
                there, rows = other.sites[at], other.token == entry
                taken = (there.ids == expert).any(1)
                part = _sums(other, rows & taken)
                whole = _sums(other, rows)
                usual = float(taken.mean())
                share, low, high, p = _ratio(part, whole, usual)
                if not np.isfinite(share):
                    return None
                sentence = (
                    f"Expert {expert} of layer {there.name} takes {share:.0%} of the tokens "
                    f"“{half.words[entry]}” ({max(low, 0):.0%} to {min(high, 1):.0%}) and "
                    f"{usual:.0%} of all tokens."
                )
                return Tested(sentence, share, low, high, p, *_expert(there.name, expert))

            yield Candidate(float(gain[expert] * np.sqrt(rows.sum())), test)


def _hesitates(half: Half) -> Iterator[Candidate]:
    """Suggest a router and the domain in which it is least sure."""
    for at in range(len(half.sites)):
        if np.isnan(half.entropy[:, at]).any():
            continue
        sums = _sums(half, half.entropy[:, at])
        for domain in sorted(set(half.domain)):
            inside = half.domain == domain
            if inside.sum() < 2 or inside.all():
                continue

            def test(other: Half, at: int = at, domain: str = domain) -> Tested | None:
                inside = other.domain == domain
                if inside.sum() < 2 or np.isnan(other.entropy[:, at]).any():
                    return None
                sums = _sums(other, other.entropy[:, at])
                mine, low, high, _ = _ratio_or_sum(sums[inside], other.tokens[inside])
                rest = float(sums[~inside].sum() / other.tokens[~inside].sum())
                interval = f" ({low:.0%} to {high:.0%})" if np.isfinite(low) else ""
                name = other.sites[at].name
                sentence = (
                    f"The router of layer {name} hesitates in {_named(domain)}: its gate entropy "
                    f"is {mine:.0%} of its largest value there{interval} and {rest:.0%} elsewhere."
                )
                p = _permuted(sums, other.tokens, inside)
                address = {"layer": name, "domain": domain, "color": "entropy"}
                return Tested(sentence, mine - rest, low - rest, high - rest, p, "tokens", address)

            yield Candidate(float(_shares(sums, half.tokens, inside)), test)


def _unspecialised(half: Half) -> Iterator[Candidate]:
    """Suggest the layer that knows least of domains, where others know more."""
    domains = sorted(set(half.domain))
    if len(domains) < 2 or len(half.sites) < 2:
        return
    known = _known(half, domains, np.ones((1, len(half.tokens))))[0]
    if np.isnan(known).any():
        return
    at = int(known.argmin())

    def test(other: Half) -> Tested | None:
        n = len(other.tokens)
        random = np.random.default_rng(_SEED)
        seen = _known(other, domains, np.ones((1, n)))
        if np.isnan(seen).any():
            return None
        times = random.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS)
        drawn = _known(other, domains, times.astype(np.float64))
        order = random.permuted(np.broadcast_to(np.arange(n), (_SHUFFLES, n)), axis=1)
        shuffled = _known(other, domains, np.ones((1, n)), order)
        gap, gaps, by_chance = (
            np.delete(values, at, axis=1).mean(1) - values[:, at]
            for values in (seen, drawn, shuffled)
        )
        spread = float(np.nanstd(gaps, ddof=1))
        # the layers differ beyond the draw of prompts, and shuffled domains do not tell them apart
        p = float(ndtr(-gap[0] / spread)) if spread > 0 else 1.0
        p = max(p, float((1 + (by_chance >= gap[0]).sum()) / (1 + _SHUFFLES)))
        low, high = gap[0] - 1.96 * spread, gap[0] + 1.96 * spread
        sentence = (
            f"Layer {other.sites[at].name} specialises least: the domain tells {seen[0, at]:.1%} "
            f"of which expert is chosen, in the other layers {np.delete(seen[0], at).mean():.1%}."
        )
        return Tested(sentence, float(gap[0]), low, high, p, "experts", {"about": "all"})

    yield Candidate(float(np.delete(known, at).mean() - known[at]), test)


def _known(half: Half, domains: list[str], times: Floats, order: Ids | None = None) -> Floats:
    """Return what share of each site's choices the domain tells, [draws, L]; nan = undefined.

    It is the mutual information of domain and expert over the entropy of the load. ``times``
    [draws, P] is how often each prompt was drawn, ``order`` [draws, P] whose domain it has.
    """
    inside = np.array([[d == one for d in half.domain] for one in domains], dtype=np.float64)
    labels = inside[None] if order is None else inside[:, order].transpose(1, 0, 2)
    found = []
    for site in half.sites:
        counts = (labels * times[:, None]) @ site.load  # [draws, D, E]
        total = counts.sum((1, 2))
        joint, rows, columns = _plogp(counts), _plogp(counts.sum(2)), _plogp(counts.sum(1))
        # H(domain) + H(expert) - H(both), over H(expert), from sums of n ln n
        with np.errstate(invalid="ignore", divide="ignore"):
            most = np.log(total) - columns / total
            found.append((np.log(total) + (joint - rows - columns) / total) / most)
    return np.stack(found, axis=1)


def _plogp(counts: Floats) -> Floats:
    """Return the sum of n ln n of each draw."""
    terms = counts * np.log(np.where(counts > 0, counts, 1.0))
    return np.asarray(terms.reshape(len(counts), -1).sum(1))


def _together(half: Half) -> Iterator[Candidate]:
    """Suggest two experts of a layer that serve the same tokens."""
    for at, site in enumerate(half.sites):
        if site.top_k < 2:
            continue
        ratio, expected = pair_uplift(_pairs(site), min_expected=2 * MIN_EXPECTED)
        strength = (ratio - 1) * np.sqrt(expected)
        if np.isnan(strength).all():
            continue
        a, b = (int(i) for i in np.unravel_index(np.nanargmax(strength), strength.shape))

        def test(other: Half, at: int = at, a: int = a, b: int = b) -> Tested | None:
            there = other.sites[at]
            expected = pair_uplift(_pairs(there)).expected[a, b]
            both = ((there.ids == a).any(1) & (there.ids == b).any(1)).astype(np.float64)
            part = _sums(other, both)
            whole = other.tokens * expected / other.tokens.sum()
            ratio, low, high, p = _ratio(part, whole)
            sentence = (
                f"Experts {a} and {b} of layer {there.name} serve the same tokens {ratio:.1f} times"
                f" as often as their loads bring about ({low:.1f} to {high:.1f})."
            )
            return Tested(sentence, ratio, low, high, p, *_expert(there.name, a))

        yield Candidate(float(strength[a, b]), test)


def _pairs(site: RouterChoices) -> Floats:
    chosen = np.zeros((len(site.ids), site.n_experts))
    at, slot = np.nonzero(site.ids >= 0)
    chosen[at, site.ids[at, slot]] = 1
    return np.asarray(chosen.T @ chosen)


def _follows(half: Half) -> Iterator[Candidate]:
    """Suggest an expert that leads to another one in the next layer."""
    for at in range(len(half.sites) - 1):
        here, there = half.sites[at], half.sites[at + 1]
        ratio, expected = transition_uplift(_met(here, there), min_expected=2 * MIN_EXPECTED)
        strength = (ratio - 1) * np.sqrt(expected)
        if np.isnan(strength).all():
            continue
        a, b = (int(i) for i in np.unravel_index(np.nanargmax(strength), strength.shape))

        def test(other: Half, at: int = at, a: int = a, b: int = b) -> Tested | None:
            here, there = other.sites[at], other.sites[at + 1]
            expected = transition_uplift(_met(here, there)).expected[a, b]
            both = ((here.ids == a).any(1) & (there.ids == b).any(1)).astype(np.float64)
            part = _sums(other, both)
            ratio, low, high, p = _ratio(part, other.tokens * expected / other.tokens.sum())
            sentence = (
                f"Tokens of expert {a} of layer {here.name} go on to expert {b} of layer "
                f"{there.name} {ratio:.1f} times as often as by chance ({low:.1f} to {high:.1f})."
            )
            return Tested(sentence, ratio, low, high, p, "flow", {"layer": here.name})

        yield Candidate(float(strength[a, b]), test)


def _met(here: RouterChoices, there: RouterChoices) -> Floats:
    one, other = here.ids[:, :, None], there.ids[:, None, :]
    cells = (one * there.n_experts + other)[(one >= 0) & (other >= 0)]
    counts = np.bincount(cells, minlength=here.n_experts * there.n_experts)
    return counts.reshape(here.n_experts, there.n_experts).astype(np.float64)


def _repeats(half: Half) -> Iterator[Candidate]:
    """Suggest the layer whose experts stay the same from token to token."""
    for at, site in enumerate(half.sites):
        kept, chance, pairs = _repetition(half, site)
        if not pairs.any() or site.n_experts < 2:
            continue

        def test(other: Half, at: int = at) -> Tested | None:
            there = other.sites[at]
            kept, chance, pairs = _repetition(other, there)
            gain, low, high, p = _ratio(kept - chance, pairs, 0.0)
            if not np.isfinite(gain):
                return None
            sentence = (
                f"Layer {there.name} keeps an expert from one token to the next in "
                f"{kept.sum() / pairs.sum():.0%} of cases, {100 * gain:.0f} points more "
                f"({100 * low:.0f} to {100 * high:.0f}) than when tokens of a prompt are shuffled."
            )
            return Tested(sentence, gain, low, high, p, "flow", {"layer": there.name})

        yield Candidate(float((kept - chance).sum() / pairs.sum()), test)


def _repetition(half: Half, site: RouterChoices) -> tuple[Floats, Floats, Floats]:
    """Count, a prompt, neighbours with an expert in common, such of shuffled tokens, and pairs."""
    n = len(half.tokens)
    same = half.prompt[1:] == half.prompt[:-1]
    order = np.lexsort((np.random.default_rng(_SEED).random(len(half.prompt)), half.prompt))

    def common(ids: Ids) -> Floats:
        before, after = ids[:-1, :, None], ids[1:, None, :]
        shared = ((before == after) & (before >= 0)).any((1, 2)) & same
        return np.bincount(half.prompt[1:], shared, minlength=n).astype(np.float64)

    pairs = np.bincount(half.prompt[1:], same, minlength=n).astype(np.float64)
    return common(site.ids), common(site.ids[order]), pairs


def _attends(half: Half) -> Iterator[Candidate]:
    """Suggest a head whose tokens share experts with the tokens that they attend to."""
    for name, sums in half.attended.items():
        shared, chance = sums.sum(0).T
        with np.errstate(invalid="ignore", divide="ignore"):
            strength = np.where(chance > 0, (shared - chance) / np.sqrt(chance), -np.inf)
        head = int(strength.argmax())
        if not strength[head] > 0:
            continue

        def test(other: Half, name: str = name, head: int = head) -> Tested | None:
            if name not in other.attended:
                return None
            shared, chance = other.attended[name][:, head].T
            ratio, low, high, p = _ratio(shared, chance)
            if not np.isfinite(ratio):
                return None
            sentence = (
                f"Tokens share an expert of layer {name} with those that its head {head} attends "
                f"to {ratio:.2f} times as often as with others at the same distance ({low:.2f} to "
                f"{high:.2f})."
            )
            address = {"layer": name, "head": f"{name.partition('.')[0]}.{head}"}
            n = int((chance > 0).sum())
            return Tested(sentence, ratio, low, high, p, "attention", address, n)

        yield Candidate(float(strength[head]), test)


def _settles(half: Half) -> Iterator[Candidate]:
    """Suggest the checkpoint up to which the routing changed fast, and after which it did not.

    What it gains a checkpoint until then, less what it gains a checkpoint afterwards, up to the
    last but one: the last one agrees with itself. Under a steady drift, and without any learning,
    both are the same.
    """
    if half.saturation is None:
        return
    for at in range(1, len(half.checkpoints) - 2):

        def test(other: Half, at: int = at) -> Tested | None:
            if other.saturation is None:
                return None
            known = other.saturation[~np.isnan(other.saturation).any(1)]
            if len(known) < MIN_PROMPTS:
                return None
            gain, low, high, p = _ratio(_knee(known, at), np.ones(len(known)), 0.0)
            first, here, last = (float(known[:, i].mean()) for i in (0, at, -2))
            names = other.checkpoints
            sentence = (
                f"Routing settled at {visible(names[at])}: for the same tokens it chose {here:.0%} "
                f"of the last checkpoint's experts, from {first:.0%} at {visible(names[0])}, and "
                f"gained {100 * (last - here):.0f} points more until {visible(names[-2])}."
            )
            address = {"source": "folder", "trend": "saturation", "runs": ",".join(names)}
            return Tested(sentence, gain, low, high, p, "trends", address, len(known))

        seen = half.saturation[~np.isnan(half.saturation).any(1)]
        if len(seen) and (gain := float(_knee(seen, at).mean())) > 0:
            yield Candidate(gain, test)


def _knee(saturation: Floats, at: int) -> Floats:
    """Return each prompt's gain a checkpoint up to ``at`` less that after it, [P]."""
    before = (saturation[:, at] - saturation[:, 0]) / at
    after = (saturation[:, -2] - saturation[:, at]) / (saturation.shape[1] - 2 - at)
    return np.asarray(before - after)


KINDS: dict[str, Callable[[Half], Iterator[Candidate]]] = {
    "dead experts": _dead,
    "overloaded expert": _overloaded,
    "expert of a domain": _of_a_domain,
    "expert of a word": _of_a_word,
    "hesitation": _hesitates,
    "unspecialised layer": _unspecialised,
    "attention partners": _attends,
    "settled routing": _settles,
    "experts together": _together,
    "experts in a row": _follows,
    "repetition": _repeats,
}
