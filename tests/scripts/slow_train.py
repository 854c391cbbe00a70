"""train.py whose documents (SLOW=tokenise) or batches of validation (SLOW=validate) take 0.2 s
each, for tests/test_run_train.py."""

import os
import sys
import time

sys.path.insert(0, os.getcwd())

import train  # noqa: E402
from lmoe.data.loader import ValidationBatches  # noqa: E402
from lmoe.data.tokenizer import Tokenizer  # noqa: E402


def say(text):
    os.write(1, f"{text}\n".encode())
    time.sleep(0.2)


encode, batches = Tokenizer.encode_array, ValidationBatches.__iter__


def slow_encode(self, text):
    say("a document")
    return encode(self, text)


def slow_batches(self):
    for batch in batches(self):
        say("a batch")
        yield batch


if os.environ["SLOW"] == "tokenise":
    Tokenizer.encode_array = slow_encode
else:
    ValidationBatches.__iter__ = slow_batches
train.main(sys.argv[1:])
