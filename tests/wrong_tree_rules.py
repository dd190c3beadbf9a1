"""Tree rules and tree drafters that are wrong: each is a fault seen in practice. The enumeration must fail for them.

``FAULTS`` maps a name to a function from a table, that is (p, q, tokens), to (rule, trees, replacement), as
``reference_trees.round_law`` takes them, and to the largest error of the joint law of three tokens on each table.
"""

from fractions import Fraction
from unittest import mock

import reference_trees as twin

FULL = (-1, -1, 0, 0, 1, 1)  # two children each, depth 2
TWO_PATHS = (-1, 0, -1, 2)


def trees_of(parents, q, replacement, vocab, change=lambda root: root):
    """Returns (mass, root) of every tree of this shape that can be drawn, changed after the drawing."""
    drawn = twin.drawn(parents, q, replacement, vocab)
    return [(mass, change(twin.grow(parents, tokens, q))) for mass, tokens in drawn]


def patched(rule, **helpers):
    """Returns the rule with some of the twin's helper functions replaced."""

    def faulty(*arguments):
        with mock.patch.multiple(twin, **helpers):
            return rule(*arguments)

    return faulty


def not_renormalised(rule):
    """Draws without replacement, scored with the q that the first sibling was drawn from."""
    faulty = patched(rule, without=lambda law, token: [0 if x == token else w for x, w in enumerate(law)])
    return lambda p, q, vocab: (faulty, trees_of(FULL, q, False, vocab), False)


def likeliest_scored_with_softmax(p, q, vocab):
    """The two likeliest children, which are no draws, scored with q."""
    law = {depth: sorted(range(vocab), key=lambda x: -q(())[x])[:2] for depth in range(2)}
    tokens = [*law[0], *law[1], *law[1]]
    return twin.recursive, [(1, twin.grow(FULL, tokens, q))], False


def sorted_siblings(p, q, vocab):
    """Siblings sorted by p / q after they were drawn."""

    def change(node):
        node.children.sort(key=lambda child: -p(node.tokens)[child.tokens[-1]] / node.law[child.tokens[-1]])
        for child in node.children:
            change(child)
        return node

    return twin.recursive, trees_of(FULL, q, False, vocab, change), False


def last_from_p(p, q, vocab):
    """After the last sibling was rejected, the next token drawn from p, not from what the siblings left of it."""

    def rule(*arguments):
        node, _ = twin.recursive(*arguments)
        return node, p(node.tokens)

    return rule, trees_of(FULL, q, False, vocab), False


def larger_of_two(p, q, vocab):
    """A chain of which each token is that of larger q among two different ones, scored with q."""

    def after(tokens):
        for mass, pair in twin.drawn((-1, -1), lambda _: q(tokens), False, vocab):
            yield mass, max(pair, key=lambda token: q(tokens)[token])

    trees = [(first * second, twin.grow((-1, 0), (x, y), q)) for first, x in after(()) for second, y in after((x,))]
    return twin.recursive, trees, True


def plain_q(p, q, vocab):
    """The best of two paths scored with the q that each path was drawn from."""

    def law_of_best(p, q, count, worse):
        return list(q), twin_law_of_best(p, q, count, worse)[1]

    twin_law_of_best = twin.law_of_best
    return patched(twin.multipath, law_of_best=law_of_best), trees_of(TWO_PATHS, q, True, vocab), True


def wrong_reach(reach_after):
    """Traversal with another chance after a child has failed."""
    faulty = patched(twin.traversal, reach_after=reach_after)
    return lambda p, q, vocab: (faulty, trees_of(FULL, q, False, vocab), False)


def break_in_block(p, q, vocab):
    """Block verification that stops at the first failure."""

    def rule(root, target, decide, _replacement):
        chain = [root, *root.children, *root.children[0].children]
        laws = [node.law for node in chain[:-1]]
        kept = None
        for node, (chance, weights) in zip(chain, twin.stops_of_block(chain, laws, target), strict=True):
            if node.index >= 0 and not decide(node.index, chance):
                break
            kept = node, weights
        return kept

    return rule, trees_of((-1, 0), q, True, vocab), True


def share_of_the_rest(_reach, total, q, token):
    rest = sum(weight for x, weight in enumerate(q) if x != token)
    return min(1, total / rest) if rest else 1


def errors(a, b, d):
    """The errors on the tables of ``test_tree_rules.TABLES``."""
    return {name: Fraction(error) for name, error in zip("ABD", (a, b, d), strict=True)}


FAULTS = {
    "recursive, q of the first sibling": (not_renormalised(twin.recursive), errors("0", "0", "171/2000")),
    "traversal, q of the first sibling": (not_renormalised(twin.traversal), errors("0", "0", "10677/122000")),
    "likeliest scored with softmax": (likeliest_scored_with_softmax, errors("7/54", "1/12", "224/3375")),
    "siblings sorted": (sorted_siblings, errors("10/27", "11/96", "3999/19600")),
    "last from p": (last_from_p, errors("0", "7/162", "357/5000")),
    "larger of two": (larger_of_two, errors("5/54", "319/7200", "107/1750")),
    "plain q": (plain_q, errors("10/243", "17/648", "2013/50000")),
    "P not updated": (wrong_reach(lambda reach, *_: reach), errors("8/81", "41/972", "37/500")),
    "P = S": (wrong_reach(lambda _, total, *__: total), errors("4/243", "1/27", "337203729/6400000000")),
    "P = S / rest of q": (wrong_reach(share_of_the_rest), errors("4/27", "0", "101/14000")),
    "break": (break_in_block, errors("4/27", "1/24", "0")),
}
