"""Story script -> token rows -> reweighted embeddings. Knows no host; only torch."""
