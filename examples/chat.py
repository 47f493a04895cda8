"""A conversation in the terminal: python examples/chat.py [MODEL]"""

import sys

from edgespec import load

with load(*sys.argv[1:]) as model:
    messages = []
    while question := input("> "):
        messages.append({"role": "user", "content": question})
        answer = model.generate(messages, max_tokens=400)
        for step in answer:
            print(step.text, end="", flush=True)
        print(f"\n[{answer.stats.tokens_per_second:.0f} tokens/s, {answer.stats.acceptance:.0%} accepted]")
        messages.append({"role": "assistant", "content": answer.stats.text})
