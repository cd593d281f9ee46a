"""Story script -> token rows -> reweighted embeddings. Independent of any host; needs torch only."""
