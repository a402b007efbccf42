"""What the sweep of these tests is told."""

PROMPTS = (("simple", "The list is"), (None, "And it came to pass"), ("complex", "def f(x):"))
NEW_TOKENS = 6
FACTS = {
    "model": "a tiny model",
    "seed": 0,
    "null": "a null",
    "null_source": "From a test.",
    "null_code": "null",
}
