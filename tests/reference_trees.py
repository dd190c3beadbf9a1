"""Slow twins of the tree rules, in plain recursion, and the exact law of a round over a tree.

They are written from the definitions and share nothing with the library. They take any numbers: floats, or
``fractions.Fraction``, with which they are exact. p is the target, q the draft.

A tree is a list of parents and one of tokens: draft j follows draft ``parents[j] < j``, or the root, -1. ``target`` and
``draft`` are functions from the tokens since the root to a distribution. ``draft`` is None for deterministic drafts.

A rule is ``rule(node, target, decide, replacement) -> (node, weights)``: the last node that is kept, and the weights of
the token after it. ``decide(index, chance)`` is True with the given chance: the one source of chance, asked at most
once for each draft.
"""

import dataclasses
import itertools
from collections import defaultdict


@dataclasses.dataclass
class Node:
    """A draft, or the root: index -1, no tokens.

    Attributes:
      index: the place among the drafts.
      tokens: the tokens from the root to this node.
      law: the distribution of the first child, or None if children are deterministic.
      children: in the order in which they were drawn.
    """

    index: int
    tokens: tuple
    law: list | None
    children: list = dataclasses.field(default_factory=list)


def grow(parents, tokens, draft):
    """Returns the root of the tree."""
    law = draft or (lambda _: None)
    nodes = [Node(-1, (), law(()))]
    for j, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        path = (*nodes[parent + 1].tokens, token)
        nodes.append(Node(j, path, law(path)))
        nodes[parent + 1].children.append(nodes[-1])
    return nodes[0]


def one_hot(token, vocab):
    return [int(x == token) for x in range(vocab)]


def normalised(weights, otherwise):
    total = sum(weights)
    return [weight / total for weight in weights] if total > 0 else otherwise


def subtract(scale, p, q):
    return [max(scale * a - b, 0) for a, b in zip(p, q, strict=True)]


def without(law, token):
    """Returns the law without the token, renormalised; all 0 if nothing is left."""
    left = [0 if x == token else weight for x, weight in enumerate(law)]
    return normalised(left, left)


def law_of(child, law, vocab):
    """Returns what a child was drawn from: one-hot for a draft that the law cannot draw."""
    token = child.tokens[-1]
    return one_hot(token, vocab) if law is None or not law[token] else law


def walk(node, target, decide, replacement):
    """The target samples; a child that is the sample is kept. It has the chance that its token has in p.

    To draw from p is to accept each child in turn with the chance that it has, given that no child before it was drawn.
    """
    del replacement
    left = target(node.tokens)
    for child in node.children:
        token = child.tokens[-1]
        if decide(child.index, left[token]):
            return walk(child, target, decide, True)
        left = normalised([0 if x == token else weight for x, weight in enumerate(left)], left)
    return node, left


def recursive(node, target, decide, replacement):
    """Rejection, sibling after sibling, each against what its elder siblings left of p."""
    residual, law = target(node.tokens), node.law
    for child in node.children:
        token, q = child.tokens[-1], law_of(child, law, len(residual))
        if decide(child.index, min(1, residual[token] / q[token])):
            return recursive(child, target, decide, replacement)
        residual = normalised(subtract(1, residual, q), residual)
        law = law if replacement or law is None else without(law, token)
    return node, residual


def reach_after(reach, total, _q, _token):
    """Returns the chance to stay at or below a node, after a child's subtree failed that left ``total``."""
    return total / (total + 1 - reach) if total + 1 - reach > 0 else 1


def traversal(node, target, decide, replacement, reach=1):
    """The first node in post-order that is kept, each with its chance. None if no node at or below this one is."""
    residual, law = target(node.tokens), node.law
    for child in node.children:
        token, q = child.tokens[-1], law_of(child, law, len(residual))
        kept = traversal(child, target, decide, replacement, min(1, reach * residual[token] / q[token]))
        if kept is not None:
            return kept
        left = subtract(reach, residual, q)
        residual, reach = normalised(left, residual), reach_after(reach, sum(left), q, token)
        law = law if replacement or law is None else without(law, token)
    return (node, residual) if node.index < 0 or decide(node.index, reach) else None


def ranked(p, q):
    """Returns the tokens by p / q, descending, lower ids first among equals; those that q cannot draw last."""
    return sorted(range(len(p)), key=lambda x: (-(p[x] / q[x]) if q[x] else 1, x))


def law_of_best(p, q, count, worse):
    """Returns the law of the best-ranked token of ``count`` paths, and for each token how much it outranks.

    ``worse`` is the weight of paths that left the chosen one for a worse token, relative to those that still follow.
    """
    order = ranked(p, q)

    def powers(a, b):
        return sum(a**j * b ** (count - 1 - j) for j in range(count))

    below = [worse + sum(q[y] for y in order[order.index(x) + 1 :]) for x in range(len(p))]
    law = [q[x] * powers(below[x] + q[x], below[x]) / powers(worse + 1, worse) for x in range(len(p))]
    return law, [b / weight if weight else 0 for b, weight in zip(below, q, strict=True)]


def multipath(node, target, decide, replacement):
    """The best-ranked path among independent ones, verified by block verification against the law of the choice."""
    assert replacement
    live, worse, laws = [node], 0, []
    counts = depths(node)
    while any(other.children for other in live):
        p = target(live[0].tokens)
        candidates = sorted((child for other in live for child in other.children), key=lambda child: child.index)
        if live[0].law is None:
            best = max(candidates, key=lambda child: p[child.tokens[-1]]).tokens[-1]
            laws.append(one_hot(best, len(p)))
        else:
            order = ranked(p, live[0].law)
            best = min((child.tokens[-1] for child in candidates), key=order.index)
            law, outranked = law_of_best(p, live[0].law, counts[len(laws) + 1], worse)
            worse = outranked[best]
            laws.append(law)
        live = [child for child in candidates if child.tokens[-1] == best]
    # The path to the first of those that got furthest.
    chain = [node]
    while chain[-1] is not live[0]:
        chain.append(next(child for child in chain[-1].children if follows(live[0], child)))
    return block(chain, laws, target, decide)


def depths(node):
    """Returns how many nodes there are at each depth."""
    counts, level = [], [node]
    while level:
        counts.append(len(level))
        level = [child for other in level for child in other.children]
    return [*counts, 0]


def follows(node, other):
    return node is other or any(follows(node, child) for child in other.children)


def stops_of_block(chain, laws, target):
    """Yields for each node of a chain, root first, the chance of block verification and the weights after it."""
    reach = 1
    for i, node in enumerate(chain):
        p = target(node.tokens)
        if i:
            token, above = node.tokens[-1], target(chain[i - 1].tokens)
            reach = min(1, reach * above[token] / laws[i - 1][token]) if laws[i - 1][token] else 0
        if i == len(laws):
            yield reach, p
        else:
            left = subtract(reach, p, laws[i])
            yield reach_after(reach, sum(left), None, None), normalised(left, p)


def block(chain, laws, target, decide):
    """Block verification of a chain of nodes that was drawn from the laws: the last success counts."""
    kept = None
    for node, (chance, weights) in zip(chain, stops_of_block(chain, laws, target), strict=True):
        if node.index < 0 or decide(node.index, chance):
            kept = node, weights
    return kept


# The law of a round.


def drawn(parents, draft, replacement, vocab):
    """Yields (mass, tokens) of every tree that can be drawn.

    Without replacement, a sibling for which the law has nothing left is the lowest token that its elders are not.
    """

    def after(tokens, paths):
        j = len(tokens)
        if j == len(parents):
            yield 1, tokens
            return
        path = paths[parents[j] + 1]
        law = draft(path)
        elders = [tokens[i] for i in range(j) if parents[i] == parents[j]]
        if not replacement:
            for token in elders:
                law = without(law, token)
        if not any(law):
            law = one_hot(min(set(range(vocab)) - set(elders), default=0), vocab)
        for token, mass in enumerate(law):
            if mass:
                for rest, whole in after((*tokens, token), [*paths, (*path, token)]):
                    yield mass * rest, whole

    return after((), [()])


def outcomes(procedure):
    """Yields (mass, result) for every sequence of decisions of ``procedure(decide) -> result``."""
    scripts = [()]
    while scripts:
        decide = Script(scripts.pop(), scripts)
        result = procedure(decide)
        yield decide.mass, result


class Script:
    """Decides as the script says, and then True; adds to ``others`` the scripts that decide otherwise after its end."""

    def __init__(self, script, others):
        self.script, self.others, self.taken, self.mass = script, others, (), 1

    def __call__(self, _index, chance):
        if chance <= 0 or chance >= 1:
            return chance > 0
        step = len(self.taken)
        if step >= len(self.script):
            self.others.append((*self.taken, False))
        yes = self.script[step] if step < len(self.script) else True
        self.taken += (yes,)
        self.mass *= chance if yes else 1 - chance
        return yes


def complete(law, tokens, mass, target, count):
    """Adds ``mass`` to the texts of ``count`` tokens that start with ``tokens``, by the target's law."""
    if len(tokens) == count:
        law[tokens] += mass
        return
    for x, chance in enumerate(target(tokens)):
        if chance:
            complete(law, (*tokens, x), mass * chance, target, count)


def merged(root):
    """Gives the children of a draft to its elder sibling of the same token, if there is one. The draft stays, a leaf.

    Parents then no longer follow from the drawing alone: they follow from tokens of earlier drafts.
    """
    first = {}
    for child in root.children:
        elder = first.setdefault(child.tokens[-1], child)
        if elder is not child:
            elder.children.extend(child.children)
            child.children = []
    for child in root.children:
        child.children.sort(key=lambda draft: draft.index)
        merged(child)
    return root


def joint(target, count):
    """Returns the target's own law of ``count`` tokens."""
    law = defaultdict(int)
    complete(law, (), 1, target, count)
    return law


def round_law(rule, trees, target, count, replacement=True):
    """Returns the law of the first ``count`` tokens that a round and then the target emit, and E[kept drafts].

    Args:
      rule: ``recursive`` or one like it.
      trees: (mass, root) of every tree that the round may have.
      target: the target's distributions.
      count: tokens in the law, more than the depth of any tree.
      replacement: what the rule is told.
    """
    law, kept = defaultdict(int), 0
    for mass, root in trees:
        for chance, (node, weights) in outcomes(lambda decide, root=root: rule(root, target, decide, replacement)):
            kept += mass * chance * len(node.tokens)
            for x, weight in enumerate(normalised(weights, None)):
                if weight:
                    complete(law, (*node.tokens, x), mass * chance * weight, target, count)
    return law, kept


def difference(law, other):
    """Returns the largest difference of two laws, and their total variation."""
    gaps = [abs(law.get(tokens, 0) - other.get(tokens, 0)) for tokens in {*law, *other}]
    return max(gaps), sum(gaps) / 2


def shapes(count):
    """Yields the parents of every tree of ``count`` drafts."""
    return itertools.product(*(range(-1, j) for j in range(count)))
