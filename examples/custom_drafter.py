"""Draft a phrase that is known to come: python examples/custom_drafter.py [MODEL]"""

import sys

from edgespec import load
from edgespec.core import Draft, Drafter

PHRASE = "The quick brown fox jumps over the lazy dog."


class Phrase(Drafter):
    """Drafts what follows the last two tokens in `tokens`. The answer stays the same, whatever is drafted."""

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, context, limit):
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        at = next((i + 2 for i, pair in enumerate(pairs) if pair == tuple(context[-2:])), len(self.tokens))
        tokens = tuple(self.tokens[at : at + limit])
        return Draft(tokens, (0.9,) * len(tokens), ("phrase",) * len(tokens))


with load(*sys.argv[1:]) as model:
    tokens = model.engine.model.vocab.tokenize(PHRASE)
    model.add_drafter(lambda: Phrase(tokens))
    stats = model.stats(f"Repeat this twice: {PHRASE}", max_tokens=40, speculate=True)
    print(stats.text, stats.drafters)
