"""An answer as JSON by schema: python examples/json_schema.py [MODEL]"""

import json
import sys

from edgespec import load

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"enum": ["France", "Italy"]}},
    "required": ["city", "country"],
}

with load(*sys.argv[1:]) as model:
    text = model.answer("Where is the Eiffel Tower? Answer as JSON.", schema=SCHEMA, max_tokens=60)
    print(json.loads(text))
