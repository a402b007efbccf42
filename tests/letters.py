"""A tokenizer of one token a character, without eos, bos or padding."""


class Letters:
    """Ids 2 to 63 of " " to "]"; other characters fall on the same ids."""

    def __call__(self, text, **options):
        return {"input_ids": [2 + (ord(c) - 32) % 62 for c in text]}

    def decode(self, token_ids, **options):
        return "".join(chr(30 + int(i)) for i in token_ids)
