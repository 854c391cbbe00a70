import json
import random

import pytest

WORDS = ["alpha", "beta", "γ", "delta 4", "ε\r\n", "\n\n", "\0", "🙂", "  "]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 documents in all five formats, some empty, and their texts in the order in
    which the folder gives them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    texts = {}

    def text():
        return "".join(rng.choice(WORDS) + " " for _ in range(rng.choice([0, 1, 5, 40, 200])))

    for k in range(25):
        path = folder / ("sub" if k % 2 else "") / f"{k:02d}{('.txt', '.md', '.py')[k % 3]}"
        path.parent.mkdir(exist_ok=True)
        texts[str(path)] = [text()]
        path.write_bytes(texts[str(path)][0].encode())
    path = folder / "lines.jsonl"
    texts[str(path)] = [text() for _ in range(35)]
    path.write_text(
        "\n\n".join(json.dumps({"id": k, "text": t}) for k, t in enumerate(texts[str(path)])) + "\n"
    )
    return folder, [t for path in sorted(texts) for t in texts[path]]
