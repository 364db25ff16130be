"""The words of the app, each explained once: for the Learn page and for tooltips.

A term's text is Markdown for a newcomer, one to three sentences. ``FIGURES`` says which term
explains how a figure is read; every figure's "?" leads there.
"""

from typing import NamedTuple

from explorer.registry import Registry


class Term(NamedTuple):
    """A word of the app.

    Attributes
    ----------
    title : str
    text : str
        Markdown.
    also : tuple of str
        Names of terms that it is explained with.
    """

    title: str
    text: str
    also: tuple[str, ...] = ()


TERMS: Registry[Term] = Registry(
    "term",
    token=Term(
        "Token",
        "A piece of text that a model reads as one: a word, a part of one, or a sign. Everything "
        "here is counted in tokens.",
    ),
    expert=Term(
        "Expert",
        "One of several small networks in a layer. A token visits a few of them, so the model "
        "can be large while every token costs little. An expert is named by its layer and its "
        "number there, such as L3.E12; experts of different layers have nothing in common.",
        ("layer", "router"),
    ),
    router=Term(
        "Router",
        "The small part of a layer that scores every expert for a token and sends the token to "
        "the best few. Also called a gate.",
        ("expert", "top_k"),
    ),
    layer=Term(
        "Layer",
        "One of the steps that a model applies to every token, in order. Many or all of them "
        "have experts and a router of their own.",
    ),
    top_k=Term(
        "Top-k", "How many experts a token visits in a layer, such as 2 of 16.", ("combine_weight",)
    ),
    combine_weight=Term(
        "Combine weight",
        "How much each chosen expert's output counts for a token. The router gives it.",
        ("top_k",),
    ),
    shared_expert=Term(
        "Shared expert",
        "An expert that every token visits, beside those that the router chooses. It is not "
        "counted in loads.",
    ),
    load=Term(
        "Load",
        "How many tokens an expert got. The **fair share** is what it would get if all experts of "
        "its layer got the same: 1× is fair, 2× twice as much.",
        ("by_chance",),
    ),
    assignment=Term(
        "Assignment",
        "One token sent to one expert. A layer with top-k 2 makes two assignments per token.",
        ("top_k",),
    ),
    by_chance=Term(
        "By chance",
        "What would be seen if nothing were going on: uniform random routing of as many tokens, or "
        "labels that were shuffled. Few tokens never look even, so compare with this before "
        "believing a pattern.",
    ),
    interval=Term(
        "Interval",
        "Where the true share may well lie (9 of 10 times). Prompts are drawn again and again "
        "where there are enough of them, since tokens of one prompt are alike.",
    ),
    gate_entropy=Term(
        "Gate entropy",
        "How undecided the router was for a token: 0% = sure of one expert, 100% = all experts "
        "alike.",
        ("router", "margin"),
    ),
    margin=Term(
        "Margin",
        "How far the last expert that was chosen was ahead of the first that was not. Near 0, a "
        "tiny change would have chosen another one.",
    ),
    load_entropy=Term(
        "Load entropy",
        "How evenly a layer's experts share the work: 100% = all the same, 0% = one does all.",
        ("load",),
    ),
    max_violation=Term(
        "Busiest expert",
        "The load of a layer's busiest expert, in fair shares: 1× = no expert has more than the "
        "others, 2× = it has twice its share. Everyone waits for it when experts run side by side. "
        "Papers write MaxVio, which is this less 1.",
        ("load",),
    ),
    dead_expert=Term(
        "Dead expert",
        "An expert that none of these tokens visited. With few tokens that is expected.",
        ("by_chance",),
    ),
    capacity=Term(
        "Capacity factor",
        "A limit of many systems: with 1.25, an expert has room for 1.25 times its fair share of a "
        "batch, and tokens beyond that are dropped.",
        ("load",),
    ),
    specialisation=Term(
        "Specialisation",
        "The share of a domain's (or of a word's) tokens that choose an expert. Uniform routing "
        "gives top-k / experts; far above it, the expert is specialised.",
        ("interval", "by_chance"),
    ),
    divergence=Term(
        "Divergence",
        "How far the mix of domains that an expert serves is from the mix of all tokens, in nats: "
        "0 = the same mix.",
        ("specialisation",),
    ),
    knock_out=Term(
        "Knock-out",
        "What the model's loss becomes without one expert. Its control is another expert of the "
        "layer with about its load: what taking out any expert that busy would cost.",
        ("specialisation", "interval"),
    ),
    coactivation=Term(
        "Co-activation", "Two experts of a layer that serve the same token.", ("by_chance",)
    ),
    transition=Term(
        "Transition",
        "From the expert of a token in one layer to its expert in the next. A pair that is used "
        "more often than by chance is a path.",
        ("by_chance",),
    ),
    attention=Term(
        "Attention head",
        "The part of a layer that lets a token look back at earlier tokens. A head's map says "
        "which ones it read from.",
    ),
    phase=Term(
        "Phase",
        "**Prompt**: tokens that the model read. **Generated**: tokens that it wrote, one by one.",
    ),
    domain=Term("Domain", "What a prompt is about, as it was labelled when it was recorded."),
    slice=Term(
        "Slice",
        "A set of tokens that somebody saved under a name, such as a region of a map. All pages "
        "can be limited to it.",
    ),
    run=Term(
        "Run",
        "One recording of one model on one set of prompts: a file that holds what every router "
        "did.",
    ),
    map=Term(
        "Map",
        "Points that are alike lie together. Distances between far regions, and their sizes, mean "
        "nothing; the numbers beside a map say how far it can be trusted.",
    ),
    lift=Term(
        "Lift",
        "How many times as often as elsewhere: 1 = as often, 2 = twice as often.",
        ("by_chance",),
    ),
    expert_parallel=Term(
        "Expert parallel",
        "A layer's experts spread over several GPUs. All wait for the GPU with the most tokens, so "
        "busy experts get replicas, and the copies are placed so that GPUs are equally busy.",
        ("load", "max_violation"),
    ),
    coverage=Term(
        "Coverage",
        "How many different experts a batch needs. Every one of them must be read from memory, "
        "however few tokens it gets.",
    ),
    expert_cache=Term(
        "Expert cache",
        "Fast memory that holds some of a layer's experts; the others are loaded when a token "
        "needs them. A **hit** is an expert that is there already. **Pins** stay for good; "
        "**Belady** knows the future, so that no cache hits more.",
        ("expert",),
    ),
    calibration=Term(
        "Calibration",
        "Texts from which quantisation and pruning take statistics of every expert. An expert that "
        "few of their tokens reach has statistics that are worth nothing.",
        ("expert", "load"),
    ),
    comparison=Term(
        "Comparison",
        "Two runs, or two routers on the same tokens, side by side. Expert numbers of different "
        "models have nothing to do with each other, so those are compared by how tokens share "
        "experts, never by number.",
        ("router",),
    ),
    agreement=Term(
        "Agreement",
        "How many experts of a token are the same under two routers, or in two runs: 1 = the same "
        "set, 0 = none in common. **Jaccard** is the share of all experts that either of them "
        "chose. Agreement says little about the loss.",
        ("by_chance", "loss"),
    ),
    saturation=Term(
        "Saturation",
        "How many of the experts that the last checkpoint of a training chooses for a token an "
        "earlier one chose already: 1 = the routing is settled.",
        ("agreement",),
    ),
    condition=Term(
        "Condition",
        "A change of the model's weights, such as fewer bits or fewer experts. A **flip** is a "
        "token whose set of experts it changes, mostly one with a small margin.",
        ("margin", "loss"),
    ),
    loss=Term("Loss", "How surprised the model was by the next token, in nats: 0 = it knew."),
)

# figure (its key on a page, or the beginning of it) -> term; the longest beginning counts
FIGURES = {
    "load map": "load",
    "load bars": "load",
    "load by": "specialisation",
    "load change": "load",
    "load a": "load",
    "load b": "load",
    "lorenz": "load_entropy",
    "over layers": "max_violation",
    "gpu": "expert_parallel",
    "decode reads": "coverage",
    "coverage": "coverage",
    "capacity": "capacity",
    "cache": "expert_cache",
    "drafts": "coverage",
    "calibration": "calibration",
    "strip": "gate_entropy",
    "token map": "gate_entropy",
    "token routes": "combine_weight",
    "scores": "router",
    "shares by": "specialisation",
    "vocabulary": "specialisation",
    "partners": "coactivation",
    "divergence map": "divergence",
    "information": "by_chance",
    "experts of": "specialisation",
    "need and use": "knock_out",
    "loss without": "knock_out",
    "what if": "knock_out",
    "alike": "expert",
    "sankey": "transition",
    "flow map": "transition",
    "together map": "coactivation",
    "together": "attention",
    "head": "attention",
    "token window": "attention",
    "map": "map",
    "lift": "lift",
    "against": "comparison",
    "both": "comparison",
    "two": "comparison",
    "by domain": "comparison",
    "by layer": "comparison",
    "front": "comparison",
    "families": "comparison",
    "curves": "comparison",
    "compare": "comparison",
    "divergence": "agreement",
    "trend saturation": "saturation",
    "trend max_violation": "max_violation",
    "trend normalized_entropy": "load_entropy",
    "trend domain_information": "specialisation",
    "oracle": "comparison",
    "gates": "comparison",
    "conditions": "condition",
    "flip": "condition",
}
_DEFAULT = "by_chance"


def term_of(figure: str) -> str:
    """Return the name of the term that explains a figure."""
    fitting = [beginning for beginning in FIGURES if figure.startswith(beginning)]
    return FIGURES[max(fitting, key=len)] if fitting else _DEFAULT


def help_text(*names: str) -> str:
    """Return terms as the text of a tooltip."""
    return "  \n".join(f"**{TERMS[name].title}**: {TERMS[name].text}" for name in names)
